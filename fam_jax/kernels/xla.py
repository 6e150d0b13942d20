"""Block attention in plain XLA operations: runs everywhere and forms no scores outside the visible blocks.

The blocks of queries join the batch, each beside the m + 1 blocks of keys that it sees. If the scores of all blocks
would take too much memory, groups of blocks run one after the other and are recomputed in the backward pass.
"""

import jax
import jax.numpy as jnp

from fam_jax.kernels.arguments import BlockInputs, BlockOptions, join_past
from fam_jax.kernels.multi_part_attention import accumulation_dtype, soft_cap

# Limit on the bytes of scores that exist at one time, per call.
SCORE_BYTES = 256 * 2**20


def xla_block_attention(inputs: BlockInputs, options: BlockOptions) -> jax.Array:
    """Compute :func:`fam_jax.kernels.block_attention` in XLA operations."""
    q, k, v, extra_k, extra_v, _, past_length, extra_count = join_past(inputs, options)
    batch, length, heads, head_dim = q.shape
    size, segments, kv_heads = options.block_size, options.memory_segments, k.shape[2]
    blocks = extra_k.shape[1]
    tail = ((0, 0), (0, blocks * size - length), (0, 0), (0, 0))  # completes the last block
    q = jnp.pad(q, tail).reshape(batch, blocks, size, kv_heads, heads // kv_heads, head_dim)
    k, v = (jnp.pad(x, tail).reshape(batch, segments + blocks, size, kv_heads, head_dim) for x in (k, v))

    group = _blocks_per_group(batch * heads * size * ((segments + 1) * size + extra_k.shape[2]), blocks)

    def attend(start: jax.Array | int) -> jax.Array:
        def pick(x: jax.Array, count: int) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, start, count, axis=1) if group < blocks else x

        picked = BlockInputs(
            q=pick(q, group),
            k=pick(k, group + segments),
            v=pick(v, group + segments),
            extra_k=pick(extra_k, group),
            extra_v=pick(extra_v, group),
            past_length=past_length,
            extra_count=pick(extra_count, group),
        )
        return _attend(picked, start, options)

    if group == blocks:
        out = attend(0)
    else:
        groups = jax.lax.map(jax.checkpoint(attend), jnp.arange(0, blocks, group))
        out = jnp.moveaxis(groups, 0, 1)  # (B, N / group, group, C, K, G, hd)
    return out.reshape(batch, blocks * size, heads, head_dim)[:, :length]


def _blocks_per_group(scores_per_block: int, blocks: int) -> int:
    """Return the largest divisor of `blocks` whose float32 scores stay within SCORE_BYTES, at least 1."""
    divisors = [n for n in range(1, blocks + 1) if blocks % n == 0]
    return max(n for n in divisors if n == 1 or 4 * n * scores_per_block <= SCORE_BYTES)


def _attend(inputs: BlockInputs, start: jax.Array | int, options: BlockOptions) -> jax.Array:
    """Compute attention for the queries of N whole blocks.

    Args:
      inputs: q (B, N, C, K, G, hd); k and v (B, m + N, C, K, hd); the rest as in the public call.
      start: number of the first of the N blocks within the call.
      options: options of the call.

    Returns:
      (B, N, C, K, G, hd).
    """
    q, k, v, extra_k, extra_v, _, past_length, extra_count = inputs
    segments, blocks = options.memory_segments, q.shape[1]
    dtype = accumulation_dtype(q.dtype)

    def seen(x: jax.Array) -> list[jax.Array]:
        shifted = [x[:, j : j + blocks] for j in range(segments + 1)]
        if options.stop_gradient:
            return [*(jax.lax.stop_gradient(s) for s in shifted[:-1]), shifted[-1]]
        return shifted

    keys = jnp.concatenate([extra_k, *seen(k)], axis=2)  # (B, N, S + (m + 1) * C, K, hd)
    values = jnp.concatenate([extra_v, *seen(v)], axis=2)
    mask = _mask(past_length, extra_count, extra_k.shape[2], start, options)

    scores = jnp.einsum("bnckgd,bnskd->bnkgcs", q, keys, preferred_element_type=dtype) * q.shape[-1] ** -0.5
    scores = jnp.where(mask[:, :, None, None], soft_cap(scores, options.softcap), -jnp.inf)
    # Normalizing after the product with the values takes C * hd divisions instead of C * S.
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    out = jnp.einsum(
        "bnkgcs,bnskd->bnckgd", weights.astype(values.dtype), values, preferred_element_type=dtype
    )
    normalizer = weights.sum(axis=-1).transpose(0, 1, 4, 2, 3)[..., None]  # (B, N, C, K, G, 1)
    return (out / normalizer).astype(q.dtype)


def _mask(
    past_length: jax.Array,
    extra_count: jax.Array,
    extra_slots: int,
    start: jax.Array | int,
    options: BlockOptions,
) -> jax.Array:
    """Return (B, N, C, S + (m + 1) * C) bool, True where a query sees a key."""
    size, blocks = options.block_size, extra_count.shape[1]
    slots = jnp.arange(-options.memory_segments * size, size)  # positions relative to the queries' block
    distance = jnp.arange(size)[:, None] - slots[None]  # (C, (m + 1) * C)
    token_mask = distance >= 0
    if options.window:
        token_mask &= distance < options.window
    # Position 0 is the first token of the call; keys exist from position -past_length on.
    positions = slots + (start + jnp.arange(blocks)[:, None]) * size  # (N, (m + 1) * C)
    exists = positions >= -past_length[:, None, None]  # (B, N, (m + 1) * C)
    extra_exists = jnp.arange(extra_slots) < extra_count[..., None]  # (B, N, S)
    extra_mask = jnp.broadcast_to(
        extra_exists[:, :, None], (*extra_exists.shape[:2], size, extra_exists.shape[2])
    )
    return jnp.concatenate([extra_mask, token_mask & exists[:, :, None]], axis=-1)
