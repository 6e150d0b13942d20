"""Titans: equal to loops over tokens in NumPy, the exact chunked form, and what the variants are without a memory."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fam_jax.config import ConfigError, ModelConfig
from fam_jax.memories import neural_memory
from fam_jax.memories.titans import TitansGateConfig, TitansLayerConfig
from fam_jax.memories.titans_mac import TitansContextConfig
from fam_jax.memories.window import BlockSlidingWindowConfig
from fam_jax.model import Transformer
from fam_jax.training.flops import keys_of_layers
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

Array = np.ndarray
EXACT = {"rtol": 1e-10, "atol": 1e-11}
LENGTH = 14  # three blocks and a half


def mlp(weights: list[Array], x: Array) -> Array:
    for n, w in enumerate(weights):
        x = (silu(x) if n else x) @ w
    return x


def gradient(weights: list[Array], k: Array, v: Array) -> list[Array]:
    """Return the gradient of |mlp(k) - v|^2 with respect to each matrix, by backpropagation."""
    inputs, sums = [k], []
    for n, w in enumerate(weights):
        if n:
            inputs.append(silu(sums[-1]))
        sums.append(inputs[-1] @ w)
    found, back = [], 2 * (sums[-1] - v)
    for n in reversed(range(len(weights))):
        found.append(np.outer(inputs[n], back))
        if n:
            slope = sigmoid(sums[n - 1]) * (1 + sums[n - 1] * (1 - sigmoid(sums[n - 1])))
            back = (weights[n] @ back) * slope
    return found[::-1]


class NaiveMemory:
    """The neural memory of one layer and stream, head by head and token by token."""

    def __init__(self, own: Any, config: Any):
        self.own, self.config = own, config
        starts = [own[f"start_{n}"] for n in range(1, config.depth + 1)]
        self.weights = [[w[:, h].copy() for w in starts] for h in range(config.heads)]
        self.step_size = config.step_size or 0.08 / np.sqrt(starts[0].shape[0])
        self.momentum = [[0 * w for w in head] for head in self.weights]
        self.border = self.weights
        self.written = 0

    def heads(self, x: Array, unit: bool = False) -> Array:
        parts = x.reshape(self.config.heads, -1)
        return parts / np.sqrt((parts**2).sum(axis=1, keepdims=True) + 1e-6) if unit else parts

    def rate(self, name: str, x: Array) -> Array:
        return sigmoid(x @ self.own[name]["kernel"] + self.own[f"{name}_bias"])

    def write(self, k: Array, v: Array, x: Array) -> None:
        """Take one step of the recurrence, of a token with input x (D,)."""
        if self.written % self.config.chunk == 0:
            self.border = self.weights
        self.written += 1
        theta = self.step_size * self.rate("step", x)
        eta = self.rate("momentum", x) if self.config.momentum else np.zeros(self.config.heads)
        alpha = self.rate("forgetting", x) if self.config.forgetting else np.zeros(self.config.heads)
        for h, (kh, vh) in enumerate(zip(self.heads(k, unit=True), self.heads(v), strict=True)):
            slopes = gradient(self.border[h], kh, vh)
            self.momentum[h] = [
                eta[h] * s - theta[h] * g for s, g in zip(self.momentum[h], slopes, strict=True)
            ]
        self.weights = [
            [(1 - alpha[h]) * w + s for w, s in zip(self.weights[h], self.momentum[h], strict=True)]
            for h in range(self.config.heads)
        ]

    def read(self, q: Array) -> Array:
        parts = self.heads(q, unit=True)
        return np.concatenate([mlp(w, part) for w, part in zip(self.weights, parts, strict=True)])


def convolved(taps: Array, rows: list[Array]) -> Array:
    """Return SiLU of the convolution at the last of `rows` (D,)."""
    last = [taps[3 - n] * rows[-1 - n] for n in range(min(4, len(rows)))]
    return silu(np.sum(last, axis=0))


class NaiveLayer:
    """One layer of one stream."""

    def __init__(self, layer: Any, model: ModelConfig):
        self.layer, self.model, self.own = layer, model, layer["memory"]
        self.memory = NaiveMemory(self.own, model.memory)
        self.projected: dict[str, list[Array]] = {"ask": [], "query": [], "key": [], "value": []}
        self.keys: list[Array] = []
        self.values: list[Array] = []
        # Of memory as context: keys and values of the block's rows, and what its tokens write.
        self.rows: list[tuple[Array, Array]] = []
        self.block: list[tuple[Array, Array, Array]] = []

    def role(self, name: str, x: Array, kernel: str = "") -> Array:
        rows, taps = self.projected[name], self.own["convolution"]
        rows.append(x @ self.own[kernel or name]["kernel"])
        return convolved(taps[:, ["query", "key", "value"].index(kernel or name)], rows)

    def window(self, x: Array, t: int) -> tuple[Array, list[Array], list[Array]]:
        """Add token t to the cache; return its query, and the keys and values that the window shows."""
        q, k, v = project_vector(self.layer, self.model, x, float(t))
        self.keys.append(k)
        self.values.append(v)
        size = self.model.block_size
        begin = max(t // size - self.model.memory.segments, 0) * size
        return q, self.keys[begin:], self.values[begin:]

    def persistent(self, end: int) -> tuple[list[Array], list[Array]]:
        rows = self.own.get("persistent", [])
        found = [
            project_vector(self.layer, self.model, x, float(end - len(rows) + i)) for i, x in enumerate(rows)
        ]
        return [k for _, k, _ in found], [v for _, _, v in found]

    def attend(self, x: Array, t: int, end: int, rows: list[tuple[Array, Array]]) -> Array:
        """Return what attention adds for token t; persistent rows end before position `end`."""
        q, keys, values = self.window(x, t)
        more_keys, more_values = self.persistent(end)
        keys = [*keys, *more_keys, *(k for k, _ in rows)]
        values = [*values, *more_values, *(v for _, v in rows)]
        return project_output(self.layer, self.model, attend(self.model, q, keys, values))

    def finish(self, a: Array) -> Array:
        return feed_forward(self.layer, self.model, a) + a

    def norm(self, name: str, x: Array) -> Array:
        return normalize(self.model, self.own[name], x)

    def mix(self, entering: Array, added: Array, recalled: Array) -> Array:
        g = sigmoid(entering @ self.own["mixing"]["kernel"] + self.own["mixing_bias"])
        return (1 - g) * added + g * recalled

    def recall(self, u: Array) -> Array:
        """Write a token, then read the memory that it has changed."""
        q, k, v = (self.role(name, u) for name in ("query", "key", "value"))
        self.memory.write(k, v, u)
        return self.norm("output_norm", self.memory.read(q))

    def titans_mag(self, x: Array, t: int) -> Array:
        u, begin = self.norm("norm", x), t - t % self.model.block_size
        recalled, added = self.recall(u), self.attend(x, t, begin, [])
        if self.model.memory.normalize_attention:
            added = self.norm("attention_norm", added)
        return self.finish(x + self.mix(u, added, recalled))

    def titans_mal(self, x: Array, t: int) -> Array:
        x = x + self.recall(self.norm("norm", x))
        return self.finish(x + self.attend(x, t, t - t % self.model.block_size, []))

    def titans_mac(self, x: Array, t: int) -> Array:
        config, size = self.model.memory, self.model.block_size
        asked, end = self.role("ask", self.norm("norm", x), "query"), t - t % size
        if config.retrieved != "none":
            answer = self.memory.read(asked)
            self.rows.append(project_vector(self.layer, self.model, answer, float(t - size))[1:])
            end -= size
        seen = self.rows if config.retrieved == "causal" else self.rows[-1:]
        added = self.attend(x, t, end, seen)
        y = self.norm("attention_norm", added)
        q, k, v = (self.role(name, y) for name in ("query", "key", "value"))
        recalled = self.norm("output_norm", self.memory.read(q))
        out = self.finish(x + self.mix(y, y if config.normalize_attention else added, recalled))
        self.block.append((k, v, y))
        if len(self.block) == size:
            for each in self.block:
                self.memory.write(*each)
            self.rows, self.block = [], []
        return out


def forward(params: Any, model: ModelConfig, tokens: Array) -> Array:
    """Return logits (T, V) of one stream."""
    layers = [NaiveLayer(parameters_of_layer(params, n), model) for n in range(model.num_layers)]
    logits = []
    for t, token in enumerate(tokens):
        x = params["embedding"]["table"][token]
        for layer in layers:
            x = getattr(layer, model.memory.kind)(x, t)
        logits.append(normalize(model, params["final_norm"], x) @ params["unembedding"]["kernel"])
    return np.array(logits)


VARIANTS = {
    "mag": TitansGateConfig(chunk=2, persistent=3),
    "mag, linear, plain": TitansGateConfig(chunk=1, depth=1, persistent=0, momentum=False, forgetting=False),
    "mag, deep, heads": TitansGateConfig(chunk=4, depth=4, expansion=2, heads=2, normalize_attention=False),
    "mal": TitansLayerConfig(chunk=2, heads=2, segments=0, step_size=0.5),
    "mal, one matrix": TitansLayerConfig(chunk=4, depth=1, persistent=0, momentum=False),
    "mac": TitansContextConfig(chunk=2, heads=2, persistent=3),
    "mac, own": TitansContextConfig(chunk=4, depth=3, retrieved="own", normalize_attention=False),
    "mac, none, window": TitansContextConfig(chunk=1, retrieved="none", segments=1, forgetting=False),
}


def model_of(memory: Any, **values: Any) -> ModelConfig:
    return dataclasses.replace(CASES["bswa"].model, memory=memory, **values)


def some_tokens(*shape: int) -> Array:
    return np.random.default_rng(0).integers(0, 16, shape).astype(np.int32)


@pytest.mark.parametrize("name", rest_slow(VARIANTS, ["mag", "mal", "mac"]))
def test_variants_are_loops_over_tokens(name: str) -> None:
    """T7: the results equal those in NumPy, one stream and one token at a time, with weights of every token."""
    model = model_of(VARIANTS[name])
    params = random_parameters(model)
    tokens = some_tokens(2, LENGTH)
    found = Reader(model, params, 2).read(tokens, aligned=True)
    plain = jax.tree.map(np.asarray, params)
    np.testing.assert_allclose(found, [forward(plain, model, row) for row in tokens], **EXACT)


def some_memory(depth: int, width: int = 4, hidden: int = 6, heads: int = 2) -> neural_memory.FastWeights:
    rng = np.random.default_rng(1)
    sizes = neural_memory.widths_of(depth, width, hidden)
    pairs = [*itertools.pairwise(sizes)]
    made = [[jnp.asarray(rng.normal(size=(1, heads, *pair)) / 2) for pair in pairs] for _ in range(2)]
    return neural_memory.FastWeights(*map(tuple, made))


@pytest.mark.parametrize(("depth", "chunk"), rest_slow([(1, 1), (2, 3), (3, 4), (4, 12)], [(2, 3), (4, 12)]))
def test_chunks_are_a_loop_over_tokens(depth: int, chunk: int) -> None:
    """What tokens read, and weights and momentum at the end, equal those of the recurrence."""
    length, heads, width = 12, 2, 4
    memory, rng = some_memory(depth), np.random.default_rng(2)
    q, k, v = (rng.normal(size=(1, length, heads, width)) for _ in range(3))
    step, eta, alpha = (rng.uniform(high=high, size=(1, length, heads)) for high in (0.1, 1, 1))
    rates = neural_memory.Rates(*map(jnp.asarray, (step, np.log(eta), np.log(1 - alpha))))
    tokens = neural_memory.Tokens(*map(jnp.asarray, (q, k, v)), rates)
    after, out = neural_memory.read_chunks(memory, tokens, chunk)
    for h in range(heads):
        w, s = ([np.asarray(x)[0, h] for x in each] for each in memory)
        border = w
        for t in range(length):
            border = w if t % chunk == 0 else border
            slopes = gradient(border, k[0, t, h], v[0, t, h])
            s = [eta[0, t, h] * a - step[0, t, h] * g for a, g in zip(s, slopes, strict=True)]
            w = [(1 - alpha[0, t, h]) * a + b for a, b in zip(w, s, strict=True)]
            np.testing.assert_allclose(out[0, t, h], mlp(w, q[0, t, h]), **EXACT)
        for n in range(depth):
            np.testing.assert_allclose(after.weights[n][0, h], w[n], **EXACT)
            np.testing.assert_allclose(after.momentum[n][0, h], s[n], **EXACT)


def test_gradients_are_those_of_the_inner_loss() -> None:
    memory, rng = some_memory(3), np.random.default_rng(3)
    k, v = (jnp.asarray(rng.normal(size=(1, 1, 2, 4))) for _ in range(2))

    def loss(weights: Any) -> jax.Array:
        return jnp.square(neural_memory.retrieve(neural_memory.explicit(weights), k) - v).sum()

    inputs, slopes = neural_memory.gradients_of(neural_memory.explicit(memory.weights), k, v)
    for w, a, d in zip(jax.grad(loss)(memory.weights), inputs, slopes, strict=True):
        np.testing.assert_allclose(jnp.einsum("bchi,bcho->bhio", a, d), w, **EXACT)


def test_a_linear_memory_overwrites() -> None:
    """With b = 1, eta = alpha = 0, theta = 1/2 and keys of norm 1 it is the delta rule: the last value is read back."""
    length, rng = 6, np.random.default_rng(4)
    k, v = rng.normal(size=(1, length, 1, 4)), rng.normal(size=(1, length, 1, 4))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    k[0, -1] = k[0, 1]
    ones = jnp.ones((1, length, 1))
    rates = neural_memory.Rates(ones / 2, -1e4 * ones, 0 * ones)
    memory = some_memory(1, heads=1)._replace(momentum=(jnp.zeros((1, 1, 4, 4)),))
    tokens = neural_memory.Tokens(*map(jnp.asarray, (k, k, v)), rates)
    after, out = neural_memory.read_chunks(memory, tokens, 1)
    np.testing.assert_allclose(out, v, **EXACT)
    w = np.asarray(memory.weights[0])[0, 0]
    for key, value in zip(k[0, :, 0], v[0, :, 0], strict=True):
        w = w + np.outer(key, value - key @ w)
    np.testing.assert_allclose(after.weights[0][0, 0], w, **EXACT)


def without_memory(memory: Any, change: Any) -> tuple[Array, Array]:
    """Return the logits of a model whose own parameters `change` has edited, and those of its window alone."""
    model = model_of(memory)
    params = random_parameters(model)
    change(params["layers"]["memory"])
    window = model_of(BlockSlidingWindowConfig(segments=memory.segments))
    tokens = some_tokens(2, LENGTH)
    return (
        Reader(model, params, 2).read(tokens, aligned=True),
        Reader(window, random_parameters(window), 2).read(tokens, aligned=True),
    )


def shut(own: Any) -> None:
    own["mixing_bias"] = jnp.full_like(own["mixing_bias"], -1e4)


def silence(own: Any) -> None:
    own["output_norm"]["scale"] *= 0


@pytest.mark.parametrize(
    ("memory", "change"),
    [
        (TitansGateConfig(persistent=0, chunk=4, normalize_attention=False), shut),
        (TitansLayerConfig(persistent=0, chunk=4), silence),
        (TitansContextConfig(persistent=0, chunk=4, retrieved="none", normalize_attention=False), shut),
    ],
    ids=["mag", "mal", "mac"],
)
def test_without_the_memory_a_window_is_left(memory: Any, change: Any) -> None:
    """T6: with a shut gate, or a memory that returns zero, it is Block Sliding Window Attention."""
    found, expected = without_memory(memory, change)
    np.testing.assert_allclose(found, expected, **EXACT)
    untouched, _ = without_memory(memory, lambda own: None)
    assert np.abs(untouched - expected).max() > 1e-3


@pytest.mark.parametrize("kind", [TitansGateConfig, TitansLayerConfig, TitansContextConfig])
def test_the_default_step_does_not_diverge(kind: Any) -> None:
    """On a text that repeats itself, like the filler of PassKey. Much larger steps do."""

    def weights(**fields: Any) -> float:
        sizes = {"model_dim": 64, "num_heads": 4, "head_dim": 16, "num_kv_heads": 4, "block_size": 32}
        model = model_of(kind(segments=0, chunk=8, **fields), **sizes)
        built = Transformer(model, rngs=nnx.Rngs(0))
        text = jnp.tile(jnp.arange(8), 48)[None] % model.vocab_size
        _, state = jax.jit(lambda ids: built.hidden(ids, built.init_state(1)))(text)
        return float(jnp.abs(state.layers.memory_weights).max())

    assert 0 < weights() < 10
    assert not 0 < weights(step_size=0.5) < 1e6


@pytest.mark.parametrize("memory", [VARIANTS["mag"], VARIANTS["mac"]], ids=["mag", "mac"])
def test_weights_and_momentum_stay_float32_in_a_bfloat16_model(memory: Any) -> None:
    """T8: they change over any number of blocks."""
    model = model_of(memory, dtype="bfloat16")

    def read() -> Any:
        built = Transformer(model, rngs=nnx.Rngs(0))
        _, state = built(jnp.zeros((1, 9), jnp.int32), built.init_state(1), aligned=True)
        return built(jnp.zeros((1, 4), jnp.int32), state)[1]

    state = jax.eval_shape(read).layers
    assert state.memory_weights.dtype == state.memory_momentum.dtype == jnp.float32
    assert state.block_rates.dtype == jnp.float32
    assert state.keys.dtype == state.convolution_tail.dtype == jnp.bfloat16


def test_keys_that_tokens_see_are_counted() -> None:
    """As context, tokens see persistent rows, and one row of the memory for each of their block's tokens."""
    memory = TitansContextConfig(chunk=2, persistent=3)
    plain = model_of(BlockSlidingWindowConfig(segments=0))
    more = keys_of_layers(model_of(memory), 8) - keys_of_layers(plain, 8)
    assert more == 2 * (8 * 3 + 2 * (1 + 2 + 3 + 4))
    without = dataclasses.replace(memory, retrieved="none")
    assert keys_of_layers(model_of(without), 8) - keys_of_layers(plain, 8) == 2 * 8 * 3


def test_products_of_reading() -> None:
    """Each token multiplies by the MLP's matrices once, as context twice: an answer to see, and one to mix in."""
    sizes = {"chunk": 4, "heads": 2, "expansion": 3}
    gate, context = TitansGateConfig(**sizes), TitansContextConfig(**sizes)
    once = 2 * (4 * 12 + 12 * 4)
    assert gate.read_products(model_of(gate)) == once
    assert context.read_products(model_of(context)) == 2 * once
    without = TitansContextConfig(**sizes, retrieved="none")
    assert without.read_products(model_of(without)) == once


def test_fields_that_contradict_the_model() -> None:
    with pytest.raises(ConfigError, match=r"memory\.chunk: 3 does not divide block_size 4"):
        model_of(TitansGateConfig(chunk=3))
    with pytest.raises(ConfigError, match=r"memory\.heads: 3 does not divide model_dim 8"):
        model_of(TitansLayerConfig(chunk=4, heads=3))
