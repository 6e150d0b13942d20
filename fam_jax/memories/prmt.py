"""Parallel Recurrent Memory Transformer (Rodkin et al. 2024): memory rows of each layer that are read and written.

It is nearly Feedback Attention Memory. Five switches, a config field each, lead from one to the other: `init`,
`memory_twice`, `causal`, `query_positions` and `first_residual`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fam_jax.config import MemoryConfig, ModelConfig, group, setting
from fam_jax.kernels import Part, causal_rows
from fam_jax.layers.decoder_layer import Apply, DecoderLayer, apply_linear
from fam_jax.layers.rope import Rope, Rotation, rotate
from fam_jax.memories.chain import Attend, ChainAttention, ChainInputs, run_chain, update_vectors
from fam_jax.memories.fam import raise_prompt
from fam_jax.memories.interface import Stream
from fam_jax.memories.learned_rows import LearnedRows, embedded_rows
from fam_jax.memories.window import ChunkFrames, ExtraKeys, Window
from fam_jax.memories.window_cache import (
    BlockWindowConfig,
    PieceFrames,
    Position,
    WindowState,
    shift_window,
)


@group("model.memory", effect="state")
class PrmtConfig(BlockWindowConfig):
    """Memory rows of each layer, before a block to be read and after it to be written."""

    kind: str = setting(default="prmt", doc="The architecture.")
    segments: int = setting(
        default=0, doc="m, past blocks that stay visible to tokens; 0 in the paper.", minimum=0
    )
    length: int = setting(default=8, doc="M, memory rows of a layer.", minimum=1, effect="parameters")
    init: str = setting(
        default="prefix",
        doc="Initial rows. prefix: learned rows of each layer. prompt: learned rows that rise through layers (FAM).",
        choices=("prefix", "prompt"),
        effect="parameters",
    )
    init_stddev: float = setting(
        default=1.0,
        doc="Standard deviation of the initial rows of a new model; 0: that of embeddings (FAM).",
        minimum=0,
        effect="training",
    )
    causal: bool = setting(
        default=True, doc="Rows that are written see themselves and earlier ones. False: all of them (FAM)."
    )
    memory_twice: bool = setting(
        default=True,
        doc="Rows that are written see the memory before the block as well as themselves. False: themselves (FAM).",
    )
    query_positions: str = setting(
        default="after",
        doc="Positions of the rows that are written. after: the M after the block. before: the M before it (FAM).",
        choices=("after", "before"),
    )
    first_residual: bool = setting(
        default=True, doc="The first update has its residual connection. False: it has none (FAM)."
    )

    parameter_axes: ClassVar[Mapping[str, tuple[str, ...]]] = {"initial_rows": ("slots", "width")}

    @property
    def extra_keys(self) -> int:
        """Return M."""
        return self.length

    @property
    def chained_rows(self) -> int:
        """Return M."""
        return self.length


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class PrmtState(WindowState):
    """The window's cache and the memory rows of one layer."""

    # (B, M, D) after the last complete block, float32 or wider: rows add to themselves at every block.
    memory_rows: Any
    # (B, M, K, hd) their keys, rotated in the frame of the next block, and values.
    read_keys: Any
    read_values: Any


class PrmtFrames(NamedTuple):
    """Frames of a chunk with memory rows."""

    window: ChunkFrames
    # (B or 1, N, 1, 1, hd/2), from the frame of each block.
    blocks: Rotation
    # (B,) bool, as in Position.
    carries_context: jax.Array


class ParallelRecurrentMemory(Window[PrmtState]):
    """In each layer, [rows ; block ; rows] under a causal mask; the last M outputs are the rows of the next block.

    What a layer writes depends on its input and its own rows, so all tokens of a chunk go through a layer at once, and
    a chain of updates takes only M rows from block to block.
    """

    Config: ClassVar[type[MemoryConfig]] = PrmtConfig
    State: ClassVar[type[WindowState]] = PrmtState

    config: PrmtConfig

    def __init__(self, model: ModelConfig):
        super().__init__(model)
        assert isinstance(model.memory, PrmtConfig)
        self.config = model.memory
        self.row_dtype = jnp.promote_types(model.dtype, jnp.float32)

    def layer_parameters(self, rngs: nnx.Rngs) -> nnx.Module | None:
        """Create the initial rows of a layer, if each layer has its own."""
        return self._initial(rngs) if self.config.init == "prefix" else None

    def model_parameters(self, rngs: nnx.Rngs) -> nnx.Module | None:
        """Create the prompt from which all layers' initial rows are computed, unless each has its own."""
        return self._initial(rngs) if self.config.init == "prompt" else None

    def _initial(self, rngs: nnx.Rngs) -> LearnedRows:
        config = self.config
        return LearnedRows(self.model, "initial_rows", config.length, rngs, stddev=config.init_stddev)

    def initial_parameters(self, table: jax.Array, seed: int) -> Mapping[str, jax.Array]:
        """Return the embeddings of random tokens for the initial rows."""
        layers = (self.model.num_layers,) if self.config.init == "prefix" else ()
        shape = (*layers, self.config.length)
        tokens = jax.random.randint(jax.random.key(seed), shape, 0, table.shape[0])
        path = "layers/memory/initial_rows" if layers else "memory/initial_rows"
        return {path: embedded_rows(self.model, table, tokens)}

    @property
    def passed_fields(self) -> tuple[str, ...]:
        """Return the rows alone: reading blocks recomputes their keys."""
        return ("memory_rows",)

    def empty_fields(self, batch_size: int) -> dict[str, jax.Array]:
        """Return zeros for the rows and their keys and values."""
        model, length = self.model, self.config.length
        keys = jnp.zeros((batch_size, length, model.num_kv_heads, model.head_dim), model.dtype)
        rows = jnp.zeros((batch_size, length, model.model_dim), self.row_dtype)
        return {"memory_rows": rows, "read_keys": keys, "read_values": keys}

    def state_axes(self) -> dict[str, tuple[str | None, ...]]:
        """Return the logical axes of a layer's state: keys and values are divided by head."""
        heads = ("batch", None, "kv_heads", None)
        return super().state_axes() | {"read_keys": heads, "read_values": heads}

    # Before any token.

    def enter_at(self, rope: Rope) -> Rotation:
        """Return the rotation (M, 1, hd/2) of the rows in the frame of the block that follows them."""
        return self._read_rotation(rope)

    def enter_stream(self, parameters: Any, shared: Any) -> Stream:
        """Return the prompt (1, M, D)."""
        return None if parameters is None else parameters.of_batch(1, self.row_dtype)

    def enter(
        self, layer: DecoderLayer, state: PrmtState, stream: Stream, at: Any
    ) -> tuple[PrmtState, Stream]:
        """Set the initial rows, and pass the prompt up through the layer."""
        initial = layer.memory.of_batch(1, self.row_dtype) if stream is None else stream
        if stream is not None:
            stream = raise_prompt(layer, stream, at)
        _, k, v = layer.project(initial)

        return self._with_rows(state, initial, rotate(k, at), v), stream

    def _with_rows(self, state: PrmtState, rows: jax.Array, k: jax.Array, v: jax.Array) -> PrmtState:
        """Return the state with other rows (B or 1, M, D), their keys, rotated for the next block, and values."""

        def like(x: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.broadcast_to(x, old.shape).astype(old.dtype)

        return dataclasses.replace(
            state,
            memory_rows=like(rows, state.memory_rows),
            read_keys=like(k, state.read_keys),
            read_values=like(v, state.read_values),
        )

    # Reading.

    def extra_of_piece(
        self, layer: DecoderLayer, q: jax.Array, state: PrmtState, at: PieceFrames
    ) -> list[Part]:
        """Return the keys and values of the rows before the block."""
        return [Part(rotate(q, at.own), state.read_keys, state.read_values)]

    def blocks_at(self, position: Position, length: int, cached: int) -> PrmtFrames:
        """Return the frames of a chunk."""
        return PrmtFrames(
            window=super().blocks_at(position, length, cached),
            blocks=self.from_blocks(position, length),
            carries_context=position.carries_context,
        )

    def window_frames(self, at: PrmtFrames) -> ChunkFrames:
        """Return the window's part of the frames."""
        return at.window

    def extra_of_blocks(
        self, layer: DecoderLayer, k: jax.Array, v: jax.Array, state: PrmtState, at: PrmtFrames
    ) -> tuple[ExtraKeys, PrmtState]:
        """Update the rows over the complete blocks; return the M keys of the rows before each block."""
        blocks = at.blocks.cos.shape[1]
        rows, chain_k, chain_v = self._write_blocks(layer, k, v, state.memory_rows, at)
        _, last_k, last_v = layer.project(rows)
        keys, values = (
            # (B, N, M, K, hd)
            jnp.concatenate([chained, last[None]]).swapaxes(0, 1)[:, :blocks].astype(k.dtype)
            for chained, last in ((chain_k, last_k), (chain_v, last_v))
        )
        own = self._read_rotation(self.rope)
        state = self._with_rows(state, rows, rotate(last_k, own), last_v)
        return ExtraKeys(rotate(keys, own.after(at.blocks)), values, None), state

    def _write_blocks(
        self, layer: DecoderLayer, k: jax.Array, v: jax.Array, rows: jax.Array, at: PrmtFrames
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return the rows after the complete blocks of rotated k and v, and keys and values of the rows before each."""
        model = self.model
        batch, length, kv_heads, head_dim = k.shape
        full = length // model.block_size
        if full == 0:
            nothing = jnp.zeros((0, batch, self.config.length, kv_heads, head_dim), k.dtype)
            return rows, nothing, nothing
        rotation = self._own_rotation().after(at.blocks[:, :full]).map(lambda r: r.swapaxes(0, 1))
        keep = self._keeps_residual(at.carries_context)[None] | (np.arange(full) > 0)[:, None]
        keys, values = (x.reshape(batch, length, -1) for x in (k, v))
        inputs = ChainInputs(keys, values, rotation, jnp.broadcast_to(keep, (full, batch)))
        attention = ChainAttention(
            model.block_size, model.attention_softcap, model.attention, causal=self.config.causal
        )
        rows, (chain_k, chain_v) = run_chain(layer, rows, inputs, attention, self._update)
        return rows, chain_k, chain_v

    # Writing.

    def close_block(
        self, layer: DecoderLayer, state: PrmtState, stream: Stream, position: Position
    ) -> tuple[PrmtState, Stream]:
        """Take the rows through the layer after the block, then cache the block."""
        rotation, length = self._own_rotation(), self.config.length

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            q, k = rotate(q, rotation[-length:]), rotate(k, rotation)
            mask = causal_rows(length, k.shape[1]) if self.config.causal else None
            return self.attend_to_write([Part(q, k, v, mask)], Part(q, state.block_keys, state.block_values))

        keep = self._keeps_residual(position.carries_context)
        rows, _ = self._update(layer, state.memory_rows, keep, attend)
        _, k, v = layer.project(rows)
        state = self._with_rows(state, rows, rotate(k, self._read_rotation(self.rope)), v)
        return shift_window(state), stream

    def _update(
        self,
        layer: DecoderLayer,
        rows: jax.Array,
        keep: jax.Array,
        attend: Attend,
        apply: Apply = apply_linear,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Compute the rows (B, M, D) after a block: an update of a chain."""

        def attend_twice(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return attend(q, *(jnp.concatenate([x, x], axis=1) for x in (k, v)))

        return update_vectors(layer, rows, keep, attend_twice if self.config.memory_twice else attend, apply)

    def _keeps_residual(self, carries_context: jax.Array) -> jax.Array:
        """Return (B,) bool: whether an update adds the rows before it."""
        return carries_context | self.config.first_residual

    def _read_rotation(self, rope: Rope) -> Rotation:
        """Return the rotation (M, 1, hd/2) of the rows before a block, in the frame of the block."""
        return rope.static(np.arange(-self.config.length, 0))

    def _own_rotation(self) -> Rotation:
        """Return the rotation (S, 1, hd/2) of the memory's keys in the frame of the block that is written.

        The last M are those of the rows that are written, and of their queries. S = 2M if these also see the rows
        before the block.
        """
        before = np.arange(-self.config.length, 0)
        after = self.model.block_size + np.arange(self.config.length)
        places = after if self.config.query_positions == "after" else before
        return self.rope.static(np.concatenate([before, places]) if self.config.memory_twice else places)
