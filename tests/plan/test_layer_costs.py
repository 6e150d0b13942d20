"""Models of several kinds of layers: keys by brute force, conditionals, and which kernels run."""

import dataclasses

import numpy as np
import pytest

from configs import fam_1b
from fam_jax.config import Config, MeshConfig, ModelConfig, resolve
from fam_jax.plan.attention import kernel_seconds
from fam_jax.plan.hlo import Op, parse
from fam_jax.plan.layer_costs import keys_of_layers, models_of_types, shares_of_types, takes_kernels
from fam_jax.plan.training import plan_training
from tests.plan.programs import needs_compiler

SMOKE = resolve(fam_1b.get_config("smoke,pretrain"))
SMALL = dataclasses.replace(SMOKE.model, block_size=32, segments=2, length=4, previous_blocks=2, num_layers=5)
MIXED = dataclasses.replace(SMALL, layer_pattern=("local", "local", "global"), local_window=40)


def counted(model: ModelConfig, tokens: int, past: int) -> int:
    """Keys that one layer's tokens see, pair by pair."""
    q, k = np.arange(past * 32, past * 32 + tokens)[:, None], np.arange(past * 32 + tokens)
    seen = (q >= k) & (q // 32 - k // 32 <= 2)
    if model.memory.window:
        seen &= q - k < model.memory.window
    fam = model.memory.length * np.minimum(2, q // 32 + 1)
    return int(seen.sum() + fam.sum())


@pytest.mark.parametrize("past", [0, 1, 5])
@pytest.mark.parametrize("tokens", [32, 100, 256])
def test_visible_keys_by_counting(tokens: int, past: int) -> None:
    wide, narrow = (
        dataclasses.replace(SMALL, num_layers=1),
        dataclasses.replace(SMALL, num_layers=1, window=40),
    )
    assert keys_of_layers(wide, tokens, past) == counted(wide, tokens, past)
    assert keys_of_layers(narrow, tokens, past) == counted(narrow, tokens, past)
    local = dataclasses.replace(narrow, length=0)
    # local, local, global, local, local
    expected = 4 * counted(local, tokens, past) + counted(wide, tokens, past)
    assert keys_of_layers(MIXED, tokens, past) == expected


def test_each_branch_counts_for_its_layers() -> None:
    assert [(kind.config.memory.length, layers) for kind, layers in models_of_types(MIXED)] == [
        (0, 4),
        (4, 1),
    ]
    switch = Op("x", "conditional", (), (), "", ", branch_computations={%a, %b}", False)
    assert shares_of_types(MIXED)(switch) == [0.8, 0.2]
    assert shares_of_types(SMALL)(switch) is None  # of another kind


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
    model = dataclasses.replace(SMALL, block_size=128, head_dim=256)
    assert takes_kernels(model)
    assert not takes_kernels(dataclasses.replace(model, attention_softcap=50.0))
    assert not takes_kernels(dataclasses.replace(model, attention="xla"))


def with_local_layers(**changes: object) -> Config:
    """As Gemma 3's, small."""
    model = dataclasses.replace(
        SMOKE.model, attention="auto", block_size=128, head_dim=128, dtype="bfloat16", num_layers=6,
        layer_pattern=("local", "local", "global"), local_window=65, local_rope_base=1000.0, **changes,
    )  # fmt: skip
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
    model = dataclasses.replace(SMOKE.model, block_size=128, head_dim=128, previous_blocks=2)
    found = kernel_seconds("v5e:1x1", model, 2, 1024, 4, 4)
    assert found.keys() == {f"block_attention_streamed_{name}" for name in ("forward", "dq", "dkv", "dextra")}
    assert all(0 < low < high for low, high in found.values())
    read = kernel_seconds("v5e:1x1", SMOKE.model, 2, 1024, 4, 4, past=3, gradient=False)
    assert read.keys() == {"block_attention_streamed_forward"}
