"""An initial FAM for a model that has none: where its training begins."""

import jax
import jax.numpy as jnp

from fam_jax.config import ModelConfig


def fam_path(config: ModelConfig) -> str:
    """Where the initial FAM is among the parameters by path; for a model that has one."""
    return "layers/initial_fam" if config.fam_init == "prefix" else "initial_fam"


def fam_shape(config: ModelConfig) -> tuple[int, ...]:
    """(M, D), or (L, M, D) where every layer has its own."""
    layers = (config.num_layers,) if config.fam_init == "prefix" else ()
    return (*layers, config.fam_length, config.model_dim)


def fam_of_embeddings(table: jax.Array, config: ModelConfig, seed: int) -> jax.Array:
    """The embeddings of tokens drawn at random, as they enter the first layer; float32 of :func:`fam_shape`.

    As usual for learned prompts (Lester et al. 2021): the layers know vectors of this kind and of this norm, whatever
    the base's embeddings are scaled by.

    Args:
      table: (V, D) of the base.
      config: of the model with FAM.
      seed: of the tokens.
    """
    rows = jax.random.randint(jax.random.key(seed), fam_shape(config)[:-1], 0, table.shape[0])
    factor = config.model_dim**0.5 if config.scale_embeddings else 1.0
    return table[rows].astype(jnp.float32) * factor
