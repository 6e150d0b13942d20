"""A layer over a few tokens anywhere in their blocks: decoding, and prompts of different lengths in one batch.

A *piece* never crosses a block border, so within it memory is read only. It is extended once after all layers, and the
FAM is updated there for the rows whose block the piece has completed.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fam_jax.config import ModelConfig
from fam_jax.kernels import Part, multi_part_attention
from fam_jax.model.fam import local_rotation, update_fam
from fam_jax.model.layer_types import Kind, kind_of_layers, kinds_of, visible_segments
from fam_jax.model.layers import DecoderLayer
from fam_jax.model.memory import LayerMemory, Memory
from fam_jax.model.rope import Rotation, rotate


class PieceFrames(NamedTuple):
    """Rotations of the piece's queries in the frames of what they see, and what of it exists; per kind of layer."""

    own: Rotation  # (B, W, 1, hd/2), in the frame of their own block
    past: list[
        Rotation
    ]  # m of them, or as many as are visible: in the frame of each cached block, oldest first
    fams: list[Rotation]  # R of them: in the frame of each FAM, newest first
    block_mask: jax.Array  # (B, W, C) cached keys of the unfinished block
    piece_mask: jax.Array  # (1, W, W)
    past_masks: list[jax.Array]  # as many of (B, W, C)
    fam_masks: list[jax.Array]  # R of (B, 1, 1)


def piece_frames(kind: Kind, memory: Memory, width: int) -> PieceFrames:
    """Frames of a piece of `width` tokens that follows what each row has in its unfinished block."""
    config, rope = kind
    size, segments, previous = config.block_size, visible_segments(config), config.fam_previous_blocks
    position = memory.filled[:, None] + np.arange(width)  # (B, W) in the block
    own = rope.at(position)
    if config.fam_positions == "zero":
        fams = [own.after(rope.at(memory.blocks, unit=size)[:, None])] * previous
    else:
        fams = [own.after(rope.static(np.asarray(r * size))) for r in range(previous)]

    def near(age: int) -> jax.Array:  # (B, W, C): within the window, for keys of the block `age` blocks back
        distance = position[:, :, None] + age * size - np.arange(size)
        return distance < config.window if config.window else jnp.ones_like(distance, bool)

    ages = range(segments, 0, -1)
    piece_distance = np.arange(width)[:, None] - np.arange(width)
    piece_mask = (piece_distance >= 0) & (piece_distance < (config.window or width))
    return PieceFrames(
        own=own,
        past=[own.after(rope.static(np.asarray(age * size))) for age in ages],
        fams=fams,
        block_mask=near(0) & (np.arange(size) < memory.filled[:, None, None]),
        piece_mask=jnp.asarray(piece_mask)[None],
        past_masks=[near(age) & (memory.blocks >= age)[:, None, None] for age in ages],
        fam_masks=[(memory.blocks >= r)[:, None, None] for r in range(previous)],
    )


def read_piece(
    layer: DecoderLayer,
    kinds: Sequence[tuple[Kind, PieceFrames]],
    which: jax.Array,
    x: jax.Array,
    memory: LayerMemory,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """One layer, of kind `which`, over a piece x (B, W, D).

    Returns:
      (B, W, D) activations, and the piece's keys (in the frame of their block) and values (B, W, K, hd).
    """
    branches = [functools.partial(_attend, kind.config, frames) for kind, frames in kinds]
    q, k, v = layer.project(x)
    attended, k = jax.lax.switch(which, branches, q, k, v, memory)
    return layer.finish(attended, x), (k, v)


def _attend(
    config: ModelConfig, frames: PieceFrames, q: jax.Array, k: jax.Array, v: jax.Array, memory: LayerMemory
) -> tuple[jax.Array, jax.Array]:
    """What differs between kinds of layers: (B, W, H, hd) attended values, and the rotated keys."""
    own_q, k = rotate(q, frames.own), rotate(k, frames.own)
    parts = [
        Part(own_q, memory.block_keys, memory.block_values, frames.block_mask),
        Part(own_q, k, v, frames.piece_mask),
    ]
    unseen = memory.keys.shape[1] - len(frames.past)
    past_keys, past_values = memory.keys[:, unseen:], memory.values[:, unseen:]
    if config.stop_gradient:
        past_keys, past_values = jax.lax.stop_gradient((past_keys, past_values))
    for j, (rotation, mask) in enumerate(zip(frames.past, frames.past_masks, strict=True)):
        parts.append(Part(rotate(q, rotation), past_keys[:, j], past_values[:, j], mask))
    if config.fam_length:
        for r, (rotation, mask) in enumerate(zip(frames.fams, frames.fam_masks, strict=True)):
            parts.append(Part(rotate(q, rotation), memory.fam_keys[:, r], memory.fam_values[:, r], mask))
    return multi_part_attention(parts, softcap=config.attention_softcap), k


def extend_memory(memory: Memory, keys: jax.Array, values: jax.Array, count: jax.Array) -> Memory:
    """Writes the first `count` (B,) of a piece's keys and values (L, B, W, K, hd) into the unfinished block."""
    batch, width = keys.shape[1:3]
    size = memory.layers.block_keys.shape[2]
    slot = memory.filled[:, None] + np.arange(width)
    slot = jnp.where(np.arange(width) < count[:, None], slot, size)  # beyond the end: dropped
    rows = np.arange(batch)[:, None]

    def write(cache: jax.Array, fresh: jax.Array) -> jax.Array:
        return cache.at[:, rows, slot].set(fresh, mode="drop")

    layers = dataclasses.replace(
        memory.layers,
        block_keys=write(memory.layers.block_keys, keys),
        block_values=write(memory.layers.block_values, values),
    )
    return dataclasses.replace(memory, layers=layers, filled=memory.filled + count)


def close_blocks(layers: DecoderLayer, config: ModelConfig, memory: Memory) -> Memory:
    """For the rows whose block is full: updates FAM and moves the block into the memory segment.

    `layers` are the stacked parameters. Costs nothing, beyond the test, while no row's block is full.
    """
    full = memory.filled == config.block_size

    def close(memory: Memory) -> Memory:
        graphdef, state = nnx.split(layers)

        def body(carry: None, xs: tuple[nnx.State, LayerMemory, jax.Array]) -> tuple[None, LayerMemory]:
            layer_state, layer_memory, which = xs
            layer = nnx.merge(graphdef, layer_state)
            branches = [functools.partial(_close_layer, layer, kind) for kind in kinds_of(config)]
            closed = jax.lax.switch(which, branches, layer_memory, memory)
            keep = jax.tree.map(
                lambda new, old: jnp.where(full.reshape(-1, *[1] * (new.ndim - 1)), new, old),
                closed,
                layer_memory,
            )
            return carry, keep

        _, new_layers = jax.lax.scan(body, None, (state, memory.layers, kind_of_layers(config)))
        return Memory(
            layers=new_layers,
            carries_context=memory.carries_context | (full & (config.fam_length > 0)),
            blocks=memory.blocks + full,
            filled=jnp.where(full, 0, memory.filled),
        )

    return jax.lax.cond(full.any(), close, lambda memory: memory, memory)


def _close_layer(layer: DecoderLayer, kind: Kind, memory: LayerMemory, rows: Memory) -> LayerMemory:
    config, rope = kind
    if config.fam_length:
        own = local_rotation(config, rope)
        rotation = own[None]
        if config.fam_positions == "zero":
            rotation = rope.at(-rows.blocks, unit=config.block_size)[:, None]  # (B, 1, 1, hd/2): all M alike

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            q, k = rotate(q, rotation), rotate(k, rotation)
            parts = [Part(q, k, v), Part(q, memory.block_keys, memory.block_values)]
            return multi_part_attention(parts, softcap=config.attention_softcap)

        fam, _ = update_fam(layer, memory.fam, rows.carries_context, attend)
        _, k, v = layer.project(fam)
        memory = dataclasses.replace(
            memory,
            fam=fam,
            fam_keys=jnp.concatenate([rotate(k, own)[:, None], memory.fam_keys[:, :-1]], axis=1),
            fam_values=jnp.concatenate([v[:, None], memory.fam_values[:, :-1]], axis=1),
        )
    return dataclasses.replace(
        memory,
        keys=jnp.concatenate([memory.keys, memory.block_keys[:, None]], axis=1)[:, 1:],
        values=jnp.concatenate([memory.values, memory.block_values[:, None]], axis=1)[:, 1:],
    )
