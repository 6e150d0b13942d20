"""PRMT equals a NumPy loop written from the paper; with all switches turned it is FAM."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from fam_jax.config import ModelConfig
from fam_jax.memories.fam import FamConfig
from fam_jax.memories.prmt import ParallelRecurrentMemory, PrmtConfig
from tests.memories.cases import CASES, random_parameters
from tests.memories.reading import EXACT, read, some_tokens
from tests.memories.reference import layer_of_rows
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

# The values that make PRMT the paper's FAM.
AS_FAM = {
    "init": "prompt",
    "causal": False,
    "memory_twice": False,
    "query_positions": "before",
    "first_residual": False,
}
ONE_SWITCH = {f"FAM but {name}": {k: v for k, v in AS_FAM.items() if k != name} for name in AS_FAM}
VARIANTS = {"PRMT": {}, "FAM": AS_FAM, **ONE_SWITCH}

Array = np.ndarray


def model_of(switches: Any, length: int = 2, segments: int = 0) -> ModelConfig:
    memory = PrmtConfig(length=length, segments=segments, **switches)
    return dataclasses.replace(CASES["prmt"].model, memory=memory)


@functools.cache
def logits_of(name: str) -> Array:
    model = model_of(VARIANTS[name])
    return read(model, random_parameters(model))


def as_in_the_paper(params: Any, config: Any, tokens: Array) -> Array:
    """Return logits (T, V) of one stream: in each layer, [rows ; block ; rows] under a causal mask."""
    size, length = config.block_size, config.memory.length
    memory, logits = [*params["layers"]["memory"]["initial_rows"]], []
    for begin in range(0, len(tokens), size):
        x = params["embedding"]["table"][tokens[begin : begin + size]]
        for index in range(config.num_layers):
            rows = np.concatenate([memory[index], x, memory[index]])
            layer, positions = parameters_of_layer(params, index), [*range(len(rows))]
            out = layer_of_rows(layer, config, rows, positions, lambda i, j: j <= i)
            x = out[length : length + len(x)]
            if len(x) == size:
                memory[index] = out[-length:]
        normed = np.array([normalize(config, params["final_norm"], row) for row in x])
        logits.append(normed @ params["unembedding"]["kernel"])
    return np.concatenate(logits)


class Layer:
    """One layer of one stream, row by row, with every switch."""

    def __init__(self, params: Any, config: Any, index: int, rows: Array):
        self.own, self.config, self.rows = parameters_of_layer(params, index), config, rows
        self.tokens: list[Any] = []  # keys and values of all tokens
        self.first = True

    def project(self, x: Array, place: int) -> Any:
        return project_vector(self.own, self.config, x, float(place))

    def finish(self, q: Array, seen: list[Any], residual: Array) -> Array:
        attended = attend(self.config, q, [k for k, _ in seen], [v for _, v in seen])
        a = project_output(self.own, self.config, attended) + residual
        return feed_forward(self.own, self.config, a) + a

    def read_keys(self, begin: int) -> list[Any]:
        count = len(self.rows)
        return [self.project(row, begin - count + i)[1:] for i, row in enumerate(self.rows)]

    def read(self, x: Array) -> Array:
        """Return the output for the next token."""
        place, size = len(self.tokens), self.config.block_size
        begin = place // size * size
        q, k, v = self.project(x, place)
        self.tokens.append((k, v))
        seen = self.tokens[max(begin - self.config.memory.segments * size, 0) :]
        return self.finish(q, self.read_keys(begin) + seen, x)

    def write(self) -> None:
        """Write the block that has just been completed."""
        memory, size, count = self.config.memory, self.config.block_size, len(self.rows)
        end = len(self.tokens)
        first = end if memory.query_positions == "after" else end - size - count
        projected = [self.project(row, first + i) for i, row in enumerate(self.rows)]
        seen = self.tokens[-size:] + (self.read_keys(end - size) if memory.memory_twice else [])
        out = []
        for i, (row, (q, _, _)) in enumerate(zip(self.rows, projected, strict=True)):
            own = [(k, v) for _, k, v in (projected[: i + 1] if memory.causal else projected)]
            residual = row if memory.first_residual or not self.first else 0 * row
            out.append(self.finish(q, seen + own, residual))
        self.rows, self.first = np.array(out), False


def initial_rows(params: Any, config: Any) -> list[Array]:
    if config.memory.init == "prefix":
        return [*params["layers"]["memory"]["initial_rows"]]
    rows, found = params["memory"]["initial_rows"], []
    for index in range(config.num_layers):
        found.append(rows)
        places = [*range(-len(rows), 0)]
        rows = layer_of_rows(parameters_of_layer(params, index), config, rows, places, lambda i, j: True)
    return found


def with_switches(params: Any, config: Any, tokens: Array) -> Array:
    """Return logits (T, V) of one stream, token by token and row by row."""
    layers = [Layer(params, config, index, rows) for index, rows in enumerate(initial_rows(params, config))]
    logits = []
    for t, token in enumerate(tokens):
        x = params["embedding"]["table"][token]
        for layer in layers:
            x = layer.read(x)
            if t % config.block_size == config.block_size - 1:
                layer.write()
        logits.append(normalize(config, params["final_norm"], x) @ params["unembedding"]["kernel"])
    return np.array(logits)


def test_logits_are_those_of_the_paper() -> None:
    model = model_of({})
    plain = jax.tree.map(np.asarray, random_parameters(model))
    expected = [as_in_the_paper(plain, model, row) for row in some_tokens()]
    np.testing.assert_allclose(logits_of("PRMT"), expected, **EXACT)


@pytest.mark.parametrize("name", rest_slow(VARIANTS, ["PRMT", "FAM"]))
def test_logits_are_those_of_the_loop(name: str) -> None:
    model = model_of(VARIANTS[name])
    plain = jax.tree.map(np.asarray, random_parameters(model))
    expected = [with_switches(plain, model, row) for row in some_tokens()]
    np.testing.assert_allclose(logits_of(name), expected, **EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("prmt")])
def test_cases_are_those_of_the_loop(name: str) -> None:
    model = CASES[name].model
    params = random_parameters(model)
    plain = jax.tree.map(np.asarray, params)
    expected = [with_switches(plain, model, row) for row in some_tokens()]
    np.testing.assert_allclose(read(model, params), expected, **EXACT)


def test_all_switches_turned_make_fam() -> None:
    """The logits are those of fam.py with the same parameters."""
    model = model_of(AS_FAM)
    params = random_parameters(model)
    fam = dataclasses.replace(model, memory=FamConfig(length=2, segments=0))
    renamed = params | {"memory": {"initial_fam": params["memory"]["initial_rows"]}}
    np.testing.assert_allclose(logits_of("FAM"), read(fam, renamed), **EXACT)


@pytest.mark.slow
def test_each_switch_changes_the_result() -> None:
    """The switches are what the docs say: turned one at a time, each leads away from FAM."""
    fam = logits_of("FAM")
    for name in ONE_SWITCH:
        assert np.abs(logits_of(name) - fam)[:, 4:].max() > 1e-4, name


@pytest.mark.parametrize(("stddev", "expected"), [(1.0, 1.0), (0.0, 0.125), (0.5, 0.5)])
def test_initial_rows_have_the_given_scale(stddev: float, expected: float) -> None:
    model = dataclasses.replace(
        CASES["prmt"].model, model_dim=64, memory=PrmtConfig(length=64, init_stddev=stddev)
    )
    rows = ParallelRecurrentMemory(model).layer_parameters(nnx.Rngs(0)).initial_rows[...]
    assert abs(float(np.std(rows)) / expected - 1) < 0.05
