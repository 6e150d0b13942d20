"""Parsing compiled programs: operations, products, loops, groups of collectives."""

import jax
import jax.numpy as jnp
import pytest

from fam_jax.plan.hlo import Op, parse, replica_group
from tests.plan.programs import compiled, needs_compiler

# A shortened program in the compiler's notation: a loop of seven products.
LOOP = """HloModule loop

%body.1 (arg: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %arg = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  %x = f32[8,16]{1,0:T(8,128)} get-tuple-element(%arg), index=1
  %w = f32[16,16]{1,0:T(8,128)S(1)} constant({...})
  %y = f32[8,16]{1,0:T(8,128)} convolution(%x, %w), dim_labels=bf_io->bf
  ROOT %out = (s32[], f32[8,16]) tuple(%next, %y)
}

%condition.1 (arg: (s32[], f32[8,16])) -> pred[] {
  %arg.1 = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  %limit = s32[]{:T(128)} constant(9)
  ROOT %less = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

ENTRY %main (x.1: f32[8,16]) -> f32[8,16] {
  %x.1 = f32[8,16]{1,0:T(8,128)} parameter(0)
  %two = s32[]{:T(128)} constant(2)
  %start = (s32[], f32[8,16]) tuple(%two, %x.1)
  %loop = (s32[], f32[8,16]) while(%start), condition=%condition.1, body=%body.1
  ROOT %result = f32[8,16]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""


def test_a_loop_runs_from_its_start_to_its_limit() -> None:
    module = parse(LOOP)
    times = {op.name: times for op, _, times in module.walk()}
    assert times["y"] == 7 and times["x.1"] == 1
    assert module.flops("body.1") == 2 * 8 * 16 * 16
    inclusive = parse(LOOP.replace("direction=LT", "direction=LE"))
    assert {op.name: times for op, _, times in inclusive.walk()}["y"] == 8


def test_fast_memory_does_not_count_as_hbm() -> None:
    body = parse(LOOP).computations["body.1"]
    assert body["w"].result_bytes() == 0
    assert body["w"].result_bytes(hbm_only=False) == 16 * 16 * 4
    assert body["out"].result_bytes() == 4 + 8 * 16 * 4


def test_a_loop_without_a_limit_is_rejected() -> None:
    with pytest.raises(ValueError, match="loop: unknown trip count"):
        list(parse(LOOP.replace("constant(9)", "parameter(1)")).walk())


def test_attributes_with_line_breaks() -> None:
    text = LOOP.replace(
        "index=1\n  %w", 'index=1, frontend_attributes={metadata={\n"a": "{}"\n}}, known={}\n  %w'
    )
    assert "known={}" in parse(text).computations["body.1"]["x"].attributes
    assert [op.name for op, _, _ in parse(text).walk()] == [op.name for op, _, _ in parse(LOOP).walk()]


@pytest.mark.parametrize(
    ("notation", "group"),
    [
        ("replica_groups={{0,2},{1,3}}", [0, 2]),
        ("replica_groups=[2,4]<=[8]", [0, 1, 2, 3]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [0, 4]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", [0, 1, 2, 3]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [0, 4]),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", [0, 1, 2, 3]),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", [0, 4]),
        ("source_target_pairs={{0,1},{1,2}}", [0, 1]),
    ],
)
def test_groups_in_every_notation(notation: str, group: list[int]) -> None:
    assert replica_group(Op("x", "all-reduce", (), (), "", f", {notation}, to_apply=%add", False)) == group


def test_an_unknown_notation_is_rejected() -> None:
    with pytest.raises(ValueError, match="x: replica groups in an unknown notation"):
        replica_group(Op("x", "all-reduce", (), (), "", "", False))


@needs_compiler
def test_products_in_a_real_program() -> None:
    """A scan over a stack of weights, a product with a batch, and a gradient."""
    rows, width, layers, batch = 256, 384, 5, 4

    def function(x: jax.Array, stack: jax.Array, many: jax.Array) -> jax.Array:
        def loss(x: jax.Array) -> jax.Array:
            x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)
            return (jnp.einsum("bij,bkj->bik", many, many) ** 2).sum() + (x**2).sum()

        return jax.grad(loss)(x)

    module = compiled(function, (rows, width), (layers, width, width), (batch, 128, 256))
    found = sum(times * module.flops(op.called[0]) for op, _, times in module.walk() if op.opcode == "fusion")
    # Forward and backward of each layer; the gradient to x alone needs no other product.
    assert found == pytest.approx(2 * layers * 2 * rows * width * width, rel=1e-9)

    module = compiled(lambda many: jnp.einsum("bij,bkj->bik", many, many), (batch, 128, 256))
    found = sum(times * module.flops(op.called[0]) for op, _, times in module.walk() if op.opcode == "fusion")
    assert found == 2 * batch * 128 * 128 * 256
