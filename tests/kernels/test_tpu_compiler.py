"""Compile the kernels with the real TPU compiler for every supported generation. No TPU needed."""

import json

import pytest

from fam_jax.plan.compile import has_compiler
from fam_jax.plan.profile import run_module
from tests.kernels import compile_kernels
from tests.variants import rest_slow

TOPOLOGIES = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2")
RESIDENT = {"block_attention_forward", "block_attention_backward"}
SMALL = {"rotary_embedding", "update_attention_forward", "update_attention_backward"}
STREAMED = {f"block_attention_streamed_{name}" for name in ("forward", "dq", "dkv", "dextra")}

pytestmark = pytest.mark.skipif(not has_compiler(), reason="libtpu is not installed")


def compiled(topology: str, *names: str) -> dict[str, set[str]]:
    """Return the kernels in the executables of the named shapes."""
    result = run_module(compile_kernels.__name__, [topology, *names], timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    kernels: dict[str, set[str]] = {}
    for line in result.stdout.splitlines():
        name, found = json.loads(line)
        kernels.setdefault(name, set()).update(found)
    return kernels


# In every run of the tests, one generation with two cores per chip here, and one with a single core below.
@pytest.mark.parametrize("topology", rest_slow(TOPOLOGIES, ["v5p:2x2x1"]))
def test_training_kernels_compile(topology: str) -> None:
    names = [name for name in compile_kernels.SHAPES if name.startswith("training")]
    kernels = compiled(topology, *names, "small")
    assert kernels.pop("small") == SMALL
    assert kernels.keys() == set(names)
    for name in names:
        assert kernels[name] == RESIDENT, name


@pytest.mark.parametrize("topology", rest_slow(TOPOLOGIES, ["v5e:2x2"]))
def test_general_kernels_compile(topology: str) -> None:
    names = [name for name in compile_kernels.SHAPES if name.startswith("prefill")]
    kernels = compiled(topology, *names)
    assert kernels.keys() == set(names)
    for name in names:
        assert kernels[name] == STREAMED, name


@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_kernels_of_the_papers_shape_compile(topology: str) -> None:
    kernels = compiled(topology, "paper", "paper, prefill")
    assert kernels["paper, prefill"] == STREAMED
    # The fast memory of v4 is too small for the resident forward kernel.
    small = {"block_attention_backward", "block_attention_streamed_forward"}
    assert kernels["paper"] == (small if topology == "v4:2x2x1" else RESIDENT)
