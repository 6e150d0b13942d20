"""Programs with several types of layers (`fam_jax.model.layer_types`): what each type computes, how many there are."""

import collections
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fam_jax.config import ModelConfig
from fam_jax.kernels.pallas.call import why_not_pallas
from fam_jax.kernels.pallas.update import can_update
from fam_jax.kernels.shapes import BlockShape
from fam_jax.model.layer_types import Kind, kinds_of
from fam_jax.plan.attention import kernel_seconds, visible_keys
from fam_jax.plan.hlo import Op, Shares
from fam_jax.plan.update_kernels import update_seconds
from fam_jax.sharding import ROW_AXES


def layers_of_kinds(model: ModelConfig) -> list[tuple[Kind, int]]:
    """Every kind, in the order in which programs number them, and how many layers are of it."""
    count = collections.Counter(np.resize(model.layer_pattern, model.num_layers).tolist())
    names = dict.fromkeys(model.layer_pattern)
    return [(kind, count[name]) for kind, name in zip(kinds_of(model), names, strict=True)]


def keys_of_layers(model: ModelConfig, tokens: int, past: int = 0) -> float:
    """Keys that a row's tokens see, summed over tokens and layers; `past` blocks were read before."""
    return sum(
        layers
        * visible_keys(
            tokens,
            block_size=kind.config.block_size,
            segments=kind.config.memory_segments,
            fam=kind.config.fam_length,
            fam_blocks=kind.config.fam_previous_blocks,
            window=kind.config.window,
            past=past,
        )
        for kind, layers in layers_of_kinds(model)
    )


def shares_of_kinds(model: ModelConfig) -> Shares:
    """How often a conditional in the scan over layers, with a branch per kind, takes each."""
    counts = [layers for _, layers in layers_of_kinds(model)]

    def shares(op: Op) -> list[float] | None:
        if len(counts) == 1 or len(op.branches) != len(counts):
            return None
        return [count / model.num_layers for count in counts]

    return shares


def takes_kernels(model: ModelConfig) -> bool:
    """Whether attention runs in Pallas kernels on a TPU, and not in XLA's operations."""
    shape = BlockShape(
        model.block_size, model.memory_segments, model.window, model.stop_gradient, model.attention_softcap
    )
    queries: Any = jax.ShapeDtypeStruct((1, 1, 1, model.head_dim), jnp.dtype(model.dtype))
    return model.attention in ("auto", "pallas") and not why_not_pallas(queries, shape)


def updates_by_kernel(model: ModelConfig) -> bool:
    """Whether FAM's own attention runs in Pallas kernels on a TPU."""
    queries: Any = jax.ShapeDtypeStruct((1, model.fam_length, 1, model.head_dim), jnp.dtype(model.dtype))
    return can_update(queries, model.block_size, model.attention_softcap)


def kernels_of_kinds(
    topology: str,
    model: ModelConfig,
    mesh: Mapping[str, int],
    rows: int,
    tokens: int,
    *,
    past: int = 0,
    gradient: bool = True,
) -> dict[str, tuple[float, float]]:
    """Seconds of the kernels of every kind of layer, for :func:`fam_jax.plan.estimate`.

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
    kinds = kinds_of(model)
    ways = math.prod(mesh[axis] for axis in ROW_AXES)
    local = rows // ways if rows % ways == 0 else rows
    heads = model.num_heads // mesh["tensor"]
    kv_heads = max(model.num_kv_heads // mesh["tensor"], 1)
    found: dict[str, tuple[float, float]] = {"fam_rotary": (0.0, 0.0)}  # no more than its traffic
    for index, kind in enumerate(kinds):
        seconds: dict[str, tuple[float, float]] = {}
        if takes_kernels(kind.config):
            seconds |= kernel_seconds(
                topology, kind.config, local, tokens, heads, kv_heads, past=past, gradient=gradient
            )
        if kind.config.fam_length and updates_by_kernel(kind.config):
            seconds |= update_seconds(topology, kind.config, local, heads, kv_heads, gradient=gradient)
        place = rf"branch_{index}_fun/(?!.*branch_).*" if len(kinds) > 1 else ""
        found |= {place + name: span for name, span in seconds.items()}
    return found
