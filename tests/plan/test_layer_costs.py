"""Costs of models with several layer types: visible keys counted one by one, conditionals, and kernels."""

import dataclasses

import numpy as np
import pytest

from configs import fam_1b
from fam_jax.config import Config, MeshConfig, ModelConfig, resolve
from fam_jax.memories.window import BlockSlidingWindowConfig
from fam_jax.model.layer_types import models_of_types
from fam_jax.plan.attention import LocalShare, kernel_seconds
from fam_jax.plan.hlo import Op, parse
from fam_jax.plan.layer_costs import shares_of_types, takes_kernels
from fam_jax.plan.training import plan_training
from fam_jax.training.flops import keys_of_layers
from tests.model.tiny import variant
from tests.plan.programs import needs_compiler

SMOKE = resolve(fam_1b.get_config("smoke,pretrain"))
SMALL = variant(SMOKE.model, block_size=32, segments=2, length=4, previous_blocks=2, num_layers=5)
MIXED = variant(SMALL, layer_pattern=("local", "local", "global"), local_window=40)


def counted(model: ModelConfig, tokens: int, past: int) -> int:
    """Count the keys that the tokens of one layer see, pair by pair."""
    q, k = np.arange(past * 32, past * 32 + tokens)[:, None], np.arange(past * 32 + tokens)
    seen = (q >= k) & (q // 32 - k // 32 <= 2)
    if model.memory.window:
        seen &= q - k < model.memory.window
    extra = model.memory.chained_rows * np.minimum(2, q // 32 + 1)
    return int(seen.sum() + extra.sum())


@pytest.mark.parametrize("past", [0, 1, 5])
@pytest.mark.parametrize("tokens", [32, 100, 256])
def test_visible_keys_by_counting(tokens: int, past: int) -> None:
    wide, narrow = variant(SMALL, num_layers=1), variant(SMALL, num_layers=1, window=40)
    assert keys_of_layers(wide, tokens, past) == counted(wide, tokens, past)
    assert keys_of_layers(narrow, tokens, past) == counted(narrow, tokens, past)
    local = variant(narrow, memory=BlockSlidingWindowConfig(segments=2, window=40))
    # The layers are local, local, global, local, local.
    expected = 4 * counted(local, tokens, past) + counted(wide, tokens, past)
    assert keys_of_layers(MIXED, tokens, past) == expected


def test_each_branch_counts_for_its_layers() -> None:
    assert [(own.memory.chained_rows, layers) for own, layers in models_of_types(MIXED)] == [(0, 4), (4, 1)]
    switch = Op("x", "conditional", (), (), "", ", branch_computations={%a, %b}", False)
    assert shares_of_types(MIXED)(switch) == [0.8, 0.2]
    assert shares_of_types(SMALL)(switch) is None  # not a conditional over layer types


CONDITIONAL = """HloModule conditional

%often.1 (a: f32[8]) -> f32[8] {
  ROOT %a = f32[8]{0:T(256)} parameter(0)
}

%seldom.1 (b: f32[8]) -> f32[8] {
  %b = f32[8]{0:T(256)} parameter(0)
  ROOT %sum = f32[8]{0:T(256)} add(%b, %b)
}

ENTRY %main (x: f32[8], p: pred[]) -> f32[8] {
  %x = f32[8]{0:T(256)} parameter(0)
  %p = pred[]{:T(512)} parameter(1)
  ROOT %y = f32[8]{0:T(256)} conditional(%p, %x, %x), BRANCHES
}
"""


@pytest.mark.parametrize(
    "branches",
    [
        "branch_computations={%often.1, %seldom.1}",
        "true_computation=%seldom.1, false_computation=%often.1",
    ],
)
def test_shares_of_conditionals(branches: str) -> None:
    module = parse(CONDITIONAL.replace("BRANCHES", branches))
    assert {op.name: times for op, _, times in module.walk()}["sum"] == 1
    assert {op.name: times for op, _, times in module.walk(shares=lambda op: [0.75, 0.25])}["sum"] == 0.25
    assert "sum" not in {op.name for op, _, _ in module.walk(shares=lambda op: [1, 0])}


def test_soft_caps_are_left_to_xla() -> None:
    model = variant(SMALL, block_size=128, head_dim=256)
    assert takes_kernels(model)
    assert not takes_kernels(variant(model, attention_softcap=50.0))
    assert not takes_kernels(variant(model, attention="xla"))


def with_local_layers() -> Config:
    """Return a small model with local layers, as in Gemma 3."""
    model = variant(
        SMOKE.model,
        attention="auto",
        block_size=128,
        head_dim=128,
        dtype="bfloat16",
        num_layers=6,
        layer_pattern=("local", "local", "global"),
        local_window=65,
        local_rope_base=1000.0,
    )
    return dataclasses.replace(SMOKE, model=model)


@needs_compiler
@pytest.mark.slow
def test_a_plan_of_local_layers() -> None:
    mixed = plan_training(with_local_layers(), "v5e:2x2", 1024, MeshConfig(data=2, fsdp=2))
    assert mixed.cost is not None
    kernels = [op for op in mixed.cost.ops if op.kind == "kernel" and "block_attention" in op.name]
    runs = {("branch_0" in op.source, "backward" in op.name): op.times for op in kernels}
    assert runs == {(True, False): 4, (True, True): 4, (False, False): 2, (False, True): 2}
    seconds = {("branch_0" in op.source, "backward" in op.name): op.low / op.times for op in kernels}
    assert seconds[True, False] < seconds[False, False] and seconds[True, True] < seconds[False, True]


@needs_compiler
@pytest.mark.slow
def test_streamed_kernels_have_times() -> None:
    model = variant(SMOKE.model, block_size=128, head_dim=128, previous_blocks=2)
    share = LocalShare("v5e:1x1", rows=2, tokens=1024, heads=4, kv_heads=4)
    found = kernel_seconds(model, share)
    assert found.keys() == {f"block_attention_streamed_{name}" for name in ("forward", "dq", "dkv", "dextra")}
    assert all(0 < low < high for low, high in found.values())
    reading = dataclasses.replace(share, past=3, gradient=False)
    read = kernel_seconds(variant(SMOKE.model, segments=5), reading)
    assert read.keys() == {"block_attention_streamed_forward"}


@needs_compiler
@pytest.mark.slow
def test_cached_blocks_cost_less_than_their_scores() -> None:
    """In the paper's blocks. Small ones have more overhead."""
    model = variant(SMOKE.model, block_size=1024, head_dim=128, segments=3)
    share = LocalShare("v5p:2x2x1", rows=2, tokens=8 * 1024, heads=4, kv_heads=4)
    plain = kernel_seconds(model, share)
    continued = kernel_seconds(model, dataclasses.replace(share, past=3))
    assert continued.keys() == plain.keys() == {"block_attention_forward", "block_attention_backward"}
    more = keys_of_layers(model, share.tokens, 3) / keys_of_layers(model, share.tokens)
    for name, (seconds, _) in plain.items():
        assert seconds < continued[name][0] < more * seconds
