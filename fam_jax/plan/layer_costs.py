"""Estimate the work of a model's layers, by layer type (`fam_jax.model.layer_types`)."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fam_jax.config import ModelConfig
from fam_jax.kernels import BlockOptions, can_update, why_not_pallas
from fam_jax.model.layer_types import models_of_types
from fam_jax.plan.attention import LocalShare, kernel_seconds
from fam_jax.plan.hlo import Op, Shares
from fam_jax.plan.update_kernels import update_seconds
from fam_jax.sharding import ROW_AXES


def shares_of_types(model: ModelConfig) -> Shares:
    """Return a function for :meth:`fam_jax.plan.hlo.Module.walk` that knows the conditionals over layer types.

    In the scan over layers, such a conditional has one branch per layer type.
    """
    counts = [layers for _, layers in models_of_types(model)]

    def shares(op: Op) -> list[float] | None:
        if len(counts) == 1 or len(op.branches) != len(counts):
            return None
        return [count / model.num_layers for count in counts]

    return shares


def takes_kernels(model: ModelConfig) -> bool:
    """Return whether attention runs in Pallas kernels on a TPU, rather than in XLA operations."""
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


def kernels_of_types(model: ModelConfig, share: LocalShare) -> dict[str, tuple[float, float]]:
    """Return low and high seconds of the kernels of every layer type, for :func:`fam_jax.plan.estimate`."""
    if model.attention not in ("auto", "pallas"):
        return {}
    models = [own for own, _ in models_of_types(model)]
    # The traffic of rotary embedding takes longer than its computation.
    found: dict[str, tuple[float, float]] = {"rotary_embedding": (0.0, 0.0)}
    for index, own in enumerate(models):
        seconds: dict[str, tuple[float, float]] = {}
        if takes_kernels(own):
            seconds |= kernel_seconds(own, share)
        if own.memory.chained_rows and updates_by_kernel(own):
            seconds |= update_seconds(own, share)
        place = rf"branch_{index}_fun/(?!.*branch_).*" if len(models) > 1 else ""
        found |= {place + name: span for name, span in seconds.items()}
    return found


def local_share(
    model: ModelConfig,
    topology: str,
    mesh: Mapping[str, int],
    rows: int,
    tokens: int,
    *,
    past: int = 0,
    gradient: bool = True,
) -> LocalShare:
    """Return the part of an attention layer that one chip computes.

    Args:
      model: the model's config.
      topology: such as v5p:2x2x1.
      mesh: sizes of the mesh axes.
      rows: rows of the batch on all chips.
      tokens: T.
      past: past blocks that the rows have room for.
      gradient: whether there is a backward pass.
    """
    ways = math.prod(mesh[axis] for axis in ROW_AXES)
    return LocalShare(
        topology=topology,
        rows=rows // ways if rows % ways == 0 else rows,
        tokens=tokens,
        heads=model.num_heads // mesh["tensor"],
        kv_heads=max(model.num_kv_heads // mesh["tensor"], 1),
        past=past,
        gradient=gradient,
    )
