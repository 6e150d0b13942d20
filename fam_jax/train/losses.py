"""Weighted next-token cross-entropy that never holds the logits of a whole batch."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fam_jax.model import Transformer


class TokenLoss(NamedTuple):
    """Sums over a batch; divide by the sum of weights for means."""

    loss: jax.Array  # () weighted cross-entropy plus z-loss, nats
    cross_entropy: jax.Array  # () weighted cross-entropy alone, nats
    correct: jax.Array  # (B, T) bool: the target has the highest logit


def token_loss(
    model: Transformer,
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    chunk: int,
    z_loss: float = 0.0,
) -> TokenLoss:
    """Cross-entropy from activations (B, T, D), with logits of at most about `chunk` tokens alive at a time.

    Chunks are cut along T, so that a batch sharded over devices stays so. Each is recomputed in the backward pass.

    Args:
      model: gives the logits.
      hidden: (B, T, D) from `Transformer.hidden`.
      targets: (B, T) int32.
      weights: (B, T) float32; 0 leaves a token out.
      chunk: tokens, all rows together.
      z_loss: weight of log(Z)^2, which keeps the softmax normaliser near 1 (PaLM, section 5).
    """
    batch, length, _ = hidden.shape
    width = min(max(1, chunk // batch), length)
    count = -(-length // width)
    if count == 1:
        return _chunk_loss(model, hidden, targets, weights, z_loss=z_loss)

    def split(x: jax.Array) -> jax.Array:  # (B, T, ...) -> (chunks, B, width, ...), padded with zero weights
        padded = jnp.pad(x, ((0, 0), (0, count * width - length), *[(0, 0)] * (x.ndim - 2)))
        return padded.reshape(batch, count, width, *x.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def body(
        sums: tuple[jax.Array, jax.Array], xs: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[tuple, jax.Array]:
        part = _chunk_loss(model, *xs, z_loss=z_loss)
        return (sums[0] + part.loss, sums[1] + part.cross_entropy), part.correct

    zero = jnp.zeros((), jnp.promote_types(hidden.dtype, jnp.float32))
    (loss, entropy), correct = jax.lax.scan(
        body, (zero, zero), (split(hidden), split(targets), split(weights))
    )
    return TokenLoss(loss, entropy, correct.swapaxes(0, 1).reshape(batch, -1)[:, :length])


def _chunk_loss(
    model: Transformer, hidden: jax.Array, targets: jax.Array, weights: jax.Array, *, z_loss: float
) -> TokenLoss:
    logits = model.logits(hidden)
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    entropy = weights * (normaliser - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0])
    loss = entropy + z_loss * weights * jnp.square(normaliser)
    return TokenLoss(loss.sum(), entropy.sum(), logits.argmax(axis=-1) == targets)
