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


def block_attention(inputs: BlockInputs, options: BlockOptions, *, implementation: str = "auto") -> jax.Array:
    """Compute Block Sliding Window Attention with extra keys (algorithm 2, sections 2.1 and 2.2).

    A query sees the keys of the m blocks before its own (those that exist), the extra keys of its block, and its own
    block causally. Every token of a block sees all extra keys of that block; TransformerFAM, for example, passes its
    FAM activations here.

    Args:
      inputs: queries, keys, values and how many of them exist; :class:`BlockInputs` gives the shapes.
      options: block size, memory segments, window and the like.
      implementation: a key of `IMPLEMENTATIONS`; or "auto", which is "pallas" where it can run and "xla" elsewhere.

    Returns:
      (B, T, H, hd) in the dtype of the queries. The softmax runs in float32, or in float64 for float64 inputs.

    Raises:
      ValueError: the implementation is unknown, or shapes contradict each other.
      AttentionError: the requested implementation cannot run here. Also a UserError.
    """
    if implementation != "auto" and implementation not in IMPLEMENTATIONS:
        known = ", ".join(["auto", *IMPLEMENTATIONS])
        raise ValueError(f"unknown attention implementation {implementation!r}; use one of {known}")
    check_shapes(inputs, options)
    if implementation == "auto":
        implementation = "pallas" if target_chip() and not why_not_pallas(inputs.q, options) else "xla"
    return IMPLEMENTATIONS[implementation](inputs, options)
