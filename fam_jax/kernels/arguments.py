"""The arguments of block attention as records, and their checks.

Letters in shapes: B batch, T tokens, C block size, N blocks, m memory segments, P past slots, S extra keys of a block,
H query heads, K key/value heads, G = H / K, hd head width.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fam_jax.config import ceil_div
from fam_jax.kernels.pallas.blocks import KV


class BlockInputs(NamedTuple):
    """The arrays of one call of :func:`fam_jax.kernels.block_attention`.

    The T queries start at a block border and form N = ceil(T / C) blocks.

    Attributes:
      q: (B, T, H, hd) queries, RoPE applied.
      k: (B, T, K, hd) keys, RoPE applied in the same frame. K divides H.
      v: (B, T, K, hd) values.
      extra_k: (B, N, S, K, hd) extra keys of each block, RoPE applied in the same frame. S = 0 gives plain BSWA.
      extra_v: (B, N, S, K, hd) extra values.
      past: (B, P, K, hd) keys, RoPE applied in the same frame, and values of P slots for tokens before these, oldest
        first. P is a multiple of C and at most m * C; the fastest kernels need all m * C. None means P = 0: nothing
        was read before.
      past_length: (B,) int32, how many of the P past slots are filled, counted from the end; a multiple of C. None
        means all.
      extra_count: (B, N) int32, how many of the S extra keys exist, counted from the start. None means all.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    extra_k: jax.Array
    extra_v: jax.Array
    past: KV | None = None
    past_length: Any = None
    extra_count: Any = None

    @property
    def past_slots(self) -> int:
        """P."""
        return self.past.k.shape[1] if self.past else 0


class BlockOptions(NamedTuple):
    """The static options of one call of :func:`fam_jax.kernels.block_attention`.

    Attributes:
      block_size: C.
      memory_segments: m.
      window: if positive, also hide tokens that lie `window` or more positions behind the query, but no extra keys
        (sliding window, Transformer-XL); at most m * C + 1.
      stop_gradient: stop gradients into keys and values of earlier blocks (figure 3a, `M1_SG`).
      softcap: if positive, scores become softcap * tanh(scores / softcap).
    """

    block_size: int
    memory_segments: int
    window: int = 0
    stop_gradient: bool = False
    softcap: float = 0.0


def check_shapes(inputs: BlockInputs, options: BlockOptions) -> None:
    """Raise ValueError if shapes and options contradict each other."""
    q, k, v, extra_k, extra_v = inputs[:5]
    length, past = q.shape[1], inputs.past_slots
    blocks = ceil_div(length, options.block_size)
    room = options.memory_segments * options.block_size
    if k.shape != v.shape or k.shape[1] != length:
        raise ValueError(f"k {k.shape} and v {v.shape} do not match q {q.shape}; both need {length} tokens")
    if inputs.past and (
        past % options.block_size or past > room or any(x.shape != _with_tokens(k, past) for x in inputs.past)
    ):
        raise ValueError(
            f"past keys {inputs.past.k.shape} and values {inputs.past.v.shape} do not match k {k.shape}; both need at "
            f"most {options.memory_segments} whole blocks of {options.block_size} past slots"
        )
    if extra_k.shape[1] != blocks or extra_k.shape != extra_v.shape:
        raise ValueError(
            f"extra keys {extra_k.shape} and values {extra_v.shape} do not match; both need the shape "
            f"(batch, {blocks} blocks, keys, heads, width)"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"{k.shape[2]} key/value heads do not divide {q.shape[2]} query heads; use a divisor as the number of "
            "key/value heads"
        )


def _with_tokens(x: jax.Array, tokens: int) -> tuple[int, ...]:
    """Return the shape of x (B, T, K, hd) with another T."""
    return (x.shape[0], tokens, *x.shape[2:])


def fill_counts(inputs: BlockInputs) -> BlockInputs:
    """Return `inputs` with `past_length` and `extra_count` as arrays where they are None."""
    past_length, extra_count = inputs.past_length, inputs.extra_count
    if past_length is None:
        past_length = jnp.full(inputs.q.shape[0], inputs.past_slots, jnp.int32)
    if extra_count is None:
        extra_count = jnp.full(inputs.extra_k.shape[:2], inputs.extra_k.shape[2], jnp.int32)
    return inputs._replace(past_length=past_length, extra_count=extra_count)


def join_past(inputs: BlockInputs, options: BlockOptions) -> BlockInputs:
    """Return `inputs` with m * C past slots in front of k and v (those that were missing empty), and both counts."""
    missing = options.memory_segments * options.block_size - inputs.past_slots

    def join(past: jax.Array | None, x: jax.Array) -> jax.Array:
        joined = x if past is None else jnp.concatenate([past, x], axis=1)
        return jnp.pad(joined, ((0, 0), (missing, 0), (0, 0), (0, 0)))

    past = inputs.past or KV(None, None)
    k, v = join(past.k, inputs.k), join(past.v, inputs.v)
    return fill_counts(inputs)._replace(k=k, v=v, past=None)
