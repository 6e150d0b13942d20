"""The one signature of block attention, and the choice of its implementation."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from fam_jax.kernels.reference import reference_block_attention
from fam_jax.kernels.xla import xla_block_attention


class BlockShape(NamedTuple):
    """What is static about a call; every implementation takes it."""

    block_size: int  # C
    memory_segments: int  # m
    window: int  # 0 = no further limit
    stop_gradient: bool


IMPLEMENTATIONS: dict[str, Callable] = {
    "reference": reference_block_attention,
    "xla": xla_block_attention,
}


def block_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    fam_k: jax.Array,
    fam_v: jax.Array,
    past_length: jax.Array,
    fam_count: jax.Array,
    *,
    block_size: int,
    memory_segments: int,
    window: int = 0,
    stop_gradient: bool = False,
    implementation: str = "auto",
) -> jax.Array:
    """Block Sliding Window Attention with feedback keys (token path of algorithm 2, sections 2.1 and 2.2).

    The T queries start at a block border and fall into N = ceil(T / C) blocks. A query sees all keys of the m
    blocks before its own (as far as they exist), the feedback keys of its block, and its own block causally.

    Args:
      q: (B, T, H, hd) queries, RoPE applied.
      k: (B, m * C + T, K, hd) keys, RoPE applied in the same frame: m * C slots for the blocks before, oldest
        first, then the queries' own tokens. K divides H.
      v: (B, m * C + T, K, hd) values.
      fam_k: (B, N, S, K, hd) feedback keys that block n sees, RoPE applied in the same frame. S = 0 is plain BSWA.
      fam_v: (B, N, S, K, hd) feedback values.
      past_length: (B,) int32, how many of the m * C past slots hold keys: the last ones; a multiple of C.
      fam_count: (B, N) int32, how many of the S feedback keys exist: the first ones.
      block_size: C.
      memory_segments: m.
      window: if positive, keys `window` tokens or more behind the query are hidden too, never feedback keys
        (sliding window, Transformer-XL); at most m * C + 1.
      stop_gradient: no gradient into keys and values of earlier blocks (figure 3a, `M1_SG`).
      implementation: a key of `IMPLEMENTATIONS`, or "auto": the fastest exact one for this backend.

    Returns:
      (B, T, H, hd) in the dtype of `q`; softmax in float32, or float64.

    Raises:
      ValueError: unknown implementation, or shapes that contradict each other.
    """
    name = "xla" if implementation == "auto" else implementation
    if name not in IMPLEMENTATIONS:
        known = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"unknown attention implementation {name!r}; there are auto, {known}")
    length, past = q.shape[1], memory_segments * block_size
    blocks = -(-length // block_size)
    if k.shape[1] != past + length or k.shape != v.shape:
        raise ValueError(
            f"keys {k.shape} and values {v.shape} must hold {past} past slots and {length} tokens"
        )
    if fam_k.shape[1] != blocks or fam_k.shape != fam_v.shape:
        raise ValueError(
            f"feedback keys {fam_k.shape} and values {fam_v.shape} must be given for {blocks} blocks"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{k.shape[2]} key/value heads do not divide {q.shape[2]} query heads")
    shape = BlockShape(block_size, memory_segments, window, stop_gradient)
    return IMPLEMENTATIONS[name](q, k, v, fam_k, fam_v, past_length, fam_count, shape)
