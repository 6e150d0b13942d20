"""The arguments of block attention as records, and their checks.

Letters in shapes: B batch, T tokens, C block size, N blocks, m memory segments, P past slots, S extra keys of a block,
H query heads, K key/value heads, G = H / K, hd head width.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fam_jax.config import ceil_div


class BlockInputs(NamedTuple):
    """Arrays of one call; :func:`fam_jax.kernels.block_attention` documents them."""

    # (B, T, H, hd)
    q: jax.Array
    # (B, P + T, K, hd)
    k: jax.Array
    v: jax.Array
    # (B, N, S, K, hd)
    extra_k: jax.Array
    extra_v: jax.Array
    # (B,) int32 array, or None if all past slots are filled
    past_length: Any
    # (B, N) int32 array, or None if all extra keys exist
    extra_count: Any

    @property
    def past_slots(self) -> int:
        """P."""
        return self.k.shape[1] - self.q.shape[1]


class BlockOptions(NamedTuple):
    """Static options of one call."""

    # C
    block_size: int
    # m
    memory_segments: int
    # Distance in tokens from which keys are hidden; 0 sets no limit.
    window: int
    stop_gradient: bool
    # Scores become softcap * tanh(scores / softcap); 0 leaves them unchanged.
    softcap: float = 0.0


def check_shapes(inputs: BlockInputs, options: BlockOptions) -> None:
    """Raise ValueError if shapes and options contradict each other."""
    q, k, v, extra_k, extra_v = inputs[:5]
    length, past = q.shape[1], inputs.past_slots
    blocks = ceil_div(length, options.block_size)
    room = options.memory_segments * options.block_size
    if past % options.block_size or not 0 <= past <= room or k.shape != v.shape:
        raise ValueError(
            f"k {k.shape} and v {v.shape} do not match q {q.shape}; both need {length} tokens after at most "
            f"{options.memory_segments} whole blocks of {options.block_size} past slots"
        )
    if extra_k.shape[1] != blocks or extra_k.shape != extra_v.shape:
        raise ValueError(
            f"extra keys {extra_k.shape} and values {extra_v.shape} do not match; both need the shape "
            f"(batch, {blocks} blocks, keys, heads, width)"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"{k.shape[2]} key/value heads do not divide {q.shape[2]} query heads; use a divisor as the number of "
            "key/value heads"
        )


def fill_counts(inputs: BlockInputs) -> BlockInputs:
    """Return `inputs` with `past_length` and `extra_count` as arrays where they are None."""
    past_length, extra_count = inputs.past_length, inputs.extra_count
    if past_length is None:
        past_length = jnp.full(inputs.q.shape[0], inputs.past_slots, jnp.int32)
    if extra_count is None:
        extra_count = jnp.full(inputs.extra_k.shape[:2], inputs.extra_k.shape[2], jnp.int32)
    return inputs._replace(past_length=past_length, extra_count=extra_count)


def fill_past(inputs: BlockInputs, options: BlockOptions) -> BlockInputs:
    """Return `inputs` with all m * C past slots (the added ones empty) and both counts as arrays."""
    missing = options.memory_segments * options.block_size - inputs.past_slots
    k, v = (jnp.pad(x, ((0, 0), (missing, 0), (0, 0), (0, 0))) for x in (inputs.k, inputs.v))
    return fill_counts(inputs)._replace(k=k, v=v)
