"""Learned vectors (M, D) that pass through layers beside those of tokens: memory rows, and the start of a memory."""

import jax
import jax.numpy as jnp
from flax import nnx

from fam_jax.config import ModelConfig
from fam_jax.layers.decoder_layer import embedding_stddev

# Logical axes of the rows, for `parameter_axes`.
ROWS_AXES = {"rows": ("slots", "width")}


class LearnedRows(nnx.Module):
    """Learned rows (M, D)."""

    def __init__(self, model: ModelConfig, length: int, rngs: nnx.Rngs, *, stddev: float = 0.0):
        """Create random rows.

        Args:
          model: the model's config.
          length: M.
          rngs: random streams for the initial values.
          stddev: standard deviation of the initial values; 0 takes that of embeddings.
        """
        values = jax.random.normal(rngs.params(), (length, model.model_dim), jnp.float32)
        self.rows = nnx.Param(values * (stddev or embedding_stddev(model)))


def rows_of_random_tokens(
    model: ModelConfig, table: jax.Array, shape: tuple[int, ...], seed: int
) -> jax.Array:
    """Return the embeddings of random tokens as they enter the first layer, to start learned rows from.

    The layers of a trained model know vectors of this kind and norm, whatever the scale of the embeddings (Lester et
    al. 2021).

    Args:
      model: the model's config.
      table: (V, D) embeddings of the trained model.
      shape: shape of the result without D.
      seed: seed of the choice of tokens.
    """
    tokens = jax.random.randint(jax.random.key(seed), shape, 0, table.shape[0])
    return table[tokens].astype(jnp.float32) * (model.model_dim**0.5 if model.scale_embeddings else 1.0)
