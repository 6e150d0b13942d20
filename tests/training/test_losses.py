"""The chunked loss equals that of a softmax over all logits, which it never has in memory at one time."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fam_jax.training.losses import TokenLoss, token_loss
from tests.model.tiny import TINY, build, params_of, variant

ROWS, TOKENS = 3, 7


def problem(weights_seed: int = 1) -> tuple[Any, ...]:
    """Return activations, targets and weights; some weights are zero, among them all of one row."""
    rng = np.random.default_rng(weights_seed)
    hidden = rng.normal(size=(ROWS, TOKENS, TINY.model_dim)).astype(np.float32) * 2
    targets = rng.integers(0, TINY.vocab_size, (ROWS, TOKENS)).astype(np.int32)
    weights = rng.uniform(0, 2, (ROWS, TOKENS)).astype(np.float32) * rng.integers(0, 2, (ROWS, TOKENS))
    weights[1] = 0
    return hidden, targets, weights.astype(np.float32)


def full_softmax(logits: jax.Array, targets: Any, weights: Any, z_loss: float) -> tuple[jax.Array, jax.Array]:
    """Compute loss and cross-entropy by the definition of softmax."""
    exponentials = jnp.exp(logits)
    z = exponentials.sum(-1)
    probability = jnp.take_along_axis(exponentials, targets[..., None], -1)[..., 0] / z
    entropy = -(weights * jnp.log(probability)).sum()
    return entropy + z_loss * (weights * jnp.log(z) ** 2).sum(), entropy


# One token of each row at a time; two, which do not divide the seven tokens; all at once.
@pytest.mark.parametrize(("chunk", "tie"), [(1, True), (8, False), (1000, True)])
def test_values_and_gradients_are_those_of_the_full_softmax(chunk: int, tie: bool) -> None:
    config = variant(tie_embeddings=tie)
    params = params_of(config)
    hidden, targets, weights = problem()
    z_loss = 0.1

    def ours(params: Any, hidden: jax.Array) -> tuple[jax.Array, TokenLoss]:
        result = token_loss(build(config, params), hidden, targets, weights, chunk=chunk, z_loss=z_loss)
        return result.loss, result

    def reference(params: Any, hidden: jax.Array) -> tuple[jax.Array, Any]:
        kernel = params["embedding"]["table"].T if tie else params["unembedding"]["kernel"]
        logits = hidden @ kernel
        loss, entropy = full_softmax(logits, targets, weights, z_loss)
        return loss, (entropy, logits.argmax(-1) == targets)

    (loss, result), gradients = jax.jit(jax.value_and_grad(ours, (0, 1), has_aux=True))(params, hidden)
    (expected, (entropy, correct)), wanted = jax.jit(jax.value_and_grad(reference, (0, 1), has_aux=True))(
        params, hidden
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(result.cross_entropy, entropy, rtol=1e-5)
    assert loss > result.cross_entropy > 0
    np.testing.assert_array_equal(result.correct, correct)
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    assert np.abs(gradients[1][0]).max() > 1e-2
    np.testing.assert_array_equal(gradients[1][1], 0)  # the row of weight zero


def test_large_logits_do_not_overflow() -> None:
    hidden, targets, weights = problem()
    result = token_loss(build(TINY, params_of(TINY)), jnp.asarray(hidden * 1e4), targets, weights, chunk=8)
    assert np.isfinite(result.loss)


def sizes(jaxpr: Any) -> Iterator[int]:
    """Yield the number of elements of every array in a jaxpr and the jaxprs inside it."""
    for equation in jaxpr.eqns:
        yield from (int(np.prod(v.aval.shape)) for v in equation.outvars if hasattr(v.aval, "shape"))
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from sizes(inner)


def test_the_logits_of_all_tokens_never_exist() -> None:
    """They exist in neither the forward nor the backward pass, unless one chunk has all tokens."""
    rows, tokens = 4, 32
    config = variant(vocab_size=64)
    params = params_of(config)
    shape = jax.ShapeDtypeStruct((rows, tokens, config.model_dim), jnp.float32)

    def largest(chunk: int) -> int:
        def loss(params: Any, hidden: jax.Array) -> jax.Array:
            targets = jnp.zeros((rows, tokens), jnp.int32)
            return token_loss(
                build(config, params), hidden, targets, jnp.ones((rows, tokens)), chunk=chunk
            ).loss

        return max(sizes(jax.make_jaxpr(jax.grad(loss, (0, 1)))(params, shape).jaxpr))

    logits = rows * tokens * config.vocab_size
    assert largest(rows * tokens) >= logits
    assert largest(16) < logits / 4
