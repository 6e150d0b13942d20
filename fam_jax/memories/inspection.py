"""What tokens, and the rows of a memory, attend to in one layer: for any memory, while it reads and writes as always.

A memory attends by `Memory.attend_parts` and `Memory.attend_to_write`. The functions of this file read and write
through a copy of the memory in which these methods also hand out the weights.
"""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fam_jax.kernels import Part, multi_part_weights
from fam_jax.layers.decoder_layer import DecoderLayer
from fam_jax.memories.interface import Memory, Stream, Tail
from fam_jax.memories.window_cache import Position


class Attention(NamedTuple):
    """What the tokens of a block attend to in one layer. The weights of a token's head sum to 1."""

    # (B, C, H, S) each key of the memory; S = 0 if the layer's tokens do not attend to a memory.
    memory: jax.Array
    # (B, C, H) all keys of past blocks together.
    past: jax.Array
    # (B, C, H, C) the tokens of their own block.
    own: jax.Array


class WriteAttention(NamedTuple):
    """What the rows of a memory attend to in one layer when a block is written. The weights of a head sum to 1."""

    # (B, M, H, S) rows of the memory itself.
    memory: jax.Array
    # (B, M, H, C) tokens of the block.
    block: jax.Array


def inspect_block(
    memory: Memory, layer: DecoderLayer, x: jax.Array, state: Any, at: Any
) -> tuple[jax.Array, Tail, Attention]:
    """Read a whole block (B, C, D) from a block border as `Memory.read_piece` does; also return what it attends to.

    Raises:
      NotImplementedError: the memory does not attend by `Memory.attend_parts`.
    """
    seen: list[Attention] = []

    def attend_parts(window: Sequence[Part], extra: Sequence[Part]) -> jax.Array:
        weights = multi_part_weights([*window, *extra], softcap=memory.model.attention_softcap)
        # The window's parts are the unfinished block (empty at a border), the piece itself, and past blocks.
        own, past, rest = weights[1], weights[2 : len(window)], weights[len(window) :]
        none = own[..., :0]
        seen.append(
            Attention(
                memory=jnp.concatenate([none, *rest], axis=-1),
                past=jnp.concatenate([none, *past], axis=-1).sum(axis=-1),
                own=own,
            )
        )
        return memory.attend_parts(window, extra)

    out, tail = _with_method(memory, "attend_parts", attend_parts).read_piece(layer, x, state, at)
    if not seen:
        raise NotImplementedError(f"{type(memory).__name__}: its tokens do not attend by attend_parts")
    return out, tail, seen[0]


def inspect_close(
    memory: Memory, layer: DecoderLayer, state: Any, stream: Stream, position: Position
) -> tuple[Any, Stream, WriteAttention | None]:
    """Write a block as `Memory.close_block` does; also return what the memory's rows attend to, if they do."""
    seen: list[WriteAttention] = []

    def attend_to_write(itself: Sequence[Part], block: Part) -> jax.Array:
        *own, tokens = multi_part_weights([*itself, block], softcap=memory.model.attention_softcap)
        seen.append(WriteAttention(jnp.concatenate(own, axis=-1), tokens))
        return memory.attend_to_write(itself, block)

    watched = _with_method(memory, "attend_to_write", attend_to_write)
    state, stream = watched.close_block(layer, state, stream, position)
    return state, stream, seen[0] if seen else None


def _with_method(memory: Memory, name: str, method: Any) -> Memory:
    """Return a copy of a memory with another method in place of its own."""
    copied = copy.copy(memory)
    setattr(copied, name, method)
    return copied
