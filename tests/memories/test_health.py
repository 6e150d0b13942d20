"""The health of a memory: every kind has figures, and a frozen or collapsed one is reported."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fam_jax.memories.fam import FamConfig
from fam_jax.model import StreamState, Transformer, empty_state, memory_vectors, passed_on, passed_on_by_row
from fam_jax.model.layer_types import layers_with_memory
from fam_jax.model.memory_health import MemoryHealth, compare, health_in_training
from tests.memories.cases import CASES
from tests.variants import rest_slow

ROWS, BLOCKS = 3, 2
STATELESS = {"full", "swa", "bswa", "longformer", "transformer_xl", "fm", "feedback"}
QUICK = ["bswa", "fam, prefix, R=2", "running_mean"]


def model_of(name: str) -> Transformer:
    return Transformer(dataclasses.replace(CASES[name].model, dtype="float32"), rngs=nnx.Rngs(0))


def tokens_of(model: Transformer) -> jax.Array:
    shape = (ROWS, BLOCKS * model.config.block_size)
    return jnp.asarray(np.random.default_rng(0).integers(0, model.config.vocab_size, shape), jnp.int32)


@nnx.jit
def read(model: Transformer, tokens: jax.Array) -> StreamState:
    return model.hidden(tokens, empty_state(model.config, len(tokens), past_slots=False), aligned=True)[1]


look = nnx.jit(health_in_training)


@pytest.mark.parametrize("name", rest_slow(CASES, QUICK))
def test_every_memory_has_figures(name: str) -> None:
    model = model_of(name)
    tokens, size = tokens_of(model), model.config.block_size
    after = read(model, tokens)
    found = look(model, tokens[:, :size], passed_on(model.config, after))
    if model.config.memory.kind in STATELESS:
        assert found is None
        return
    layers = len(layers_with_memory(model.config)) if after.shared is None else 1
    assert {np.shape(each) for each in found} == {(layers,)}
    means = found.means()
    assert means.keys() == {"memory_rms", "memory_unchanged", "memory_spread"}
    if model.config.memory.kind == "armt":  # its values begin with zero weights
        assert means["memory_rms"] == 0 and len(found.alarms(model.config)) == layers
        return
    assert means["memory_rms"] > 0 and means["memory_unchanged"] < 0.5 and means["memory_spread"] > 0.01
    assert found.alarms(model.config) == []
    # The first row's memory is where all rows read on from.
    if after.shared is None and name == QUICK[1]:
        first = model.hidden(tokens[:1, :size], after.select([0]), aligned=True)[1]
        np.testing.assert_allclose(
            compare(model.config, after.select([0]), first).unchanged, found.unchanged, atol=0.2
        )


@pytest.mark.parametrize("name", rest_slow(["fam, prefix, R=2", "prmt"], ["fam, prefix, R=2"]))
@pytest.mark.parametrize("window", [False, True])
def test_rows_that_go_on_are_looked_at_where_they_are(name: str, window: bool) -> None:
    model = model_of(name)
    tokens, size = tokens_of(model), model.config.block_size
    after = read(model, tokens)
    found = look(model, tokens[:, :size], passed_on_by_row(model.config, after, window=window))
    assert found.alarms(model.config) == []


def test_a_memory_that_does_not_depend_on_the_text_has_collapsed() -> None:
    model = model_of("fam, prefix, R=2")
    tokens = jnp.tile(tokens_of(model)[:1], (ROWS, 1))  # as if all texts left the same memory
    found = look(model, tokens[:, : model.config.block_size], passed_on(model.config, read(model, tokens)))
    assert found.means()["memory_spread"] < 1e-6
    alarms = found.alarms(model.config)
    assert len(alarms) == len(layers_with_memory(model.config))
    assert "layer 0 has collapsed: those of different texts differ by " in alarms[0]


def test_a_memory_that_no_longer_changes_is_frozen() -> None:
    """A sum of float32 beyond 2^24 times what is added to it."""
    model = model_of("fam, prefix, R=2")
    tokens, size = tokens_of(model), model.config.block_size
    carried = passed_on(model.config, read(model, tokens))
    assert look(model, tokens[:, :size], carried).alarms(model.config) == []
    large = jax.tree.map(lambda x: x * 1e12, carried)
    found = look(model, tokens[:, :size], large)
    assert found.means()["memory_unchanged"] > 0.9999
    assert "is frozen: a block leaves 100.00% of its entries unchanged" in found.alarms(model.config)[0]
    broken = look(model, tokens[:, :size], jax.tree.map(lambda x: x * jnp.nan, carried))
    assert "is not finite" in broken.alarms(model.config)[0]


def test_what_counts_as_unchanged() -> None:
    """One stream, compared entry by entry; layers without a memory do not count."""
    config = dataclasses.replace(CASES["fam"].model, dtype="float32", memory=FamConfig(segments=1, length=2))
    model = Transformer(config, rngs=nnx.Rngs(0))
    state = read(model, tokens_of(model)[:1])
    same = compare(config, state, state)
    assert same is not None and same.spread is None
    np.testing.assert_array_equal(same.unchanged, 1.0)
    vectors = memory_vectors(config, state)
    np.testing.assert_allclose(same.rms, np.sqrt(np.square(vectors).mean(axis=(1, 2, 3))), rtol=1e-6)
    half = MemoryHealth(np.ones(1), np.array([0.5]), np.array([0.1]))
    assert half.alarms(config) == []
