"""A layer over whole blocks: all tokens at once, the FAM chain, all tokens at once (training and prefill)."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fam_jax.config import ModelConfig
from fam_jax.kernels import block_attention
from fam_jax.model.fam import ChainAttention, ChainInputs, local_rotation, run_chain
from fam_jax.model.layer_types import Kind, visible_segments
from fam_jax.model.layers import DecoderLayer
from fam_jax.model.memory import LayerMemory, Memory
from fam_jax.model.rope import Rotation, rotate, rotate_tokens


class ChunkFrames(NamedTuple):
    """Positions and counts of a chunk that starts at a block border: the same for every layer of a kind.

    The frame of the chunk has its zero at the chunk's first token, or `offset` tokens before it.
    """

    tokens: Rotation  # (B or 1, T, 1, hd/2)
    past: Rotation  # (B or 1, visible cached blocks, 1, 1, hd/2), from each block's own frame
    fams: Rotation  # (B or 1, R + full blocks, 1, 1, hd/2), from the own frame of F_{-R} .. F_last
    own_tokens: Rotation  # (C, 1, hd/2), in the block's own frame
    own_fam: Rotation  # (M, 1, hd/2), in the own frame of a FAM
    past_length: jax.Array | None  # (B,) existing tokens of the visible cached blocks; None: there are none
    fam_count: jax.Array | None  # (B, N) existing feedback keys; None: all of them
    carries_context: jax.Array  # (B,) bool


def chunk_frames(kind: Kind, memory: Memory, length: int, offset: jax.Array | None) -> ChunkFrames:
    """Frames of a chunk of `length` tokens; `offset` is (B,) int32, the random position offset, or None."""
    config, rope = kind
    size, previous = config.block_size, config.fam_previous_blocks
    cached = min(memory.layers.keys.shape[2], visible_segments(config))
    full, blocks = length // size, -(-length // size)
    shift = jnp.zeros(1, jnp.int32) if offset is None else offset
    fam_blocks = np.arange(-(previous - 1), full + 1)  # the block that follows each FAM
    if config.fam_positions == "zero":
        # Position zero of the stream lies as many blocks before the chunk as the row has read.
        fams = rope.at(-memory.blocks, unit=size)[:, None, None]
        fams = fams.map(lambda x: jnp.broadcast_to(x, (x.shape[0], len(fam_blocks), *x.shape[2:])))
    else:
        fams = rope.at(shift[:, None] + size * fam_blocks)[:, :, None]
    existing = jnp.minimum(memory.blocks[:, None] + np.arange(1, blocks + 1), previous)
    return ChunkFrames(
        tokens=rope.at(shift[:, None] + np.arange(length)),
        past=rope.at(shift[:, None] + size * np.arange(-cached, 0))[:, :, None],
        fams=fams,
        own_tokens=rope.static(np.arange(size)),
        own_fam=local_rotation(config, rope),
        past_length=jnp.minimum(memory.blocks, cached) * size if cached else None,
        fam_count=existing * config.fam_length if previous > 1 else None,
        carries_context=memory.carries_context,
    )


def read_blocks(
    layer: DecoderLayer,
    kinds: Sequence[tuple[Kind, ChunkFrames]],
    which: jax.Array,
    x: jax.Array,
    memory: LayerMemory,
    start_fam: jax.Array,
) -> tuple[jax.Array, LayerMemory]:
    """One layer over a chunk whose first token begins a block (algorithm 2 of the paper, rearranged).

    Args:
      layer: the layer's parameters.
      kinds: of the model's layers, with the frames of the chunk.
      which: () int32, the kind of this layer.
      x: (B, T, D) activations; T need not be a multiple of C.
      memory: this layer's, of streams that all stand at a block border.
      start_fam: (B, M, D) FAM before the first block.

    Returns:
      (B, T, D) activations for the next layer, and the layer's memory after the chunk.
    """
    branches = [functools.partial(_attend, layer, kind.config, frames) for kind, frames in kinds]
    attended, memory = jax.lax.switch(which, branches, *layer.project(x), memory, start_fam)
    return layer.finish(attended, x), memory


def _attend(
    layer: DecoderLayer,
    config: ModelConfig,
    frames: ChunkFrames,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    memory: LayerMemory,
    start_fam: jax.Array,
) -> tuple[jax.Array, LayerMemory]:
    """What differs between kinds of layers: (B, T, H, hd) attended values, and the memory after the chunk."""
    rotated = rotate_tokens(k, frames.tokens, config.attention)
    fam, fam_k, fam_v, memory = _read_fam(layer, config, rotated, v, memory, start_fam, frames)

    segments = visible_segments(config)
    unseen = max(memory.keys.shape[1] - segments, 0)
    past_k = rotate(memory.keys[:, unseen:], frames.past).reshape(k.shape[0], -1, *k.shape[2:])
    past_v = memory.values[:, unseen:].reshape(past_k.shape)
    attended = block_attention(
        rotate_tokens(q, frames.tokens, config.attention),
        jnp.concatenate([past_k, rotated], axis=1),
        jnp.concatenate([past_v, v], axis=1),
        fam_k,
        fam_v,
        frames.past_length,
        frames.fam_count,
        block_size=config.block_size,
        memory_segments=segments,
        window=config.window,
        stop_gradient=config.stop_gradient,
        softcap=config.attention_softcap,
        implementation=config.attention,
    )
    return attended, _remember(config, dataclasses.replace(memory, fam=fam), k, v, frames)


def _read_fam(
    layer: DecoderLayer,
    config: ModelConfig,
    k: jax.Array,
    v: jax.Array,
    memory: LayerMemory,
    start_fam: jax.Array,
    frames: ChunkFrames,
) -> tuple[jax.Array, jax.Array, jax.Array, LayerMemory]:
    """The FAM chain over the complete blocks of rotated keys and values (B, T, K, hd).

    Returns:
      The last FAM; the feedback keys (rotated) and values (B, N, R * M, K, hd) that each block sees, newest FAM first;
      the memory with the last R of them.
    """
    batch, length, kv_heads, head_dim = k.shape
    size, previous = config.block_size, config.fam_previous_blocks
    blocks = -(-length // size)
    if config.fam_length == 0:
        nothing = jnp.zeros((batch, blocks, 0, kv_heads, head_dim), k.dtype)
        return start_fam, nothing, nothing, memory

    fam, chain_k, chain_v = _update_by_block(layer, config, k, v, start_fam, frames)
    _, last_k, last_v = layer.project(fam)

    # All FAMs in order of time, in their own frames: older ones from memory, those before each block, the last.
    def in_order(older: jax.Array, chained: jax.Array, last: jax.Array) -> jax.Array:
        return jnp.concatenate([older[:, :0:-1], chained.swapaxes(0, 1), last[:, None]], axis=1)

    fresh_k = rotate(jnp.concatenate([chain_k, last_k[None]]), frames.own_fam)
    keys = in_order(memory.fam_keys, fresh_k[:-1], fresh_k[-1])  # (B, R + full, M, K, hd)
    values = in_order(memory.fam_values, chain_v, last_v)

    def seen(a: jax.Array) -> jax.Array:
        """(B, N, R * M, K, hd): for each block the R FAMs before it, newest first."""
        return jnp.concatenate([a[:, i : i + blocks] for i in range(previous - 1, -1, -1)], axis=2)

    newest = slice(-1, -previous - 1, -1)
    memory = dataclasses.replace(memory, fam_keys=keys[:, newest], fam_values=values[:, newest])
    return fam, seen(rotate(keys, frames.fams)), seen(values), memory


def _update_by_block(
    layer: DecoderLayer,
    config: ModelConfig,
    k: jax.Array,
    v: jax.Array,
    fam: jax.Array,
    frames: ChunkFrames,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The FAM after the complete blocks of rotated keys and values, and the keys and values of those before."""
    batch, length, kv_heads, head_dim = k.shape
    previous, full = config.fam_previous_blocks, length // config.block_size
    if full == 0:
        nothing = jnp.zeros((0, batch, config.fam_length, kv_heads, head_dim), k.dtype)
        return fam, nothing, nothing
    # The rotation of the FAM before each block: its own, then that of its frame in the chunk.
    before = frames.fams[:, previous - 1 : previous - 1 + full]
    rotation = frames.own_fam.after(before).map(lambda r: r.swapaxes(0, 1))  # (N, B or 1, M, 1, hd/2)
    keep = frames.carries_context[None] | (np.arange(full) > 0)[:, None]
    keys, values = (x.reshape(batch, length, -1) for x in (k, v))
    inputs = ChainInputs(keys, values, rotation, jnp.broadcast_to(keep, (full, batch)))
    attention = ChainAttention(config.block_size, config.attention_softcap, config.attention)
    fam, (chain_k, chain_v) = run_chain(layer, fam, inputs, attention)
    return fam, chain_k, chain_v


def _remember(
    config: ModelConfig, memory: LayerMemory, k: jax.Array, v: jax.Array, frames: ChunkFrames
) -> LayerMemory:
    """Caches the last m complete blocks and the unfinished one, of unrotated keys and values (B, T, K, hd)."""
    batch, length, *heads = k.shape
    size, segments = config.block_size, config.memory_segments
    full = length // size
    kept = min(full, segments)  # complete blocks of this chunk that stay visible
    recent, rest = slice((full - kept) * size, full * size), slice(full * size, length)

    def complete(cached: jax.Array, fresh: jax.Array) -> jax.Array:
        every = jnp.concatenate([cached, fresh], axis=1)
        missing = max(segments - every.shape[1], 0)  # where the memory had no room for a past
        every = jnp.pad(every, ((0, 0), (missing, 0), (0, 0), (0, 0), (0, 0)))
        return every[:, every.shape[1] - segments :]

    def unfinished(fresh: jax.Array) -> jax.Array:
        return jnp.pad(fresh, ((0, 0), (0, size - fresh.shape[1]), (0, 0), (0, 0)))

    blocked_k = rotate(k[:, recent].reshape(batch, kept, size, *heads), frames.own_tokens)
    own_rest = frames.own_tokens[: length - full * size]
    return dataclasses.replace(
        memory,
        keys=complete(memory.keys, blocked_k),
        values=complete(memory.values, v[:, recent].reshape(batch, kept, size, *heads)),
        block_keys=unfinished(rotate(k[:, rest], own_rest)),
        block_values=unfinished(v[:, rest]),
    )
