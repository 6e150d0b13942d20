"""The health of a memory: whether it still changes, how large it is, and whether different texts leave different ones.

It works for every memory, through `Memory.vectors`, which says what counts.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fam_jax.config import ModelConfig
from fam_jax.model.layer_types import layers_with_memory
from fam_jax.model.state import (
    StreamState,
    empty_state,
    going_on_by_row,
    memory_vectors,
    with_passed_on,
)
from fam_jax.model.transformer import Transformer

# A memory is frozen if a block leaves a larger share of its entries unchanged. Memories that write one of many slots
# at a time leave most of them, but not all.
FROZEN = 0.9999
# A memory has collapsed if those of different texts differ by a smaller part of their size. The rounding of dtypes with
# less precision sets a higher limit.
ALIKE = 1e-3


class MemoryHealth(NamedTuple):
    """Figures of a memory, (L,) float32 each: of the layers that have one, or L = 1 if layers share it."""

    # Root mean square of the entries.
    rms: Any
    # Share of the entries that the last block left unchanged.
    unchanged: Any
    # How much the memories of streams differ after texts of their own: the distance from their mean, relative to their
    # size, both as root mean square. None: there is one stream.
    spread: Any = None

    def means(self) -> dict[str, float]:
        """Return the means over layers, as metrics by name."""
        named = {"memory_rms": self.rms, "memory_unchanged": self.unchanged, "memory_spread": self.spread}
        return {name: float(value.mean()) for name, value in named.items() if value is not None}

    def alarms(self, model: ModelConfig) -> list[str]:
        """Return a line for each layer whose memory is not finite, no longer changes, or is the same for all texts."""
        numbers = layers_with_memory(model)
        names = [f"layer {number}" for number in numbers] if len(numbers) == len(self.rms) else ["all layers"]
        limit, found = max(ALIKE, float(jnp.finfo(model.dtype).eps)), []
        for place, name in enumerate(names):
            rms, unchanged = float(self.rms[place]), float(self.unchanged[place])
            if not jnp.isfinite(rms):
                found.append(f"the memory of {name} is not finite")
            elif unchanged > FROZEN:
                found.append(
                    f"the memory of {name} is frozen: a block leaves {unchanged:.2%} of its entries unchanged"
                )
            elif self.spread is not None and float(self.spread[place]) < limit:
                found.append(
                    f"the memory of {name} has collapsed: those of different texts differ by "
                    f"{float(self.spread[place]):.1e} of their size"
                )
        return found


def compare(
    model: ModelConfig, before: StreamState, after: StreamState, apart: StreamState | None = None
) -> MemoryHealth | None:
    """Compare states of streams.

    Args:
      model: the model's config.
      before: a state at any place.
      after: the state one block later.
      apart: a state of several streams that began alike and read texts of their own; None: not known.

    Returns:
      None if there is no memory.
    """
    old, new, others = (None if each is None else _vectors(model, each) for each in (before, after, apart))
    if old is None or new is None:
        return None
    spread = None
    if others is not None and others.shape[1] > 1:
        size = _size(others)
        spread = _size(others - others.mean(axis=1, keepdims=True)) / jnp.where(size > 0, size, 1)
    return MemoryHealth(_size(new), (old == new).astype(jnp.float32).mean(axis=(1, 2, 3)), spread)


def health_in_training(
    model: Transformer, tokens: jax.Array, carried: Mapping[str, Any]
) -> MemoryHealth | None:
    """Return the health of the memory that a training step left; a pure function, to be jitted.

    The rows read a block from that memory, which shows whether it still changes, and a block from the initial one,
    which shows whether the memory depends on the text.

    Args:
      model: the model.
      tokens: (B, C) int32, a block of each row of the batch.
      carried: what the step passes on: of the first row, or of all rows with train.carry.
    """
    config, rows = model.config, len(tokens)
    empty = empty_state(config, rows, past_slots=False)
    if "carries_context" in carried:
        start = going_on_by_row(config, dict(carried), jnp.zeros(rows, bool))
    else:
        start = with_passed_on(empty, dict(carried), jnp.ones(rows, bool))
    _, after = model.hidden(tokens, start, aligned=True)
    _, apart = model.hidden(tokens, empty, aligned=True)
    return compare(config, start, after, apart)


def _vectors(model: ModelConfig, state: StreamState) -> jax.Array | None:
    """Return the vectors (L, B, M, W) in float32, of the layers that have a memory; None if there is none."""
    found = memory_vectors(model, state)
    if found is None:
        return None
    numbers = layers_with_memory(model)
    return (found[jnp.array(numbers)] if len(found) > 1 else found).astype(jnp.float32)


def _size(x: jax.Array) -> jax.Array:
    """Return the root mean square (L,) of (L, B, M, W)."""
    return jnp.sqrt(jnp.square(x).mean(axis=(1, 2, 3)))
