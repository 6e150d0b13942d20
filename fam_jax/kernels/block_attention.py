"""The one signature of block attention, and the choice of its implementation."""

import functools
from collections.abc import Callable

import jax

from fam_jax.kernels.pallas.call import pallas_block_attention, why_not_pallas
from fam_jax.kernels.platform import target_chip
from fam_jax.kernels.reference import reference_block_attention
from fam_jax.kernels.shapes import BlockShape, check_shapes
from fam_jax.kernels.xla import xla_block_attention

IMPLEMENTATIONS: dict[str, Callable] = {
    "reference": reference_block_attention,
    "xla": xla_block_attention,
    "pallas": pallas_block_attention,
    "pallas_interpret": functools.partial(pallas_block_attention, interpret=True),
}


def block_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    fam_k: jax.Array,
    fam_v: jax.Array,
    past_length: jax.Array | None,
    fam_count: jax.Array | None,
    *,
    block_size: int,
    memory_segments: int,
    window: int = 0,
    stop_gradient: bool = False,
    softcap: float = 0.0,
    implementation: str = "auto",
) -> jax.Array:
    """Block Sliding Window Attention with feedback keys (token path of algorithm 2, sections 2.1 and 2.2).

    The T queries start at a block border and fall into N = ceil(T / C) blocks. A query sees all keys of the m
    blocks before its own (as far as they exist), the feedback keys of its block, and its own block causally.

    Args:
      q: (B, T, H, hd) queries, RoPE applied.
      k: (B, P + T, K, hd) keys, RoPE applied in the same frame: P slots for blocks before, oldest first, then the
        queries' own tokens. P is a multiple of C, at most m * C; 0 where nothing was read before, as in training,
        which the fastest kernels want. K divides H.
      v: (B, P + T, K, hd) values.
      fam_k: (B, N, S, K, hd) feedback keys that block n sees, RoPE applied in the same frame. S = 0 is plain BSWA.
      fam_v: (B, N, S, K, hd) feedback values.
      past_length: (B,) int32, how many of the P past slots hold keys: the last ones; a multiple of C. None: all.
      fam_count: (B, N) int32, how many of the S feedback keys exist: the first ones. None: all.
      block_size: C.
      memory_segments: m.
      window: if positive, keys `window` tokens or more behind the query are hidden too, never feedback keys
        (sliding window, Transformer-XL); at most m * C + 1.
      stop_gradient: no gradient into keys and values of earlier blocks (figure 3a, `M1_SG`).
      softcap: if positive, scores are softcap * tanh(scores / softcap).
      implementation: a key of `IMPLEMENTATIONS`, or "auto": "pallas" where it can run, else "xla".

    Returns:
      (B, T, H, hd) in the dtype of `q`; softmax in float32, or float64.

    Raises:
      ValueError: unknown implementation, or shapes that contradict each other.
      AttentionError: the implementation asked for cannot run here; also a UserError.
    """
    if implementation != "auto" and implementation not in IMPLEMENTATIONS:
        known = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"unknown attention implementation {implementation!r}; there are auto, {known}")
    shape = BlockShape(block_size, memory_segments, window, stop_gradient, softcap)
    check_shapes(q, k, v, fam_k, fam_v, shape)
    if implementation == "auto":
        implementation = "pallas" if target_chip() and not why_not_pallas(q, shape) else "xla"
    return IMPLEMENTATIONS[implementation](q, k, v, fam_k, fam_v, past_length, fam_count, shape)
