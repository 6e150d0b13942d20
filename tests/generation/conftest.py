"""Quick compilation for the tests of generation."""

from collections.abc import Iterator

import jax
import pytest

from tests.model.tiny import quick_jit


@pytest.fixture(autouse=True, scope="package")
def quick_compilation() -> Iterator[None]:
    """Compile with few optimizations: compilation takes most of the time of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", quick_jit)
        yield
