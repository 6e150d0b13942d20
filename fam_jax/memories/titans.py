"""Titans (Behrouz et al. 2024): a neural memory beside attention (memory as a gate) or before it (memory as a layer).

:mod:`fam_jax.memories.neural_memory` has the memory itself, :mod:`fam_jax.memories.titans_mac` memory as context.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fam_jax.config import MemoryConfig, ModelConfig, group, setting
from fam_jax.kernels import Part
from fam_jax.layers.decoder_layer import DecoderLayer
from fam_jax.layers.rope import Rotation, rotate
from fam_jax.memories.interface import Stream, Tail
from fam_jax.memories.neural_memory import (
    FastWeights,
    Rows,
    absorb,
    coefficients_of,
    implicit,
    read_chunks,
    retrieve,
    write_piece,
)
from fam_jax.memories.titans_layer import (
    CONVOLUTION,
    MemoryLayer,
    TitansConfig,
    TitansParameters,
)
from fam_jax.memories.window import ChunkFrames, ExtraKeys, Window
from fam_jax.memories.window_cache import PieceFrames, Position, WindowState, piece_frames, shift_window


@group("model.memory", effect="state")
class TitansGateConfig(TitansConfig):
    """Titans, memory as a gate: a neural memory beside Block Sliding Window Attention."""

    kind: str = setting(default="titans_mag", doc="The architecture.")
    normalize_attention: bool = setting(
        default=True,
        doc="Normalize what attention adds, too, before the gate mixes it with what the memory returns.",
        effect="parameters",
    )


@group("model.memory", effect="state")
class TitansLayerConfig(TitansConfig):
    """Titans, memory as a layer: Block Sliding Window Attention over what a neural memory returns."""

    kind: str = setting(default="titans_mal", doc="The architecture.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class TitansState(WindowState):
    """The window's cache and the neural memory of one layer. Sums are float32 or wider."""

    # (B, h, P) the memory's weights and their momentum after the last complete block.
    memory_weights: Any
    memory_momentum: Any
    # (B, 3, 3, D) projections of the last tokens of that block, for the convolutions of the next.
    convolution_tail: Any
    # Of the unfinished block: (B, C, 3, D) projections, (B, C, h, sum of widths) what its tokens write, and (B, C, h,
    # 3) by which rates.
    block_projections: Any
    block_inputs: Any
    block_gradients: Any
    block_rates: Any


LEARNED = ("memory_weights", "memory_momentum", "convolution_tail")


class TitansFrames(NamedTuple):
    """Frames of a chunk."""

    window: ChunkFrames
    # (B or 1, N, 1, 1, hd/2) from the frame of each block.
    blocks: Rotation


class TitansPieceFrames(NamedTuple):
    """Frames of a piece."""

    window: PieceFrames
    # (B,) tokens in the unfinished block.
    filled: jax.Array


class NeuralMemory(Window[TitansState]):
    """The base of the two: each token reads a memory that it has changed itself, in chunks of b tokens.

    A block's chunks change nothing in the state before the block closes. Until then tokens read the weights at its
    start and, by linear attention, what the block's tokens write.
    """

    State: ClassVar[type[WindowState]] = TitansState

    def __init__(self, model: ModelConfig):
        super().__init__(model)
        self.memory = MemoryLayer(model, streams=3)

    @property
    def learned_fields(self) -> tuple[str, ...]:
        """Return the memory's weights, their momentum, and the rows that convolutions still see."""
        return LEARNED

    def layer_parameters(self, rngs: Any) -> TitansParameters:
        """Create a layer's parameters."""
        return TitansParameters(self.model, rngs)

    def empty_fields(self, batch_size: int) -> dict[str, jax.Array]:
        """Return zeros; :meth:`enter` sets the memory's weights."""
        memory, size = self.memory, self.model.block_size
        return memory.empty_learned(batch_size) | {
            "block_projections": jnp.zeros((batch_size, size, 3, self.model.model_dim), self.model.dtype),
            "block_inputs": memory.zeros(batch_size, size, sum(memory.widths[:-1])),
            "block_gradients": memory.zeros(batch_size, size, sum(memory.widths[1:])),
            "block_rates": memory.zeros(batch_size, size, 3),
        }

    def enter(
        self, layer: DecoderLayer, state: TitansState, stream: Stream, at: Any
    ) -> tuple[TitansState, Stream]:
        """Start from the learned weights."""
        start = jnp.broadcast_to(self.memory.start_of(layer.memory), state.memory_weights.shape)
        return dataclasses.replace(state, memory_weights=start), stream

    # Positions.

    def blocks_at(self, position: Position, length: int, cached: int) -> TitansFrames:
        """Return the frames of a chunk."""
        return TitansFrames(super().blocks_at(position, length, cached), self.from_blocks(position, length))

    def window_frames(self, at: TitansFrames) -> ChunkFrames:
        """Return the window's part of the frames."""
        return at.window

    def piece_at(self, position: Position, width: int) -> TitansPieceFrames:
        """Return the frames of a piece."""
        return TitansPieceFrames(piece_frames(self.model, self.rope, position, width), position.filled)

    def window_piece_frames(self, at: TitansPieceFrames) -> PieceFrames:
        """Return the window's part of the frames."""
        return at.window

    # Persistent keys.

    def extra_of_piece(
        self, layer: DecoderLayer, q: jax.Array, state: TitansState, at: TitansPieceFrames
    ) -> list[Part]:
        """Return the keys of the persistent rows, before the block."""
        keys, values = self.memory.persistent_keys(layer, self.rope, len(q))
        return [Part(rotate(q, at.window.own), keys, values)] if keys.shape[1] else []

    def extra_of_blocks(
        self, layer: DecoderLayer, k: jax.Array, v: jax.Array, state: TitansState, at: TitansFrames
    ) -> tuple[ExtraKeys, TitansState]:
        """Return the keys of the persistent rows, before each block."""
        keys, values = (x[:, None] for x in self.memory.persistent_keys(layer, self.rope, len(k)))
        keys = rotate(keys, at.blocks)  # (B, N, Np, K, hd)
        return ExtraKeys(keys, jnp.broadcast_to(values, keys.shape), None), state

    # The neural memory.

    def recall(
        self, layer: DecoderLayer, x: jax.Array, state: TitansState, filled: jax.Array
    ) -> tuple[jax.Array, Tail]:
        """Read and write a piece.

        Args:
          layer: the layer.
          x: (B, W, D) the memory's normalized input.
          state: the layer's state.
          filled: (B,) tokens in the unfinished block.

        Returns:
          (B, W, D) what the memory returns, normalized, and the entries to add to the unfinished block.
        """
        memory, width = self.memory, x.shape[1]
        fresh = memory.project(layer.memory, x)
        before = memory.rows_before(state.convolution_tail, state.block_projections, filled)
        tokens = memory.tokens(layer.memory, fresh, before, x)
        weights = memory.fast_weights(state)
        rows = write_piece(weights, self._rows(state), tokens, filled, memory.config.chunk)
        counts = filled[:, None] + np.arange(1, width + 1)
        matrices = implicit(weights, rows, coefficients_of(rows.rates, counts))
        # Entries beyond the end of the block are not kept, whatever they are.
        slots = jnp.minimum(counts - 1, self.model.block_size - 1)
        tail = {
            name: entries[np.arange(len(x))[:, None], slots] for name, entries in self._block(rows).items()
        }
        assert tokens.queries is not None
        out = memory.output(layer.memory, retrieve(matrices, tokens.queries), x.dtype)
        return out, tail | {"block_projections": fresh}

    def recall_blocks(
        self, layer: DecoderLayer, x: jax.Array, state: TitansState
    ) -> tuple[jax.Array, TitansState]:
        """Read and write a chunk that begins at a block border; x (B, T, D) is the memory's normalized input.

        The weights are formed at every border of b tokens. The backward pass keeps those at block borders and
        recomputes the others.
        """
        memory, size, (batch, length, _) = self.memory, self.model.block_size, x.shape
        full = length // size * size
        fresh = memory.project(layer.memory, x)
        history = jnp.concatenate([state.convolution_tail, fresh], axis=1)
        tokens = memory.tokens(layer.memory, fresh, state.convolution_tail, x)
        weights, out = memory.fast_weights(state), []
        if full:
            blocks = jax.tree.map(
                lambda y: y[:, :full].reshape(batch, -1, size, *y.shape[2:]).swapaxes(0, 1), tokens
            )

            def body(weights: FastWeights, block: Any) -> tuple[FastWeights, Any]:
                return read_chunks(weights, block, memory.config.chunk)

            weights, read = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), weights, blocks)
            out.append(read.swapaxes(0, 1).reshape(batch, full, *read.shape[3:]))
        rest = jax.tree.map(lambda y: y[:, full:], tokens)
        none = jnp.zeros(batch, jnp.int32)
        rows = self._rows(self.empty(batch, past_slots=False))
        if length > full:
            rows = write_piece(weights, rows, rest, none, memory.config.chunk)
            counts = np.arange(1, length - full + 1)[None]
            out.append(retrieve(implicit(weights, rows, coefficients_of(rows.rates, counts)), rest.queries))
        unfinished = jnp.pad(fresh[:, full:], ((0, 0), (0, size - (length - full)), (0, 0), (0, 0)))
        state = dataclasses.replace(
            state,
            **memory.fields_of(weights),
            convolution_tail=history[:, full : full + CONVOLUTION - 1],
            block_projections=unfinished,
            **self._block(rows),
        )
        return memory.output(layer.memory, jnp.concatenate(out, axis=1), x.dtype), state

    def close_block(
        self, layer: DecoderLayer, state: TitansState, stream: Stream, position: Position
    ) -> tuple[TitansState, Stream]:
        """Form the weights that the block's tokens have made, and cache the block."""
        memory = self.memory
        history = jnp.concatenate([state.convolution_tail, state.block_projections], axis=1)
        state = dataclasses.replace(
            state,
            **memory.fields_of(absorb(memory.fast_weights(state), self._rows(state))),
            convolution_tail=history[:, 1 - CONVOLUTION :],
        )
        return shift_window(state), stream

    def _rows(self, state: TitansState) -> Rows:
        memory = self.memory
        return Rows(
            memory.split(state.block_inputs, memory.widths[:-1]),
            memory.split(state.block_gradients, memory.widths[1:]),
            memory.rates_of(state.block_rates),
        )

    def _block(self, rows: Rows) -> dict[str, jax.Array]:
        return {
            "block_inputs": jnp.concatenate(rows.inputs, axis=-1),
            "block_gradients": jnp.concatenate(rows.gradients, axis=-1),
            "block_rates": jnp.stack(rows.rates, axis=-1),
        }


class MemoryAsGate(NeuralMemory):
    """MAG: x + (1 - g) attention(x) + g memory(x), with a gate g that depends on the token."""

    Config: ClassVar[type[MemoryConfig]] = TitansGateConfig

    def layer_parameters(self, rngs: Any) -> TitansParameters:
        """Create a layer's parameters, those of the gate included."""
        config: Any = self.model.memory
        return TitansParameters(self.model, rngs, gate=True, normalize=config.normalize_attention)

    def read_piece(
        self, layer: DecoderLayer, x: jax.Array, state: TitansState, at: TitansPieceFrames
    ) -> tuple[jax.Array, Tail]:
        """Attend and read the memory, side by side."""
        entering = layer.memory.norm(x)
        recalled, written = self.recall(layer, entering, state, at.filled)
        attended, tail = self.attend_piece(layer, *layer.project(x), state, at)
        return self._mix(layer, x, entering, attended, recalled), tail | written

    def read_blocks(
        self, layer: DecoderLayer, x: jax.Array, state: TitansState, streams: Stream, at: TitansFrames
    ) -> tuple[jax.Array, TitansState, Stream]:
        """Attend and read the memory, all tokens at once."""
        entering = layer.memory.norm(x)
        recalled, state = self.recall_blocks(layer, entering, state)
        attended, state = self.attend_blocks(layer, *layer.project(x), state, at)
        return self._mix(layer, x, entering, attended, recalled), state, streams

    def _mix(
        self, layer: DecoderLayer, x: jax.Array, entering: jax.Array, attended: jax.Array, recalled: jax.Array
    ) -> jax.Array:
        added, own = layer.project_attended(attended), layer.memory
        if own.attention_norm is not None:
            added = own.attention_norm(added)
        return layer.feed_forward(x + own.mix(entering, added, recalled))


class MemoryAsLayer(NeuralMemory):
    """MAL: y = x + memory(x), then a layer of Block Sliding Window Attention over y."""

    Config: ClassVar[type[MemoryConfig]] = TitansLayerConfig

    def read_piece(
        self, layer: DecoderLayer, x: jax.Array, state: TitansState, at: TitansPieceFrames
    ) -> tuple[jax.Array, Tail]:
        """Read the memory, then attend."""
        recalled, written = self.recall(layer, layer.memory.norm(x), state, at.filled)
        out, tail = super().read_piece(layer, x + recalled, state, at)
        return out, tail | written

    def read_blocks(
        self, layer: DecoderLayer, x: jax.Array, state: TitansState, streams: Stream, at: TitansFrames
    ) -> tuple[jax.Array, TitansState, Stream]:
        """Read the memory, then attend, all tokens at once."""
        recalled, state = self.recall_blocks(layer, layer.memory.norm(x), state)
        return super().read_blocks(layer, x + recalled, state, streams, at)
