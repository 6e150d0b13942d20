"""Slots: keys and values of the rows that the last n blocks left. Newer rows do not change those of older ones.

A slot is filled once. When a block closes, the slots move by one, and `Memory.enter` fills the newest as the block's
rows pass through the layers. Keys are rotated in the frame of their own rows, of which the first is at position 0.
"""

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from fam_jax.config import ModelConfig
from fam_jax.kernels import Part
from fam_jax.layers.rope import Rope, rotate
from fam_jax.memories.interface import choose_rows
from fam_jax.memories.window_cache import WindowState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class SlotState(WindowState):
    """The window's cache and the slots of one layer."""

    # (B, n, S, K, hd) keys and values of the S rows of each slot, newest last.
    slot_keys: Any
    slot_values: Any
    # (B,) int32: how many slots are filled, the last ones.
    slots_filled: Any


S = TypeVar("S", bound=SlotState)

SLOT_FIELDS = ("slot_keys", "slot_values", "slots_filled")
# Logical axes of the fields that heads divide.
SLOT_AXES: dict[str, tuple[str | None, ...]] = {
    "slot_keys": ("batch", None, None, "kv_heads", None),
    "slot_values": ("batch", None, None, "kv_heads", None),
}


def empty_slots(model: ModelConfig, batch_size: int, slots: int, rows: int) -> dict[str, jax.Array]:
    """Return the fields of n empty slots of S rows, for B streams."""
    keys = jnp.zeros((batch_size, slots, rows, model.num_kv_heads, model.head_dim), model.dtype)
    return {"slot_keys": keys, "slot_values": keys, "slots_filled": jnp.zeros(batch_size, jnp.int32)}


def next_slot(state: S) -> S:
    """Move the slots by one: the newest then waits for :func:`fill_newest`, and the oldest of n is gone."""
    count = state.slot_keys.shape[1]
    return dataclasses.replace(
        state,
        slot_keys=jnp.roll(state.slot_keys, -1, axis=1),
        slot_values=jnp.roll(state.slot_values, -1, axis=1),
        slots_filled=jnp.minimum(state.slots_filled + 1, count),
    )


def fill_newest(state: S, k: jax.Array, v: jax.Array) -> S:
    """Put keys and values (B, S, K, hd) into the newest slot of the streams that have one. Repeating it is harmless."""

    def put(slots: jax.Array, newest: jax.Array) -> jax.Array:
        return choose_rows(state.slots_filled > 0, slots.at[:, -1].set(newest), slots)

    return dataclasses.replace(
        state, slot_keys=put(state.slot_keys, k), slot_values=put(state.slot_values, v)
    )


def slots_part(state: SlotState, q: jax.Array, rope: Rope, origins: np.ndarray) -> Part:
    """Return the keys and values of the oldest slots as one part; those that are not filled are hidden.

    Args:
      state: the state of one layer.
      q: (B, T, H, hd) queries, rotated in their own frame.
      rope: the layer's RoPE.
      origins: (count,) positions of the first row of each slot in the frame of the queries, for the `count` oldest.
    """
    batch, slots, rows, *heads = state.slot_keys.shape
    count = len(origins)
    keys = rotate(state.slot_keys[:, :count], rope.static(origins)[:, None])
    exists = state.slots_filled[:, None] >= slots - np.arange(count)
    return Part(
        q,
        keys.reshape(batch, count * rows, *heads),
        state.slot_values[:, :count].reshape(batch, count * rows, *heads),
        jnp.repeat(exists, rows, axis=1)[:, None],
    )
