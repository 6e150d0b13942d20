"""The Block-Recurrent Transformer against a NumPy loop written from the paper, and against what it must equal."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fam_jax.config import ConfigError, ModelConfig
from fam_jax.memories.block_recurrent import BlockRecurrentConfig
from fam_jax.memories.window import BlockSlidingWindowConfig
from fam_jax.model import Transformer, to_dict
from fam_jax.model.layer_types import layers_with_memory
from tests.memories.cases import CASES, random_parameters
from tests.memories.reference import sigmoid, silu
from tests.model.tiny import Reader
from tests.oracle.naive import (
    attend,
    feed_forward,
    normalize,
    parameters_of_layer,
    project_output,
    project_vector,
)
from tests.variants import rest_slow

pytestmark = pytest.mark.usefixtures("float64")

EXACT = {"rtol": 1e-10, "atol": 1e-11}
SIZE, LENGTH, LAYERS = 4, 15, 3

PLAIN = BlockRecurrentConfig(length=3, layers_above=1)
FORMS = [*itertools.product(("skip", "dual", "single"), ("fixed", "lstm"))]
Array = np.ndarray


def model_of(memory: Any, **values: Any) -> ModelConfig:
    return dataclasses.replace(CASES["bswa"].model, memory=memory, num_layers=LAYERS, **values)


def some_tokens(rows: int = 2, length: int = LENGTH) -> Array:
    return np.random.default_rng(1).integers(0, 16, (rows, length)).astype(np.int32)


def gate(params: Any, kind: str, old: Array, new: Array, features: Array) -> Array:
    """Return the next vector (D,) of the state: of the paper's section on the gate type."""
    if kind == "fixed":
        rate = sigmoid(params["rate"])
        return rate * old + (1 - rate) * new
    forget = np.tensordot(features, params["forget"]["kernel"], features.ndim) + params["forget_bias"]
    admit = np.tensordot(features, params["admit"]["kernel"], features.ndim) + params["admit_bias"]
    return sigmoid(forget + 1) * old + sigmoid(admit - 1) * np.tanh(new)


class NaiveState:
    """The recurrent state of one stream, one vector at a time."""

    def __init__(self, params: Any, config: Any):
        self.own, self.config, self.memory = params["memory"], config, config.memory
        self.vectors = [np.asarray(x, np.float64) for x in self.own["initial_state"]]

    def times(self, name: str, x: Array) -> Array:
        return np.tensordot(x, self.own[name]["kernel"], x.ndim)

    def named(self) -> list[Array]:
        """Return the normalized vectors with their ids."""
        norm = [normalize(self.config, self.own["state_norm"], x) for x in self.vectors]
        return [x + identity for x, identity in zip(norm, self.own["state_ids"], strict=True)]

    def keys(self) -> tuple[list[Array], list[Array]]:
        named = self.named()
        return [self.times("state_key", u) for u in named], [self.times("state_value", u) for u in named]

    def read(self, normed: Array) -> Array:
        """Return what a token (D,) gets from the state."""
        attended = attend(self.config, self.times("token_query", normed), *self.keys())
        return self.times("token_output", attended)

    def close(self, keys: list[Array], values: list[Array]) -> None:
        """Update the state from the keys and values of tokens, without positions."""
        form, kind, new = self.memory.form, self.memory.gate, []
        for u, old in zip(self.named(), self.vectors, strict=True):
            of_state = attend(self.config, self.times("self_query", u), *self.keys())
            of_tokens = attend(self.config, self.times("block_query", u), keys, values)
            h = np.concatenate([of_state, of_tokens], axis=-1)
            if form == "single":
                hidden = silu(self.times("attended_up", h))
                z = np.tanh(self.times("state_down", hidden))
                new.append(gate(self.own["state_down_gate"], kind, old, z, hidden))
                continue
            after = gate(self.own["state_output_gate"], kind, old, self.times("state_output", h), h)
            if form == "dual":
                hidden = silu(
                    self.times("state_up", normalize(self.config, self.own["state_ff_norm"], after))
                )
                after = gate(
                    self.own["state_down_gate"], kind, after, self.times("state_down", hidden), hidden
                )
            new.append(after)
        self.vectors = new


def naive(params: Any, config: Any, tokens: Array) -> tuple[Array, Array]:
    """Return the logits (T, V) of one stream and its last state (M, D)."""
    memory, size, state = config.memory, config.block_size, NaiveState(params, config)
    layers = [parameters_of_layer(params, index) for index in range(config.num_layers)]
    inputs: list[list[Array]] = [[] for _ in layers]
    recurrent = config.num_layers - 1 - memory.layers_above
    logits = []

    def keys_from(index: int, first: int, at: Any) -> tuple[list[Array], list[Array]]:
        projected = [
            project_vector(layers[index], config, inputs[index][s], at(s))
            for s in range(max(first, 0), len(inputs[index]))
        ]
        return [k for _, k, _ in projected], [v for _, _, v in projected]

    for t, token in enumerate(tokens):
        x, first = params["embedding"]["table"][token], (t // size - memory.segments) * size
        for index, layer in enumerate(layers):
            inputs[index].append(x)
            q, _, _ = project_vector(layer, config, x, float(t))
            a = project_output(layer, config, attend(config, q, *keys_from(index, first, float))) + x
            if index == recurrent:
                a = a + state.read(normalize(config, layer["attention_norm"], x))
            x = feed_forward(layer, config, a) + a
        logits.append(normalize(config, params["final_norm"], x) @ params["unembedding"]["kernel"])
        if t % size == size - 1:
            state.close(*keys_from(recurrent, first, lambda _: 0.0))
    return np.array(logits), np.array(state.vectors)


@pytest.mark.parametrize(
    ("form", "kind", "segments"),
    rest_slow(
        [(*each, segments) for each in FORMS for segments in (0, 1, 2)],
        [("skip", "fixed", 1)],
    ),
)
def test_logits_and_state_are_those_of_the_loop(form: str, kind: str, segments: int) -> None:
    memory = dataclasses.replace(PLAIN, segments=segments, form=form, gate=kind)
    model = model_of(memory)
    params, tokens = random_parameters(model), some_tokens()
    expected = [naive(jax.tree.map(np.asarray, params), model, row) for row in tokens]
    one = Reader(model, params, 2)
    found = one.read(tokens, aligned=True)
    np.testing.assert_allclose(found, [logits for logits, _ in expected], **EXACT)
    last = np.asarray(one.state.layers.recurrent)
    np.testing.assert_allclose(last[1], [state for _, state in expected], **EXACT)
    # The other layers leave it as it was.
    initial = np.broadcast_to(params["memory"]["initial_state"], last[0].shape)
    np.testing.assert_array_equal(last[[0, 2]], [initial, initial])
    assert layers_with_memory(model) == [1]


def test_without_the_output_of_the_state_it_is_a_window() -> None:
    model = model_of(PLAIN)
    params, tokens = random_parameters(model), some_tokens()
    params["memory"]["token_output"]["kernel"] *= 0
    found = Reader(model, params, 2).read(tokens, aligned=True)
    window = model_of(BlockSlidingWindowConfig(segments=1))
    del params["memory"]
    np.testing.assert_allclose(found, Reader(window, params, 2).read(tokens, aligned=True), **EXACT)


def test_a_gate_that_keeps_everything_keeps_the_initial_state() -> None:
    model = model_of(PLAIN)
    params = random_parameters(model)
    params["memory"]["state_output_gate"]["rate"] = jnp.full(model.model_dim, 1e3)
    one = Reader(model, params, 2)
    start = np.asarray(one.state.layers.recurrent)
    one.read(some_tokens(), aligned=True)
    np.testing.assert_array_equal(one.state.layers.recurrent, start)


@pytest.mark.slow
def test_local_layers_around() -> None:
    """Three types of layers: local ones, windows, and the recurrent one."""
    model = model_of(
        BlockRecurrentConfig(length=3, layers_above=1),
        layer_pattern=("local", "global", "global"),
        local_window=3,
    )
    params, tokens = random_parameters(model), some_tokens()
    whole = Reader(model, params, 2).read(tokens, aligned=True)
    one = Reader(model, params, 2)
    steps = [one.read(tokens[:, at : at + 1]) for at in range(LENGTH)]
    np.testing.assert_allclose(np.concatenate(steps, axis=1), whole, **EXACT)
    assert layers_with_memory(model) == [1]


def test_the_weights_exist_once_and_start_as_the_paper_says() -> None:
    model = dataclasses.replace(
        model_of(BlockRecurrentConfig(length=64, layers_above=2, gate="lstm")), model_dim=64, dtype="bfloat16"
    )

    def read() -> Any:
        built = Transformer(model, rngs=nnx.Rngs(0))
        return built(jnp.zeros((1, 9), jnp.int32), built.init_state(1), aligned=True)[1]

    with jax.enable_x64(False):
        params = jax.jit(lambda: to_dict(nnx.state(Transformer(model, rngs=nnx.Rngs(0)))))()
        state = jax.eval_shape(read)
    own, gates = params["memory"], params["memory"]["state_output_gate"]
    assert "memory" not in params["layers"]
    assert own["initial_state"].std() == pytest.approx(0.1, rel=0.1)
    assert own["state_ids"].std() == pytest.approx(1, rel=0.1)
    assert gates["forget"]["kernel"].std() == pytest.approx((0.1 / 32) ** 0.5, rel=0.1)
    assert state.layers.recurrent.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("above", "pattern", "says"),
    [
        (3, ("global",), r"3 leaves none of 3 layers for the state; set at most 2"),
        (0, ("global", "global", "local"), r"layer 2 is local"),
    ],
)
def test_the_layer_must_exist(above: int, pattern: tuple[str, ...], says: str) -> None:
    local = {"layer_pattern": pattern, "local_window": 3} if "local" in pattern else {}
    with pytest.raises(ConfigError, match=rf"config\.model\.memory\.layers_above: {says}"):
        model_of(BlockRecurrentConfig(layers_above=above), **local)
