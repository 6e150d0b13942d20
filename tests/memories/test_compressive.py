"""The Compressive Transformer against a NumPy loop written from the paper, and against what it must equal."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fam_jax.config import ConfigError, ModelConfig
from fam_jax.memories.compressive import CompressiveConfig
from fam_jax.memories.window import BlockSlidingWindowConfig
from fam_jax.model import auxiliary_loss, empty_state, with_auxiliary_loss
from fam_jax.model.layer_types import start_of_memory
from tests.memories.cases import CASES, random_parameters
from tests.model.tiny import Reader, build
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
SIZE, LENGTH = 4, 26  # six blocks and a half

VARIANTS = {
    "index": CompressiveConfig(compressed_rows=2, compressed_blocks=2),
    "centre": CompressiveConfig(compressed_rows=1, compressed_blocks=3, positions="centre"),
    "no window": CompressiveConfig(segments=0, compressed_rows=2, compressed_blocks=2),
    "mean": CompressiveConfig(segments=2, window=6, compressed_rows=2, compression="mean"),
}


def model_of(memory: Any) -> ModelConfig:
    return dataclasses.replace(CASES["compressive"].model, memory=memory)


def some_tokens(rows: int = 2, length: int = LENGTH) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 16, (rows, length)).astype(np.int32)


class NaiveLayer:
    """One layer of one stream, read one token at a time. It keeps the input of every token."""

    def __init__(self, params: Any, config: Any, index: int):
        self.layer, self.config, self.memory = parameters_of_layer(params, index), config, config.memory
        self.inputs: list[np.ndarray] = []

    def row(self, block: int, index: int) -> np.ndarray:
        """Return row `index` of a compressed block: f_c of c inputs."""
        rate = self.config.block_size // self.memory.compressed_rows
        first = block * self.config.block_size + index * rate
        old = self.inputs[first : first + rate]
        if self.memory.compression == "mean":
            return np.mean(old, axis=0)
        kernel, width = self.layer["memory"]["compress_kernel"], self.config.model_dim
        parts = [x @ kernel[j * width : (j + 1) * width] for j, x in enumerate(old)]
        return self.layer["memory"]["compress_bias"] + sum(parts)

    def position(self, block: int, index: int, t: int) -> float:
        """Return where a row stands for the token at t."""
        size, rows = self.config.block_size, self.memory.compressed_rows
        begin = (t // size - self.memory.segments) * size  # of the window
        if self.memory.positions == "index":
            oldest = begin // size - block  # 1 for the block just before the window
            return begin - oldest * rows + index
        rate = size // rows
        return block * size + np.mean([index * rate + j for j in range(rate)])

    def read(self, x: np.ndarray) -> np.ndarray:
        """Return the output of the layer for the next token."""
        size, t = self.config.block_size, len(self.inputs)
        self.inputs.append(x)
        tau = t // size
        q, _, _ = project_vector(self.layer, self.config, x, float(t))
        keys, values = [], []
        first = tau - self.memory.segments
        for block in range(max(0, first - self.memory.compressed_blocks), max(first, 0)):
            for index in range(self.memory.compressed_rows):
                at = self.position(block, index, t)
                _, k, v = project_vector(self.layer, self.config, self.row(block, index), at)
                keys.append(k)
                values.append(v)
        for s in range(max(0, first) * size, t + 1):
            if not self.memory.window or t - s < self.memory.window:
                _, k, v = project_vector(self.layer, self.config, self.inputs[s], float(s))
                keys.append(k)
                values.append(v)
        a = project_output(self.layer, self.config, attend(self.config, q, keys, values)) + x
        return feed_forward(self.layer, self.config, a) + a

    def loss(self) -> float:
        """Return the reconstruction loss, summed over complete blocks."""
        size = self.config.block_size
        blocks = len(self.inputs) // size

        def without_position(rows: list[np.ndarray]) -> tuple[list[np.ndarray], ...]:
            projected = [project_vector(self.layer, self.config, x, 0.0) for x in rows]
            return tuple([each[i] for each in projected] for i in range(3))

        total = 0.0
        for block in range(blocks):
            leaves = min(block + self.memory.segments, blocks - 1)
            queries, _, _ = without_position(self.inputs[leaves * size : (leaves + 1) * size])
            _, *old = without_position(self.inputs[block * size : (block + 1) * size])
            _, *new = without_position([self.row(block, i) for i in range(self.memory.compressed_rows)])
            squares = [(attend(self.config, q, *old) - attend(self.config, q, *new)) ** 2 for q in queries]
            total += self.memory.auxiliary_weight * np.mean(squares)
        return total


def naive(params: Any, config: ModelConfig, tokens: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the logits (T, V) of one stream, and its auxiliary loss summed over blocks and layers."""
    layers = [NaiveLayer(params, config, index) for index in range(config.num_layers)]
    logits = []
    for token in tokens:
        x = params["embedding"]["table"][token]
        for layer in layers:
            x = layer.read(x)
        logits.append(normalize(config, params["final_norm"], x) @ params["unembedding"]["kernel"])
    return np.array(logits), sum(layer.loss() for layer in layers)


def losses(model: ModelConfig, params: Any, tokens: np.ndarray) -> jax.Array:
    """Return the auxiliary losses (B,) of an aligned call."""
    begun = with_auxiliary_loss(model, empty_state(model, len(tokens), past_slots=False))
    _, after = build(model, params).hidden(jnp.asarray(tokens), begun, aligned=True)
    return auxiliary_loss(after)


@pytest.mark.parametrize("name", rest_slow(VARIANTS, ["index"]))
def test_logits_and_loss_are_those_of_the_loop(name: str) -> None:
    model = model_of(VARIANTS[name])
    params, tokens = random_parameters(model), some_tokens()
    expected = [naive(jax.tree.map(np.asarray, params), model, row) for row in tokens]
    found = Reader(model, params, 2).read(tokens, aligned=True)
    np.testing.assert_allclose(found, [logits for logits, _ in expected], **EXACT)
    if model.memory.has_auxiliary_loss:
        np.testing.assert_allclose(losses(model, params, tokens), [loss for _, loss in expected], **EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("positions", ["index", "centre"])
def test_one_row_for_every_token_is_a_longer_window(positions: str) -> None:
    """If c = 1, W = I and b = 0, the logits and gradients are those of a window of m + k blocks, and the loss is 0."""
    memory = CompressiveConfig(
        compressed_rows=SIZE, compressed_blocks=2, positions=positions, stop_gradient=False
    )
    model, window = model_of(memory), model_of(BlockSlidingWindowConfig(segments=3))
    params = random_parameters(model)
    own = params["layers"].pop("memory")
    identity = jnp.broadcast_to(jnp.eye(model.model_dim), own["compress_kernel"].shape)
    own = {"compress_kernel": identity, "compress_bias": 0 * own["compress_bias"]}
    tokens = jnp.asarray(some_tokens(1))

    def score(params: Any, *, compressed: bool) -> Any:
        config = model if compressed else window
        if compressed:
            params = {**params, "layers": {**params["layers"], "memory": own}}
        built = build(config, params)
        logits, _ = built(tokens, empty_state(config, 1, past_slots=False), aligned=True)
        return jnp.sin(logits).sum(), logits

    slope = jax.jit(jax.grad(score, has_aux=True), static_argnames="compressed")
    found, expected = (slope(params, compressed=which) for which in (True, False))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10), found, expected)
    whole = {**params, "layers": {**params["layers"], "memory": own}}
    np.testing.assert_allclose(losses(model, whole, some_tokens()), 0, atol=1e-25)


@pytest.mark.slow
def test_a_convolution_of_equal_weights_is_the_mean() -> None:
    """It is also the convolution with which a trained model goes on."""
    memory = CompressiveConfig(compressed_rows=2)
    model = model_of(memory)
    mean = model_of(dataclasses.replace(memory, compression="mean"))
    params, tokens = random_parameters(model), some_tokens()
    params["layers"].pop("memory")
    expected = Reader(mean, params, 2).read(tokens, aligned=True)
    fresh = start_of_memory(model, params["embedding"]["table"], 0)
    own = {name.removeprefix("layers/memory/"): jnp.asarray(x, "float64") for name, x in fresh.items()}
    whole = {**params, "layers": {**params["layers"], "memory": own}}
    np.testing.assert_allclose(Reader(model, whole, 2).read(tokens, aligned=True), expected, **EXACT)


def test_the_convolution_learns_from_the_loss_alone_and_nothing_else_does() -> None:
    model = model_of(CompressiveConfig(compressed_rows=2))
    params, tokens = random_parameters(model), some_tokens()

    def read(params: Any) -> tuple[jax.Array, jax.Array]:
        begun = with_auxiliary_loss(model, empty_state(model, 2, past_slots=False))
        logits, after = build(model, params)(jnp.asarray(tokens), begun, aligned=True)
        return jnp.sin(logits).sum(), auxiliary_loss(after).sum()

    of_logits, of_loss = jax.jit(jax.jacrev(read))(params)
    own = of_logits["layers"].pop("memory"), of_loss["layers"].pop("memory")
    for leaf in jax.tree.leaves(own[0]) + jax.tree.leaves(of_loss):
        np.testing.assert_array_equal(leaf, 0)
    for leaf in jax.tree.leaves(own[1]) + jax.tree.leaves(of_logits):
        assert np.abs(leaf).max() > 1e-6


def test_rows_must_divide_a_block() -> None:
    with pytest.raises(
        ConfigError, match=r"config\.model\.memory\.compressed_rows: 3 does not divide block_size 4"
    ):
        model_of(CompressiveConfig(compressed_rows=3))


def test_flops_count_what_tokens_see() -> None:
    memory = CompressiveConfig(segments=1, compressed_rows=2, compressed_blocks=2)
    assert [memory.extra_keys_of_block(block) for block in range(5)] == [0, 0, 2, 4, 4]
    assert memory.extra_keys == 4
