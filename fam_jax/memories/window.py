"""Memories that are windows over past keys and values: full attention, SWA, BSWA (section 2.1), Transformer-XL."""

import dataclasses
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from fam_jax.config import MemoryConfig, ModelConfig, ceil_div, group, require, setting
from fam_jax.kernels import KV, BlockInputs, BlockOptions, block_attention
from fam_jax.layers.decoder_layer import DecoderLayer
from fam_jax.layers.rope import Rotation, rotate, rotate_tokens
from fam_jax.memories.interface import Memory, Stream
from fam_jax.memories.window_cache import (
    BlockWindowConfig,
    Position,
    SegmentsConfig,
    WindowState,
    visible_blocks,
)


class WindowConfig(MemoryConfig):
    """The base of the windows' config groups: no state beyond the window."""

    @property
    def has_state(self) -> bool:
        """Return False."""
        return False


@group("model.memory", effect="state")
class FullConfig(WindowConfig):
    """Full causal attention over the first `context` tokens; after those, a window of as many blocks."""

    kind: str = setting(default="full", doc="The architecture.")
    context: int = setting(
        default=1024, doc="Tokens, from the first on, that see all tokens before them.", minimum=1
    )

    def cached_blocks(self, block_size: int) -> int:
        """Return m: enough blocks for the last token of the context to see the first."""
        return ceil_div(self.context, block_size) - 1


@group("model.memory", effect="state")
class SlidingWindowConfig(WindowConfig):
    """Sliding window attention (Longformer, Mistral): each token sees a fixed number of tokens."""

    kind: str = setting(default="swa", doc="The architecture.")
    window: int = setting(default=64, doc="Tokens that a token sees, itself included.", minimum=1)

    def cached_blocks(self, block_size: int) -> int:
        """Return m: the number of past blocks that the window of a block's first token reaches."""
        return ceil_div(self.window - 1, block_size)


@group("model.memory", effect="state")
class BlockSlidingWindowConfig(WindowConfig, BlockWindowConfig):
    """Block Sliding Window Attention: each token sees all of the last m blocks and its own block causally."""

    kind: str = setting(default="bswa", doc="The architecture.")


@group("model.memory", effect="state")
class TransformerXLConfig(WindowConfig, SegmentsConfig):
    """Transformer-XL with RoPE: cached keys and values get no gradient (Dai et al. 2019)."""

    kind: str = setting(default="transformer_xl", doc="The architecture.")

    @property
    def stop_gradient(self) -> bool:
        """Return True."""
        return True


class ChunkFrames(NamedTuple):
    """Positions and counts of a chunk that starts at a block border: the same for every layer of a type.

    Position zero of the chunk's frame is its first token, or `Position.offset` tokens before it.
    """

    # (B or 1, T, 1, hd/2)
    tokens: Rotation
    # (B or 1, tokens of the visible past blocks, 1, hd/2), from each block's own frame.
    past: Rotation
    # (C, 1, hd/2), in the block's own frame.
    own_tokens: Rotation
    # (B,) tokens that exist in the visible past blocks; None: there are no past blocks.
    past_length: jax.Array | None


class ExtraKeys(NamedTuple):
    """Keys that every token of a block sees beside its window."""

    # (B, N, S, K, hd) rotated in the frame of the chunk, and their values.
    keys: jax.Array
    values: jax.Array
    # (B, N) how many of the S exist: the first ones. None: all.
    existing: jax.Array | None


S = TypeVar("S", bound=WindowState)


class Window(Memory[S]):
    """A memory that reads all tokens of a chunk at once, by attention to past blocks, the own block and extra keys.

    A subclass that adds extra keys overrides both :meth:`extra_of_piece` and :meth:`extra_of_blocks`.
    """

    def blocks_at(self, position: Position, length: int, cached: int) -> Any:
        """Return the :class:`ChunkFrames` of a chunk."""
        rope, size = self.rope, self.model.block_size
        seen = min(cached, visible_blocks(self.model))
        shift = jnp.zeros(1, jnp.int32) if position.offset is None else position.offset
        return ChunkFrames(
            tokens=rope.at(shift[:, None] + np.arange(length)),
            past=rope.at(shift[:, None] + size * np.arange(-seen, 0)).map(
                lambda x: jnp.repeat(x, size, axis=1)
            ),
            own_tokens=rope.static(np.arange(size)),
            past_length=jnp.minimum(position.blocks, seen) * size if seen else None,
        )

    def read_blocks(
        self, layer: DecoderLayer, x: jax.Array, state: S, streams: Stream, at: Any
    ) -> tuple[jax.Array, S, Stream]:
        """Read all tokens of the chunk at once."""
        attended, state = self.attend_blocks(layer, *layer.project(x), state, at)
        return layer.finish(attended, x), state, streams

    def attend_blocks(
        self, layer: DecoderLayer, q: jax.Array, k: jax.Array, v: jax.Array, state: S, at: Any
    ) -> tuple[jax.Array, S]:
        """Attend to past blocks, extra keys and the own block; cache the chunk's keys and values.

        Args:
          layer: the layer.
          q: (B, T, H, hd) queries, not rotated.
          k: (B, T, K, hd) keys, not rotated.
          v: (B, T, K, hd) values.
          state: the layer's state.
          at: from :meth:`blocks_at`.

        Returns:
          (B, T, H, hd) attended values, and the state after the chunk.
        """
        model = self.model
        frames = self.window_frames(at)
        rotated = rotate_tokens(k, frames.tokens, model.attention)
        extra, state = self.extra_of_blocks(layer, rotated, v, state, at)
        queries = rotate_tokens(q, frames.tokens, model.attention)
        inputs = BlockInputs(
            queries,
            rotated,
            v,
            extra.keys,
            extra.values,
            self.past_keys(state, frames),
            frames.past_length,
            extra.existing,
        )
        options = BlockOptions(
            block_size=model.block_size,
            memory_segments=visible_blocks(model),
            window=model.memory.window,
            stop_gradient=model.memory.stop_gradient,
            softcap=model.attention_softcap,
        )
        attended = block_attention(inputs, options, implementation=model.attention)
        return attended, self._cache_chunk(state, k, v, frames)

    def past_keys(self, state: S, frames: ChunkFrames) -> KV | None:
        """Return the rotated keys and the values (B, P, K, hd) of the visible past blocks; None if there are none."""
        unseen = max(state.keys.shape[1] - visible_blocks(self.model), 0)
        keys, values = (_tokens_of(x[:, unseen:]) for x in (state.keys, state.values))
        if not keys.shape[1]:
            return None
        return KV(rotate_tokens(keys, frames.past, self.model.attention), values)

    def from_blocks(self, position: Position, length: int) -> Rotation:
        """Return the rotation (B or 1, N, 1, 1, hd/2) from the frame of each block into that of the chunk."""
        shift = jnp.zeros(1, jnp.int32) if position.offset is None else position.offset
        size = self.model.block_size
        return self.rope.at(shift[:, None] + size * np.arange(ceil_div(length, size)))[:, :, None]

    def window_frames(self, at: Any) -> ChunkFrames:
        """Return the frames of the window from what :meth:`blocks_at` returned."""
        return at

    def extra_of_blocks(
        self, layer: DecoderLayer, k: jax.Array, v: jax.Array, state: S, at: Any
    ) -> tuple[ExtraKeys, S]:
        """Return the extra keys that each block of a chunk sees, and the state after the chunk.

        Args:
          layer: the layer.
          k: (B, T, K, hd) keys of the chunk, rotated in its frame.
          v: (B, T, K, hd) values.
          state: the layer's state before the chunk.
          at: from :meth:`blocks_at`.
        """
        batch, length, *heads = k.shape
        none = jnp.zeros((batch, ceil_div(length, self.model.block_size), 0, *heads), k.dtype)
        return ExtraKeys(none, none, None), state

    def _cache_chunk(self, state: S, k: jax.Array, v: jax.Array, frames: ChunkFrames) -> S:
        """Cache the last m complete blocks and the unfinished one of unrotated k and v (B, T, K, hd)."""
        batch, length, *heads = k.shape
        size, segments = self.model.block_size, self.model.memory_segments
        own = frames.own_tokens
        full = length // size
        kept = min(full, segments)  # complete blocks of this chunk that stay visible
        recent, rest = slice((full - kept) * size, full * size), slice(full * size, length)
        # Heads side by side: with an axis of heads, a TPU would copy all tokens to another layout first.
        recent_v = v.reshape(batch, length, -1)[:, recent].reshape(batch, kept * size, *heads)

        def complete(cached: jax.Array, fresh: jax.Array) -> jax.Array:
            fresh = fresh.reshape(batch, kept, size, *heads)
            every = jnp.concatenate([cached, fresh], axis=1)
            # The state of an aligned call may have no room for past blocks.
            missing = max(segments - every.shape[1], 0)
            every = jnp.pad(every, ((0, 0), (missing, 0), (0, 0), (0, 0), (0, 0)))
            return every[:, every.shape[1] - segments :]

        def unfinished(fresh: jax.Array) -> jax.Array:
            return jnp.pad(fresh, ((0, 0), (0, size - fresh.shape[1]), (0, 0), (0, 0)))

        in_own_frames = own.map(lambda x: jnp.tile(x, (kept, 1, 1))[None])
        recent_k = rotate_tokens(k, in_own_frames, self.model.attention, begin=recent.start)
        return dataclasses.replace(
            state,
            keys=complete(state.keys, recent_k),
            values=complete(state.values, recent_v),
            block_keys=unfinished(rotate(k[:, rest], own[: length - full * size])),
            block_values=unfinished(v[:, rest]),
        )


def _tokens_of(blocks: jax.Array) -> jax.Array:
    """Return (B, m, C, K, hd) as (B, m * C, K, hd)."""
    return blocks.reshape(blocks.shape[0], -1, *blocks.shape[3:])


class FullAttention(Window[WindowState]):
    """Full causal attention."""

    Config: ClassVar[type[MemoryConfig]] = FullConfig


class SlidingWindowAttention(Window[WindowState]):
    """Sliding window attention."""

    Config: ClassVar[type[MemoryConfig]] = SlidingWindowConfig


class BlockSlidingWindowAttention(Window[WindowState]):
    """Block Sliding Window Attention (section 2.1 of the FAM paper)."""

    Config: ClassVar[type[MemoryConfig]] = BlockSlidingWindowConfig


class TransformerXL(Window[WindowState]):
    """Transformer-XL: Block Sliding Window Attention with stop-gradient."""

    Config: ClassVar[type[MemoryConfig]] = TransformerXLConfig


def local_model(model: ModelConfig) -> ModelConfig:
    """Return the config of a model's local layers: a sliding window within the same cache."""
    window = BlockSlidingWindowConfig(segments=model.memory_segments, window=model.local_window)
    changes: dict[str, Any] = {"memory": window, "layer_pattern": ("global",), "local_window": 0}
    if model.local_rope_base:
        changes |= {"rope_base": model.local_rope_base, "rope_scaling": "none", "local_rope_base": 0.0}
    require(model.local_window > 0, "config.model.local_window: the model has no local layers")
    return dataclasses.replace(model, **changes)
