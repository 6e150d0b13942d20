"""FAM's own attention in a chain of updates: to itself, and to all keys of one block of a longer sequence."""

import jax

from fam_jax.kernels.multi_part_attention import Part, multi_part_attention
from fam_jax.kernels.pallas.update import can_update, pallas_update_attention
from fam_jax.kernels.platform import asks_for_kernels


def update_attention(
    q: jax.Array,
    fam_k: jax.Array,
    fam_v: jax.Array,
    k: jax.Array,
    v: jax.Array,
    block: jax.Array,
    taps: tuple[jax.Array, jax.Array],
    *,
    softcap: float = 0.0,
    implementation: str = "auto",
) -> jax.Array:
    """FAM path of algorithm 2: one softmax over the FAM's own keys and all keys of block `block`; no causal mask.

    In a loop over blocks, gradients into whole `k` and `v` would be added up in every step. Here they get none; the
    cotangents of the block's keys and values are those of `taps`, whose values do not matter. Heads of all these are
    side by side, as the kernels want them, lest each step of the loop bring them there.

    Args:
      q: (B, M, H, hd) queries, RoPE applied.
      fam_k: (B, M, K, hd) keys of the FAM, RoPE applied in the same frame.
      fam_v: (B, M, K, hd) values.
      k: (B, T, K * hd) keys of the tokens of all blocks, RoPE applied in the same frame.
      v: (B, T, K * hd) values.
      block: () int32, number of the block, one of T // C.
      taps: two arrays (B, C, K * hd) of the dtype of k; C follows from their shape.
      softcap: as in `block_attention`.
      implementation: as of `block_attention`. The kernel takes FAMs and heads of whole tiles; others are left to XLA
        under any name.

    Returns:
      (B, M, H, hd).
    """
    if asks_for_kernels(implementation) and can_update(q, taps[0].shape[1], softcap):
        interpret = implementation == "pallas_interpret"
        return pallas_update_attention(q, fam_k, fam_v, k, v, block, taps, interpret=interpret)
    k, v = (
        _read_block(x, block, tap).reshape(*tap.shape[:2], *fam_k.shape[2:])
        for x, tap in zip((k, v), taps, strict=True)
    )
    return multi_part_attention([Part(q, fam_k, fam_v), Part(q, k, v)], softcap=softcap)


@jax.custom_vjp
def _read_block(x: jax.Array, block: jax.Array, tap: jax.Array) -> jax.Array:
    """(B, C, W), block number `block` of x (B, T, W); its cotangent is the tap's, and x has none."""
    return jax.lax.dynamic_slice_in_dim(x, block * tap.shape[1], tap.shape[1], axis=1)


def _read_forward(x: jax.Array, block: jax.Array, tap: jax.Array) -> tuple[jax.Array, None]:
    return _read_block(x, block, tap), None


def _read_backward(_: None, cotangent: jax.Array) -> tuple[None, None, jax.Array]:
    return None, None, cotangent


_read_block.defvjp(_read_forward, _read_backward)
