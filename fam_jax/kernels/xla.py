"""Block attention in plain XLA operations: runs everywhere, never forms scores outside the visible blocks.

Each block of queries is folded into the batch beside the m + 1 blocks of keys that it sees. Where the scores of all
blocks together would be large, groups of blocks are taken one after the other and recomputed in the backward pass.
"""

import jax
import jax.numpy as jnp

from fam_jax.kernels.multi_part_attention import accumulation_dtype, soft_cap
from fam_jax.kernels.shapes import BlockShape, fill_in

# Bytes of scores that may exist at one time, per call.
SCORE_BYTES = 256 * 2**20


def xla_block_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    fam_k: jax.Array,
    fam_v: jax.Array,
    past_length: jax.Array | None,
    fam_count: jax.Array | None,
    shape: BlockShape,
) -> jax.Array:
    """See :func:`fam_jax.kernels.block_attention`; arguments as there."""
    k, v, past_length, fam_count = fill_in(q, k, v, fam_k, past_length, fam_count, shape)
    batch, length, heads, head_dim = q.shape
    size, segments, kv_heads = shape.block_size, shape.memory_segments, k.shape[2]
    blocks = fam_k.shape[1]
    tail = ((0, 0), (0, blocks * size - length), (0, 0), (0, 0))  # the last block may not be full
    q = jnp.pad(q, tail).reshape(batch, blocks, size, kv_heads, heads // kv_heads, head_dim)
    k, v = (jnp.pad(x, tail).reshape(batch, segments + blocks, size, kv_heads, head_dim) for x in (k, v))

    group = _blocks_per_group(batch, heads, blocks, size, (segments + 1) * size + fam_k.shape[2])

    def attend(start: jax.Array | int) -> jax.Array:
        def pick(x: jax.Array, count: int) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, start, count, axis=1) if group < blocks else x

        return _attend(
            pick(q, group), pick(k, group + segments), pick(v, group + segments), pick(fam_k, group),
            pick(fam_v, group), pick(fam_count, group), past_length, start, shape,
        )  # fmt: skip

    if group == blocks:
        out = attend(0)
    else:
        out = jax.lax.map(
            jax.checkpoint(attend), jnp.arange(0, blocks, group)
        )  # (N / group, B, group, C, ...)
        out = jnp.moveaxis(out, 0, 1)
    return out.reshape(batch, blocks * size, heads, head_dim)[:, :length]


def _blocks_per_group(batch: int, heads: int, blocks: int, size: int, keys: int) -> int:
    """The largest divisor of `blocks` whose scores stay within SCORE_BYTES."""
    per_block = 4 * batch * heads * size * keys
    return max(
        n for n in range(1, blocks + 1) if blocks % n == 0 and (n == 1 or n * per_block <= SCORE_BYTES)
    )


def _attend(
    q: jax.Array,  # (B, N, C, K, G, hd)
    k: jax.Array,  # (B, m + N, C, K, hd)
    v: jax.Array,
    fam_k: jax.Array,  # (B, N, S, K, hd)
    fam_v: jax.Array,
    fam_count: jax.Array,  # (B, N)
    past_length: jax.Array,  # (B,)
    start: jax.Array | int,  # index of the first of the N blocks
    shape: BlockShape,
) -> jax.Array:
    size, segments, blocks = shape.block_size, shape.memory_segments, q.shape[1]
    dtype = accumulation_dtype(q.dtype)

    def visible(x: jax.Array) -> list[jax.Array]:
        shifted = [x[:, j : j + blocks] for j in range(segments + 1)]
        return (
            [jax.lax.stop_gradient(s) for s in shifted[:-1]] + shifted[-1:]
            if shape.stop_gradient
            else shifted
        )

    keys = jnp.concatenate([fam_k, *visible(k)], axis=2)  # (B, N, S + (m + 1) * C, K, hd)
    values = jnp.concatenate([fam_v, *visible(v)], axis=2)

    fam_slots = fam_k.shape[2]
    distance = jnp.arange(size)[:, None] - jnp.arange(-segments * size, size)[None]  # (C, (m + 1) * C)
    token_mask = distance >= 0
    if shape.window:
        token_mask &= distance < shape.window
    # Block n is the (start + n)-th of the call: its oldest visible slot exists if past_length reaches back so far.
    slot_position = (
        jnp.arange(-segments * size, size) + (start + jnp.arange(blocks)[:, None]) * size
    )  # (N, (m+1)*C)
    exists = slot_position >= -past_length[:, None, None]  # (B, N, (m + 1) * C)
    fam_exists = jnp.arange(fam_slots) < fam_count[..., None]  # (B, N, S)
    mask = jnp.concatenate(
        [
            jnp.broadcast_to(fam_exists[:, :, None], (*fam_exists.shape[:2], size, fam_slots)),
            token_mask & exists[:, :, None],
        ],
        axis=-1,
    )  # (B, N, C, S + (m + 1) * C)

    scores = jnp.einsum("bnckgd,bnskd->bnkgcs", q, keys, preferred_element_type=dtype) * q.shape[-1] ** -0.5
    scores = jnp.where(mask[:, :, None, None], soft_cap(scores, shape.softcap), -jnp.inf)
    # The softmax is normalised after the product with the values: C x hd divisions in place of C x S.
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    out = jnp.einsum(
        "bnkgcs,bnskd->bnckgd", weights.astype(values.dtype), values, preferred_element_type=dtype
    )
    normaliser = weights.sum(axis=-1).transpose(0, 1, 4, 2, 3)[..., None]  # (B, N, C, K, G, 1)
    return (out / normaliser).astype(q.dtype)
