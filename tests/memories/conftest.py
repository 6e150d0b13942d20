"""Register the memories of the tests, and remove them afterwards, because other tests must not see them."""

from collections.abc import Iterator

import jax
import pytest

from fam_jax.memories import registry
from tests.memories.cases import OWN


@pytest.fixture(scope="module", autouse=True)
def own_memories() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "MEMORIES", dict(registry.MEMORIES))
        for kind, memory in OWN.items():
            registry.register_memory(kind, memory)
        yield


@pytest.fixture
def float64() -> Iterator[None]:
    """Compute in float64: `pytestmark = pytest.mark.usefixtures("float64")`."""
    with jax.enable_x64(True):
        yield
