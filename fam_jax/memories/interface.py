"""The interface of a memory: config fields, parameters, a state per layer, and how blocks read and write it.

All memories have the same timeline. Tokens of block tau read the state that block tau - 1 left. The state changes once
per block, after its last token has been read. Most memories therefore define two methods:
:meth:`Memory.extra_of_piece`, the keys that tokens see beside their window, and :meth:`Memory.close_block`, which
writes a complete block into the state. If tokens read the memory by other means than attention, override
:meth:`Memory.read_piece` instead.

The default :meth:`Memory.read_blocks` uses these methods to read whole blocks in training and prefill. Faster versions
are tested against it.

docs/add_a_memory.md shows step by step how to add a memory.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fam_jax.config import MemoryConfig, ModelConfig
from fam_jax.kernels import Part, multi_part_attention
from fam_jax.layers.decoder_layer import DecoderLayer, Norm
from fam_jax.layers.rope import Rope, rope_of, rotate
from fam_jax.memories.window_cache import (
    WINDOW_AXES,
    PieceFrames,
    Position,
    WindowState,
    empty_window,
    piece_frames,
    shift_window,
    window_parts,
    with_past_slots,
)

S = TypeVar("S", bound=WindowState)

# Entries (B, W, ...) that a piece adds to the unfinished block, by the field (B, C, ...) of the state that holds them.
Tail = dict[str, jax.Array]
# Rows (B or 1, M, D), or a tree of arrays, that rise through the layers beside the tokens; None if there are none.
Stream = Any


class Memory(Generic[S]):
    """The memory of a model's layers. One object serves all layers of a type in a call of the model.

    The base class is Block Sliding Window Attention, read block by block. Subclasses add a state.
    """

    # The group of the memory's config fields.
    Config: ClassVar[type[MemoryConfig]]
    # The state of a layer: a registered dataclass that extends WindowState.
    State: ClassVar[type[WindowState]] = WindowState
    # layer: the state of a layer comes from that layer alone. segment: the output of the top layer for a block enters
    # the bottom layer at the next block, so each block passes through all layers before the next one starts.
    order: ClassVar[Literal["layer", "segment"]] = "layer"
    # What :meth:`model_parameters` created, while a model reads or writes.
    parameters: Any = None

    def __init__(self, model: ModelConfig):
        self.model = model
        self.rope: Rope = rope_of(model)

    # Parameters.

    def layer_parameters(self, rngs: nnx.Rngs) -> nnx.Module | None:
        """Create the parameters that each layer has for the memory: `layer.memory`."""
        return None

    def model_parameters(self, rngs: nnx.Rngs) -> nnx.Module | None:
        """Create the parameters that the memory has once: `model.memory`, and `self.parameters` in a call."""
        return None

    def initial_parameters(self, table: jax.Array, seed: int) -> Mapping[str, jax.Array]:
        """Return parameters to start from when a trained model changes to this memory; others stay random.

        Args:
          table: (V, D) embeddings of the trained model.
          seed: seed of random choices.

        Returns:
          Arrays by path, such as memory/start or layers/memory/gate (with a leading L axis).
        """
        return {}

    # The state.

    def empty_fields(self, batch_size: int) -> dict[str, jax.Array]:
        """Return the fields (B, ...) of a layer's state beyond the window, for streams that have read nothing.

        Use float32 for sums that grow over a stream, whatever the dtype of the model.
        """
        return {}

    def empty(self, batch_size: int, *, past_slots: bool = True) -> S:
        """Return a layer's state for streams that have read nothing, before :meth:`enter`.

        Args:
          batch_size: B.
          past_slots: make room for past blocks. Training needs none: it reads all blocks in one call.
        """
        window = empty_window(self.model, batch_size, past_slots=past_slots)
        return self.State(**window, **self.empty_fields(batch_size))  # type: ignore[return-value]

    def state_axes(self) -> dict[str, tuple[str | None, ...]]:
        """Return the logical axes of each field of a layer's state; by default only the batch is divided."""
        own = jax.eval_shape(lambda: self.empty_fields(1))
        return WINDOW_AXES | {name: ("batch", *[None] * (x.ndim - 1)) for name, x in own.items()}

    @property
    def learned_fields(self) -> tuple[str, ...]:
        """Return the fields of the state that evaluation ablates: by default all beyond the window but fixed ones.

        Exclude fields of the unfinished block, if the memory has any beside keys and values.
        """
        fields = dataclasses.fields(self.State)
        return tuple(field.name for field in fields if field.name not in {*WINDOW_AXES, *self.fixed_fields})

    @property
    def fixed_fields(self) -> tuple[str, ...]:
        """Return the fields of the state that :meth:`enter` computes from the weights and that no block changes.

        An aligned call computes them from its weights for all rows, also for those that carry context.
        """
        return ()

    @property
    def passed_fields(self) -> tuple[str, ...]:
        """Return the fields of the state that random state passing hands to the next step.

        :meth:`read_blocks` must be able to continue from these alone. In "segment" order the shared state is enough.
        """
        return () if self.order == "segment" else self.learned_fields

    # Before any token: the initial state.

    def enter_at(self, rope: Rope) -> Any:
        """Return arrays that :meth:`enter` needs in layers with this RoPE, such as rotations."""
        return None

    def enter_stream(self, parameters: Any, shared: Any) -> Stream:
        """Return the rows that enter the bottom layer before the tokens of a block.

        Args:
          parameters: from :meth:`model_parameters`.
          shared: the state that the layers share, in "segment" order; else None.
        """
        return None

    def enter(self, layer: DecoderLayer, state: S, stream: Stream, at: Any) -> tuple[S, Stream]:
        """Fill in the part of a layer's state that does not depend on the layer's tokens.

        In "layer" order this is the initial state, which rows without context start from. In "segment" order it is the
        part that follows from the shared state, and this method is called again after every block.

        Args:
          layer: the layer; `layer.memory` holds its parameters for the memory.
          state: the layer's state.
          stream: rows from the layer below.
          at: from :meth:`enter_at`.

        Returns:
          The state, and the rows for the layer above.
        """
        return state, stream

    # Reading.

    def piece_at(self, position: Position, width: int) -> Any:
        """Return the positions that :meth:`read_piece` needs for `width` tokens, the same for all layers.

        The default is a :class:`PieceFrames`. A subclass that returns another type overrides
        :meth:`window_piece_frames`.
        """
        return piece_frames(self.model, self.rope, position, width)

    def window_piece_frames(self, at: Any) -> PieceFrames:
        """Return the window's part of what :meth:`piece_at` returned."""
        return at

    def read_piece(self, layer: DecoderLayer, x: jax.Array, state: S, at: Any) -> tuple[jax.Array, Tail]:
        """Read tokens that lie within a block through one layer, without changing its state.

        Args:
          layer: the layer.
          x: (B, W, D) its input.
          state: the layer's state.
          at: from :meth:`piece_at`.

        Returns:
          (B, W, D) output, and the entries to add to the unfinished block.
        """
        q, k, v = layer.project(x)
        attended, tail = self.attend_piece(layer, q, k, v, state, at)
        return layer.finish(attended, x), tail

    def attend_piece(
        self, layer: DecoderLayer, q: jax.Array, k: jax.Array, v: jax.Array, state: S, at: Any
    ) -> tuple[jax.Array, Tail]:
        """Attend to past blocks, the unfinished block, the piece itself and extra keys, in one softmax.

        Args:
          layer: the layer.
          q: (B, W, H, hd) queries, not rotated.
          k: (B, W, K, hd) keys, not rotated.
          v: (B, W, K, hd) values.
          state: the layer's state.
          at: from :meth:`piece_at`.

        Returns:
          (B, W, H, hd) attended values, and the entries to add to the unfinished block.
        """
        frames = self.window_piece_frames(at)
        k = rotate(k, frames.own)
        window = window_parts(self.model, state, frames, q, k, v)
        attended = self.attend_parts(window, self.extra_of_piece(layer, q, state, at))
        return attended, {"block_keys": k, "block_values": v}

    def attend_parts(self, window: Sequence[Part], extra: Sequence[Part]) -> jax.Array:
        """Attend to the parts of :func:`window_parts` and to extra ones; return (B, W, H, hd).

        An override of :meth:`attend_piece` should call it, because this is where evaluation sees what tokens attend to.
        """
        return multi_part_attention([*window, *extra], softcap=self.model.attention_softcap)

    def extra_of_piece(self, layer: DecoderLayer, q: jax.Array, state: S, at: Any) -> Sequence[Part]:
        """Return keys and values (B, S, K, hd) that every token of a piece sees beside its window.

        Each part holds the queries in the frame of its keys: `rotate(q, at.own)` for keys rotated in the frame of the
        block, whose first token is at 0, or `q` for keys without a position.

        Args:
          layer: the layer.
          q: (B, W, H, hd) queries, not rotated.
          state: the layer's state.
          at: from :meth:`piece_at`.
        """
        return ()

    def blocks_at(self, position: Position, length: int, cached: int) -> Any:
        """Return the positions that :meth:`read_blocks` needs for a chunk, the same for all layers.

        Args:
          position: where the rows are; all are at a block border.
          length: T.
          cached: past blocks that the state has room for.
        """
        return position

    def read_blocks(
        self, layer: DecoderLayer, x: jax.Array, state: S, streams: Stream, at: Any
    ) -> tuple[jax.Array, S, Stream]:
        """Read a chunk that starts at a block border through one layer. Memories in "layer" order only.

        To make it faster, override this method and :meth:`blocks_at`; the results must stay the same.

        Args:
          layer: the layer.
          x: (B, T, D) its input; T need not be a multiple of C.
          state: the layer's state.
          streams: (N, B, ...) rows of :meth:`close_stream` from the layer below, one set for each complete block.
          at: from :meth:`blocks_at`.

        Returns:
          (B, T, D) output, the state after the chunk, and the rows for the layer above.
        """
        return scan_blocks(self, layer, x, state, streams, at)

    # Writing.

    def close_stream(self, parameters: Any, shared: Any, batch_size: int) -> Stream:
        """Return the rows (B, M, D) that enter the bottom layer when a block closes.

        Args:
          parameters: from :meth:`model_parameters`.
          shared: the state that the layers share, in "segment" order; else None.
          batch_size: B.
        """
        return None

    def close_block(
        self, layer: DecoderLayer, state: S, stream: Stream, position: Position
    ) -> tuple[S, Stream]:
        """Write a block whose last token has been read into the state of one layer.

        An override ends with :func:`shift_window`, which moves the block into the window.

        Args:
          layer: the layer.
          state: the layer's state, with the whole block in the fields of the unfinished one.
          stream: rows of :meth:`close_stream` from the layer below.
          position: where the rows are, this block not yet counted.

        Returns:
          The state after the block, and the rows for the layer above.
        """
        return shift_window(state), stream

    def attend_to_write(self, memory: Sequence[Part], block: Part) -> jax.Array:
        """Attend from the rows of the memory to themselves and to the block that is written; return (B, M, H, hd).

        A memory whose rows attend should call it in :meth:`close_block`, because this is where evaluation sees what
        they attend to.
        """
        return multi_part_attention([*memory, block], softcap=self.model.attention_softcap)

    # The state that layers share, in "segment" order.

    def start_shared(self, parameters: Any, batch_size: int) -> Any:
        """Return the shared state (B, ...) of streams that have read nothing, from :meth:`model_parameters`."""
        return None

    def next_shared(self, norm: Norm, shared: Any, stream: Stream) -> Any:
        """Return the shared state after a block.

        Args:
          norm: the model's final norm.
          shared: the shared state before the block.
          stream: the rows of :meth:`close_stream` as they leave the top layer.
        """
        return None

    # Measuring.

    def ablate(self, state: S, initial: S, how: str) -> S:
        """Replace the memory by one without information, to measure whether the model uses it.

        Args:
          state: the state of all layers (L, B, ...).
          initial: the state of streams that have read nothing.
          how: "zeroed", "shuffled" (each stream gets that of another), or "frozen" (the initial one).
        """
        changed = {
            name: ablate_array(getattr(state, name), getattr(initial, name), how, batch_axis=1)
            for name in self.learned_fields
        }
        return dataclasses.replace(state, **changed)

    def vectors(self, state: S, shared: Any) -> jax.Array | None:
        """Return the vectors that hold what was written, to measure whether they are alike.

        By default these are those of the first learned field, counted along the axis after the batch, or those of the
        shared state.

        Args:
          state: the state of all layers (L, B, ...).
          shared: the state that layers share (B, ...), or None.

        Returns:
          (L, B, M, W), with L = 1 for a shared state; None if there is no memory.
        """
        if not self.model.memory.has_state:
            return None
        own = getattr(state, self.learned_fields[0]) if shared is None else jax.tree.leaves(shared)[0][None]
        return own.reshape(*own.shape[:2], own.shape[2] if own.ndim > 3 else 1, -1)


def ablate_array(x: jax.Array, initial: jax.Array, how: str, batch_axis: int) -> jax.Array:
    """Return one array of an ablated state; see :meth:`Memory.ablate`."""
    if how == "zeroed":
        return jnp.zeros_like(x)
    return jnp.roll(x, 1, axis=batch_axis) if how == "shuffled" else initial


def scan_blocks(
    memory: Memory, layer: DecoderLayer, x: jax.Array, state: Any, streams: Stream, position: Position
) -> tuple[jax.Array, Any, Stream]:
    """Read a chunk through one layer block by block: `read_piece` of the whole block, then `close_block`.

    This is the default of :meth:`Memory.read_blocks`, with the same arguments and results. The backward pass recomputes
    activations within a block.
    """
    size, writes = memory.model.block_size, memory.model.memory.has_state
    full, rest = divmod(x.shape[1], size)
    batch = x.shape[0]
    state = with_past_slots(state, memory.model.memory_segments)

    def body(carry: Any, xs: Any) -> Any:
        (state, position), (block, stream) = carry, xs
        y, tail = memory.read_piece(layer, block, state, memory.piece_at(position, size))
        state, stream = memory.close_block(layer, dataclasses.replace(state, **tail), stream, position)
        return (state, position.next_block(writes=writes)), (y, stream)

    out = []
    if full:
        blocks = x[:, : full * size].reshape(batch, full, size, -1).swapaxes(0, 1)
        body = jax.checkpoint(body, prevent_cse=False)
        (state, position), (read, streams) = jax.lax.scan(body, (state, position), (blocks, streams))
        out.append(read.swapaxes(0, 1).reshape(batch, full * size, -1))
    if rest:
        y, tail = memory.read_piece(layer, x[:, full * size :], state, memory.piece_at(position, rest))
        state = write_tail(state, tail, position.filled, np.full(batch, rest))
        out.append(y)
    return jnp.concatenate(out, axis=1), state, streams


def write_tail(state: S, tail: Tail, filled: Any, count: Any, *, stacked: bool = False) -> S:
    """Append the first `count` (B,) entries of a piece to the `filled` (B,) entries of the unfinished block.

    Args:
      state: the state of one layer, or of all (L, B, ...) if `stacked`.
      tail: entries (B, W, ...), or (L, B, W, ...), by field of the state.
      filled: number of entries that each row has.
      count: number of entries to write.
      stacked: whether arrays have a leading L axis.
    """
    changed = {}
    for name, fresh in tail.items():
        cache = getattr(state, name)
        batch, width = fresh.shape[1:3] if stacked else fresh.shape[:2]
        size = cache.shape[2] if stacked else cache.shape[1]
        slot = filled[:, None] + np.arange(width)
        # Entries to leave out get a slot beyond the end, where `mode="drop"` discards them.
        slot = jnp.where(np.arange(width) < count[:, None], slot, size)
        where = (np.arange(batch)[:, None], slot)
        changed[name] = cache.at[(slice(None), *where) if stacked else where].set(fresh, mode="drop")
    return dataclasses.replace(state, **changed)


def choose_rows(rows: jax.Array, if_true: Any, if_false: Any) -> Any:
    """Choose each row from one of two trees of arrays (B, ...): from `if_true` where `rows` (B,) bool is True."""

    def choose(new: jax.Array, old: jax.Array) -> jax.Array:
        return new if new is old else jnp.where(rows.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return jax.tree.map(choose, if_true, if_false)
