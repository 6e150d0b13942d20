"""The Feedback Transformer: equal to a NumPy loop, and to a window where the mixture is the layer's own input."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fam_jax.config import ConfigError, ModelConfig
from fam_jax.memories.feedback import FeedbackConfig
from fam_jax.memories.window import BlockSlidingWindowConfig
from tests.memories.cases import CASES, random_parameters
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
ROWS, LENGTH = 2, 14
MEMORIES = {name: case.memory for name, case in CASES.items() if case.memory.kind == "feedback"}
VARIANTS = [
    *((name, memory, 4) for name, memory in MEMORIES.items()),
    ("the paper's", FeedbackConfig(segments=6), 1),
    ("window", FeedbackConfig(segments=2, window=6), 4),
]


def some_tokens() -> Array:
    vocabulary = CASES["feedback"].model.vocab_size
    return np.random.default_rng(0).integers(0, vocabulary, (ROWS, LENGTH), np.int32)


def model_with(memory: FeedbackConfig, block_size: int, **changes: Any) -> ModelConfig:
    return dataclasses.replace(CASES["feedback"].model, memory=memory, block_size=block_size, **changes)


def feedback_forward(params: Any, config: Any, tokens: Array) -> Array:
    """Return logits (T, V) of one stream, token by token; every key is made of its vector when it is needed."""
    logits_of_mix = np.asarray(params["memory"]["layer_mix"])
    weights = np.exp(logits_of_mix - logits_of_mix.max())
    weights /= weights.sum()
    memory, size, out = config.memory, config.block_size, []
    rows: list[list[Array]] = []  # of each token: embedding, and the output of every layer
    for t, token in enumerate(tokens):
        x = params["embedding"]["table"][token]
        rows.append([x])
        block = t // size
        for index in range(config.num_layers):
            layer = parameters_of_layer(params, index)
            query, *_ = project_vector(layer, config, x, float(t))
            keys, values = [], []
            for s in range(max(0, (block - memory.segments) * size), t + memory.sees_itself):
                if memory.window and t - s >= memory.window:
                    continue
                own_block = s // size == block
                mixed = sum(w * each for w, each in zip(weights, rows[s], strict=False))
                _, k, v = project_vector(layer, config, rows[s][index] if own_block else mixed, float(s))
                keys.append(k)
                values.append(v)
            attended = attend(config, query, keys, values) if keys else np.zeros_like(query)
            a = project_output(layer, config, attended) + x
            x = feed_forward(layer, config, a) + a
            rows[t].append(x)
        out.append(normalize(config, params["final_norm"], x) @ params["unembedding"]["kernel"])
    return np.array(out)


@pytest.mark.parametrize(("name", "memory", "block_size"), rest_slow(VARIANTS, VARIANTS[:1]))
def test_it_computes_what_the_paper_says(name: str, memory: FeedbackConfig, block_size: int) -> None:
    model, tokens = model_with(memory, block_size), some_tokens()
    params = random_parameters(model)
    logits = Reader(model, params, ROWS).read(tokens, aligned=True)
    plain = jax.tree.map(np.asarray, params)
    expected = [feedback_forward(plain, model, row) for row in tokens]
    np.testing.assert_allclose(logits, expected, **EXACT)


@pytest.mark.parametrize("block_size", rest_slow([1, 4], [4]))
def test_one_layer_that_mixes_its_input_alone_is_the_window(block_size: int) -> None:
    model = model_with(FeedbackConfig(segments=2, sees_itself=True), block_size, num_layers=1)
    window = dataclasses.replace(model, memory=BlockSlidingWindowConfig(segments=2))
    params, tokens = random_parameters(window), some_tokens()
    own = {**params, "memory": {"layer_mix": jnp.asarray([0.0, -1e9])}}
    expected = Reader(window, params, ROWS).read(tokens, aligned=True)
    np.testing.assert_allclose(Reader(model, own, ROWS).read(tokens, aligned=True), expected, **EXACT)


def test_a_window_must_show_something() -> None:
    with pytest.raises(ConfigError, match=r"config\.model\.memory\.window: 1 shows a token only itself"):
        model_with(FeedbackConfig(window=1), 4)
