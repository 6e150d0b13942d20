"""Longformer's attention for language models (Beltagy et al. 2020): windows that grow with the layer, dilated heads.

A dilated head sees every d-th token. The tokens at the same place modulo d form a sequence of their own, in which the
head has a plain window. So d shorter sequences take the place of one, in blocks of C / d tokens.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fam_jax.config import MemoryConfig, ModelConfig, ceil_div, group, require, setting
from fam_jax.kernels import KV, BlockInputs, BlockOptions, block_attention, multi_part_attention
from fam_jax.layers.decoder_layer import DecoderLayer
from fam_jax.layers.rope import rotate, rotate_tokens
from fam_jax.memories.interface import Tail
from fam_jax.memories.window import (
    BlockSlidingWindowAttention,
    BlockSlidingWindowConfig,
    ChunkFrames,
    Window,
    WindowConfig,
)
from fam_jax.memories.window_cache import (
    PieceFrames,
    Position,
    WindowState,
    visible_blocks,
    window_parts,
)


@group("model.memory", effect="state")
class LongformerConfig(WindowConfig):
    """Sliding windows of a width, and a dilation of some heads, that depend on the layer."""

    kind: str = setting(default="longformer", doc="The architecture.")
    windows: tuple[int, ...] = setting(
        default=(32, 64),
        doc="Tokens that a token sees, itself included, from the lowest layers to the highest. The layers are divided "
        "evenly among the entries.",
        minimum=1,
    )
    dilations: tuple[int, ...] = setting(
        default=(1,),
        doc="d, of the dilated heads of the same layers: they see every d-th token, as many as the others. 1: no "
        "dilation. As many entries as `windows`, or one for all.",
        minimum=1,
    )
    dilated_heads: int = setting(
        default=2, doc="The number of heads, the last ones, that dilations apply to.", minimum=1
    )
    cached_tokens: int = setting(
        default=0,
        doc="Tokens back that the cache has room for at least; it has room for what the windows reach.",
        minimum=0,
    )

    def check(self) -> None:
        """Raise :class:`ConfigError` if windows and dilations do not go together."""
        counts = len(self.windows), len(self.dilations)
        require(
            min(counts) > 0 and (counts[0] == counts[1] or 1 in counts),
            f"config.model.memory.dilations: {counts[1]} entries for {counts[0]} windows; give as many, or one",
        )

    def check_model(self, model: ModelConfig) -> None:
        """Raise :class:`ConfigError` if layers, heads or blocks do not suffice."""
        count = len(self.pairs)
        require(
            count <= model.num_layers,
            f"config.model.memory.windows: {count} entries for {model.num_layers} layers; give at most one per layer",
        )
        if max(self.dilations) == 1:
            return
        require(
            self.dilated_heads <= model.num_heads,
            f"config.model.memory.dilated_heads: {self.dilated_heads} exceeds num_heads {model.num_heads}",
        )
        for dilation in self.dilations:
            require(
                model.block_size % dilation == 0,
                f"config.model.memory.dilations: {dilation} does not divide block_size {model.block_size}; choose "
                "divisors",
            )

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Return the windows and dilations from the lowest layers to the highest."""
        count = max(len(self.windows), len(self.dilations))
        windows, dilations = (each * (count // len(each)) for each in (self.windows, self.dilations))
        return tuple(zip(windows, dilations, strict=True))

    @property
    def window(self) -> int:
        """Return the widest window without dilation."""
        return max(self.windows)

    @property
    def reach(self) -> int:
        """Return how many tokens back the farthest visible key is."""
        return max((window - 1) * dilation for window, dilation in self.pairs)

    def cached_blocks(self, block_size: int) -> int:
        """Return m: the number of past blocks that the windows of a block's first token reach."""
        return ceil_div(max(self.reach, self.cached_tokens), block_size)

    def of_layer(self, index: int, model: ModelConfig) -> MemoryConfig:
        """Return the window and the dilation of a layer."""
        pairs = self.pairs
        if len(pairs) == 1:
            return self
        window, dilation = pairs[index * len(pairs) // model.num_layers]
        return dataclasses.replace(
            self,
            windows=(window,),
            dilations=(dilation,),
            cached_tokens=max(self.reach, self.cached_tokens),
        )


class HeadFrames(NamedTuple):
    """Frames of a chunk or a piece for both kinds of heads."""

    near: Any
    # None without dilated heads.
    dilated: Any


class Longformer(Window[WindowState]):
    """Sliding windows, in some heads over every d-th token."""

    Config: ClassVar[type[MemoryConfig]] = LongformerConfig

    def __init__(self, model: ModelConfig):
        super().__init__(model)
        config = model.memory
        assert isinstance(config, LongformerConfig)
        self.window, self.dilation = config.pairs[-1]
        self.dilated_heads = config.dilated_heads
        # The window that reaches as far as the dilated heads do, without dilation.
        reach = BlockSlidingWindowConfig(
            segments=model.memory_segments, window=(self.window - 1) * self.dilation + 1
        )
        self.far = BlockSlidingWindowAttention(dataclasses.replace(model, memory=reach))

    def blocks_at(self, position: Position, length: int, cached: int) -> HeadFrames:
        """Return the frames of a chunk."""
        far = self.far.blocks_at(position, length, cached) if self.dilation > 1 else None
        return HeadFrames(super().blocks_at(position, length, cached), far)

    def window_frames(self, at: HeadFrames) -> ChunkFrames:
        """Return the frames of the heads that are not dilated."""
        return at.near

    def attend_blocks(
        self,
        layer: DecoderLayer,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        state: WindowState,
        at: HeadFrames,
    ) -> tuple[jax.Array, WindowState]:
        """Attend with all heads, and again with those that are dilated."""
        attended, after = super().attend_blocks(layer, q, k, v, state, at)
        if self.dilation == 1:
            return attended, after
        model, frames = self.model, at.dilated
        rotated = rotate_tokens(k, frames.tokens, model.attention)
        own, past = jax.tree.map(self._for_dilated, (KV(rotated, v), self.far.past_keys(state, frames)))
        queries = rotate_tokens(q[:, :, -self.dilated_heads :], frames.tokens, model.attention)
        dilated = self._attend_dilated(queries, own, past, frames.past_length)
        return self._joined(attended, dilated), after

    def _attend_dilated(
        self, q: jax.Array, own: KV, past: KV | None, past_length: jax.Array | None
    ) -> jax.Array:
        """Attend with queries (B, T, heads, hd) to every d-th of the keys (B, T, heads, hd) and (B, P, heads, hd)."""
        model, step = self.model, self.dilation
        batch, length, *heads = q.shape

        def divide(x: jax.Array) -> jax.Array:
            """Return (B * d, ceil(T / d), heads, hd): the tokens at the same place modulo d."""
            x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % step), (0, 0), (0, 0)))
            return x.reshape(batch, -1, step, *heads).swapaxes(1, 2).reshape(batch * step, -1, *heads)

        queries = divide(q)
        size = model.block_size // step
        none = jnp.zeros((batch * step, ceil_div(queries.shape[1], size), 0, *heads), q.dtype)
        filled = None if past_length is None else jnp.repeat(past_length // step, step)
        options = BlockOptions(
            block_size=size,
            memory_segments=visible_blocks(self.far.model),
            window=self.window,
            softcap=model.attention_softcap,
        )
        attended = block_attention(
            BlockInputs(
                queries, divide(own.k), divide(own.v), none, none, jax.tree.map(divide, past), filled
            ),
            options,
            # The kernels may not take blocks that are d times shorter.
            implementation="auto" if model.attention.startswith("pallas") else model.attention,
        )
        joined = attended.reshape(batch, step, -1, *heads).swapaxes(1, 2)
        return joined.reshape(batch, -1, *heads)[:, :length]

    def _for_dilated(self, x: jax.Array) -> jax.Array:
        """Return keys or values (..., K, hd) once for each dilated head."""
        heads = np.arange(self.model.num_heads - self.dilated_heads, self.model.num_heads)
        return x[..., heads * self.model.num_kv_heads // self.model.num_heads, :]

    def _joined(self, attended: jax.Array, dilated: jax.Array) -> jax.Array:
        """Put the results of the dilated heads in the place of those of the last heads."""
        return jnp.concatenate([attended[:, :, : -self.dilated_heads], dilated], axis=2)

    def piece_at(self, position: Position, width: int) -> HeadFrames:
        """Return the frames of a piece."""
        near = super().piece_at(position, width)
        if self.dilation == 1:
            return HeadFrames(near, None)
        far, size = self.far.piece_at(position, width), self.model.block_size
        place = position.filled[:, None] + np.arange(width)

        def every(mask: jax.Array, distance: jax.Array) -> jax.Array:
            return mask & (distance % self.dilation == 0)

        # Blocks are a multiple of d tokens apart.
        of_block = place[:, :, None] - np.arange(size)
        of_piece = np.arange(width)[:, None] - np.arange(width)
        dilated = far._replace(
            block_mask=every(far.block_mask, of_block),
            piece_mask=every(far.piece_mask, jnp.asarray(of_piece)),
            past_masks=[every(mask, of_block) for mask in far.past_masks],
        )
        return HeadFrames(near, dilated)

    def window_piece_frames(self, at: HeadFrames) -> PieceFrames:
        """Return the frames of the heads that are not dilated."""
        return at.near

    def attend_piece(
        self,
        layer: DecoderLayer,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        state: WindowState,
        at: HeadFrames,
    ) -> tuple[jax.Array, Tail]:
        """Attend with all heads, and again with those that are dilated."""
        attended, tail = super().attend_piece(layer, q, k, v, state, at)
        if self.dilation == 1:
            return attended, tail
        rotated = rotate(k, at.dilated.own)
        parts = [
            part._replace(
                q=part.q[:, :, -self.dilated_heads :],
                k=self._for_dilated(part.k),
                v=self._for_dilated(part.v),
            )
            for part in window_parts(self.far.model, state, at.dilated, q, rotated, v)
        ]
        dilated = multi_part_attention(parts, softcap=self.model.attention_softcap)
        return self._joined(attended, dilated), tail
