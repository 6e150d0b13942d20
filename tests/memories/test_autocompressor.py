"""AutoCompressors: equal to a NumPy loop that recomputes all summaries, and to ordinary decoders over all rows."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fam_jax.config import ConfigError
from fam_jax.memories.autocompressor import AutoCompressorConfig
from fam_jax.memories.window import BlockSlidingWindowConfig
from fam_jax.model.layer_types import start_of_memory
from tests.memories.cases import CASES, SIZE, random_parameters
from tests.memories.test_rmt import decode_rows
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
ROWS, LENGTH = 2, 18
NAMES = [name for name, case in CASES.items() if case.memory.kind == "autocompressor"]


def some_tokens(length: int = LENGTH) -> Array:
    vocabulary = CASES["autocompressor"].model.vocab_size
    return np.random.default_rng(0).integers(0, vocabulary, (ROWS, length), np.int32)


def compressor_forward(params: Any, config: Any, tokens: Array) -> tuple[Array, list[Array]]:
    """Return logits (T, V) of one stream, and the summaries (kappa, D) of its complete blocks.

    All summaries so far pass through the layers again with every block. A row of a summary or of s sees the rows of the
    n summaries before, or n - 1 besides its own, as many as are kept when it is computed.
    """
    own, memory, size = np.asarray(params["memory"]["summary_rows"]), config.memory, config.block_size
    length, logits, summaries = len(own), [], []
    # For each layer the inputs of the tokens of past blocks: their keys are made again in every block's frame.
    past: list[list[list[Array]]] = [[] for _ in range(config.num_layers)]
    for begin in range(0, len(tokens), size):
        block, count = params["embedding"]["table"][tokens[begin : begin + size]], len(summaries)
        # (number of the summary, or "token" or "s"; place in the frame of the block; vector)
        kinds: list[Any] = [number for number in range(count) for _ in range(length)]
        kinds += ["token"] * len(block) + ["s"] * length
        fixed = memory.summary_positions == "fixed"
        places = [
            -length + i if fixed else (n - count) * length + i for n in range(count) for i in range(length)
        ]
        places += [*range(len(block)), *range(size, size + length)]
        rows = [*np.reshape(summaries, (-1, own.shape[1])), *block, *own]
        for index in range(config.num_layers):
            layer = parameters_of_layer(params, index)
            made = [project_vector(layer, config, x, float(p)) for x, p in zip(rows, places, strict=True)]
            above = []
            for i, x in enumerate(rows):
                oldest = (kinds[i] + 1 if isinstance(kinds[i], int) else count) - memory.summaries
                seen = [
                    made[j][1:] for j in range(i + 1) if not isinstance(kinds[j], int) or kinds[j] >= oldest
                ]
                if kinds[i] == "token":
                    for age in range(1, min(memory.segments, len(past[index])) + 1):
                        for place, old in enumerate(past[index][-age]):
                            seen.append(project_vector(layer, config, old, float(place - age * size))[1:])
                attended = attend(config, made[i][0], [k for k, _ in seen], [v for _, v in seen])
                a = project_output(layer, config, attended) + x
                above.append(feed_forward(layer, config, a) + a)
            past[index].append([x for kind, x in zip(kinds, rows, strict=True) if kind == "token"])
            rows = above
        normed = np.array([normalize(config, params["final_norm"], x) for x in rows])
        logits.append(normed[count * length : count * length + len(block)] @ params["unembedding"]["kernel"])
        if len(block) == size:
            summaries.append(normed[-length:])
    return np.concatenate(logits), summaries


@pytest.mark.parametrize("name", rest_slow(NAMES, ["autocompressor"]))
def test_it_computes_what_the_paper_says(name: str) -> None:
    model, params, tokens = CASES[name].model, random_parameters(CASES[name].model), some_tokens()
    one = Reader(model, params, ROWS)
    logits = one.read(tokens, aligned=True)
    plain = jax.tree.map(np.asarray, params)
    for row in range(ROWS):
        expected, summaries = compressor_forward(plain, model, tokens[row])
        np.testing.assert_allclose(logits[row], expected, **EXACT)
        np.testing.assert_allclose(one.state.shared[row], summaries[-1], **EXACT)
    assert (np.asarray(one.state.layers.slots_filled) == min(model.memory.summaries, LENGTH // SIZE)).all()


def test_every_block_is_a_decoder_over_all_summaries_and_itself() -> None:
    """Cached keys of old summaries are what an ordinary decoder over [sigma_1 ; .. ; block ; s] recomputes."""
    model = CASES["autocompressor"].model
    params, tokens = random_parameters(model), some_tokens(3 * SIZE)
    one, summaries = Reader(model, params, ROWS), []
    own = np.broadcast_to(params["memory"]["summary_rows"], (ROWS, 2, model.model_dim))
    for begin in range(0, tokens.shape[1], SIZE):
        block = tokens[:, begin : begin + SIZE]
        logits = one.read(block, aligned=True)
        rows = np.concatenate([*summaries, params["embedding"]["table"][block], own], axis=1)
        above = decode_rows(model, params, rows)
        of_block = above[:, -2 - SIZE : -2] @ params["unembedding"]["kernel"]
        np.testing.assert_allclose(logits, of_block, **EXACT)
        np.testing.assert_allclose(one.state.shared, above[:, -2:], **EXACT)
        summaries.append(above[:, -2:])


@pytest.mark.parametrize("segments", rest_slow([0, 1], [0]))
def test_without_rows_it_is_the_window(segments: int) -> None:
    memory = AutoCompressorConfig(length=0, segments=segments)
    model = dataclasses.replace(CASES["autocompressor"].model, memory=memory)
    window = dataclasses.replace(model, memory=BlockSlidingWindowConfig(segments=segments))
    params, tokens = random_parameters(window), some_tokens()
    expected = Reader(window, params, ROWS).read(tokens, aligned=True)
    np.testing.assert_allclose(Reader(model, params, ROWS).read(tokens, aligned=True), expected, **EXACT)


def test_a_trained_model_starts_from_a_token() -> None:
    memory = AutoCompressorConfig(length=3, init_token=7)
    model = dataclasses.replace(CASES["autocompressor"].model, memory=memory)
    table = jnp.asarray(np.random.default_rng(0).normal(size=(model.vocab_size, model.model_dim)))
    rows = start_of_memory(model, table, 0)["memory/summary_rows"]
    np.testing.assert_array_equal(rows, np.broadcast_to(table[7].astype(jnp.float32), rows.shape))
    random = dataclasses.replace(memory, init_token=-1)
    rows = start_of_memory(dataclasses.replace(model, memory=random), table, 0)["memory/summary_rows"]
    assert np.abs(rows[0] - rows[1]).max() > 0.1


def test_the_token_to_start_from_exists() -> None:
    memory = AutoCompressorConfig(init_token=19)
    with pytest.raises(ConfigError, match=r"config\.model\.memory\.init_token: 19 is no token of the vocab"):
        dataclasses.replace(CASES["autocompressor"].model, memory=memory)


def test_keys_that_a_block_sees() -> None:
    memory = AutoCompressorConfig(length=5, summaries=3)
    assert [memory.extra_keys_of_block(block) for block in range(5)] == [0, 5, 10, 15, 15]
    assert memory.extra_keys == 15
