"""Every implementation of block attention: forward and all gradients against a dense softmax in float64.

Tolerances follow from the dtype: an attention output is an average of values, so its error is a few roundings
of the largest value, and a gradient's error a few roundings of the largest entry of that gradient.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fam_jax.kernels import IMPLEMENTATIONS, Part, block_attention, joint_attention, xla
from tests.model.tiny import quick_jit


class Case(NamedTuple):
    length: int = 12  # T
    block_size: int = 4  # C
    memory_segments: int = 2  # m
    heads: int = 4  # H
    kv_heads: int = 2  # K
    fam_slots: int = 3  # S
    window: int = 0
    stop_gradient: bool = False
    past_blocks: tuple[int, ...] = (2, 1, 0)  # per row: how many blocks of the past exist
    head_dim: int = 4

    def options(self):
        return {
            "block_size": self.block_size, "memory_segments": self.memory_segments, "window": self.window,
            "stop_gradient": self.stop_gradient,
        }  # fmt: skip


CASES = {
    "plain": Case(),
    "multi-head": Case(kv_heads=4),
    "multi-query": Case(kv_heads=1),
    "odd length": Case(length=10),
    "shorter than a block": Case(length=3),
    "one token": Case(length=1),
    "no memory": Case(memory_segments=0, past_blocks=(0, 0)),
    "no feedback": Case(fam_slots=0),
    "neither": Case(memory_segments=0, fam_slots=0, past_blocks=(0, 0)),
    "memory longer than the tokens": Case(memory_segments=4, length=6, past_blocks=(4, 2, 0)),
    "window within the block": Case(window=3),
    "window across blocks": Case(window=6, length=11),
    "Transformer-XL": Case(window=9),
    "stop-gradient": Case(stop_gradient=True, length=11),
    "stop-gradient in a window": Case(stop_gradient=True, window=6),
}


def arrays(case: Case, seed: int = 0):
    """Inputs by name, float64, and the existing number of feedback keys per block: 0 .. S."""
    rng = np.random.default_rng(seed)
    batch, blocks = len(case.past_blocks), -(-case.length // case.block_size)
    slots = case.memory_segments * case.block_size + case.length
    shapes = {
        "q": (batch, case.length, case.heads, case.head_dim),
        "k": (batch, slots, case.kv_heads, case.head_dim),
        "v": (batch, slots, case.kv_heads, case.head_dim),
        "fam_k": (batch, blocks, case.fam_slots, case.kv_heads, case.head_dim),
        "fam_v": (batch, blocks, case.fam_slots, case.kv_heads, case.head_dim),
    }
    inputs = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    past_length = np.array(case.past_blocks, np.int32) * case.block_size
    fam_count = rng.integers(0, case.fam_slots + 1, (batch, blocks)).astype(np.int32)
    cotangent = rng.normal(size=shapes["q"])
    return inputs, past_length, fam_count, cotangent


def visibility(case: Case, past_length, fam_count):
    """(B, T, S) which keys a query sees, pair by pair from the definition, and (T, S) which get its gradient.

    S runs over the past slots, the tokens and then the feedback keys of every block.
    """
    past, blocks = case.memory_segments * case.block_size, fam_count.shape[1]
    tokens = past + case.length
    seen = np.zeros((len(past_length), case.length, tokens + blocks * case.fam_slots), bool)
    gradient = np.ones(seen.shape[1:], bool)
    for t in range(case.length):
        block = t // case.block_size
        for s in range(tokens):
            at = s - past  # position of the key; the first query is at 0
            near = block - at // case.block_size <= case.memory_segments
            in_window = case.window == 0 or t - at < case.window
            gradient[t, s] = not case.stop_gradient or at // case.block_size == block
            for b in range(seen.shape[0]):
                seen[b, t, s] = at <= t and near and in_window and at >= -past_length[b]
        for b in range(seen.shape[0]):
            first = tokens + block * case.fam_slots
            seen[b, t, first : first + fam_count[b, block]] = True
    return seen, gradient


def dense_attention(case: Case, inputs, past_length, fam_count, cotangent):
    """Output and gradients of one softmax over every key there is, by hand in NumPy float64."""
    seen, gradient = visibility(case, past_length, fam_count)
    q, group = inputs["q"], case.heads // case.kv_heads
    scale = case.head_dim**-0.5

    def all_keys(tokens, feedback):  # (B, S, H, hd)
        flat = feedback.reshape(len(feedback), -1, *tokens.shape[2:])
        return np.repeat(np.concatenate([tokens, flat], axis=1), group, axis=2)

    k, v = all_keys(inputs["k"], inputs["fam_k"]), all_keys(inputs["v"], inputs["fam_v"])
    p = np.where(seen[:, :, None], np.exp(np.einsum("bthd,bshd->bths", q, k) * scale), 0.0)
    p /= p.sum(-1, keepdims=True)
    d_p = np.einsum("bthd,bshd->bths", cotangent, v)
    d_scores = p * (d_p - (p * d_p).sum(-1, keepdims=True)) * scale

    def by_source(name, d):  # the reverse of all_keys
        d = d.reshape(*d.shape[:2], case.kv_heads, group, case.head_dim).sum(3)
        tokens = inputs[name].shape[1]
        fam = inputs["fam_" + name]
        return {name: d[:, :tokens], "fam_" + name: d[:, tokens:].reshape(fam.shape)}

    through = gradient[None, :, None]
    return np.einsum("bths,bshd->bthd", p, v), {
        "q": np.einsum("bths,bshd->bthd", d_scores, k),
        **by_source("k", np.einsum("bths,bthd->bshd", d_scores * through, q)),
        **by_source("v", np.einsum("bths,bthd->bshd", p * through, cotangent)),
    }


def check(case: Case, implementation: str, dtype: str, roundings: float):
    with jax.enable_x64(True):
        inputs, past_length, fam_count, cotangent = arrays(case)
        inputs = {name: jnp.asarray(x, dtype) for name, x in inputs.items()}
        cotangent = jnp.asarray(cotangent, dtype)

        @quick_jit
        def forward_and_gradients(inputs, cotangent):
            out, pull = jax.vjp(lambda x: attend(case, x, past_length, fam_count, implementation), inputs)
            return out, pull(cotangent)[0]

        out, gradients = forward_and_gradients(inputs, cotangent)
        assert out.dtype == dtype and all(x.dtype == dtype for x in gradients.values())
        wide = {name: np.asarray(x, np.float64) for name, x in inputs.items()}
        want, want_gradients = dense_attention(
            case, wide, past_length, fam_count, np.asarray(cotangent, np.float64)
        )
        close("output", out, want, np.abs(wide["v"]).max(), dtype, roundings)
        for name, gradient in want_gradients.items():
            close(name, gradients[name], gradient, np.abs(gradient).max(initial=0), dtype, roundings)


def attend(case: Case, inputs, past_length, fam_count, implementation):
    ordered = (inputs[name] for name in ("q", "k", "v", "fam_k", "fam_v"))
    return block_attention(*ordered, past_length, fam_count, implementation=implementation, **case.options())


def close(name, got, want, scale, dtype, roundings):
    error = np.abs(np.asarray(got, np.float64) - want).max(initial=0)
    unit = float(jnp.finfo(dtype).eps) * scale
    assert error <= roundings * unit, f"{name}: {error / unit if unit else error} roundings"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_is_dense_attention_under_its_mask(case, implementation):
    check(case, implementation, "float64", roundings=64)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["plain", "stop-gradient in a window"])
def test_narrow_dtypes(case, dtype, implementation):
    """bfloat16: probabilities, outputs and the products of the backward pass are rounded once each."""
    check(CASES[case], implementation, dtype, roundings={"float32": 16, "bfloat16": 4}[dtype])


@pytest.mark.parametrize("case", ["plain", "odd length", "stop-gradient", "window across blocks"])
def test_xla_in_groups_of_blocks(case, monkeypatch):
    """The path for scores that are too large to exist at once."""
    one_block = 4 * 3 * 4 * 4 * (3 * 4 + 3)  # bytes: 4 B H C ((m + 1) C + S)
    monkeypatch.setattr(xla, "SCORE_BYTES", one_block)
    inputs, past_length, fam_count, _ = arrays(CASES[case])
    assert "scan" in str(
        jax.make_jaxpr(lambda x: attend(CASES[case], x, past_length, fam_count, "xla"))(inputs)
    )
    check(CASES[case], "xla", "float64", roundings=64)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_is_hidden_has_no_influence(implementation):
    """Slots of a past that does not exist, and of feedback keys that do not, may hold anything finite."""
    case = Case()
    inputs, past_length, fam_count, _ = arrays(case)
    spoilt = {name: x.copy() for name, x in inputs.items()}
    for b, length in enumerate(past_length):
        for name in ("k", "v"):
            spoilt[name][b, : case.memory_segments * case.block_size - length] = 1e6
        for n, count in enumerate(fam_count[b]):
            for name in ("fam_k", "fam_v"):
                spoilt[name][b, n, count:] = 1e6
    assert all((spoilt[name] != inputs[name]).any() for name in inputs if name != "q")
    call = quick_jit(lambda x: attend(case, x, past_length, fam_count, implementation))
    np.testing.assert_array_equal(call(single(spoilt)), call(single(inputs)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_scores_do_not_overflow(implementation):
    inputs, past_length, fam_count, _ = arrays(Case())
    inputs["q"] *= 1e4
    call = quick_jit(lambda x: attend(Case(), x, past_length, fam_count, implementation))
    assert np.isfinite(call(single(inputs))).all()


def single(inputs):
    return {name: x.astype(np.float32) for name, x in inputs.items()}


def test_auto_is_one_of_the_implementations():
    inputs, past_length, fam_count, _ = arrays(Case())

    def call(name):
        return np.asarray(
            quick_jit(lambda x: attend(Case(), x, past_length, fam_count, name))(single(inputs))
        )

    assert any((call("auto") == call(name)).all() for name in IMPLEMENTATIONS)


@pytest.mark.parametrize(
    ("case", "implementation", "message"),
    [
        (Case(), "pallas-tpu", "unknown attention implementation"),
        (Case(memory_segments=1), "auto", "past slots"),
        (Case(block_size=2), "auto", "past slots"),
        (Case(block_size=8, memory_segments=1), "auto", "feedback keys"),
    ],
)
def test_contradictions_are_refused(case, implementation, message):
    inputs, past_length, fam_count, _ = arrays(Case())
    with pytest.raises(ValueError, match=message):
        attend(case, single(inputs), past_length, fam_count, implementation)


def test_heads_that_do_not_divide_are_refused():
    inputs, past_length, fam_count, _ = arrays(Case(heads=3))
    with pytest.raises(ValueError, match="do not divide"):
        attend(Case(), single(inputs), past_length, fam_count, "auto")


def test_joint_attention_is_one_softmax_over_all_parts():
    """Parts with a query each are the same as one part, where the queries are the same."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        q, k, v = (jnp.asarray(rng.normal(size=(2, n, h, 4))) for n, h in ((3, 4), (7, 2), (7, 2)))
        mask = rng.random((2, 3, 7)) < 0.6
        mask[..., 0] = True
        spans = ((0, 2), (2, 6), (6, 7))
        split = [Part(q, k[:, a:b], v[:, a:b], jnp.asarray(mask[..., a:b])) for a, b in spans]
        whole, split = (
            quick_jit(joint_attention)(parts) for parts in ([Part(q, k, v, jnp.asarray(mask))], split)
        )
        scores = np.einsum("bthd,bshd->bths", q, np.repeat(k, 2, 2)) / 2
        p = np.where(mask[:, :, None], np.exp(scores), 0)
        p /= p.sum(-1, keepdims=True)
        dense = np.einsum("bths,bshd->bthd", p, np.repeat(v, 2, 2))
        np.testing.assert_allclose(whole, dense, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(split, dense, rtol=1e-12, atol=1e-12)
