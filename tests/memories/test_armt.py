"""ARMT equals a NumPy loop written from the paper, and its limits are the known ones."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fam_jax.config import ConfigError
from fam_jax.memories.armt import ArmtConfig, AssociativeRecurrentMemory
from fam_jax.memories.window import BlockSlidingWindowConfig
from tests.memories.cases import CASES, SIZE, random_parameters
from tests.memories.reading import EXACT, ROWS, read, some_tokens
from tests.memories.reference import layer_of_rows
from tests.model.tiny import build
from tests.oracle.naive import normalize, parameters_of_layer
from tests.variants import rest_slow

pytestmark = pytest.mark.usefixtures("float64")

VARIANTS = [name for name in CASES if name.startswith("armt")]

Array = np.ndarray


def dpfp(y: Array, nu: int) -> Array:
    """Return phi(y), product by product."""
    r = [max(each, 0.0) for each in y] + [max(-each, 0.0) for each in y]
    return np.array([r[i] * r[(i - j) % len(r)] for j in range(1, nu + 1) for i in range(len(r))])


class Matrix:
    """The associative memory of one layer: A, z."""

    def __init__(self, own: Any, config: ArmtConfig, width: int):
        self.own, self.config = own, config
        self.a, self.z = np.zeros((width, config.features)), np.zeros(config.features)
        self.first = True

    def read(self, h: Array) -> Array:
        phi = dpfp(h @ self.own["recall_query"], self.config.dpfp_nu)
        return self.a @ phi / (self.z @ phi + 1e-5)

    def write(self, rows: Array) -> None:
        """Write the memory rows, each against the matrix before the segment."""
        a, z = self.a.copy(), self.z.copy()
        for u in rows:
            k = dpfp(u @ self.own["write_key"], self.config.dpfp_nu)
            beta = 1 / (1 + np.exp(-(u @ self.own["write_gate"] + self.own["write_gate_bias"])))
            overlap = self.z @ k + 1e-5
            gamma = 1.0
            if self.config.correction and not self.first:
                gamma = min(max(1 - overlap / (k @ k + 1e-5), 0.0), 1.0)
            a += np.outer(beta * (u @ self.own["write_value"] - self.a @ k / overlap), k)
            z += gamma * k
        self.a, self.z, self.first = a, z, False


def armt_forward(params: Any, config: Any, tokens: Array) -> Array:
    """Return logits (T, V) of one stream: [past blocks ; block ; memory rows] under a causal mask."""
    size, segments = config.block_size, config.memory.segments
    own = [parameters_of_layer(params, index)["memory"] for index in range(config.num_layers)]
    matrices = [Matrix(each, config.memory, config.model_dim) for each in own]
    past: list[list[Array]] = [[] for _ in own]  # inputs of each layer, with what was recalled
    logits = []
    for begin in range(0, len(tokens), size):
        block = params["embedding"]["table"][tokens[begin : begin + size]]
        rows = np.concatenate([block, params["memory"]["memory_rows"]]) if len(block) == size else block
        for index, matrix in enumerate(matrices):
            rows = np.array([h + matrix.read(h) for h in rows])
            earlier = past[index][max(len(past[index]) - segments * size, 0) :]
            known, end = len(earlier), len(earlier) + len(block)
            past[index] += [*rows[: len(block)]]
            # Memory rows see the block and earlier memory rows, but no past blocks.
            rows = layer_of_rows(
                parameters_of_layer(params, index),
                config,
                np.array([*earlier, *rows]),
                [begin - known + i for i in range(known + len(rows))],
                lambda i, j, known=known, end=end: j <= i and (i < end or j >= known),
            )[known:]
            if len(block) == size:
                matrix.write(rows[size:])
        normed = np.array([normalize(config, params["final_norm"], x) for x in rows[: len(block)]])
        logits.append(normed @ params["unembedding"]["kernel"])
    return np.concatenate(logits)


@pytest.mark.parametrize("name", rest_slow(VARIANTS, ["armt"]))
def test_logits_are_those_of_the_loop(name: str) -> None:
    model = CASES[name].model
    params = random_parameters(model)
    plain = jax.tree.map(np.asarray, params)
    expected = [armt_forward(plain, model, row) for row in some_tokens()]
    np.testing.assert_allclose(read(model, params), expected, **EXACT)


def with_values(params: Any, factor: float) -> Any:
    """Return the parameters with the weights of the values that are written times a factor."""
    layers = params["layers"]
    own = layers["memory"] | {"write_value": layers["memory"]["write_value"] * factor}
    return params | {"layers": layers | {"memory": own}}


def test_without_values_it_is_block_attention() -> None:
    """Where values are zero, as in a new model, memory rows change nothing for tokens."""
    model = CASES["armt"].model
    params = random_parameters(model)
    plain = dataclasses.replace(model, memory=BlockSlidingWindowConfig(segments=0))
    layers = {name: leaf for name, leaf in params["layers"].items() if name != "memory"}
    rest = {name: leaf for name, leaf in params.items() if name != "memory"}
    expected = read(plain, rest | {"layers": layers})
    np.testing.assert_allclose(read(model, with_values(params, 0)), expected, **EXACT)
    different = np.abs(read(model, params) - expected)
    assert different[:, :SIZE].max() < 1e-12 and different[:, SIZE:].max() > 1e-3


def test_a_new_model_writes_zeros() -> None:
    own = AssociativeRecurrentMemory(CASES["armt"].model).layer_parameters(nnx.Rngs(0))
    np.testing.assert_array_equal(own.write_value[...], 0)
    np.testing.assert_array_equal(own.write_gate_bias[...], 0)


@pytest.mark.slow
def test_a_new_model_learns_values_first() -> None:
    """At the first step, only the weights of values have a gradient."""
    model = CASES["armt"].model
    params, tokens = with_values(random_parameters(model), 0), jnp.asarray(some_tokens())

    def loss(layers: Any, rows: jax.Array) -> jax.Array:
        tree = params | {"layers": params["layers"] | {"memory": layers}, "memory": {"memory_rows": rows}}
        built = build(model, tree)
        return jnp.square(built(tokens, built.init_state(ROWS), aligned=True)[0]).sum()

    slopes, of_rows = jax.jit(jax.grad(loss, argnums=(0, 1)))(
        params["layers"]["memory"], params["memory"]["memory_rows"]
    )
    moved = {name: float(np.abs(leaf).max()) > 0 for name, leaf in slopes.items()}
    assert moved == {name: name == "write_value" for name in slopes}
    assert not np.asarray(of_rows).any()


def test_dpfp_needs_two_different_features() -> None:
    with pytest.raises(ConfigError, match=r"config\.model\.memory\.dpfp_nu: 4 is not below 2 \* key_dim = 4"):
        dataclasses.replace(CASES["armt"].model, memory=ArmtConfig(key_dim=2, dpfp_nu=4))
