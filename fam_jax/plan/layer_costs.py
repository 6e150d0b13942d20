"""Programs with several types of layers (`fam_jax.model.layer_types`): what each type computes, how many there are."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fam_jax.config import ModelConfig
from fam_jax.kernels import BlockOptions, can_update, why_not_pallas
from fam_jax.model.layer_types import layer_types
from fam_jax.plan.attention import kernel_seconds, visible_keys
from fam_jax.plan.hlo import Op, Shares
from fam_jax.plan.update_kernels import update_seconds
from fam_jax.sharding import ROW_AXES


def models_of_types(model: ModelConfig) -> list[tuple[ModelConfig, int]]:
    """Return the config that each layer type goes by, in the order in which programs number them, and its layers."""
    types = layer_types(model)
    counts = np.bincount(types.of_layers, minlength=len(types.memories)).tolist()
    return [(memory.model, count) for memory, count in zip(types.memories, counts, strict=True)]


def keys_of_layers(model: ModelConfig, tokens: int, past: int = 0) -> float:
    """Return the keys that a row's tokens see, summed over tokens and layers, after `past` blocks."""
    return sum(
        layers
        * visible_keys(
            tokens,
            block_size=own.block_size,
            segments=own.memory_segments,
            extra=own.memory.extra_keys_of_block,
            window=own.memory.window,
            past=past,
        )
        for own, layers in models_of_types(model)
    )


def shares_of_types(model: ModelConfig) -> Shares:
    """Return how often a conditional in the scan over layers, with a branch per layer type, takes each branch."""
    counts = [layers for _, layers in models_of_types(model)]

    def shares(op: Op) -> list[float] | None:
        if len(counts) == 1 or len(op.branches) != len(counts):
            return None
        return [count / model.num_layers for count in counts]

    return shares


def takes_kernels(model: ModelConfig) -> bool:
    """Return whether attention runs in Pallas kernels on a TPU, and not in XLA's operations."""
    shape = BlockOptions(
        model.block_size,
        model.memory_segments,
        model.memory.window,
        model.memory.stop_gradient,
        model.attention_softcap,
    )
    queries: Any = jax.ShapeDtypeStruct((1, 1, 1, model.head_dim), jnp.dtype(model.dtype))
    return model.attention in ("auto", "pallas") and not why_not_pallas(queries, shape)


def updates_by_kernel(model: ModelConfig) -> bool:
    """Return whether the attention of a chain of updates runs in Pallas kernels on a TPU."""
    queries: Any = jax.ShapeDtypeStruct(
        (1, model.memory.chained_rows, 1, model.head_dim), jnp.dtype(model.dtype)
    )
    return can_update(queries, model.block_size, model.attention_softcap)


def kernels_of_types(
    topology: str,
    model: ModelConfig,
    mesh: Mapping[str, int],
    rows: int,
    tokens: int,
    *,
    past: int = 0,
    gradient: bool = True,
) -> dict[str, tuple[float, float]]:
    """Return the seconds of the kernels of every layer type, for :func:`fam_jax.plan.estimate`.

    Args:
      topology: such as v5p:2x2x1.
      model: that attends.
      mesh: sizes of its axes.
      rows: of the batch, on all chips.
      tokens: T.
      past: as of :func:`kernel_seconds`.
      gradient: likewise.
    """
    if model.attention not in ("auto", "pallas"):
        return {}
    models = [own for own, _ in models_of_types(model)]
    ways = math.prod(mesh[axis] for axis in ROW_AXES)
    local = rows // ways if rows % ways == 0 else rows
    heads = model.num_heads // mesh["tensor"]
    kv_heads = max(model.num_kv_heads // mesh["tensor"], 1)
    found: dict[str, tuple[float, float]] = {"rotary_embedding": (0.0, 0.0)}  # no more than its traffic
    for index, own in enumerate(models):
        seconds: dict[str, tuple[float, float]] = {}
        if takes_kernels(own):
            seconds |= kernel_seconds(
                topology, own, local, tokens, heads, kv_heads, past=past, gradient=gradient
            )
        if own.memory.chained_rows and updates_by_kernel(own):
            seconds |= update_seconds(topology, own, local, heads, kv_heads, gradient=gradient)
        place = rf"branch_{index}_fun/(?!.*branch_).*" if len(models) > 1 else ""
        found |= {place + name: span for name, span in seconds.items()}
    return found
