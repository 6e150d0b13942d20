"""Longformer's windows against a NumPy loop with one mask for every layer and head."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from fam_jax.config import ConfigError, ModelConfig
from fam_jax.memories.longformer import LongformerConfig
from fam_jax.memories.window import SlidingWindowConfig
from fam_jax.model.layer_types import models_of_types
from fam_jax.training.flops import keys_of_layers
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

EXACT = {"rtol": 1e-10, "atol": 1e-11}
LENGTH, LAYERS = 23, 4

# Windows and dilations, and those of each of four layers.
VARIANTS = {
    "dilated": (
        LongformerConfig(windows=(2, 3, 5, 4), dilations=(1, 1, 2, 4)),
        [(2, 1), (3, 1), (5, 2), (4, 4)],
    ),
    "pairs": (LongformerConfig(windows=(3, 6)), [(3, 1), (3, 1), (6, 1), (6, 1)]),
    "one head": (
        LongformerConfig(windows=(3,), dilations=(1, 2, 4), dilated_heads=1),
        [(3, 1), (3, 1), (3, 2), (3, 4)],
    ),
    "all heads": (LongformerConfig(windows=(4,), dilations=(2,), dilated_heads=4), [(4, 2)] * LAYERS),
}


def model_of(memory: Any, **values: Any) -> ModelConfig:
    return dataclasses.replace(CASES["bswa"].model, memory=memory, num_layers=LAYERS, **values)


def some_tokens(rows: int = 2, length: int = LENGTH) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 16, (rows, length)).astype(np.int32)


def naive(params: Any, config: Any, tokens: np.ndarray, of_layers: list[tuple[int, int]]) -> np.ndarray:
    """Return the logits (T, V) of one stream, for the window and the dilation of each layer."""
    rows = params["embedding"]["table"][tokens]
    dilated = range(config.num_heads - config.memory.dilated_heads, config.num_heads)
    for index, (window, dilation) in enumerate(of_layers):
        layer = parameters_of_layer(params, index)
        projected = [project_vector(layer, config, x, float(t)) for t, x in enumerate(rows)]
        out = []
        for t, x in enumerate(rows):
            heads = []
            for head in range(config.num_heads):
                step = dilation if head in dilated else 1
                seen = [t - step * i for i in range(window) if t - step * i >= 0]
                keys, values = ([projected[s][part] for s in seen] for part in (1, 2))
                heads.append(attend(config, projected[t][0], keys, values)[head])
            a = project_output(layer, config, np.array(heads)) + x
            out.append(feed_forward(layer, config, a) + a)
        rows = np.array(out)
    normed = np.array([normalize(config, params["final_norm"], x) for x in rows])
    return normed @ params["unembedding"]["kernel"]


@pytest.mark.parametrize("name", rest_slow(VARIANTS, ["dilated"]))
def test_logits_are_those_of_a_mask(name: str) -> None:
    memory, of_layers = VARIANTS[name]
    model = model_of(memory)
    params, tokens = random_parameters(model), some_tokens()
    expected = [naive(jax.tree.map(np.asarray, params), model, row, of_layers) for row in tokens]
    found = Reader(model, params, 2).read(tokens, aligned=True)
    np.testing.assert_allclose(found, expected, **EXACT)
    # From a cache, in pieces that cross block borders.
    one = Reader(model, params, 2)
    parts = [one.read(tokens[:, begin : begin + 9]) for begin in (0, 9)]
    np.testing.assert_allclose(np.concatenate(parts, axis=1), np.array(expected)[:, :18], **EXACT)


def test_equal_windows_without_dilation_are_a_sliding_window() -> None:
    model, window = model_of(LongformerConfig(windows=(5,))), model_of(SlidingWindowConfig(window=5))
    params, tokens = random_parameters(model), some_tokens()
    found = Reader(model, params, 2).read(tokens, aligned=True)
    np.testing.assert_allclose(found, Reader(window, params, 2).read(tokens, aligned=True), **EXACT)
    assert len(models_of_types(model)) == 1


def test_types_share_one_cache_and_flops_count_each() -> None:
    memory, of_layers = VARIANTS["dilated"]
    model = model_of(memory)
    types = models_of_types(model)
    assert [(own.memory.window, count) for own, count in types] == [(window, 1) for window, _ in of_layers]
    assert {own.memory_segments for own, _ in types} == {3} == {model.memory_segments}  # 12 tokens back
    expected = sum(min(window, t + 1) for window, _ in of_layers for t in range(LENGTH))
    assert keys_of_layers(model, LENGTH) == expected


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"windows": (2, 3), "dilations": (1, 2, 2)}, r"dilations: 3 entries for 2 windows"),
        ({"windows": (1, 2, 3, 4, 5)}, r"windows: 5 entries for 4 layers"),
        ({"windows": (2,), "dilations": (3,)}, r"dilations: 3 does not divide block_size 4"),
        ({"windows": (2,), "dilations": (2,), "dilated_heads": 5}, r"dilated_heads: 5 exceeds num_heads 4"),
    ],
)
def test_what_does_not_go_together(values: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=rf"config\.model\.memory\.{says}"):
        model_of(LongformerConfig(**values))
