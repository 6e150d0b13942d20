"""Block attention with the mask written out over all pairs: slow, quadratic, and easy to check by eye."""

import jax
import jax.numpy as jnp

from fam_jax.kernels.multi_part_attention import accumulation_dtype, soft_cap
from fam_jax.kernels.shapes import BlockShape, fill_in


def reference_block_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    fam_k: jax.Array,
    fam_v: jax.Array,
    past_length: jax.Array | None,
    fam_count: jax.Array | None,
    shape: BlockShape,
) -> jax.Array:
    """The definition of :func:`fam_jax.kernels.block_attention`; arguments as there."""
    k, v, past_length, fam_count = fill_in(q, k, v, fam_k, past_length, fam_count, shape)
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    dtype = accumulation_dtype(q.dtype)

    query_position = jnp.arange(length)[:, None]  # (T, 1); the past has negative positions
    key_position = jnp.arange(length - k.shape[1], length)[None, :]  # (1, S)
    distance = query_position - key_position
    query_block, key_block = query_position // shape.block_size, key_position // shape.block_size
    same_block = query_block == key_block  # (T, S)
    visible = (distance >= 0) & (query_block - key_block <= shape.memory_segments)
    if shape.window:
        visible &= distance < shape.window
    exists = key_position >= -past_length[:, None]  # (B, S)
    token_mask = visible[None] & exists[:, None]  # (B, T, S)

    fam_blocks, fam_slots = fam_k.shape[1:3]
    own_fam = (query_block == jnp.arange(fam_blocks))[None, :, :, None]
    fam_mask = own_fam & (jnp.arange(fam_slots) < fam_count[..., None])[:, None]  # (B, T, N, S')
    fam_mask = fam_mask.reshape(batch, length, -1)

    def scores(keys: jax.Array) -> jax.Array:
        grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
        products = jnp.einsum("btkgd,bskd->bkgts", grouped, keys, preferred_element_type=dtype)
        return soft_cap(products * head_dim**-0.5, shape.softcap)

    def weighted(p: jax.Array, values: jax.Array) -> jax.Array:
        return jnp.einsum("bkgts,bskd->btkgd", p.astype(values.dtype), values, preferred_element_type=dtype)

    token_scores = scores(k)
    if shape.stop_gradient:
        token_scores = jnp.where(same_block, token_scores, scores(jax.lax.stop_gradient(k)))
    fam_scores = scores(fam_k.reshape(batch, -1, kv_heads, head_dim))
    all_scores = jnp.concatenate(
        [
            jnp.where(fam_mask[:, None, None], fam_scores, -jnp.inf),
            jnp.where(token_mask[:, None, None], token_scores, -jnp.inf),
        ],
        axis=-1,
    )
    p = jax.nn.softmax(all_scores, axis=-1)
    fam_p, token_p = jnp.split(p, [fam_blocks * fam_slots], axis=-1)
    out = weighted(fam_p, fam_v.reshape(batch, -1, kv_heads, head_dim))
    if shape.stop_gradient:
        out += weighted(jnp.where(same_block, token_p, 0), v)
        out += weighted(jnp.where(same_block, 0, token_p), jax.lax.stop_gradient(v))
    else:
        out += weighted(token_p, v)
    return out.reshape(q.shape).astype(q.dtype)
