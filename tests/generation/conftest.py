"""Quick compilation for the tests of generation."""

from collections.abc import Iterator

import pytest

from tests.model.tiny import quick_compilation


@pytest.fixture(autouse=True, scope="package")
def compile_fast() -> Iterator[None]:
    """Compile with few optimizations: compilation takes most of the time of these tests."""
    with quick_compilation():
        yield
