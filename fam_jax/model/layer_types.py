"""The kinds of layers that a decoder mixes: which layer is of which kind, and the config that each kind goes by.

Parameters and memories of all layers are stacked alike, whatever their kind, and one scan goes over all of them. Only
what differs, attention and its positions, is chosen per layer by `jax.lax.switch`, so compile time grows with the
number of kinds and not with depth. All of a kind is static: a local layer spends no time on FAM or on what lies
beyond its window.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fam_jax.config import ModelConfig
from fam_jax.model.rope import Rope, rope_of


class Kind(NamedTuple):
    """What the layers of one kind share."""

    config: ModelConfig
    rope: Rope


def kinds_of(config: ModelConfig) -> tuple[Kind, ...]:
    """Every kind that `config.layer_pattern` names, once."""
    found = dict.fromkeys(config.layer_pattern)
    configs = [_local(config) if name == "local" else config for name in found]
    return tuple(Kind(kind, rope_of(kind)) for kind in configs)


def kind_of_layers(config: ModelConfig) -> jax.Array:
    """(L,) int32 index of every layer's kind in :func:`kinds_of`."""
    names = list(dict.fromkeys(config.layer_pattern))
    pattern = [names.index(name) for name in config.layer_pattern]
    return jnp.asarray(np.resize(pattern, config.num_layers), jnp.int32)


def visible_segments(config: ModelConfig) -> int:
    """Blocks before its own that a token sees keys of: at most m, and no more than the window reaches into."""
    if not config.window:
        return config.memory_segments
    return min(config.memory_segments, -(-(config.window - 1) // config.block_size))


def _local(config: ModelConfig) -> ModelConfig:
    """Sliding window attention without FAM."""
    local = dataclasses.replace(config, window=config.local_window, fam_length=0)
    if not config.local_rope_base:
        return local
    return dataclasses.replace(local, rope_base=config.local_rope_base, rope_scaling="none")
