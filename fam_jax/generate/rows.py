"""Streams put together and taken apart: a memory of one stream can branch into many."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fam_jax.config import UserError
from fam_jax.model import Memory


def select_rows(memory: Memory, rows: Sequence[int]) -> Memory:
    """The memory of the streams `rows`, in that order; a stream may be taken more than once.

    Raises:
      UserError: there is no such stream.
    """
    count = memory.filled.shape[0]
    wrong = [row for row in rows if not 0 <= row < count]
    if wrong or len(rows) == 0:
        raise UserError(
            f"rows: expected some of 0 to {count - 1}, as the memory holds {count} streams, got {[*rows]}"
        )
    chosen = np.asarray(rows, np.int32)
    return _join([memory], lambda parts, axis: jnp.take(parts[0], chosen, axis=axis))


def join_rows(memories: Sequence[Memory]) -> Memory:
    """One memory of the streams of all `memories`, which belong to one model."""
    return _join(memories, jnp.concatenate)


def _join(memories: Sequence[Memory], merge: Callable[[list[jax.Array], int], jax.Array]) -> Memory:
    def merge_leaf(path: tuple[Any, ...], *leaves: jax.Array) -> jax.Array:
        in_layers = jax.tree_util.keystr(path[:1], simple=True) == "layers"  # arrays with a leading L axis
        return merge([*leaves], 1 if in_layers else 0)

    return jax.tree_util.tree_map_with_path(merge_leaf, *memories)
