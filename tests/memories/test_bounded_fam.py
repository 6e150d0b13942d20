"""FAM over thousands of blocks: its state stays float32, and with a bound it stays as easy to change as at first."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fam_jax.layers.decoder_layer import DecoderLayer
from fam_jax.memories.chain import bounded, update_vectors
from fam_jax.memories.fam import FamConfig
from fam_jax.model import StreamState, Transformer
from tests.model.tiny import build, params_of, some_tokens, variant


def after_blocks(model: Any, blocks: int, at_once: int = 100) -> list[StreamState]:
    """Read random blocks; return the states after `blocks` of them and after one more."""
    params, tokens = params_of(model), some_tokens(1, (blocks + 1) * model.block_size)

    @jax.jit
    def read(tokens: jax.Array, state: StreamState) -> StreamState:
        return build(model, params)(tokens, state, aligned=True)[1]

    state = build(model, params).init_state(1)
    for begin in range(0, blocks, at_once):
        state = read(tokens[:, begin * model.block_size : (begin + at_once) * model.block_size], state)
    return [state, read(tokens[:, -model.block_size :], state)]


def size(state: StreamState) -> np.ndarray:
    """Return the root mean square of the FAM of each layer (L,)."""
    return np.sqrt(np.mean(np.square(np.asarray(state.layers.fam, np.float64)), axis=(1, 2, 3)))


def test_bfloat16_does_not_freeze() -> None:
    """After 2,000 blocks in bfloat16, a block still changes FAM, as it does in float32, and FAM has the same norm.

    In bfloat16 itself, adding an update to a FAM of 256 times its size would change nothing.
    """
    narrow, wide = (after_blocks(variant(dtype=dtype), 2_000) for dtype in ("bfloat16", "float32"))
    assert narrow[0].layers.fam.dtype == jnp.float32
    assert narrow[0].layers.fam_keys.dtype == narrow[0].layers.keys.dtype == jnp.bfloat16
    # The norm is far beyond that at which bfloat16 would freeze.
    update = np.abs(np.asarray(wide[1].layers.fam) - np.asarray(wide[0].layers.fam)).max()
    assert size(wide[0]).min() > 256 * update / 4
    unchanged = np.mean(np.asarray(narrow[0].layers.fam) == np.asarray(narrow[1].layers.fam))
    assert unchanged < 0.01
    np.testing.assert_allclose(size(narrow[0]), size(wide[0]), rtol=0.05)


def test_a_bounded_memory_does_not_grow() -> None:
    free = [size(after_blocks(variant(), blocks)[0]) for blocks in (100, 1_000)]
    bound = [size(after_blocks(variant(bound=1.0), blocks)[0]) for blocks in (100, 1_000)]
    assert (free[1] > 5 * free[0]).all()
    assert (bound[1] < 1.5 * bound[0]).all()


def test_the_bound_is_one_of_the_root_mean_square() -> None:
    x = jnp.asarray([[3.0, -4.0], [0.3, 0.4], [0.0, 0.0]])
    found = bounded(x, 2.0)
    np.testing.assert_allclose(found[0], x[0] * 2.0 / np.sqrt(12.5), rtol=1e-6)
    np.testing.assert_array_equal(found[1:], x[1:])
    slopes = jax.jacobian(lambda x: bounded(x, 2.0))(x)
    assert np.isfinite(slopes).all()
    np.testing.assert_allclose(slopes[2, :, 2], np.eye(2), rtol=1e-6)


def test_no_bound_may_be_written_as_a_whole_number() -> None:
    model = variant()
    layer, vectors = DecoderLayer(model, rngs=nnx.Rngs(0)), jnp.ones((1, 2, model.model_dim))

    def updated(**bound: float) -> jax.Array:
        return update_vectors(layer, vectors, jnp.array([True]), lambda q, k, v: q, **bound)[0]

    np.testing.assert_array_equal(updated(bound=0), updated())
    assert np.abs(updated(bound=0.5) - updated()).max() > 0.1


def test_noise_comes_with_keys_alone() -> None:
    """Noise changes what tokens of later blocks read, row by row, and never the first block or a call without keys."""
    model = variant(noise=0.5, previous_blocks=2)
    params, tokens = params_of(model), some_tokens(2, 12)

    @jax.jit
    def read(keys: jax.Array | None) -> jax.Array:
        one: Transformer = build(model, params)
        return one.hidden(jnp.asarray(tokens), one.init_state(2), aligned=True, noise_keys=keys)[0]

    keys = jax.random.split(jax.random.key(0), 2)
    quiet, loud, half = read(None), read(keys), read(jnp.stack([keys[0], keys[0]]))
    size = model.block_size
    np.testing.assert_array_equal(loud[:, :size], quiet[:, :size])
    assert np.abs(loud[:, size:] - quiet[:, size:]).max(axis=(1, 2)).min() > 1e-2
    np.testing.assert_array_equal(half[0], loud[0])
    assert np.abs(half[1, size:] - loud[1, size:]).max() > 1e-2
    with pytest.raises(ValueError, match="only aligned calls"):
        build(model, params).hidden(jnp.asarray(tokens), build(model, params).init_state(2), noise_keys=keys)


@pytest.mark.slow
def test_noise_changes_no_gradient_but_by_its_values() -> None:
    """The noise is added to the chain: with noise of zero, gradients are those without keys."""
    model = variant(dtype="float64")

    def slope(noise: float, keys: jax.Array | None) -> Any:
        config = dataclasses.replace(model, memory=dataclasses.replace(model.memory, noise=noise))

        def loss(params: Any) -> jax.Array:
            one = build(config, params)
            hidden, _ = one.hidden(some_tokens(2, 14), one.init_state(2), aligned=True, noise_keys=keys)
            return jnp.sin(hidden).sum()

        return jax.jit(jax.grad(loss))(params_of(model))

    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0), 2)
        quiet, tiny, loud = slope(0.0, keys), slope(1e-9, keys), slope(0.3, keys)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), quiet, tiny)
        assert (
            max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (quiet, loud)), strict=True)) > 1e-2
        )


def test_layers_project_wide_rows_in_the_dtype_of_the_model() -> None:
    model = variant(dtype="bfloat16", qkv_bias=True, post_norms=True)
    layer = DecoderLayer(model, rngs=nnx.Rngs(0))
    x = jnp.ones((1, 3, model.model_dim), jnp.float32)
    q, k, v = layer.project(x)
    assert {q.dtype, k.dtype, v.dtype} == {jnp.dtype("bfloat16")}
    assert layer.finish(q, x).dtype == jnp.float32
    assert layer.finish(q, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_the_paper_has_neither() -> None:
    assert (FamConfig().bound, FamConfig().noise) == (0, 0)
