"""Plans for generation and evaluation: sizes computed by hand, phases of a real compilation, meshes, advice."""

import dataclasses
import json
from typing import Any

import jax
import pytest
from flax import nnx

from configs import fam_1b, fam_24b
from fam_jax.config import ConfigError, MeshConfig, ModelConfig, resolve
from fam_jax.model import Transformer, to_dict
from fam_jax.plan.serving import (
    Phase,
    ServingPlan,
    best_serving,
    plan_serving,
    serving_advice,
    serving_meshes,
    stream_bytes,
)
from fam_jax.restore import dtype_of_use
from tests.plan.programs import needs_compiler

SMOKE = resolve(fam_1b.get_config("smoke"))
LARGE = resolve(fam_24b.get_config())
GIB = 2**30


def test_a_stream_is_its_blocks_and_feedback_vectors() -> None:
    model = LARGE.model
    keys = 2 * (model.memory.segments + 1) * model.block_size * model.num_kv_heads * model.head_dim
    # FAM is float32, everything else bfloat16.
    fams = model.memory.length * (2 * model.model_dim + 2 * model.num_kv_heads * model.head_dim)
    counts = 1 + 4 + 4  # carries_context, blocks, filled
    assert stream_bytes(model) == 2 * model.num_layers * (keys + fams) + counts


@pytest.fixture(scope="module")
def plan() -> ServingPlan:
    """Return a plan with blocks large enough for kernels and a vocabulary large enough for logits to matter."""
    model = dataclasses.replace(SMOKE.model, block_size=128, head_dim=128, dtype="bfloat16", vocab_size=8192)
    config = dataclasses.replace(SMOKE, model=model)
    phases = ("prefill", "measure", "decode")
    return plan_serving(
        config, "v5e:2x2", 4, phases, mesh=MeshConfig(data=1, fsdp=2, tensor=2), chunk_blocks=4
    )


@needs_compiler
@pytest.mark.slow
def test_a_plan_of_a_small_model(plan: ServingPlan) -> None:
    report = json.loads(json.dumps(plan.report()))
    assert report["fits"] and report["mesh"] == {"data": 1, "fsdp": 2, "tensor": 2}
    assert report["hbm_capacity_bytes"] == 16 * 2**30
    # Streams are spread over fsdp and heads over tensor. The feedback vectors themselves have no heads.
    assert report["bytes_per_stream"] < report["hbm_memory_bytes"] < 1.1 * report["bytes_per_stream"]
    assert report["hbm_peak_bytes"] > report["hbm_parameter_bytes"] + 2 * report["hbm_memory_bytes"]
    assert report["hbm_loading_bytes"] > report["hbm_parameter_bytes"] > 0
    prefill, measure, decode = (report["phases"][name] for name in ("prefill", "measure", "decode"))
    assert (prefill["tokens_per_step"], decode["tokens_per_step"]) == (4 * 512, 4)
    for phase in (prefill, measure, decode):
        assert 0 < phase["step_seconds_low"] <= phase["step_seconds_high"]
        assert phase["tokens_per_second_low"] * phase["step_seconds_high"] == pytest.approx(
            phase["tokens_per_step"]
        )
    assert measure["step_seconds_low"] > prefill["step_seconds_low"]  # it computes logits too
    assert prefill["read_1000000_seconds_low"] == pytest.approx(1e6 / 512 * prefill["step_seconds_low"])
    assert decode["step_seconds_low"] < prefill["step_seconds_low"]


@needs_compiler
@pytest.mark.slow
def test_a_border_is_shared_by_the_tokens_of_a_block(plan: ServingPlan) -> None:
    decode = plan.phases["decode"]
    assert decode.seconds is not None
    low, high = decode.details["border_seconds_low"], decode.details["border_seconds_high"]
    assert 0 < low <= high
    assert decode.seconds[0] > low / 128 and decode.seconds[1] > high * 4 / 128


def test_weights_are_stored_in_the_dtype_of_use() -> None:
    model = dataclasses.replace(SMOKE.model, dtype="bfloat16")
    shapes = to_dict(jax.eval_shape(lambda: _state(model)))
    found = jax.tree_util.tree_map_with_path(lambda path, x: str(dtype_of_use(path, x, model)), shapes)
    assert found["embedding"]["table"] == found["layers"]["query"]["kernel"] == "bfloat16"
    assert found["layers"]["attention_norm"]["scale"] == found["memory"]["initial_fam"] == "float32"
    wide = dataclasses.replace(model, dtype="float64")
    assert (
        str(dtype_of_use((jax.tree_util.DictKey("kernel"),), shapes["embedding"]["table"], wide)) == "float32"
    )


def _state(model: ModelConfig) -> nnx.State:
    return nnx.state(Transformer(model, rngs=nnx.Rngs(0)))


@needs_compiler
def test_meshes_spread_heads_first() -> None:
    meshes = serving_meshes(LARGE, "v5e:4x4", 8)
    assert meshes[0] == MeshConfig(data=1, fsdp=1, tensor=16)
    assert all(mesh.data * mesh.fsdp * mesh.tensor == 16 for mesh in meshes)
    one = serving_meshes(LARGE, "v5e:4x4", 1)
    assert all(mesh.data == 1 for mesh in one)  # a single stream cannot be divided


@needs_compiler
def test_a_mesh_of_another_slice() -> None:
    with pytest.raises(ConfigError, match=r"config\.mesh: .* = 8, but there are 4 devices"):
        plan_serving(SMOKE, "v5e:2x2", 1, mesh=MeshConfig(data=2, fsdp=2, tensor=2))


def fabricated(**changes: Any) -> ServingPlan:
    """Return a plan for 24B on four chips of 16 GiB, with made-up sizes."""
    decode = Phase(8, 15 * GIB, (0.01, 0.02), 1.0, {})
    plan = ServingPlan(
        topology="v5e:2x2",
        chips=4,
        mesh={"data": 1, "fsdp": 1, "tensor": 4},
        streams=8,
        chunk_blocks=16,
        capacity=16 * GIB,
        parameters=12 * GIB,
        state=GIB,
        stream=GIB // 8,
        loading=13 * GIB,
        phases={"prefill": Phase(131072, 14 * GIB, (1.0, 2.0), 1.0, {}), "decode": decode},
    )
    return dataclasses.replace(plan, **changes)


def test_advice_says_by_how_much_and_what_helps() -> None:
    assert fabricated().fits and fabricated().peak == 15 * GIB
    chunks = fabricated(phases={"prefill": Phase(131072, 18 * GIB, None, 1.0, {})})
    assert not chunks.fits
    assert serving_advice(LARGE, chunks) == (
        "2.0 GiB too much for a chip's 16 GiB; try --chunk_blocks=4, more chips"
    )
    loading = fabricated(loading=24 * GIB)
    assert not loading.fits
    assert serving_advice(LARGE, loading) == (
        "8.0 GiB too much for a chip's 16 GiB while loading; try more chips"
    )
    many = fabricated(state=5 * GIB, phases={"decode": Phase(8, 22 * GIB, None, 1.0, {})}, chunk_blocks=1)
    assert "try --streams=4, more chips" in serving_advice(LARGE, many)
    float32 = dataclasses.replace(LARGE, model=dataclasses.replace(LARGE.model, dtype="float32"))
    copies = fabricated(parameters=24 * GIB, loading=25 * GIB, mesh={"data": 4, "fsdp": 1, "tensor": 1})
    assert "config.model.dtype=bfloat16, a larger config.mesh.tensor" in serving_advice(float32, copies)


def test_the_best_is_the_fastest_that_fits() -> None:
    slow = fabricated()
    quick = fabricated(phases=slow.phases | {"decode": Phase(8, 15 * GIB, (0.005, 0.01), 1.0, {})})
    large = dataclasses.replace(quick, loading=17 * GIB)
    assert best_serving([slow, large, quick]) is quick
    assert best_serving([slow, large]) is slow
    larger = dataclasses.replace(quick, phases={"decode": Phase(8, 30 * GIB, None, 1.0, {})})
    assert best_serving([larger, large]) is large  # neither does
