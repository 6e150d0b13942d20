"""The public signature of block attention, and the choice of its implementation."""

import functools
from collections.abc import Callable

import jax

from fam_jax.kernels.arguments import BlockInputs, BlockOptions, check_shapes
from fam_jax.kernels.pallas.block_attention import pallas_block_attention, why_not_pallas
from fam_jax.kernels.pallas.devices import target_chip
from fam_jax.kernels.reference import reference_block_attention
from fam_jax.kernels.xla import xla_block_attention

IMPLEMENTATIONS: dict[str, Callable[[BlockInputs, BlockOptions], jax.Array]] = {
    "reference": reference_block_attention,
    "xla": xla_block_attention,
    "pallas": pallas_block_attention,
    "pallas_interpret": functools.partial(pallas_block_attention, interpret=True),
}


def block_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    extra_k: jax.Array,
    extra_v: jax.Array,
    past_length: jax.Array | None,
    extra_count: jax.Array | None,
    *,
    block_size: int,
    memory_segments: int,
    window: int = 0,
    stop_gradient: bool = False,
    softcap: float = 0.0,
    implementation: str = "auto",
) -> jax.Array:
    """Compute Block Sliding Window Attention with extra keys (algorithm 2, sections 2.1 and 2.2).

    The T queries start at a block border and form N = ceil(T / C) blocks. A query sees the keys of the m blocks before
    its own (those that exist), the extra keys of its block, and its own block causally. Every token of a block sees
    all extra keys of that block; TransformerFAM, for example, passes its FAM activations here.

    Args:
      q: (B, T, H, hd) queries, RoPE applied.
      k: (B, P + T, K, hd) keys, RoPE applied in the same frame: P past slots, oldest first, then the queries' own
        tokens. P is a multiple of C and at most m * C. It is 0 if nothing was read before, as in training; the fastest
        kernels need P = 0. K divides H.
      v: (B, P + T, K, hd) values.
      extra_k: (B, N, S, K, hd) extra keys of each block, RoPE applied in the same frame. S = 0 gives plain BSWA.
      extra_v: (B, N, S, K, hd) extra values.
      past_length: (B,) int32, how many of the P past slots are filled, counted from the end; a multiple of C. None
        means all.
      extra_count: (B, N) int32, how many of the S extra keys exist, counted from the start. None means all.
      block_size: C.
      memory_segments: m.
      window: if positive, also hide tokens that lie `window` or more positions behind the query, but no extra keys
        (sliding window, Transformer-XL); at most m * C + 1.
      stop_gradient: stop gradients into keys and values of earlier blocks (figure 3a, `M1_SG`).
      softcap: if positive, scores become softcap * tanh(scores / softcap).
      implementation: a key of `IMPLEMENTATIONS`; or "auto", which is "pallas" where it can run and "xla" elsewhere.

    Returns:
      (B, T, H, hd) in the dtype of `q`. The softmax runs in float32, or in float64 for float64 inputs.

    Raises:
      ValueError: the implementation is unknown, or shapes contradict each other.
      AttentionError: the requested implementation cannot run here. Also a UserError.
    """
    if implementation != "auto" and implementation not in IMPLEMENTATIONS:
        known = ", ".join(["auto", *IMPLEMENTATIONS])
        raise ValueError(f"unknown attention implementation {implementation!r}; use one of {known}")
    inputs = BlockInputs(q, k, v, extra_k, extra_v, past_length, extra_count)
    options = BlockOptions(block_size, memory_segments, window, stop_gradient, softcap)
    check_shapes(inputs, options)
    if implementation == "auto":
        implementation = "pallas" if target_chip() and not why_not_pallas(q, options) else "xla"
    return IMPLEMENTATIONS[implementation](inputs, options)
