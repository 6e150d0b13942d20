"""Dense attention with one softmax over several groups of keys."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Part(NamedTuple):
    """A group of keys, with the queries as that group sees them.

    The queries of different parts are the same vectors in different RoPE frames: a cached block of keys stays
    rotated relative to its own first token, for ever, and it is the query that is turned towards it.
    """

    q: jax.Array  # (B, T, H, hd)
    k: jax.Array  # (B, S, K, hd)
    v: jax.Array  # (B, S, K, hd)
    mask: jax.Array | None = None  # broadcasts to (B, T, S); True where visible


def accumulation_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Softmax and sums run in float32, or in float64 where the inputs are that."""
    return jnp.promote_types(dtype, jnp.float32)


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
    """Keeps x within (-cap, cap): cap * tanh(x / cap); 0 leaves it as it is."""
    return cap * jnp.tanh(x / cap) if cap else x


def multi_part_attention(parts: Sequence[Part], *, softcap: float = 0.0) -> jax.Array:
    """Softmax attention over the keys of all `parts` together; scores are divided by sqrt(hd), then soft-capped.

    Every query must see at least one key. Meant for short queries (decoding, FAM): the scores are materialised.

    Returns:
      (B, T, H, hd), in the dtype of the queries.
    """
    scores = [_scores(part, softcap) for part in parts]
    probabilities = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
    batch, length, heads, head_dim = parts[0].q.shape
    out: jax.Array = jnp.zeros((), accumulation_dtype(parts[0].v.dtype))
    start = 0
    for part in parts:
        end = start + part.k.shape[1]
        p = probabilities[..., start:end].astype(part.v.dtype)
        out = out + jnp.einsum("bkgts,bskd->btkgd", p, part.v, preferred_element_type=out.dtype)
        start = end
    return out.reshape(batch, length, heads, head_dim).astype(parts[0].q.dtype)


def _scores(part: Part, softcap: float) -> jax.Array:
    """(B, K, G, T, S) scaled scores, -inf where hidden."""
    batch, length, heads, head_dim = part.q.shape
    kv_heads = part.k.shape[2]
    dtype = accumulation_dtype(part.q.dtype)
    q = part.q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("btkgd,bskd->bkgts", q, part.k, preferred_element_type=dtype) * head_dim**-0.5
    scores = soft_cap(scores, softcap)
    if part.mask is not None:
        scores = jnp.where(part.mask[:, None, None], scores, -jnp.inf)
    return scores
