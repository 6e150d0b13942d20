"""Gradients against finite differences of the oracle, compared between implementations, and zero where they must be."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fam_jax.kernels import Part, multi_part_attention
from fam_jax.layers.decoder_layer import apply_linear
from fam_jax.layers.rope import rotate
from fam_jax.memories import chain
from fam_jax.model import empty_state, with_passed_on
from tests.model.tiny import build, params_of, some_tokens, variant
from tests.oracle.naive import naive_forward, random_params

LENGTH = 14
WIDE = variant(dtype="float64", segments=1)
TOKENS = some_tokens(2, LENGTH)
# Weights of a smooth function of the logits; any such function serves.
PROJECTION = np.random.default_rng(9).normal(size=(2, LENGTH, WIDE.vocab_size))


def score(logits):
    return (PROJECTION[:, : logits.shape[1]] * logits).sum() + 0.1 * (logits**2).sum()


@functools.cache
def gradients(config, *, aligned=True, length=LENGTH):
    """Return the gradient of the score with respect to every parameter, for a call from an initial state."""
    tokens = TOKENS[:, :length]

    def loss(params):
        model = build(config, params)
        return score(model(jnp.asarray(tokens), model.init_state(len(tokens)), aligned=aligned)[0])

    return jax.jit(jax.grad(loss))(params_of(config))


def assert_same(got, want, **tolerance):
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, **tolerance), got, want)


EXACT = {"rtol": 1e-9, "atol": 1e-10}


@pytest.mark.parametrize(
    "changes",
    [
        {"previous_blocks": 2},
        pytest.param(
            {
                "init": "prefix",
                "norm": "layernorm",
                "activation": "gelu",
                "tie_embeddings": False,
                "num_kv_heads": 1,
            },
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {
                "positions": "zero",
                "activation": "geglu",
                "window": 3,
                "scale_embeddings": True,
                "num_kv_heads": 4,
            },
            marks=pytest.mark.slow,
        ),
        {
            "layer_pattern": ("local", "global"),
            "local_window": 4,
            "num_layers": 3,
            "qkv_bias": True,
            "qk_norm": True,
            "post_norms": True,
            "norm_offset": True,
            "attention_softcap": 1.5,
            "logit_softcap": 2.0,
        },
    ],
    ids=[
        "prompt",
        "prefix, layernorm, gelu, untied",
        "zero positions, geglu, window",
        "local layers, soft caps, biases, all norms",
    ],
)
def test_every_parameter_against_finite_differences_of_the_oracle(changes):
    """Compare slopes along a random direction of each parameter with central differences of the oracle."""
    config = variant(dtype="float64", **changes)
    params = random_params(config, 0)
    with jax.enable_x64(True):
        got = jax.tree.map(np.asarray, gradients(config))
    leaves, structure = jax.tree.flatten(params)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params)]
    rng = np.random.default_rng(0)
    for i, (name, leaf, gradient) in enumerate(zip(names, leaves, jax.tree.leaves(got), strict=True)):
        direction, h = rng.normal(size=leaf.shape), 3e-5

        def at(distance, i=i, leaf=leaf, direction=direction):
            moved = jax.tree.unflatten(
                structure, [*leaves[:i], leaf + distance * direction, *leaves[i + 1 :]]
            )
            return score(naive_forward(moved, config, TOKENS).logits)

        difference = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)  # error of order h^4
        slope = (gradient * direction).sum()
        assert abs(slope) > 1e-3, f"{name}: this direction shows nothing"
        np.testing.assert_allclose(slope, difference, rtol=1e-6, err_msg=name)


def plain_scan(chain, frozen, weights, rest, start, inputs):
    """Compute `scan_updates` with the backward pass of `lax.scan`."""
    layer, attention = chain.merge(frozen, weights, rest), chain.attention
    blocks, size = len(inputs.keep), attention.block_size

    def by_block(x):
        x = x.reshape(*x.shape[:2], -1, layer.key.kernel.shape[-1])
        return jnp.stack([x[:, i * size : (i + 1) * size] for i in range(blocks)])

    def body(carry, step):
        keys, values, rotation, keep, _ = step

        def attend(q, k, v):
            q, k = rotate(q, rotation), rotate(k, rotation)
            return multi_part_attention([Part(q, k, v), Part(q, keys, values)], softcap=attention.softcap)

        return chain.update(layer, carry, keep, attend, apply_linear)

    return jax.lax.scan(body, start, (by_block(inputs.keys), by_block(inputs.values), *inputs[2:]))


def test_deferred_weight_gradients_are_those_of_a_plain_scan(monkeypatch):
    config = variant(dtype="float64", previous_blocks=2)
    with jax.enable_x64(True):
        deferred = gradients(config)
        calls = []
        monkeypatch.setattr(chain, "scan_updates", lambda *args: calls.append(1) or plain_scan(*args))
        plain = gradients.__wrapped__(config)
    assert calls
    assert_same(deferred, plain, **EXACT)


@pytest.mark.parametrize(
    "changes",
    [pytest.param({"stop_gradient": True}, marks=pytest.mark.slow), {"length": 0, "window": 3}],
    ids=str,
)
def test_parallel_and_piecewise_gradients_are_equal(changes):
    config = variant(dtype="float64", **changes)
    with jax.enable_x64(True):
        assert_same(gradients(config), gradients(config, aligned=False), **EXACT)


@pytest.mark.parametrize(
    "changes",
    [{}, pytest.param({"layer_pattern": ("local", "global"), "local_window": 4}, marks=pytest.mark.slow)],
    ids=str,
)
@pytest.mark.parametrize("remat", ["dots", "wide", "full"])
def test_rematerialization_changes_no_gradient(remat, changes):
    with jax.enable_x64(True):
        config = variant(WIDE, **changes)
        assert_same(gradients(dataclasses.replace(config, remat=remat)), gradients(config), **EXACT)


@pytest.mark.slow
def test_less_than_a_block_has_gradients_too():
    with jax.enable_x64(True):
        assert_same(gradients(WIDE, length=3), gradients(WIDE, length=3, aligned=False), **EXACT)


def test_gradient_reaches_a_saved_fam_and_not_the_initial_one_beside_it():
    tokens = jnp.asarray(TOKENS)
    saved = jnp.asarray(np.random.default_rng(5).normal(size=(2, 2, 8)))  # L, M, D

    def loss(params, saved, rows):
        memory = with_passed_on(empty_state(WIDE, 2), {"fam": saved}, rows)
        return score(build(WIDE, params)(tokens, memory, aligned=True)[0])

    with jax.enable_x64(True):
        slope = jax.jit(jax.grad(loss, argnums=(0, 1)))
        for rows in (jnp.array([True, True]), jnp.array([False, False])):
            params, start = slope(params_of(WIDE), saved, rows)
            initial = params["memory"]["initial_fam"]
            used, unused = (start, initial) if rows[0] else (initial, start)
            assert np.abs(used).max() > 1e-3
            np.testing.assert_array_equal(unused, 0)


@pytest.mark.slow
def test_bfloat16_activations_give_float32_gradients_near_the_float32_ones():
    got = gradients(variant(dtype="bfloat16", init="prefix"))
    want = gradients(variant(init="prefix"))
    assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype("float32")}
    flat, flat_want = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(g)]) for g in (got, want))
    error = np.linalg.norm(flat - flat_want) / np.linalg.norm(flat_want)
    assert error < 16 * float(jnp.finfo("bfloat16").eps)


BLOCKS, LAYERS = 5, 2


def influence_of_first_block(config):
    """Return (N,) largest gradients of each block's squared logits with respect to the first block's embeddings.

    The first block's tokens occur nowhere else and embeddings are not tied, so their rows of the table are used only
    there.
    """
    size = config.block_size
    tokens = np.concatenate([np.arange(size), np.full((BLOCKS - 1) * size, 10)])[None].astype(np.int32)

    def scores(table, params):
        params = {**params, "embedding": {"table": table}}
        model = build(config, params)
        logits, _ = model(jnp.asarray(tokens), model.init_state(1), aligned=True)
        return jnp.square(logits).reshape(BLOCKS, -1).sum(axis=1)

    with jax.enable_x64(True):
        params = params_of(config)
        by_row = jax.jit(jax.jacrev(scores))(params["embedding"]["table"], params)  # (N, V, D)
    return np.abs(np.asarray(by_row)[:, :size]).max(axis=(1, 2))


@pytest.mark.parametrize(
    ("changes", "reached"),
    [
        # Without FAM, each layer looks back m blocks.
        ({"length": 0}, 1 + LAYERS),
        ({"length": 0, "segments": 0}, 1),
        ({"length": 0, "segments": 2}, BLOCKS),
        # A window of w keys reaches w - 1 tokens back per layer: from the first token of a block, 3 of 4.
        ({"length": 0, "window": 2}, 2),
        ({"length": 0, "num_layers": 1}, 2),
        # With stop-gradient, a block reaches its own tokens only.
        ({"length": 0, "stop_gradient": True}, 1),
        # FAM passes gradients on without limit, whatever the segments are.
        ({}, BLOCKS),
        ({"stop_gradient": True}, BLOCKS),
        ({"num_layers": 1, "segments": 0}, BLOCKS),
    ],
    ids=str,
)
def test_receptive_field(changes, reached):
    """Figure 3a: beyond its receptive field, BSWA cannot learn from the first block; with FAM it can."""
    config = variant(dtype="float64", tie_embeddings=False, **{"num_layers": LAYERS, **changes})
    influence = influence_of_first_block(config)
    assert (influence[:reached] > 1e-6).all(), influence
    np.testing.assert_array_equal(influence[reached:], 0)
