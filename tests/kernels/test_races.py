"""Run the kernels on a simulated chip of two cores, whose interpreter checks every memory access for races."""

import functools
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fam_jax.kernels import block_attention
from fam_jax.kernels.pallas.block_attention import pallas_block_attention
from tests.kernels.cases import Case, attend, draw

WATCHED = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)


def gradients(case: Case, implementation: str) -> Any:
    call = draw(case)
    inputs = {name: np.float32(x) for name, x in call.inputs.items()}
    out, pull = jax.vjp(lambda x: attend(case, call, x, implementation), inputs)
    return jax.block_until_ready((out, pull(np.float32(call.cotangent))))


@pytest.mark.parametrize(
    "case",
    [
        Case(length=16, slots=0, counted=False, extra_counted=False, past_blocks=(0, 0), heads=2, kv_heads=1),
        pytest.param(Case(length=8, past_blocks=(1, 0), heads=2, kv_heads=1), marks=pytest.mark.slow),
    ],
    ids=["training", "prefill"],
)
def test_no_two_cores_touch_the_same_memory(
    case: Case, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    watched = functools.partial(pallas_block_attention, interpret=WATCHED)
    monkeypatch.setitem(block_attention.__globals__["IMPLEMENTATIONS"], "watched", watched)
    got, want = gradients(case.wider(), "watched"), gradients(case.wider(), "pallas_interpret")
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert "RACE" not in "".join(capfd.readouterr())


def test_the_interpreter_detects_races(capfd: pytest.CaptureFixture[str]) -> None:
    """All steps add to one block, although the dimension is declared parallel."""

    def add(x: Any, sums: Any) -> None:
        sums[...] += x[...]

    call = pl.pallas_call(
        add,
        grid=(4,),
        in_specs=[pl.BlockSpec((8, 128), lambda i: (i, 0))],
        out_specs=pl.BlockSpec((8, 128), lambda i: (0, 0)),
        out_shape=jax.ShapeDtypeStruct((8, 128), np.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=WATCHED,
    )
    jax.block_until_ready(call(np.ones((32, 128), np.float32)))
    assert "RACE" in "".join(capfd.readouterr())
