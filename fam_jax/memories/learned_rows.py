"""Learned rows that enter a layer beside tokens, as embeddings do: memory rows, and what a memory starts from."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fam_jax.config import ModelConfig
from fam_jax.layers.decoder_layer import embedding_stddev


class LearnedRows(nnx.Module):
    """A parameter (M, D), by default at the scale of embeddings."""

    def __init__(self, model: ModelConfig, name: str, length: int, rngs: nnx.Rngs, *, stddev: float = 0.0):
        """Create it under a name that the memory's `parameter_axes` lists.

        Args:
          model: the model's config.
          name: name of the parameter.
          length: M.
          rngs: random streams for the initial values.
          stddev: their standard deviation; 0: that of embeddings.
        """
        self.name = name
        values = jax.random.normal(rngs.params(), (length, model.model_dim), jnp.float32)
        setattr(self, name, nnx.Param(values * (stddev or embedding_stddev(model))))

    def of_batch(self, batch_size: int, dtype: Any) -> jax.Array:
        """Return the rows (B, M, D) of a batch."""
        rows = getattr(self, self.name)[...].astype(dtype)
        return jnp.broadcast_to(rows, (batch_size, *rows.shape))


def embedded_rows(model: ModelConfig, table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Return rows (..., M, D), float32, to start from in a trained model: tokens as they enter its bottom layer.

    Its layers were trained on vectors of this kind and norm, whatever the scale of the embeddings (Lester et al. 2021).

    Args:
      model: the model's config.
      table: (V, D) its embeddings.
      tokens: (..., M) int32.
    """
    factor = model.model_dim**0.5 if model.scale_embeddings else 1.0
    return table[tokens].astype(jnp.float32) * factor
