"""Cases of block attention, and dense attention in NumPy float64 to compare with."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fam_jax.config import ceil_div
from fam_jax.kernels import KV, BlockInputs, BlockOptions, block_attention

Arrays = dict[str, np.ndarray]
# Factor between the small blocks of these cases (multiples of 4) and blocks of the kernels (multiples of 128).
WIDER = 32


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes and options of a call; the defaults make blocks of four tokens."""

    # T
    length: int = 12
    # C
    block_size: int = 4
    # m
    memory_segments: int = 2
    # H
    heads: int = 4
    # K
    kv_heads: int = 2
    # S
    extra_slots: int = 3
    window: int = 0
    stop_gradient: bool = False
    softcap: float = 0.0
    # Filled blocks of the past, per row of the batch
    past_blocks: tuple[int, ...] = (2, 1, 0)
    # hd
    head_dim: int = 4
    # P / C; -1 means m.
    slots: int = -1
    # Whether the call passes past_length
    counted: bool = True
    # Whether the call passes extra_count
    extra_counted: bool = True

    @property
    def past_slots(self) -> int:
        """P."""
        return self.block_size * (self.memory_segments if self.slots < 0 else self.slots)

    @property
    def blocks(self) -> int:
        """N; the last block may be incomplete."""
        return ceil_div(self.length, self.block_size)

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments of the call."""
        names = ("block_size", "memory_segments", "window", "stop_gradient", "softcap")
        return {name: getattr(self, name) for name in names}

    def wider(self) -> "Case":
        """Return the same structure at a size that the kernels support, with fewer heads to save time."""
        whole, rest = divmod(self.length, self.block_size)
        size = self.block_size * WIDER
        fewer = 2 if self.kv_heads % 2 == 0 else 1
        return dataclasses.replace(
            self,
            length=whole * size + max(rest * WIDER - 1, 0),
            block_size=size,
            window=max(self.window * WIDER - 1, 0),
            head_dim=2 * self.head_dim,
            heads=self.heads // fewer,
            kv_heads=self.kv_heads // fewer,
        )


class Call(NamedTuple):
    """The arguments of a case in float64, and a cotangent."""

    # q, k, v, extra_k, extra_v. Past slots stand in front of k and v.
    inputs: Arrays
    # (B,)
    past_length: np.ndarray
    # (B, N)
    extra_count: np.ndarray
    # Like q
    cotangent: np.ndarray


def draw(case: Case, seed: int = 0) -> Call:
    """Return random arguments; between 0 and S extra keys of each block exist."""
    rng = np.random.default_rng(seed)
    batch, tokens = len(case.past_blocks), case.past_slots + case.length
    extra = (batch, case.blocks, case.extra_slots, case.kv_heads, case.head_dim)
    queries = (batch, case.length, case.heads, case.head_dim)
    keys = (batch, tokens, case.kv_heads, case.head_dim)
    shapes = {"q": queries, "k": keys, "v": keys, "extra_k": extra, "extra_v": extra}
    inputs = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    past_length = np.array(case.past_blocks, np.int32) * case.block_size
    extra_count = rng.integers(0, case.extra_slots + 1, (batch, case.blocks)).astype(np.int32)
    if not case.counted:
        past_length = np.full_like(past_length, case.past_slots)
    if not case.extra_counted:
        extra_count = np.full_like(extra_count, case.extra_slots)
    return Call(inputs, past_length, extra_count, rng.normal(size=queries))


def attend(case: Case, call: Call, inputs: dict[str, Any], implementation: str) -> jax.Array:
    """Return the attention under test."""
    past_slots = case.past_slots
    k, v = (inputs[name][:, past_slots:] for name in "kv")
    past = KV(*(inputs[name][:, :past_slots] for name in "kv")) if past_slots else None
    past_length = jnp.asarray(call.past_length) if case.counted else None
    extra_count = jnp.asarray(call.extra_count) if case.extra_counted else None
    return block_attention(
        BlockInputs(inputs["q"], k, v, inputs["extra_k"], inputs["extra_v"], past, past_length, extra_count),
        BlockOptions(**case.options()),
        implementation=implementation,
    )


def visibility(case: Case, call: Call) -> tuple[np.ndarray, np.ndarray]:
    """Return (B, T, S), True where a query sees a key, and (T, S), True where the key gets the query's gradient.

    S runs over the past slots, the tokens, and then the extra keys of every block.
    """
    at = np.arange(-case.past_slots, case.length)[None]  # positions of keys; the first query is at 0
    t = np.arange(case.length)[:, None]
    blocks_between = t // case.block_size - at // case.block_size
    seen = (at <= t) & (blocks_between <= case.memory_segments)
    if case.window:
        seen &= t - at < case.window
    seen = seen[None] & (at >= -call.past_length[:, None])[:, None]
    own = t // case.block_size == np.arange(case.blocks)[None]  # (T, N)
    slot = np.arange(case.extra_slots)
    extra = own[None, :, :, None] & (slot < call.extra_count[..., None])[:, None]
    gradient = (blocks_between == 0) | (not case.stop_gradient)
    extra_gradient = np.ones((case.length, case.blocks * case.extra_slots), bool)
    return (
        np.concatenate([seen, extra.reshape(*extra.shape[:2], -1)], axis=-1),
        np.concatenate([np.broadcast_to(gradient, seen.shape[1:]), extra_gradient], axis=-1),
    )


def dense_attention(
    case: Case, call: Call, inputs: Arrays, cotangent: np.ndarray
) -> tuple[np.ndarray, Arrays, Arrays]:
    """Return output and gradients of one softmax over all keys, and the gradients' sums of absolute terms."""
    seen, gradient = visibility(case, call)
    q, group = inputs["q"], case.heads // case.kv_heads
    scale = case.head_dim**-0.5

    def all_keys(tokens: np.ndarray, extra: np.ndarray) -> np.ndarray:  # (B, S, H, hd)
        flat = extra.reshape(len(extra), -1, *tokens.shape[2:])
        return np.repeat(np.concatenate([tokens, flat], axis=1), group, axis=2)

    def sums(equation: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.einsum(equation, a, b, optimize=True)  # by matrix products

    k, v = all_keys(inputs["k"], inputs["extra_k"]), all_keys(inputs["v"], inputs["extra_v"])
    scores, slope = sums("bthd,bshd->bths", q, k) * scale, np.ones(1)
    if case.softcap:
        capped = np.tanh(scores / case.softcap)
        scores, slope = case.softcap * capped, 1 - capped**2
    scores = np.where(seen[:, :, None], scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    d_p = sums("bthd,bshd->bths", cotangent, v)
    mean = (p * d_p).sum(-1, keepdims=True)
    d_scores = p * (d_p - mean) * slope * scale
    d_scores_size = p * (np.abs(d_p) + np.abs(mean)) * slope * scale

    def by_source(name: str, d: np.ndarray) -> Arrays:  # the inverse of all_keys
        d = d.reshape(*d.shape[:2], case.kv_heads, group, case.head_dim).sum(3)
        tokens = inputs[name].shape[1]
        return {name: d[:, :tokens], "extra_" + name: d[:, tokens:].reshape(inputs["extra_" + name].shape)}

    through = gradient[None, :, None]

    def gradients(d_scores: np.ndarray, q: np.ndarray, k: np.ndarray, cotangent: np.ndarray) -> Arrays:
        return {
            "q": sums("bths,bshd->bthd", d_scores, k),
            **by_source("k", sums("bths,bthd->bshd", d_scores * through, q)),
            **by_source("v", sums("bths,bthd->bshd", p * through, cotangent)),
        }

    exact = gradients(d_scores, q, k, cotangent)
    return sums("bths,bshd->bthd", p, v), exact, gradients(d_scores_size, *map(np.abs, (q, k, cotangent)))


def check(case: Case, implementation: str, dtype: str, roundings: float, seed: int = 0) -> None:
    """Check output and every gradient of a case against :func:`dense_attention`.

    Args:
      case: the call.
      implementation: the implementation under test.
      dtype: dtype of all arrays.
      roundings: largest allowed error, in units of the dtype's epsilon times the largest sum of absolute terms.
      seed: seed of the arguments.
    """
    with jax.enable_x64(dtype == "float64"):
        call = draw(case, seed)
        inputs = {name: jnp.asarray(x, dtype) for name, x in call.inputs.items()}
        cotangent = jnp.asarray(call.cotangent, dtype)

        @jax.jit
        def forward_and_gradients(inputs: Any, cotangent: jax.Array) -> Any:
            out, pull = jax.vjp(lambda x: attend(case, call, x, implementation), inputs)
            return out, pull(cotangent)[0]

        out, gradients = forward_and_gradients(inputs, cotangent)
        assert out.dtype == dtype and all(x.dtype == dtype for x in gradients.values())
        rounded = {name: np.asarray(x, np.float64) for name, x in inputs.items()}
        want, want_gradients, terms = dense_attention(case, call, rounded, np.asarray(cotangent, np.float64))
        close("output", out, want, np.abs(rounded["v"]).max(), dtype, roundings)
        for name, gradient in want_gradients.items():
            close(name, gradients[name], gradient, terms[name].max(initial=0), dtype, roundings)


def close(name: str, got: Any, want: np.ndarray, scale: float, dtype: str, roundings: float) -> None:
    """Assert that the error is at most `roundings` roundings of `scale`."""
    error = np.abs(np.asarray(got, np.float64) - want).max(initial=0)
    unit = float(jnp.finfo(dtype).eps) * scale
    assert error <= roundings * unit, f"{name}: {error / unit if unit else error} roundings"
