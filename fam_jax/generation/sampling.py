"""Sampling of the next token from logits."""

import dataclasses

import jax
import jax.numpy as jnp

from fam_jax.config import UserError
from fam_jax.config.training import LARGEST_SEED

# Those by which float32 logits can be divided.
TEMPERATURES = (1e-37, 1e37)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to sample tokens; the default is greedy. Filters apply in this order: temperature, top_k, top_p.

    Raises:
      UserError: a value is out of range, or a filter is set where greedy decoding would ignore it.
    """

    # Divides the logits; 0: take the likeliest token, of equal ones that with the lowest id.
    temperature: float = 0.0
    # Sample among the k likeliest tokens only, of equal ones those with the lowest ids; 0: off.
    top_k: int = 0
    # Sample among the fewest likeliest tokens whose probabilities add up to top_p; 1: off.
    top_p: float = 1.0

    def __post_init__(self) -> None:
        low, high = TEMPERATURES
        if not (self.temperature == 0 or low <= self.temperature <= high):
            raise UserError(
                f"temperature: must be 0 (greedy) or from {low} to {high}, got {self.temperature}"
            )
        if self.top_k < 0 or self.top_k != int(self.top_k):
            raise UserError(f"top_k: must be 0 (off) or a number of tokens, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p: must be above 0 and at most 1 (off), got {self.top_p}")
        if self.temperature == 0 and (self.top_k > 0 or self.top_p < 1):
            raise UserError(
                "temperature: 0 is greedy and ignores top_k and top_p; set it above 0, or leave them unset"
            )


GREEDY = Sampling()


def check_seed(seed: int) -> int:
    """Return `seed`.

    Raises:
      UserError: it is not one of the 2^32 seeds that JAX tells apart.
    """
    if not 0 <= seed <= LARGEST_SEED:
        raise UserError(f"seed: must be from 0 to {LARGEST_SEED}, got {seed}")
    return seed


def sample(logits: jax.Array, keys: jax.Array, sampling: Sampling) -> jax.Array:
    """Sample a token for every row. A row's token depends on its own logits and key alone.

    Args:
      logits: (B, V); -inf forbids a token.
      keys: (B,) typed PRNG keys; greedy decoding ignores them.
      sampling: static under `jax.jit`.

    Returns:
      (B,) int32.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    draw = jax.vmap(jax.random.categorical)
    # With the largest logit at zero, no temperature overflows, however small it is.
    scaled = (logits - logits.max(axis=-1, keepdims=True)) / sampling.temperature
    vocabulary = logits.shape[-1]
    kept = min(sampling.top_k or vocabulary, vocabulary)
    if kept == vocabulary and sampling.top_p == 1:
        return draw(keys, scaled).astype(jnp.int32)
    scaled, ids = jax.lax.top_k(scaled, kept)  # in descending order, equal ones in the order of their ids
    if sampling.top_p < 1:
        probabilities = jax.nn.softmax(scaled)
        likelier = jnp.cumsum(probabilities, axis=-1) - probabilities
        # The likeliest token always stays, whatever rounding does.
        outside = (likelier >= sampling.top_p).at[..., 0].set(False)
        scaled = jnp.where(outside, -jnp.inf, scaled)
    choice = draw(keys, scaled)
    return jnp.take_along_axis(ids, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)
