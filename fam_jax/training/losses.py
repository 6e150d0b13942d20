"""Weighted next-token cross-entropy that never keeps the logits of a whole batch in memory."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec as P

from fam_jax.config import ceil_div
from fam_jax.layers.fsdp import FSDP, divides_rows, on_rows, spread
from fam_jax.model import Transformer
from fam_jax.sharding import ROW_AXES


class TokenLoss(NamedTuple):
    """Sums over a batch; divide by the sum of weights for means. Only `loss` has a gradient."""

    # () weighted cross-entropy plus z-loss, nats.
    loss: jax.Array
    # () weighted cross-entropy alone, nats.
    cross_entropy: jax.Array
    # (B, T) bool: the target's logit is above all others; a tie is wrong.
    correct: jax.Array


@dataclasses.dataclass(frozen=True)
class _Form:
    """Static settings of a loss."""

    # (table, activations) -> logits.
    logits: Callable[[jax.Array, jax.Array], jax.Array]
    # Tokens of a row in a chunk.
    width: int
    z_loss: float
    # The axis of the table that is divided over fsdp.
    spread_axis: int


def token_loss(
    model: Transformer,
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    chunk: int,
    z_loss: float = 0.0,
) -> TokenLoss:
    """Compute cross-entropy from activations (B, T, D), with the logits of about `chunk` tokens in memory at a time.

    Gradients are computed along with the loss, chunk by chunk, so no logits are computed twice. On a mesh, every device
    gathers the table once, takes its own rows of the batch, sums the table's gradient locally and scatters it at the
    end. Chunks are cut along T.

    Args:
      model: the model that computes the logits.
      hidden: (B, T, D) from `Transformer.hidden`.
      targets: (B, T) int32.
      weights: (B, T) float32; 0 leaves a token out.
      chunk: tokens in all rows together.
      z_loss: weight of log(Z)^2, which keeps the softmax normalizer near 1 (PaLM, section 5).
    """
    width = min(max(1, chunk // hidden.shape[0]), hidden.shape[1])
    form = _Form(model.logits_from, width, z_loss, spread_axis=0 if model.unembedding is not None else 1)
    loss, entropy, correct = _loss(form, model.output_table, hidden, targets, weights)
    return TokenLoss(loss, jax.lax.stop_gradient(entropy), correct)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(form: _Form, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    return _on_mesh(form, (), *arrays)[0]


def _forward(form: _Form, *primals: Any) -> tuple[tuple[jax.Array, ...], Any]:
    wanted = tuple(i for i in (0, 1) if primals[i].perturbed)  # a frozen table needs no gradient
    out, gradients = _on_mesh(form, wanted, *(primal.value for primal in primals))
    return out, dict(zip(wanted, gradients, strict=True))


def _backward(form: _Form, gradients: dict[int, jax.Array], cotangents: Any) -> tuple[Any, ...]:
    scale = cotangents[0]
    if isinstance(scale, SymbolicZero):
        return None, None, None, None
    table, hidden = (
        None if gradients.get(i) is None else gradients[i] * scale.astype(gradients[i].dtype) for i in (0, 1)
    )
    return table, hidden, None, None


_loss.defvjp(_forward, _backward, symbolic_zeros=True)


def _on_mesh(
    form: _Form, wanted: tuple[int, ...], table: jax.Array, hidden: jax.Array, *rest: jax.Array
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Return the three results, and the loss's gradients with respect to the arrays `wanted` of (table, hidden)."""
    if not divides_rows(hidden.shape[0]):
        return _local(form, wanted, table, hidden, *rest)

    def local(table: jax.Array, hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> Any:
        whole = jax.lax.all_gather(table.astype(hidden.dtype), FSDP, axis=form.spread_axis, tiled=True)
        (loss, entropy, correct), gradients = _local(
            form, wanted, whole, hidden, targets, weights, table.dtype
        )
        gradients = tuple(
            spread(gradient, form.spread_axis) if i == 0 else gradient
            for i, gradient in zip(wanted, gradients, strict=True)
        )
        return (*jax.lax.psum((loss, entropy), ROW_AXES), correct), gradients

    rows = P(ROW_AXES)
    by_width = P(*[None] * form.spread_axis, FSDP)
    specs = ((P(), P(), rows), tuple((by_width, rows)[i] for i in wanted))
    return on_rows(local, (by_width, rows, rows, rows), specs)(table, hidden, *rest)


def _local(
    form: _Form,
    wanted: tuple[int, ...],
    table: jax.Array,
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    total_dtype: Any = None,
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Compute :func:`_on_mesh` on one device; sum the table's gradient in `total_dtype`, by default the table's."""
    batch, length, _ = hidden.shape
    width, count = form.width, ceil_div(length, form.width)

    def split(x: jax.Array) -> jax.Array:
        """Return x (B, T, ...) as (chunks, B, width, ...), padded with zeros, which have weight 0."""
        padded = jnp.pad(x, ((0, 0), (0, count * width - length), *[(0, 0)] * (x.ndim - 2)))
        return padded.reshape(batch, count, width, *x.shape[2:]).swapaxes(0, 1)

    def body(carry: Any, xs: tuple[jax.Array, ...]) -> tuple[Any, Any]:
        sums, d_table = carry
        loss = functools.partial(_chunk_loss, form)
        if wanted:
            gradient = jax.value_and_grad(loss, argnums=wanted, has_aux=True)
            (value, (entropy, correct)), gradients = gradient(table, *xs)
        else:
            (value, (entropy, correct)), gradients = loss(table, *xs), ()
        found = dict(zip(wanted, gradients, strict=True))
        if 0 in found:
            d_table = d_table + found[0].astype(d_table.dtype)
        return ((sums[0] + value, sums[1] + entropy), d_table), (correct, found.get(1))

    zero = jnp.zeros((), jnp.promote_types(hidden.dtype, jnp.float32))
    start = jnp.zeros(table.shape if 0 in wanted else (), total_dtype or table.dtype)
    chunks = (split(hidden), split(targets), split(weights))
    ((loss, entropy), d_table), (correct, d_hidden) = jax.lax.scan(body, ((zero, zero), start), chunks)

    def join(x: jax.Array) -> jax.Array:
        """Return the inverse of `split`."""
        return x.swapaxes(0, 1).reshape(batch, count * width, *x.shape[3:])[:, :length]

    gradients = tuple(d_table if i == 0 else join(d_hidden) for i in wanted)
    return (loss, entropy, join(correct)), gradients


def _chunk_loss(
    form: _Form, table: jax.Array, hidden: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Return the loss of a chunk, its cross-entropy and which targets are predicted."""
    logits = form.logits(table, hidden)
    of_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    # A comparison with the maximum of the other logits also finds ties. Counting ties would read all logits again.
    is_other = jnp.arange(logits.shape[-1]) != targets[..., None]
    rival = jax.lax.stop_gradient(jnp.where(is_other, logits, -jnp.inf).max(axis=-1))
    highest = jnp.maximum(rival, jax.lax.stop_gradient(of_target))
    normalizer = highest + jnp.log(jnp.exp(logits - highest[..., None]).sum(axis=-1))
    entropy = weights * (normalizer - of_target)
    loss = entropy + form.z_loss * weights * jnp.square(normalizer)
    return loss.sum(), (entropy.sum(), of_target > rival)
