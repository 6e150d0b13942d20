"""Compile fast in all tests of this folder."""

from collections.abc import Iterator

import pytest

from tests.model.tiny import quick_compilation


@pytest.fixture(autouse=True, scope="package")
def compile_fast() -> Iterator[None]:
    with quick_compilation():
        yield
