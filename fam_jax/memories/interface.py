"""What a memory architecture is: config fields, parameters, a state per layer, and how blocks read and write it.

The timeline is the same for all. Tokens of block tau read the state that block tau - 1 left. The state changes once,
when the last token of the block has been read. Most memories therefore define two things:
:meth:`Memory.extra_of_piece`, the keys that tokens see beside their window, and :meth:`Memory.close_block`, which
writes a complete block into the state. Memories that tokens read in another way than by attention override
:meth:`Memory.read_piece` instead.

From these, the default :meth:`Memory.read_blocks` reads whole blocks for training and prefill. It is also the reference
for a faster one.

docs/add_a_memory.md adds a memory step by step.
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
# Rows (B or 1, M, D), or a tree of arrays, that rise through the layers beside the tokens. None: there are none.
Stream = Any


class Memory(Generic[S]):
    """How the layers of a model remember. One object serves all layers of a type; it holds no arrays.

    As it stands, it is Block Sliding Window Attention, read block by block. Subclasses add a state.
    """

    # The group of the memory's config fields.
    Config: ClassVar[type[MemoryConfig]]
    # The state of a layer: a registered dataclass that extends WindowState.
    State: ClassVar[type[WindowState]] = WindowState
    # layer: the state of a layer comes from that layer alone. segment: what the top layer makes of a block enters the
    # bottom layer at the next one, so blocks are read one after another through all layers.
    order: ClassVar[Literal["layer", "segment"]] = "layer"

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
        """Return parameters to start from when a trained model changes to this memory; others stay random.

        Args:
          table: (V, D) embeddings of the trained model.
          seed: of random choices.

        Returns:
          Arrays by path, such as memory/start or layers/memory/gate (with a leading L axis).
        """
        return {}

    # The state.

    def empty_fields(self, batch_size: int) -> dict[str, jax.Array]:
        """Return the fields of a layer's state beyond the window (B, ...), of streams that have read nothing.

        Sums that grow over a stream should be float32 whatever the dtype of the model.
        """
        return {}

    def empty(self, batch_size: int, *, past_slots: bool = True) -> S:
        """Return the state of a layer of streams that have read nothing, before :meth:`enter`.

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
        """Return the fields of the state that evaluation ablates: by default all beyond the window.

        A memory that keeps more of the unfinished block than keys and values leaves that out.
        """
        fields = dataclasses.fields(self.State)
        return tuple(field.name for field in fields if field.name not in WINDOW_AXES)

    @property
    def passed_fields(self) -> tuple[str, ...]:
        """Return the fields of the state that random state passing hands to the next step.

        They must suffice for :meth:`read_blocks` to go on from. In "segment" order the shared state does.
        """
        return () if self.order == "segment" else self.learned_fields

    # Before any token: the initial state.

    def enter_at(self, rope: Rope) -> Any:
        """Return arrays that :meth:`enter` needs in layers with this RoPE, such as rotations."""
        return None

    def enter_stream(self, parameters: Any, shared: Any) -> Stream:
        """Return the rows that enter the bottom layer before the tokens of a block.

        Args:
          parameters: of :meth:`model_parameters`.
          shared: the state that the layers share, in "segment" order; else None.
        """
        return None

    def enter(self, layer: DecoderLayer, state: S, stream: Stream, at: Any) -> tuple[S, Stream]:
        """Fill in what does not depend on the layer's tokens.

        In "layer" order that is the initial state, used in rows that carry no context. In "segment" order it is what
        the shared state makes of the layer, and it is called again after every block.

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

    def piece_at(self, position: Position, width: int) -> Any:
        """Return what reading a piece of `width` tokens needs to know of positions, the same for all layers.

        By default :class:`PieceFrames`. A subclass that returns something else overrides :meth:`window_piece_frames`.
        """
        return piece_frames(self.model, self.rope, position, width)

    def window_piece_frames(self, at: Any) -> PieceFrames:
        """Return the window's part of what :meth:`piece_at` returned."""
        return at

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
          state: of the layer.
          at: from :meth:`piece_at`.

        Returns:
          (B, W, H, hd) attended values, and what the state of the unfinished block gains.
        """
        frames = self.window_piece_frames(at)
        k = rotate(k, frames.own)
        parts = [
            *window_parts(self.model, state, frames, q, k, v),
            *self.extra_of_piece(layer, q, state, at),
        ]
        attended = multi_part_attention(parts, softcap=self.model.attention_softcap)
        return attended, {"block_keys": k, "block_values": v}

    def extra_of_piece(self, layer: DecoderLayer, q: jax.Array, state: S, at: Any) -> Sequence[Part]:
        """Return keys and values (B, S, K, hd) that every token of a piece sees beside its window.

        A part holds the queries as its keys want them: `rotate(q, at.own)` for keys rotated in the frame of the block,
        in which its first token is at 0, or `q` for keys without a position.

        Args:
          layer: the layer.
          q: (B, W, H, hd) queries, not rotated.
          state: of the layer.
          at: from :meth:`piece_at`.
        """
        return ()

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

        Override it, and :meth:`blocks_at`, with something faster that computes the same.

        Args:
          layer: the layer.
          x: (B, T, D) its input; T need not be a multiple of C.
          state: of the layer.
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
          parameters: of :meth:`model_parameters`.
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
          state: of the layer, with the whole block in the fields of the unfinished one.
          stream: rows of :meth:`close_stream` from the layer below.
          position: before the block is counted.

        Returns:
          The state after the block, and the rows for the layer above.
        """
        return shift_window(state), stream

    # The state that layers share, in "segment" order.

    def start_shared(self, parameters: Any, batch_size: int) -> Any:
        """Return the shared state (B, ...) of streams that have read nothing, from :meth:`model_parameters`."""
        return None

    def next_shared(self, norm: Norm, shared: Any, stream: Stream) -> Any:
        """Return the shared state after a block.

        Args:
          norm: the model's final norm.
          shared: before the block.
          stream: rows of :meth:`close_stream` above the top layer.
        """
        return None

    # Measuring.

    def ablate(self, state: S, initial: S, how: str) -> S:
        """Make the state useless, to measure whether the model uses it.

        Args:
          state: of all layers (L, B, ...).
          initial: of streams that have read nothing.
          how: "zeroed", "shuffled" (each stream gets that of another), or "frozen" (the initial one).
        """
        changed = {
            name: ablate_array(getattr(state, name), getattr(initial, name), how, batch_axis=1)
            for name in self.learned_fields
        }
        return dataclasses.replace(state, **changed)


def ablate_array(x: jax.Array, initial: jax.Array, how: str, batch_axis: int) -> jax.Array:
    """Return one array of a state made useless; see :meth:`Memory.ablate`."""
    if how == "zeroed":
        return jnp.zeros_like(x)
    return jnp.roll(x, 1, axis=batch_axis) if how == "shuffled" else initial


def scan_blocks(
    memory: Memory, layer: DecoderLayer, x: jax.Array, state: Any, streams: Stream, position: Position
) -> tuple[jax.Array, Any, Stream]:
    """Read a chunk through one layer block by block: `read_piece` of the whole block, then `close_block`.

    The default of :meth:`Memory.read_blocks`, whose arguments and results these are. The backward pass recomputes
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
    """Return each row from one of two trees of arrays (B, ...): from `if_true` where `rows` (B,) bool is set."""

    def choose(new: jax.Array, old: jax.Array) -> jax.Array:
        return new if new is old else jnp.where(rows.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return jax.tree.map(choose, if_true, if_false)
