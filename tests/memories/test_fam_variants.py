"""SUM FAM and feedback memory segments: equal to NumPy loops, and to what they vary where they must be."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from fam_jax.config import ConfigError, ModelConfig
from fam_jax.memories.fam import FamConfig
from fam_jax.memories.fm import FeedbackMemory, FeedbackMemoryConfig
from fam_jax.memories.sum_fam import SummaryFamConfig
from fam_jax.memories.window import BlockSlidingWindowConfig
from tests.memories.cases import CASES, random_parameters
from tests.model.tiny import Reader, build
from tests.oracle import naive
from tests.variants import rest_slow

pytestmark = pytest.mark.usefixtures("float64")

Array = np.ndarray
EXACT = {"rtol": 1e-10, "atol": 1e-11}
LENGTH, SIZE = 14, 4  # three blocks and a half


def model_of(memory: Any, **values: Any) -> ModelConfig:
    return dataclasses.replace(CASES["bswa"].model, memory=memory, **values)


def some_tokens(*shape: int) -> Array:
    return np.random.default_rng(0).integers(0, 16, shape).astype(np.int32)


def logits(memory: Any) -> Array:
    model = model_of(memory)
    return Reader(model, random_parameters(model), 2).read(some_tokens(2, LENGTH), aligned=True)


def next_summary(layer: Any, config: Any, state: Any, tau: int, origin: float) -> Array:
    """Return F_tau of SUM FAM: the queries of F_{-1} at the positions of F_{tau-1}, which has no other part in it."""
    summary = state.fams[0]
    q, _, _ = naive._fam_qkv(layer, config, summary, naive.fam_positions(config, tau - 1, origin))
    keys, values = list(state.keys[tau]), list(state.values[tau])
    for block in range(tau - 1, max(-1, tau - config.memory.previous_blocks) - 1, -1):
        positions = naive.fam_positions(config, block, origin)
        _, more_keys, more_values = naive._fam_qkv(layer, config, state.fams[block + 1], positions)
        keys += more_keys
        values += more_values
    new = []
    for i, x in enumerate(summary):
        a = naive.project_output(layer, config, naive.attend(config, q[i], keys, values))
        if config.memory.residual == "summary":
            a = a + x
        new.append(naive.feed_forward(layer, config, a) + a)
    return np.array(new)


SUMMARIES = {
    "summary": SummaryFamConfig(length=2),
    "none, prefix, R=2": SummaryFamConfig(length=3, residual="none", init="prefix", previous_blocks=2),
    "zero": SummaryFamConfig(length=2, segments=0, positions="zero"),
    "zero, R=3": SummaryFamConfig(length=2, segments=0, positions="zero", previous_blocks=3),
    "float, none": SummaryFamConfig(length=2, positions="float", residual="none"),
}


@pytest.mark.parametrize("name", rest_slow(SUMMARIES, ["summary", "none, prefix, R=2"]))
def test_summaries_are_a_loop_over_tokens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """T7: one stream and one token at a time, as for FAM, with another update."""
    monkeypatch.setattr(naive, "_next_fam", next_summary)
    model = model_of(SUMMARIES[name])
    params = jax.tree.map(np.asarray, random_parameters(model))
    expected = naive.naive_forward(params, model, some_tokens(2, LENGTH))
    np.testing.assert_allclose(logits(SUMMARIES[name]), expected.logits, **EXACT)


@pytest.mark.parametrize("init", rest_slow(["prompt", "prefix"], ["prompt"]))
def test_without_a_residual_the_first_update_is_that_of_fam(init: str) -> None:
    """T6: F_0 is equal, so the logits of blocks 0 and 1 are; later ones differ."""
    summary = logits(SummaryFamConfig(length=2, init=init, residual="none"))
    fam = logits(FamConfig(length=2, init=init))
    np.testing.assert_allclose(summary[:, : 2 * SIZE], fam[:, : 2 * SIZE], **EXACT)
    assert np.abs(summary[:, 2 * SIZE :] - fam[:, 2 * SIZE :]).max() > 1e-3
    own = logits(SummaryFamConfig(length=2, init=init))
    np.testing.assert_allclose(own[:, :SIZE], fam[:, :SIZE], **EXACT)
    assert np.abs(own[:, SIZE : 2 * SIZE] - fam[:, SIZE : 2 * SIZE]).max() > 1e-3


def test_fields_without_meaning_in_a_summary() -> None:
    with pytest.raises(ConfigError, match=r"memory\.length: sum_fam needs at least 1"):
        SummaryFamConfig(length=0)
    with pytest.raises(ConfigError, match=r"memory\.bound: sum_fam adds nothing of one FAM to the next"):
        SummaryFamConfig(bound=4.0)


def feedback_forward(params: Any, config: Any, tokens: Array) -> Array:
    """Return logits (T, V) of one stream with feedback memory segments."""
    size, segments, window = config.block_size, config.memory.segments, config.memory.window
    layers = [naive.parameters_of_layer(params, n) for n in range(config.num_layers)]
    # By layer: (key, value) of each token's input and output.
    inputs: list[list[Any]] = [[] for _ in layers]
    outputs: list[list[Any]] = [[] for _ in layers]
    found = []
    for t, token in enumerate(tokens):
        x, begin = params["embedding"]["table"][token], t - t % size
        for layer, own, past in zip(layers, inputs, outputs, strict=True):
            q, *key_and_value = naive.project_vector(layer, config, x, float(t))
            own.append(key_and_value)
            first = max(begin - segments * size, 0)
            seen = [
                past[s] if s < begin else own[s] for s in range(first, t + 1) if not window or t - s < window
            ]
            attended = naive.attend(config, q, [k for k, _ in seen], [v for _, v in seen])
            a = naive.project_output(layer, config, attended) + x
            x = naive.feed_forward(layer, config, a) + a
            past.append(naive.project_vector(layer, config, x, float(t))[1:])
        found.append(naive.normalize(config, params["final_norm"], x) @ params["unembedding"]["kernel"])
    return np.array(found)


@pytest.mark.parametrize(
    "memory", [FeedbackMemoryConfig(segments=2), FeedbackMemoryConfig(window=3)], ids=["2", "window"]
)
def test_feedback_segments_are_a_loop_over_tokens(memory: Any) -> None:
    """T7: one stream and one token at a time."""
    model = model_of(memory)
    params = jax.tree.map(np.asarray, random_parameters(model))
    expected = [feedback_forward(params, model, row) for row in some_tokens(2, LENGTH)]
    np.testing.assert_allclose(logits(memory), expected, **EXACT)


def test_feedback_segments_are_a_window_where_nothing_is_fed_back() -> None:
    """T6: in the first block, and without memory segments."""
    found, window = logits(FeedbackMemoryConfig(segments=1)), logits(BlockSlidingWindowConfig(segments=1))
    np.testing.assert_allclose(found[:, :SIZE], window[:, :SIZE], **EXACT)
    assert np.abs(found[:, SIZE:] - window[:, SIZE:]).max() > 1e-3
    none = logits(FeedbackMemoryConfig(segments=0))
    np.testing.assert_allclose(none, logits(BlockSlidingWindowConfig(segments=0)), **EXACT)


def test_segments_of_inputs_are_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """T6: if the layers' inputs are remembered in place of their outputs, it is Block Sliding Window Attention."""
    monkeypatch.setattr(FeedbackMemory, "remembered", lambda self, x, out: x)
    model = model_of(FeedbackMemoryConfig(segments=1))
    one = build(model, random_parameters(model))
    found, _ = one(some_tokens(2, LENGTH), one.init_state(2), aligned=True)
    np.testing.assert_allclose(found, logits(BlockSlidingWindowConfig(segments=1)), **EXACT)
