"""The state of streams: an explicit value that the model takes and returns.

Its size depends on the config and the batch only, never on the number of tokens read.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fam_jax.config import ModelConfig, UserError
from fam_jax.memories.interface import Memory, ablate_array
from fam_jax.memories.window_cache import Position, ShownByShape, packed, start_position, unpacked
from fam_jax.model.layer_types import memory_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class StreamState(ShownByShape):
    """The state of a batch of streams; rows may be at different positions."""

    # The memory's `State` with a leading L axis: arrays (L, B, ...).
    layers: Any
    # The state (B, ...) that layers share, for memories in "segment" order; else None.
    shared: Any
    position: Position

    @property
    def batch_size(self) -> int:
        """Return B, the number of streams."""
        return self.position.filled.shape[0]

    @property
    def tokens_read(self) -> np.ndarray:
        """Return how many tokens each stream has read (B,), int64."""
        blocks, filled = (np.asarray(x, np.int64) for x in (self.position.blocks, self.position.filled))
        return blocks * self.position.block_size + filled

    def select(self, rows: Sequence[int]) -> "StreamState":
        """Return the state of the streams `rows`, in that order; a stream may be taken more than once.

        Raises:
          UserError: there is no such stream.
        """
        count = self.batch_size
        if len(rows) == 0 or not all(0 <= row < count for row in rows):
            raise UserError(
                f"rows: expected numbers from 0 to {count - 1}, because there are {count} streams, got {[*rows]}"
            )
        chosen = np.asarray(rows, np.int32)
        return _by_rows([self], lambda parts, axis: jnp.take(parts[0], chosen, axis=axis))

    @staticmethod
    def join(states: Sequence["StreamState"]) -> "StreamState":
        """Return one state with the streams of all `states`, which must belong to one model."""
        return _by_rows(states, jnp.concatenate)

    def replace_row(self, row: int | jax.Array, stream: "StreamState") -> "StreamState":
        """Return the state with another stream, a state of one row, in place of row `row`."""
        return _by_rows(
            [self, stream],
            lambda parts, axis: jax.lax.dynamic_update_slice_in_dim(parts[0], parts[1], row, axis),
        )

    def choose(self, rows: Any, other: "StreamState") -> "StreamState":
        """Return a state with the own stream where `rows` (B,) bool is True, and that of `other` elsewhere."""
        chosen = jnp.asarray(rows)

        def merge(parts: list[jax.Array], axis: int) -> jax.Array:
            own, others = parts
            return jnp.where(chosen.reshape(*[1] * axis, -1, *[1] * (own.ndim - axis - 1)), own, others)

        return _by_rows([self, other], merge)


def _by_rows(
    states: Sequence[StreamState], merge: Callable[[list[jax.Array], int], jax.Array]
) -> StreamState:
    def merge_leaf(path: tuple[Any, ...], *leaves: jax.Array) -> jax.Array:
        in_layers = jax.tree_util.keystr(path[:1], simple=True) == "layers"  # arrays with a leading L axis
        return merge([*leaves], 1 if in_layers else 0)

    return jax.tree_util.tree_map_with_path(merge_leaf, *states)


def empty_state(
    model: ModelConfig, batch_size: int, *, past_slots: bool = True, memory: Memory | None = None
) -> StreamState:
    """Return the state of streams that have read nothing, with zeros in place of values that depend on the weights.

    Use it for aligned calls, which compute the initial state themselves and give it gradients. For other calls use
    `Transformer.init_state`. Without `past_slots` the state has no room for past blocks, so an aligned call is compiled
    without them, as training needs it.
    """
    memory = memory or memory_of(model)
    one = memory.empty(batch_size, past_slots=past_slots)
    layers = jax.tree.map(lambda x: jnp.zeros((model.num_layers, *x.shape), x.dtype), one)
    return StreamState(layers, None, start_position(batch_size, model.block_size))


def with_auxiliary_loss(model: ModelConfig, state: StreamState) -> StreamState:
    """Ask the layers of an aligned call for their auxiliary losses: start the sums at zero."""
    shape = (model.num_layers, state.batch_size)
    zeros = jnp.zeros(shape, jnp.promote_types(model.dtype, jnp.float32))
    return dataclasses.replace(state, layers=dataclasses.replace(state.layers, auxiliary_loss=zeros))


def auxiliary_loss(state: StreamState) -> jax.Array:
    """Return the auxiliary losses (B,) of a call that was asked for them, summed over its blocks and layers."""
    return state.layers.auxiliary_loss.sum(axis=0)


def passed_on(model: ModelConfig, state: StreamState) -> dict[str, Any]:
    """Return the part of a state that random state passing hands on: the memory of the first stream (appendix B.2.3).

    Returns:
      Arrays without a batch axis: the memory's `passed_fields` (L, ...) by name, and "shared" if layers share a state.
    """
    found = {name: getattr(state.layers, name)[:, 0] for name in memory_of(model).passed_fields}
    return found if state.shared is None else found | {"shared": jax.tree.map(lambda x: x[0], state.shared)}


def with_passed_on(state: StreamState, passed: dict[str, Any], rows: jax.Array) -> StreamState:
    """Start the chosen rows of an empty state from the arrays that :func:`passed_on` returned.

    Pass the result to an aligned call, which computes everything else that the memory needs. The chosen rows count as
    carrying context.

    Args:
      state: the state of B streams that have read nothing.
      passed: arrays without a batch axis, the same for all chosen rows.
      rows: (B,) bool, True for the chosen rows.
    """

    def start(saved: jax.Array, fresh: jax.Array) -> jax.Array:
        chosen = rows.reshape(1, -1, *[1] * (fresh.ndim - 2))
        return jnp.where(chosen, saved[:, None].astype(fresh.dtype), fresh)

    own = {
        name: start(saved, getattr(state.layers, name)) for name, saved in passed.items() if name != "shared"
    }
    shared = state.shared
    if "shared" in passed:
        # An aligned call replaces this in rows that carry no context.
        shared = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(rows), *x.shape)), passed["shared"])
    return StreamState(
        layers=dataclasses.replace(state.layers, **own),
        shared=shared,
        position=dataclasses.replace(state.position, carries_context=state.position.carries_context | rows),
    )


def passed_on_by_row(model: ModelConfig, state: StreamState, *, window: bool) -> dict[str, Any]:
    """Return what every stream of a state at a block border hands on to its next tokens.

    Args:
      model: the model's config.
      state: a state, or a tree of the same structure, such as its shardings.
      window: hand on everything, so that a stream goes on as if all its tokens were read at once. False: hand on the
        memory only; the stream goes on with an empty window.

    Returns:
      "layers": fields (L, B, ...) by name; "carries_context" (B,); with `window`, "blocks" (B,), and keys and values
      of the window (L, B, m * C, K * hd); "shared" if layers share a state.
    """
    memory, layers = memory_of(model), state.layers
    names = set(memory.passed_fields)
    if window:
        layers = packed(layers)
        names |= {"keys", "values", *(() if memory.order == "segment" else memory.learned_fields)}
    found = {
        "layers": {name: getattr(layers, name) for name in sorted(names)},
        "carries_context": state.position.carries_context,
    }
    if window:
        found["blocks"] = state.position.blocks
    return found if state.shared is None else found | {"shared": state.shared}


def going_on_by_row(model: ModelConfig, passed: dict[str, Any], begins: jax.Array) -> StreamState:
    """Return the state of streams that go on from :func:`passed_on_by_row`, for an aligned call.

    Args:
      model: the model's config.
      passed: what :func:`passed_on_by_row` returned.
      begins: (B,) bool, rows that begin a new stream instead.
    """
    window = "blocks" in passed
    fresh = empty_state(model, len(begins), past_slots=window)
    layers = packed(fresh.layers) if window else fresh.layers

    def choose(saved: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(begins.reshape(1, -1, *[1] * (new.ndim - 2)), new, saved.astype(new.dtype))

    own = {name: choose(saved, getattr(layers, name)) for name, saved in passed["layers"].items()}
    layers = dataclasses.replace(layers, **own)
    position = dataclasses.replace(fresh.position, carries_context=passed["carries_context"] & ~begins)
    if window:
        layers = unpacked(layers, model)
        position = dataclasses.replace(position, blocks=jnp.where(begins, 0, passed["blocks"]))
    # An aligned call replaces the shared state in rows that carry no context.
    return StreamState(layers, passed.get("shared"), position)


def ablated(model: ModelConfig, state: StreamState, start: StreamState, how: str) -> StreamState:
    """Return `state` with its memory ablated, to measure whether the model uses it.

    Args:
      model: the model's config.
      state: a state at a block border.
      start: the state of streams that have read nothing.
      how: "zeroed", "shuffled" (each stream gets the memory of another), or "frozen" (the initial memory; such streams
        count as carrying no context).
    """
    position = state.position
    if how == "frozen":
        position = dataclasses.replace(position, carries_context=start.position.carries_context)
    return StreamState(
        layers=memory_of(model).ablate(state.layers, start.layers, how),
        shared=jax.tree.map(
            lambda x, initial: ablate_array(x, initial, how, batch_axis=0), state.shared, start.shared
        ),
        position=position,
    )


def memory_vectors(model: ModelConfig, state: StreamState) -> jax.Array | None:
    """Return the vectors (L, B, M, W) that hold what was written, L = 1 if layers share them; None without memory."""
    return memory_of(model).vectors(state.layers, state.shared)
