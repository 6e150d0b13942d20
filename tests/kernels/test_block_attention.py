"""Compare every implementation of block attention, forward and all gradients, with a dense softmax in float64.

Tolerances follow from the dtype. An attention output is an average of values, so its error is a few roundings of the
largest value. The error of a gradient is a few roundings of the sum of its absolute terms.
"""

import dataclasses
import functools
import re
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fam_jax.config import ceil_div
from fam_jax.kernels import (
    IMPLEMENTATIONS,
    KV,
    BlockInputs,
    BlockOptions,
    Part,
    block_attention,
    multi_part_attention,
    xla,
)
from tests.kernels.cases import Case, attend, check, draw
from tests.variants import rest_slow

CASES = {
    "plain": Case(),
    "multi-head": Case(kv_heads=4),
    "multi-query": Case(kv_heads=1),
    "grouped queries": Case(heads=8, kv_heads=4),
    "odd length": Case(length=10),
    "shorter than a block": Case(length=3),
    "one token": Case(length=1),
    "no memory": Case(memory_segments=0, past_blocks=(0, 0)),
    "no extra keys": Case(extra_slots=0),
    "neither": Case(memory_segments=0, extra_slots=0, past_blocks=(0, 0)),
    "memory longer than the tokens": Case(memory_segments=4, length=6, past_blocks=(4, 2, 0)),
    "window within the block": Case(window=3),
    "window across blocks": Case(window=6, length=11),
    "Transformer-XL": Case(window=9),
    "stop-gradient": Case(stop_gradient=True, length=11),
    "stop-gradient in a window": Case(stop_gradient=True, window=6),
    "a block that is no power of two": Case(block_size=12, length=20, memory_segments=1, past_blocks=(1, 0)),
    "room for part of the past": Case(slots=1, past_blocks=(1, 0)),
}
# A call as in training: there is no past, and all extra keys exist.
TRAINING = Case(slots=0, counted=False, extra_counted=False, past_blocks=(0, 0), length=16)
# A call as in training whose rows go on from the step before: there is room for m past blocks.
CONTINUED = Case(extra_counted=False, length=16)
TRAINING_CASES = {
    "training": TRAINING,
    "training, multi-query": dataclasses.replace(TRAINING, kv_heads=1),
    "training, odd length": dataclasses.replace(TRAINING, length=14),
    "training, memory longer than the tokens": dataclasses.replace(TRAINING, memory_segments=4, length=8),
    "training, no memory": dataclasses.replace(TRAINING, memory_segments=0),
    "training, no extra keys": dataclasses.replace(TRAINING, extra_slots=0, kv_heads=4),
    "training, window within the block": dataclasses.replace(TRAINING, window=3),
    "training, window across blocks": dataclasses.replace(TRAINING, window=6),
    "training, stop-gradient": dataclasses.replace(TRAINING, stop_gradient=True),
    "training, a block that is no power of two": dataclasses.replace(TRAINING, block_size=12, length=30),
    # Whole tiles but not whole blocks: the kernels skip the missing part of the last block.
    "training, half of the last block": dataclasses.replace(TRAINING, block_size=16, length=38),
    "training, half of the only block": dataclasses.replace(TRAINING, block_size=16, length=5, kv_heads=1),
    "training, half of the last block in a window": dataclasses.replace(
        TRAINING, block_size=16, length=52, window=20, stop_gradient=True
    ),
}
CONTINUED_CASES = {
    "continued": CONTINUED,
    "continued, all of the past": dataclasses.replace(CONTINUED, counted=False, kv_heads=1),
    "continued, odd length": dataclasses.replace(CONTINUED, length=14),
    "continued, memory longer than the tokens": dataclasses.replace(
        CONTINUED, memory_segments=4, length=6, past_blocks=(4, 2, 0)
    ),
    "continued, one segment": dataclasses.replace(CONTINUED, memory_segments=1, past_blocks=(0, 1)),
    "continued, no extra keys": dataclasses.replace(CONTINUED, extra_slots=0),
    "continued, window across blocks": dataclasses.replace(CONTINUED, window=6),
    "continued, stop-gradient": dataclasses.replace(CONTINUED, stop_gradient=True),
    "continued, half of the last block": dataclasses.replace(CONTINUED, block_size=16, length=38),
    "continued, half of the only block": dataclasses.replace(CONTINUED, block_size=16, length=5, kv_heads=1),
    "continued, half of the last block in a window": dataclasses.replace(
        CONTINUED, block_size=16, length=52, window=20, stop_gradient=True
    ),
}
ALL_CASES = CASES | TRAINING_CASES | CONTINUED_CASES
SOFT_CAPPED = {
    "soft cap": Case(softcap=1.5),
    "soft cap, stop-gradient in a window": Case(softcap=0.5, stop_gradient=True, window=6, length=11),
    "soft cap, training": dataclasses.replace(TRAINING, softcap=1.0),
}
# Implementations that run natively and in float64; then these and the kernels in their interpreter.
PORTABLE = ("reference", "xla")
RUNNABLE = (*PORTABLE, "pallas_interpret")


RESIDENT = {f"block_attention_{name}" for name in ("forward", "backward")}
STREAMED = {f"block_attention_streamed_{name}" for name in ("forward", "dq", "dkv", "dextra")}


def of_size(case: Case, implementation: str) -> Case:
    return case if implementation in PORTABLE else case.wider()


def test_every_implementation_is_tested() -> None:
    assert set(IMPLEMENTATIONS) == {*RUNNABLE, "pallas"}  # "pallas" is "pallas_interpret" on a TPU


@pytest.mark.parametrize("implementation", PORTABLE)
@pytest.mark.parametrize("case", (ALL_CASES | SOFT_CAPPED).values(), ids=ALL_CASES | SOFT_CAPPED)
def test_portable_implementations_match_dense_attention(case: Case, implementation: str) -> None:
    check(case, implementation, "float64", roundings=16)


@pytest.mark.parametrize(
    "name",
    rest_slow(
        ALL_CASES,
        [
            "stop-gradient in a window", "no extra keys", "training",
            "training, half of the last block in a window", "continued",
        ],
    ),
)  # fmt: skip
def test_kernels_match_dense_attention(name: str) -> None:
    check(ALL_CASES[name].wider(), "pallas_interpret", "float32", roundings=8)


@pytest.mark.parametrize("past_blocks", [(0,), pytest.param((2,), marks=pytest.mark.slow)])
def test_two_cores_split_a_single_key_head(
    past_blocks: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two cores cannot divide an odd number of rows times key heads, so the key heads are repeated."""
    monkeypatch.setattr("fam_jax.kernels.pallas.block_attention.CORES", {"interpreter": 2})
    case = dataclasses.replace(
        TRAINING, kv_heads=1, past_blocks=past_blocks, slots=-1 if past_blocks[0] else 0
    )
    call = draw(case.wider())
    trace = str(jax.make_jaxpr(lambda x: attend(case.wider(), call, x, "pallas_interpret"))(call.inputs))
    assert ",2,8]" in trace  # keys of two heads, eight wide
    check(case.wider(), "pallas_interpret", "float32", roundings=8)


@pytest.mark.parametrize(
    ("case", "kernels"),
    [("training", RESIDENT), ("continued", RESIDENT), ("room for part of the past", STREAMED)],
)
def test_which_kernels_run(case: str, kernels: set[str]) -> None:
    """A call with no past or with room for all of it takes the resident kernels, which train faster."""
    wide = ALL_CASES[case].wider()
    call = draw(wide)
    single = {name: np.float32(x) for name, x in call.inputs.items()}
    trace = str(jax.make_jaxpr(jax.grad(lambda x: attend(wide, call, x, "pallas_interpret").sum()))(single))
    assert set(re.findall(r"name=(block_attention_\w+)", trace)) == kernels


@pytest.mark.parametrize("implementation", RUNNABLE)
@pytest.mark.parametrize("dtype", rest_slow(["float32", "bfloat16"], ["bfloat16"]))
@pytest.mark.parametrize("case", rest_slow(["plain", "stop-gradient in a window", "training"], ["training"]))
def test_narrow_dtypes(case: str, dtype: str, implementation: str) -> None:
    """In bfloat16, probabilities, outputs and the products of the backward pass are each rounded once."""
    roundings = {"float32": 8, "bfloat16": 2}[dtype]
    check(of_size(ALL_CASES[case], implementation), implementation, dtype, roundings)


@pytest.mark.parametrize("case", ["plain", "odd length", "stop-gradient", "window across blocks"])
def test_xla_takes_large_scores_in_groups_of_blocks(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one_block = 4 * 3 * 4 * 4 * (3 * 4 + 3)  # bytes: 4 B H C ((m + 1) C + S)
    monkeypatch.setattr(xla, "SCORE_BYTES", one_block)
    call = draw(CASES[case])
    assert "scan" in str(jax.make_jaxpr(lambda x: attend(CASES[case], call, x, "xla"))(call.inputs))
    check(CASES[case], "xla", "float64", roundings=16)


@st.composite
def any_case(draw_from: st.DrawFn) -> Case:
    """Draw arbitrary shapes and options."""
    size, segments = draw_from(st.integers(1, 5)), draw_from(st.integers(0, 4))
    kv_heads = draw_from(st.sampled_from([1, 2]))
    training, all_extra = draw_from(st.booleans()), draw_from(st.booleans())
    past = [0] if training else draw_from(st.lists(st.integers(0, segments), min_size=1, max_size=3))
    return Case(
        length=draw_from(st.integers(1, 4 * size)),
        block_size=size,
        memory_segments=segments,
        heads=kv_heads * draw_from(st.integers(1, 3)),
        kv_heads=kv_heads,
        extra_slots=draw_from(st.integers(0, 5)),
        window=draw_from(st.integers(0, segments * size + 1)),
        stop_gradient=draw_from(st.booleans()),
        past_blocks=tuple(past),
        slots=0 if training else -1,
        counted=not training,
        extra_counted=not training and not all_extra,
    )


@pytest.mark.slow
@hypothesis.given(case=any_case(), seed=st.integers(0, 2**16), implementation=st.sampled_from(PORTABLE))
@hypothesis.settings(max_examples=30, deadline=None)
def test_any_shape(case: Case, seed: int, implementation: str) -> None:
    check(case, implementation, "float64", roundings=16, seed=seed)


@pytest.mark.slow
@hypothesis.given(case=any_case(), seed=st.integers(0, 2**16))
@hypothesis.settings(max_examples=15, deadline=None)
def test_any_shape_in_the_kernels(case: Case, seed: int) -> None:
    wide = dataclasses.replace(case, block_size=4, length=ceil_div(case.length * 4, case.block_size)).wider()
    window = min(wide.window, wide.memory_segments * wide.block_size + 1)
    check(dataclasses.replace(wide, window=window), "pallas_interpret", "float32", roundings=8, seed=seed)


@pytest.mark.parametrize("implementation", RUNNABLE)
def test_hidden_keys_have_no_influence(implementation: str) -> None:
    """Empty past slots and extra keys beyond the count may hold any finite value."""
    case = of_size(Case(), implementation)
    call = draw(case)
    spoilt = {name: x.copy() for name, x in call.inputs.items()}
    for b, length in enumerate(call.past_length):
        for name in ("k", "v"):
            spoilt[name][b, : case.past_slots - length] = 1e6
        for n, count in enumerate(call.extra_count[b]):
            for name in ("extra_k", "extra_v"):
                spoilt[name][b, n, count:] = 1e6
    assert all((spoilt[name] != call.inputs[name]).any() for name in spoilt if name != "q")
    attention = jax.jit(lambda x: attend(case, call, x, implementation))
    np.testing.assert_array_equal(attention(single(spoilt)), attention(single(call.inputs)))


@pytest.mark.parametrize("implementation", RUNNABLE)
@pytest.mark.parametrize("case", ["plain", "training"])
def test_the_future_has_no_influence(case: str, implementation: str) -> None:
    """A change of one token's key and value affects that token and later ones, up to the end of its window."""
    case = of_size(ALL_CASES[case], implementation)
    call = draw(case)
    attention = jax.jit(lambda x: attend(case, call, x, implementation))
    plain = np.asarray(attention(single(call.inputs)))
    size = case.block_size
    for token in (0, size - 1, size, size + size // 2):
        changed = {name: x.copy() for name, x in call.inputs.items()}
        for name in ("k", "v"):
            changed[name][:, case.past_slots + token] += 1
        differs = (np.asarray(attention(single(changed))) != plain).any(axis=(0, 2, 3))
        # The start of the first block that no longer sees the token.
        last = (token // size + case.memory_segments + 1) * size
        reached = np.arange(case.length)
        np.testing.assert_array_equal(differs, (reached >= token) & (reached < last))


@pytest.mark.parametrize("implementation", RUNNABLE)
def test_large_scores_do_not_overflow(implementation: str) -> None:
    case = of_size(Case(), implementation)
    call = draw(case)
    call.inputs["q"] *= 1e4
    attention = jax.jit(lambda x: attend(case, call, x, implementation))
    assert np.isfinite(attention(single(call.inputs))).all()


def single(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: x.astype(np.float32) for name, x in inputs.items()}


def test_auto_is_xla_without_a_tpu() -> None:
    call = draw(Case())

    def result(name: str) -> np.ndarray:
        return np.asarray(jax.jit(lambda x: attend(Case(), call, x, name))(single(call.inputs)))

    np.testing.assert_array_equal(result("auto"), result("xla"))


@pytest.mark.parametrize(
    ("case", "implementation", "message"),
    [
        (Case(), "splash", "unknown attention implementation"),
        (Case(memory_segments=1, slots=2), "auto", "at most 1 whole blocks of 4 past slots"),
        (Case(slots=1), "auto", "both need 12 tokens"),
        (Case(block_size=8, slots=1), "auto", "extra keys"),
        (Case(), "pallas", "multiple of 128, but it is 4"),
        (Case(), "pallas_interpret", "multiple of 128, but it is 4"),
    ],
)
def test_contradictions_are_rejected(case: Case, implementation: str, message: str) -> None:
    call = draw(Case())
    with pytest.raises(ValueError, match=message):
        attend(case, call, single(call.inputs), implementation)


def test_wrong_extra_keys_are_rejected() -> None:
    call = draw(Case(length=8))
    inputs = single(call.inputs)
    inputs["extra_k"] = inputs["extra_k"][:, :1]
    with pytest.raises(ValueError, match="extra keys"):
        attend(Case(length=8), call, inputs, "auto")


def test_past_slots_are_whole_blocks() -> None:
    q, past = jnp.zeros((1, 8, 1, 4)), jnp.zeros((1, 6, 1, 4))
    none = jnp.zeros((1, 2, 0, 1, 4))
    with pytest.raises(ValueError, match="at most 2 whole blocks of 4 past slots"):
        block_attention(BlockInputs(q, q, q, none, none, KV(past, past)), BlockOptions(4, 2))
    past = jnp.zeros((1, 4, 2, 4))
    with pytest.raises(ValueError, match=r"past keys \(1, 4, 2, 4\)"):
        block_attention(BlockInputs(q, q, q, none, none, KV(past, past)), BlockOptions(4, 2))


@pytest.mark.parametrize("case", ["continued", "room for part of the past"])
def test_a_past_without_gradient_gets_none(case: str) -> None:
    """If nobody asks for the gradients of past slots, the kernels skip them, and all others stay the same."""
    wide = ALL_CASES[case].wider()
    call = draw(wide)
    inputs, past_slots = single(call.inputs), wide.past_slots

    def loss(inputs: Any, fixed: bool) -> jax.Array:
        if fixed:
            inputs = dict(inputs)
            for name in "kv":
                past = jax.lax.stop_gradient(inputs[name][:, :past_slots])
                inputs[name] = jnp.concatenate([past, inputs[name][:, past_slots:]], axis=1)
        return jnp.vdot(attend(wide, call, inputs, "pallas_interpret"), jnp.float32(call.cotangent))

    free, fixed = (jax.grad(functools.partial(loss, fixed=fixed))(inputs) for fixed in (False, True))
    for name in "kv":
        assert np.abs(free[name][:, :past_slots]).max() > 0
        np.testing.assert_array_equal(fixed[name][:, :past_slots], 0)
        free[name] = free[name].at[:, :past_slots].set(0)
    jax.tree.map(np.testing.assert_array_equal, fixed, free)


def test_kernels_need_a_tpu() -> None:
    case = Case().wider()
    call = draw(case)
    with pytest.raises(ValueError, match="need a TPU, and there is none"):
        attend(case, call, single(call.inputs), "pallas")


def test_kernels_reject_float64() -> None:
    case = Case().wider()
    call = draw(case)
    with jax.enable_x64(True), pytest.raises(ValueError, match="bfloat16 and float32"):
        attend(case, call, {name: jnp.asarray(x) for name, x in call.inputs.items()}, "pallas_interpret")


@pytest.mark.parametrize("implementation", ["pallas", "pallas_interpret"])
def test_kernels_reject_a_soft_cap(implementation: str) -> None:
    case = dataclasses.replace(Case(), softcap=1.0).wider()
    call = draw(case)
    with pytest.raises(ValueError, match="do not support a soft cap"):
        attend(case, call, single(call.inputs), implementation)


def test_heads_that_do_not_divide_are_rejected() -> None:
    call = draw(Case(heads=3))
    with pytest.raises(ValueError, match="do not divide"):
        attend(Case(), call, single(call.inputs), "auto")


def test_multi_part_attention_is_one_softmax_over_all_parts() -> None:
    """Several parts with the same queries are equal to one part."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        q, k, v = (jnp.asarray(rng.normal(size=(2, n, h, 4))) for n, h in ((3, 4), (7, 2), (7, 2)))
        mask = rng.random((2, 3, 7)) < 0.6
        mask[..., 0] = True
        spans = ((0, 2), (2, 6), (6, 7))
        split = [Part(q, k[:, a:b], v[:, a:b], jnp.asarray(mask[..., a:b])) for a, b in spans]
        whole, split = (
            jax.jit(multi_part_attention)(parts) for parts in ([Part(q, k, v, jnp.asarray(mask))], split)
        )
        scores = np.einsum("bthd,bshd->bths", q, np.repeat(k, 2, 2)) / 2
        p = np.where(mask[:, :, None], np.exp(scores), 0)
        p /= p.sum(-1, keepdims=True)
        dense = np.einsum("bths,bshd->bthd", p, np.repeat(v, 2, 2))
        np.testing.assert_allclose(whole, dense, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(split, dense, rtol=1e-12, atol=1e-12)
