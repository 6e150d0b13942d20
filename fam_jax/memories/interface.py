"""What a memory architecture is: config fields, parameters, a state per layer, and how blocks read and write it.

The timeline is the same for all: the tokens of block tau read the state that block tau - 1 left, and the state changes
once, when the last token of the block has been read. So a memory has to define two things: :meth:`Memory.read_piece`
(tokens within a block read the state) and :meth:`Memory.close_block` (a complete block changes it). From these the
default :meth:`Memory.read_blocks` reads whole blocks, for training and prefill. It is also the reference for a faster
one.

docs/add_a_memory.md adds one step by step.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fam_jax.config import MemoryConfig, ModelConfig
from fam_jax.layers.decoder_layer import DecoderLayer, Norm
from fam_jax.layers.rope import Rope, rope_of
from fam_jax.memories.window_cache import (
    WINDOW_AXES,
    Position,
    WindowState,
    empty_window,
    piece_frames,
    shift_window,
    with_past_slots,
)

S = TypeVar("S", bound=WindowState)

# What a piece adds to the unfinished block: entries (B, W, ...) by the field of the state (B, C, ...) that holds them.
Tail = dict[str, jax.Array]
# Rows (B or 1, M, D) that rise through the layers beside the tokens.
Stream = jax.Array | None


class Memory(Generic[S]):
    """How the layers of a model remember. One object serves all layers of a type; it holds no arrays."""

    # The group of the memory's config fields.
    Config: ClassVar[type[MemoryConfig]]
    # The state of a layer, a registered dataclass that extends WindowState.
    State: ClassVar[type[WindowState]] = WindowState
    # layer: the state of a layer comes from that layer alone. segment: what the top layer makes of a block enters the
    # bottom layer at the next one, so blocks are read one after another through all layers.
    order: ClassVar[Literal["layer", "segment"]] = "layer"
    # Fields of the state beyond the window, which evaluation ablates.
    learned_fields: ClassVar[tuple[str, ...]] = ()
    # Those of them from which a row can go on: what random state passing hands to the next step.
    passed_fields: ClassVar[tuple[str, ...]] = ()
    # Whether all it does lies between a layer's projections and its output, in attend_blocks and attend_piece.
    shares_projections: ClassVar[bool] = False

    def __init__(self, model: ModelConfig):
        self.model = model
        self.rope: Rope = rope_of(model)

    # Parameters.

    def layer_parameters(self, rngs: nnx.Rngs) -> nnx.Module | None:
        """Create the parameters that each layer has for the memory: `layer.memory`."""
        return None

    def model_parameters(self, rngs: nnx.Rngs) -> nnx.Module | None:
        """Create the parameters that the memory has once: `model.memory`."""
        return None

    def initial_parameters(self, table: jax.Array, seed: int) -> Mapping[str, jax.Array]:
        """Return parameters by path with which a model that had another memory goes on; others stay random.

        Args:
          table: (V, D) embeddings of that model.
          seed: of what is random.
        """
        return {}

    # The state.

    def empty(self, batch_size: int, *, past_slots: bool = True) -> S:
        """Return the state of a layer of streams that have read nothing, before :meth:`enter`.

        Args:
          batch_size: B.
          past_slots: make room for past blocks. Training needs none: it reads all blocks in one call.
        """
        return self.State(**empty_window(self.model, batch_size, past_slots=past_slots))  # type: ignore[return-value]

    def state_axes(self) -> dict[str, tuple[str | None, ...]]:
        """Return the logical axes of each field of a layer's state."""
        return dict(WINDOW_AXES)

    def start_shared(self, parameters: Any, batch_size: int) -> Any:
        """Return the state that the layers share, of streams that have read nothing; for "segment" order."""
        return None

    def enter_at(self, rope: Rope) -> Any:
        """Return the arrays that :meth:`enter` needs in layers with this RoPE."""
        return None

    def enter_stream(self, parameters: Any, shared: Any) -> Stream:
        """Return the rows (B or 1, M, D) that enter the bottom layer before any token is read.

        Args:
          parameters: those of :meth:`model_parameters`.
          shared: of :meth:`start_shared` at first; in "segment" order, after each block, of :meth:`top`.
        """
        return None

    def enter(self, layer: DecoderLayer, state: S, stream: Stream, at: Any) -> tuple[S, Stream]:
        """Fill in what does not depend on tokens: the initial state of a layer.

        Args:
          layer: with its parameters for the memory in `layer.memory`.
          state: of the layer.
          stream: rows from the layer below.
          at: from :meth:`enter_at`.

        Returns:
          The state, and the rows for the layer above.
        """
        return state, stream

    # Reading.

    def blocks_at(self, position: Position, length: int, cached: int) -> Any:
        """Return what :meth:`read_blocks` needs to know of the positions of a chunk, the same for all layers.

        Args:
          position: of rows that are all at a block border.
          length: T.
          cached: past blocks that the state has room for.
        """
        return position

    def read_blocks(
        self, layer: DecoderLayer, x: jax.Array, state: S, streams: Stream, at: Any
    ) -> tuple[jax.Array, S, Stream]:
        """Read a chunk that starts at a block border through one layer; for "layer" order.

        Args:
          layer: the layer.
          x: (B, T, D) its input; T need not be a multiple of C.
          state: of the layer.
          streams: (N, B, M, D) rows of :meth:`close_stream` from the layer below, one set for each complete block.
          at: from :meth:`blocks_at`.

        Returns:
          (B, T, D) output, the state after the chunk, and the rows for the layer above.
        """
        return scan_blocks(self, layer, x, state, streams, at)

    def attend_blocks(
        self, layer: DecoderLayer, q: jax.Array, k: jax.Array, v: jax.Array, state: S, at: Any
    ) -> tuple[jax.Array, S]:
        """Read a chunk, given its projections; for memories with `shares_projections`.

        Returns:
          (B, T, H, hd) attended values, and the state after the chunk.
        """
        raise NotImplementedError

    def piece_at(self, position: Position, width: int) -> Any:
        """Return what :meth:`read_piece` needs to know of the positions of a piece, the same for all layers."""
        return piece_frames(self.model, self.rope, position, width)

    def read_piece(self, layer: DecoderLayer, x: jax.Array, state: S, at: Any) -> tuple[jax.Array, Tail]:
        """Read tokens that lie within a block through one layer. Writes nothing.

        Args:
          layer: the layer.
          x: (B, W, D) its input.
          state: of the layer.
          at: from :meth:`piece_at`.

        Returns:
          (B, W, D) output, and what the state of the unfinished block gains.
        """
        q, k, v = layer.project(x)
        attended, tail = self.attend_piece(q, k, v, state, at)
        return layer.finish(attended, x), tail

    def attend_piece(
        self, q: jax.Array, k: jax.Array, v: jax.Array, state: S, at: Any
    ) -> tuple[jax.Array, Tail]:
        """Read a piece, given its projections; what :meth:`read_piece` does between them and the layer's output."""
        raise NotImplementedError

    # Writing.

    def close_stream(self, parameters: Any, shared: Any, batch_size: int) -> Stream:
        """Return the rows (B, M, D) that enter the bottom layer when a block closes."""
        return None

    def close_block(
        self, layer: DecoderLayer, state: S, stream: Stream, position: Position
    ) -> tuple[S, Stream]:
        """Write a block whose last token has been read into the state of one layer.

        Args:
          layer: the layer.
          state: of the layer, with the whole block in the fields of the unfinished one.
          stream: rows of :meth:`close_stream` from the layer below.
          position: before the block is counted.

        Returns:
          The state after the block, and the rows for the layer above.
        """
        return shift_window(state), stream

    def top(self, norm: Norm, stream: Stream) -> Any:
        """Return the shared state after a block from the rows above the top layer; for "segment" order."""
        return None

    # Measuring.

    def ablate(self, state: S, initial: S, how: str) -> S:
        """Make the state useless, to measure whether the model uses it.

        Args:
          state: of all layers (L, B, ...).
          initial: of streams that have read nothing.
          how: "zeroed", "shuffled" (each stream gets that of another), or "frozen" (the initial one).
        """

        def replaced(name: str) -> jax.Array:
            field = getattr(state, name)
            if how == "zeroed":
                return jnp.zeros_like(field)
            return jnp.roll(field, 1, axis=1) if how == "shuffled" else getattr(initial, name)

        return dataclasses.replace(state, **{name: replaced(name) for name in self.learned_fields})


def scan_blocks(
    memory: Memory, layer: DecoderLayer, x: jax.Array, state: Any, streams: Stream, position: Position
) -> tuple[jax.Array, Any, Stream]:
    """Read a chunk through one layer block by block: `read_piece` of the whole block, then `close_block`.

    The default of :meth:`Memory.read_blocks`, whose arguments and results these are. Activations within a block are
    formed again in the backward pass.
    """
    size = memory.model.block_size
    full, rest = divmod(x.shape[1], size)
    batch = x.shape[0]
    state = with_past_slots(state, memory.model.memory_segments)

    def body(carry: Any, xs: Any) -> Any:
        (state, position), (block, stream) = carry, xs
        y, tail = memory.read_piece(layer, block, state, memory.piece_at(position, size))
        state, stream = memory.close_block(layer, dataclasses.replace(state, **tail), stream, position)
        return (state, position.next_block()), (y, stream)

    blocks = x[:, : full * size].reshape(batch, full, size, -1).swapaxes(0, 1)
    if full:
        body = jax.checkpoint(body, prevent_cse=False)
        (state, position), (read, streams) = jax.lax.scan(body, (state, position), (blocks, streams))
    else:
        read = blocks
    out = read.swapaxes(0, 1).reshape(batch, full * size, -1)
    if rest:
        y, tail = memory.read_piece(layer, x[:, full * size :], state, memory.piece_at(position, rest))
        state = write_tail(state, tail, position.filled, np.full(batch, rest))
        out = jnp.concatenate([out, y], axis=1)
    return out, state, streams


def write_tail(state: S, tail: Tail, filled: Any, count: Any, *, stacked: bool = False) -> S:
    """Write the first `count` (B,) entries of a piece behind the `filled` (B,) ones of the unfinished block.

    Args:
      state: of one layer, or of all (L, B, ...) if `stacked`.
      tail: entries (B, W, ...), or (L, B, W, ...), by field of the state.
      filled: entries that each row has.
      count: entries to write.
      stacked: whether arrays have a leading L axis.
    """
    changed = {}
    for name, fresh in tail.items():
        cache = getattr(state, name)
        batch, width = fresh.shape[1:3] if stacked else fresh.shape[:2]
        size = cache.shape[2] if stacked else cache.shape[1]
        slot = filled[:, None] + np.arange(width)
        slot = jnp.where(np.arange(width) < count[:, None], slot, size)  # beyond the end: dropped
        where = (np.arange(batch)[:, None], slot)
        changed[name] = cache.at[(slice(None), *where) if stacked else where].set(fresh, mode="drop")
    return dataclasses.replace(state, **changed)


def choose_rows(rows: jax.Array, if_true: Any, if_false: Any) -> Any:
    """Return two states combined: rows (B,) bool says from which each row is."""

    def choose(new: jax.Array, old: jax.Array) -> jax.Array:
        return new if new is old else jnp.where(rows.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return jax.tree.map(choose, if_true, if_false)
