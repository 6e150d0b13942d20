"""Block attention with the mask written out over all pairs of query and key: quadratic, slow, easy to check by eye."""

import jax
import jax.numpy as jnp

from fam_jax.kernels.arguments import BlockInputs, BlockOptions, join_past
from fam_jax.kernels.multi_part_attention import accumulation_dtype, soft_cap


def reference_block_attention(inputs: BlockInputs, options: BlockOptions) -> jax.Array:
    """Compute :func:`fam_jax.kernels.block_attention` by its definition."""
    q, k, v, extra_k, extra_v, _, past_length, extra_count = join_past(inputs, options)
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    dtype = accumulation_dtype(q.dtype)

    query_position = jnp.arange(length)[:, None]  # (T, 1); the past has negative positions
    key_position = jnp.arange(length - k.shape[1], length)[None, :]  # (1, S)
    distance = query_position - key_position
    query_block, key_block = query_position // options.block_size, key_position // options.block_size
    same_block = query_block == key_block  # (T, S)
    visible = (distance >= 0) & (query_block - key_block <= options.memory_segments)
    if options.window:
        visible &= distance < options.window
    exists = key_position >= -past_length[:, None]  # (B, S)
    token_mask = visible[None] & exists[:, None]  # (B, T, S)

    extra_blocks, extra_slots = extra_k.shape[1:3]
    own_extra = (query_block == jnp.arange(extra_blocks))[None, :, :, None]
    extra_mask = own_extra & (jnp.arange(extra_slots) < extra_count[..., None])[:, None]  # (B, T, N, S')
    extra_mask = extra_mask.reshape(batch, length, -1)

    def scores(keys: jax.Array) -> jax.Array:
        grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
        products = jnp.einsum("btkgd,bskd->bkgts", grouped, keys, preferred_element_type=dtype)
        return soft_cap(products * head_dim**-0.5, options.softcap)

    def weighted(p: jax.Array, values: jax.Array) -> jax.Array:
        return jnp.einsum("bkgts,bskd->btkgd", p.astype(values.dtype), values, preferred_element_type=dtype)

    token_scores = scores(k)
    if options.stop_gradient:
        token_scores = jnp.where(same_block, token_scores, scores(jax.lax.stop_gradient(k)))
    extra_scores = scores(extra_k.reshape(batch, -1, kv_heads, head_dim))
    all_scores = jnp.concatenate(
        [
            jnp.where(extra_mask[:, None, None], extra_scores, -jnp.inf),
            jnp.where(token_mask[:, None, None], token_scores, -jnp.inf),
        ],
        axis=-1,
    )
    p = jax.nn.softmax(all_scores, axis=-1)
    extra_p, token_p = jnp.split(p, [extra_blocks * extra_slots], axis=-1)
    out = weighted(extra_p, extra_v.reshape(batch, -1, kv_heads, head_dim))
    if options.stop_gradient:
        out += weighted(jnp.where(same_block, token_p, 0), v)
        out += weighted(jnp.where(same_block, 0, token_p), jax.lax.stop_gradient(v))
    else:
        out += weighted(token_p, v)
    return out.reshape(q.shape).astype(q.dtype)
