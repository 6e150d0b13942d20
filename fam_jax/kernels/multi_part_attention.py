"""Dense attention with one softmax over several groups of keys."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Part(NamedTuple):
    """One group of keys, with the queries in the RoPE frame of that group.

    The queries of all parts are the same vectors, rotated differently: a cached block of keys stays rotated relative to
    its own first token, so the query is rotated to match each block.
    """

    # (B, T, H, hd)
    q: jax.Array
    # (B, S, K, hd)
    k: jax.Array
    # (B, S, K, hd)
    v: jax.Array
    # Broadcasts to (B, T, S); True where a key is visible. None if all are.
    mask: jax.Array | None = None


def accumulation_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Return the dtype of softmax and sums: float32, or float64 for float64 inputs."""
    return jnp.promote_types(dtype, jnp.float32)


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
    """Return cap * tanh(x / cap), which lies within (-cap, cap); return x unchanged if cap is 0."""
    return cap * jnp.tanh(x / cap) if cap else x


def multi_part_attention(parts: Sequence[Part], *, softcap: float = 0.0) -> jax.Array:
    """Compute attention with one softmax over the keys of all `parts`.

    Scores are divided by sqrt(hd), then soft-capped. Every query must see at least one key. All scores are in memory
    at once, so call it with few queries (decoding, memory updates).

    Args:
      parts: groups of keys, all with the same number of queries.
      softcap: if positive, scores become softcap * tanh(scores / softcap).

    Returns:
      (B, T, H, hd) in the dtype of the queries.
    """
    probabilities = _probabilities(parts, softcap)
    batch, length, heads, head_dim = parts[0].q.shape
    out: jax.Array = jnp.zeros((), accumulation_dtype(parts[0].v.dtype))
    start = 0
    for part in parts:
        end = start + part.k.shape[1]
        p = probabilities[..., start:end].astype(part.v.dtype)
        out = out + jnp.einsum("bkgts,bskd->btkgd", p, part.v, preferred_element_type=out.dtype)
        start = end
    return out.reshape(batch, length, heads, head_dim).astype(parts[0].q.dtype)


def multi_part_weights(parts: Sequence[Part], *, softcap: float = 0.0) -> list[jax.Array]:
    """Return the weights by which :func:`multi_part_attention` adds up the values of each of the `parts`.

    Returns:
      For each part (B, T, H, S); over all parts together, the weights of a query's head sum to 1. Hidden keys have 0.
    """
    batch, length, heads, _ = parts[0].q.shape
    whole = jnp.moveaxis(_probabilities(parts, softcap), 3, 1).reshape(batch, length, heads, -1)
    ends = np.cumsum([part.k.shape[1] for part in parts])
    return jnp.split(whole, ends[:-1], axis=-1)


def _probabilities(parts: Sequence[Part], softcap: float) -> jax.Array:
    """Return (B, K, G, T, S) softmax over the keys of all parts, in their order."""
    scores = [_scores(part, softcap) for part in parts]
    return jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)


def _scores(part: Part, softcap: float) -> jax.Array:
    """Return (B, K, G, T, S) scaled scores, -inf where hidden."""
    batch, length, heads, head_dim = part.q.shape
    kv_heads = part.k.shape[2]
    dtype = accumulation_dtype(part.q.dtype)
    q = part.q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("btkgd,bskd->bkgts", q, part.k, preferred_element_type=dtype) * head_dim**-0.5
    scores = soft_cap(scores, softcap)
    if part.mask is not None:
        scores = jnp.where(part.mask[:, None, None], scores, -jnp.inf)
    return scores
