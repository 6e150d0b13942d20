"""The keys and values that every memory caches: those of the last m complete blocks and of the unfinished block.

Cached keys are rotated relative to the first token of their *own* block. So no cached array refers to an absolute
position, and streams have no maximum length.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from fam_jax.config import MemoryConfig, ModelConfig, ceil_div, group, setting
from fam_jax.kernels import Part
from fam_jax.layers.rope import Rope, Rotation, rotate


@group("model.memory", effect="state")
class SegmentsConfig(MemoryConfig):
    """Fields of a memory whose tokens see the last m blocks beside it (m = 0: their own block only)."""

    segments: int = setting(default=1, doc="m, past blocks that stay visible.", minimum=0)
    window: int = setting(
        default=0, doc="If positive, hide keys this many tokens or more behind a query as well.", minimum=0
    )

    def cached_blocks(self, block_size: int) -> int:
        """Return m."""
        return self.segments


@group("model.memory", effect="state")
class BlockWindowConfig(SegmentsConfig):
    """The fields of :class:`SegmentsConfig`, and whether gradients stop between blocks. The base of most memories."""

    stop_gradient: bool = setting(
        default=False, doc="Stop gradients at the keys and values of earlier blocks.", effect="training"
    )


class ShownByShape:
    """Base of dataclasses of arrays whose `repr` has dtypes and shapes instead of numbers; for `repr=False`."""

    def __repr__(self) -> str:
        """Show the arrays as `name: dtype[shape]`."""
        arrays = (
            f"{jax.tree_util.keystr(path, simple=True, separator='.')}: {leaf.dtype}{list(leaf.shape)}"
            for path, leaf in jax.tree.leaves_with_path(self)
        )
        return f"{type(self).__name__}({', '.join(arrays)})"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class WindowState(ShownByShape):
    """The cache of one layer. In a :class:`fam_jax.model.StreamState` every array has a leading L axis."""

    # (B, m, C, K, hd) keys and values of the last m complete blocks, oldest first.
    keys: Any
    values: Any
    # (B, C, K, hd) of the unfinished block; slots from Position.filled on are unused.
    block_keys: Any
    block_values: Any
    # (B,) the layer's auxiliary losses, summed over the blocks of a training step. None: nobody asks for them.
    auxiliary_loss: Any = dataclasses.field(default=None, kw_only=True)


S = TypeVar("S", bound=WindowState)

# Logical axes of the fields that every memory has; None: not spread.
WINDOW_AXES: dict[str, tuple[str | None, ...]] = {
    "keys": ("batch", None, None, "kv_heads", None),
    "values": ("batch", None, None, "kv_heads", None),
    "block_keys": ("batch", None, "kv_heads", None),
    "block_values": ("batch", None, "kv_heads", None),
    "auxiliary_loss": ("batch",),
}


def add_auxiliary_loss(state: S, loss: Callable[[], jax.Array]) -> S:
    """Return `state` with a loss added that its memory trains on beside the next-token loss.

    A memory calls it where it reads or writes complete blocks, and adds one value per stream and block, or their sum
    over the blocks that it reads at once. The loss of a training step is the mean over streams and blocks, summed over
    layers. Outside of training nothing is computed.

    Args:
      state: the state of one layer.
      loss: returns (B,), weighted as the memory's config says.
    """
    if state.auxiliary_loss is None:
        return state
    added = loss().astype(state.auxiliary_loss.dtype)
    return dataclasses.replace(state, auxiliary_loss=state.auxiliary_loss + added)


# Nothing depends on how many blocks beyond this were read, and a count that wrapped around would hide all of them.
LARGEST_BLOCKS = 2**31 - 1


@dataclasses.dataclass(frozen=True, repr=False)
class Position(ShownByShape):
    """The positions of a batch's streams; rows may be at different positions."""

    # (B,) int32: complete blocks read; at most LARGEST_BLOCKS, where the count stays.
    blocks: Any
    # (B,) int32: tokens in the unfinished block, below C.
    filled: Any
    # (B,) bool: True if a block has been written into the state; False if the state follows from the weights alone.
    carries_context: Any
    # (B,) int32 added to all positions in training (random position offset, appendix B.2.2), or None.
    offset: Any = None
    # C.
    block_size: int = 0
    # (B,) typed PRNG keys of the noise that training adds to a memory, or None.
    noise_keys: Any = None

    def next_block(self, *, writes: bool = True) -> "Position":
        """Return the position after one more complete block, for rows at a block border."""
        return self.after_blocks(1, writes=writes)

    def after_blocks(self, count: int, *, writes: bool = True) -> "Position":
        """Return the position after `count` more complete blocks, for rows at a block border."""
        blocks = jnp.minimum(self.blocks, LARGEST_BLOCKS - count) + count
        return dataclasses.replace(
            self, blocks=blocks, carries_context=self.carries_context | (writes and count > 0)
        )


jax.tree_util.register_dataclass(
    Position,
    data_fields=["blocks", "filled", "carries_context", "offset", "noise_keys"],
    meta_fields=["block_size"],
)


def start_position(batch_size: int, block_size: int) -> Position:
    """Return the position of streams that have read nothing."""
    zeros = jnp.zeros(batch_size, jnp.int32)
    return Position(zeros, zeros, jnp.zeros(batch_size, bool), block_size=block_size)


def empty_window(model: ModelConfig, batch_size: int, *, past_slots: bool = True) -> dict[str, jax.Array]:
    """Return the arrays of an empty cache by name; without `past_slots` there is no room for past blocks."""
    segments = model.memory_segments if past_slots else 0
    heads = (model.num_kv_heads, model.head_dim)
    past = jnp.zeros((batch_size, segments, model.block_size, *heads), model.dtype)
    block = jnp.zeros((batch_size, model.block_size, *heads), model.dtype)
    return {"keys": past, "values": past, "block_keys": block, "block_values": block}


def visible_blocks(model: ModelConfig) -> int:
    """Return how many past blocks a token sees keys of: at most m, and only those that the window reaches."""
    window = model.memory.window
    if not window:
        return model.memory_segments
    return min(model.memory_segments, ceil_div(window - 1, model.block_size))


def packed(state: S) -> S:
    """Return the states of layers, or of one, with past keys and values (..., m * C, K * hd), or their shardings.

    A scan over layers slices and stacks these arrays. The kernels read heads side by side, so with an axis of heads a
    TPU would copy them to another layout in every layer, forward and backward.
    """

    def pack(x: Any) -> Any:
        if isinstance(x, jax.sharding.NamedSharding):
            *axes, _, _, heads, _ = x.spec
            return x.update(spec=jax.sharding.PartitionSpec(*axes, None, heads))
        *rows, blocks, size, heads, head_dim = x.shape
        return x.reshape(*rows, blocks * size, heads * head_dim)

    return dataclasses.replace(state, keys=pack(state.keys), values=pack(state.values))


def unpacked(state: S, model: ModelConfig) -> S:
    """Return the states of layers, or of one, with past keys and values (..., m, C, K, hd): undo :func:`packed`."""
    block = (model.block_size, model.num_kv_heads, model.head_dim)

    def unpack(x: jax.Array) -> jax.Array:
        *rows, tokens, _ = x.shape
        return x.reshape(*rows, tokens // model.block_size, *block)

    return dataclasses.replace(state, keys=unpack(state.keys), values=unpack(state.values))


def with_past_slots(state: S, segments: int) -> S:
    """Return `state` with room for `segments` past blocks, the missing ones empty."""
    missing = segments - state.keys.shape[1]

    def pad(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (missing, 0), (0, 0), (0, 0), (0, 0)))

    return (
        state if missing <= 0 else dataclasses.replace(state, keys=pad(state.keys), values=pad(state.values))
    )


def shift_window(state: S) -> S:
    """Return `state` with the unfinished block, now full, as the newest of the past blocks."""

    def shift(past: jax.Array, block: jax.Array) -> jax.Array:
        return jnp.concatenate([past, block[:, None]], axis=1)[:, 1:]

    return dataclasses.replace(
        state,
        keys=shift(state.keys, state.block_keys),
        values=shift(state.values, state.block_values),
    )


class PieceFrames(NamedTuple):
    """Rotations of a piece's queries into the frames of the keys that they see, and masks of those keys."""

    # (B, W, 1, hd/2), into the frame of the queries' own block.
    own: Rotation
    # For each visible past block, oldest first: (B, W, 1, hd/2), into the frame of that block.
    past: list[Rotation]
    # (B, W, C) of cached keys of the unfinished block.
    block_mask: jax.Array
    # (1, W, W) of the piece's own keys.
    piece_mask: jax.Array
    # For each visible past block: (B, W, C).
    past_masks: list[jax.Array]


def piece_frames(model: ModelConfig, rope: Rope, position: Position, width: int) -> PieceFrames:
    """Return the frames of a piece of `width` tokens that follows what each row has in its unfinished block."""
    size, window = model.block_size, model.memory.window
    place = position.filled[:, None] + np.arange(width)  # (B, W) in the block
    own = rope.at(place)

    def near(age: int) -> jax.Array:
        """Return (B, W, C): the keys that the window reaches in the block `age` blocks back."""
        distance = place[:, :, None] + age * size - np.arange(size)
        return distance < window if window else jnp.ones_like(distance, bool)

    ages = range(visible_blocks(model), 0, -1)
    distance = np.arange(width)[:, None] - np.arange(width)
    piece_mask = (distance >= 0) & (distance < (window or width))
    return PieceFrames(
        own=own,
        past=[own.after(rope.static(np.asarray(age * size))) for age in ages],
        block_mask=near(0) & (np.arange(size) < position.filled[:, None, None]),
        piece_mask=jnp.asarray(piece_mask)[None],
        past_masks=[near(age) & (position.blocks >= age)[:, None, None] for age in ages],
    )


def window_parts(
    model: ModelConfig, state: WindowState, frames: PieceFrames, q: jax.Array, k: jax.Array, v: jax.Array
) -> Sequence[Part]:
    """Return the groups of keys that the window shows to a piece.

    Args:
      model: the model's config, with the memory's window.
      state: the state of one layer.
      frames: from :func:`piece_frames`.
      q: (B, W, H, hd) queries, not rotated.
      k: (B, W, K, hd) the piece's own keys, rotated in the frame of their block.
      v: (B, W, K, hd) values.
    """
    own_q = rotate(q, frames.own)
    parts = [
        Part(own_q, state.block_keys, state.block_values, frames.block_mask),
        Part(own_q, k, v, frames.piece_mask),
    ]
    unseen = state.keys.shape[1] - len(frames.past)
    past_keys, past_values = state.keys[:, unseen:], state.values[:, unseen:]
    if model.memory.stop_gradient:
        past_keys, past_values = jax.lax.stop_gradient((past_keys, past_values))
    for j, (rotation, mask) in enumerate(zip(frames.past, frames.past_masks, strict=True)):
        parts.append(Part(rotate(q, rotation), past_keys[:, j], past_values[:, j], mask))
    return parts
