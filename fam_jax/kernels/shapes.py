"""What is static about a call of block attention, and what it may leave out."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class BlockShape(NamedTuple):
    """What is static about a call; every implementation takes it."""

    block_size: int  # C
    memory_segments: int  # m
    window: int  # 0 = no further limit
    stop_gradient: bool
    softcap: float = 0.0  # scores are softcap * tanh(scores / softcap); 0 = as they are


def check_shapes(
    q: jax.Array, k: jax.Array, v: jax.Array, fam_k: jax.Array, fam_v: jax.Array, shape: BlockShape
) -> None:
    """Raises ValueError if the arguments of block attention contradict each other."""
    length, past = q.shape[1], k.shape[1] - q.shape[1]
    blocks = -(-length // shape.block_size)
    room = shape.memory_segments * shape.block_size
    if past % shape.block_size or not 0 <= past <= room or k.shape != v.shape:
        raise ValueError(
            f"keys {k.shape} and values {v.shape} must hold up to {shape.memory_segments} blocks of past slots and "
            f"{length} tokens"
        )
    if fam_k.shape[1] != blocks or fam_k.shape != fam_v.shape:
        raise ValueError(
            f"feedback keys {fam_k.shape} and values {fam_v.shape} must be given for {blocks} blocks"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{k.shape[2]} key/value heads do not divide {q.shape[2]} query heads")


def fill_in(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    fam_k: jax.Array,
    past_length: jax.Array | None,
    fam_count: jax.Array | None,
    shape: BlockShape,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(k, v, past_length, fam_count) with all m * C past slots, and counts where they were left out."""
    slots = k.shape[1] - q.shape[1]
    missing = shape.memory_segments * shape.block_size - slots
    k, v = (jnp.pad(x, ((0, 0), (missing, 0), (0, 0), (0, 0))) for x in (k, v))
    if past_length is None:
        past_length = jnp.full(q.shape[0], slots, jnp.int32)
    if fam_count is None:
        fam_count = jnp.full(fam_k.shape[:2], fam_k.shape[2], jnp.int32)
    return k, v, past_length, fam_count
