"""Quick compilation of what the tests of generation run."""

from collections.abc import Iterator

import jax
import pytest

from tests.model.tiny import quick_jit


@pytest.fixture(autouse=True, scope="package")
def quick_compilation() -> Iterator[None]:
    """Most of these tests' time is compilation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", quick_jit)
        yield
