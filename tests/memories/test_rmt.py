"""RMT: equal to a NumPy loop written from the paper, and to ordinary decoders where it must be."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fam_jax.config import ModelConfig
from fam_jax.memories.rmt import RmtConfig
from fam_jax.memories.window import BlockSlidingWindowConfig, FullConfig
from fam_jax.model.layer_types import start_of_memory
from tests.memories.cases import CASES, SIZE, random_parameters
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

Array = np.ndarray
EXACT = {"rtol": 1e-10, "atol": 1e-11}
ROWS, LENGTH = 2, 14
NAMES = [name for name, case in CASES.items() if case.memory.kind == "rmt"]


def some_tokens(length: int = LENGTH) -> Array:
    return np.random.default_rng(0).integers(0, CASES["rmt"].model.vocab_size, (ROWS, length), np.int32)


def rmt_forward(params: Any, config: Any, tokens: Array) -> tuple[Array, Array]:
    """Return logits (T, V) of one stream, and the memory (M, D) after its last complete block.

    A block's rows are [m ; block ; m]. Positions count from the stream's first token; memory rows share those of the
    tokens around them.
    """
    memory, size = np.asarray(params["memory"]["memory_rows"]), config.block_size
    length, logits = len(memory), []
    # For each layer the keys and values of past blocks, block by block.
    past: list[list[list[tuple[Array, Array]]]] = [[] for _ in range(config.num_layers)]
    for begin in range(0, len(tokens), size):
        block = params["embedding"]["table"][tokens[begin : begin + size]]
        kinds = ["read"] * length + ["token"] * len(block) + ["write"] * length
        places = [begin - length + i for i in range(length)]
        places += [begin + i for i in range(len(block))] + [begin + size + i for i in range(length)]
        rows = [*memory, *block, *memory]
        for index in range(config.num_layers):
            layer = parameters_of_layer(params, index)
            made = [project_vector(layer, config, x, float(p)) for x, p in zip(rows, places, strict=True)]
            above = []
            for i, x in enumerate(rows):
                seen = []
                if kinds[i] == "token":
                    for old in past[index][max(0, len(past[index]) - config.memory.segments) :]:
                        seen += old
                for j in range(len(rows)):
                    together = kinds[i] == kinds[j] != "token" and config.memory.mask == "paper"
                    if j <= i or together:
                        seen.append(made[j][1:])
                attended = attend(config, made[i][0], [k for k, _ in seen], [v for _, v in seen])
                a = project_output(layer, config, attended) + x
                above.append(feed_forward(layer, config, a) + a)
            past[index].append([made[j][1:] for j in range(len(rows)) if kinds[j] == "token"])
            rows = above
        normed = np.array([normalize(config, params["final_norm"], x) for x in rows])
        logits.append(normed[length : length + len(block)] @ params["unembedding"]["kernel"])
        if len(block) == size:
            memory = normed[-length:]
    return np.concatenate(logits), memory


@pytest.mark.parametrize("name", rest_slow(NAMES, ["rmt"]))
def test_it_computes_what_the_paper_says(name: str) -> None:
    model, params, tokens = CASES[name].model, random_parameters(CASES[name].model), some_tokens()
    one = Reader(model, params, ROWS)
    logits = one.read(tokens, aligned=True)
    plain = jax.tree.map(np.asarray, params)
    for row in range(ROWS):
        expected, memory = rmt_forward(plain, model, tokens[row])
        np.testing.assert_allclose(logits[row], expected, **EXACT)
        np.testing.assert_allclose(one.state.shared[row], memory, **EXACT)


@pytest.mark.parametrize("segments", rest_slow([0, 1], [0]))
def test_without_rows_it_is_the_window(segments: int) -> None:
    model = dataclasses.replace(CASES["rmt"].model, memory=RmtConfig(length=0, segments=segments))
    window = dataclasses.replace(model, memory=BlockSlidingWindowConfig(segments=segments))
    params, tokens = random_parameters(window), some_tokens()
    expected = Reader(window, params, ROWS).read(tokens, aligned=True)
    np.testing.assert_allclose(Reader(model, params, ROWS).read(tokens, aligned=True), expected, **EXACT)


def decode_rows(model: ModelConfig, params: Any, rows: Array) -> Array:
    """Return the activations above an ordinary causal decoder, of vectors (B, T, D) in place of embeddings."""
    batch, length, width = rows.shape
    plain = dataclasses.replace(
        model, memory=FullConfig(context=length), block_size=length, vocab_size=batch * length
    )
    own = {key: value for key, value in params.items() if key != "memory"}
    own["embedding"] = {"table": jnp.asarray(rows.reshape(-1, width))}
    own["unembedding"] = {"kernel": jnp.zeros((width, batch * length))}
    decoder = build(plain, own)
    tokens = jnp.arange(batch * length, dtype=jnp.int32).reshape(batch, length)
    return np.asarray(decoder.hidden(tokens, decoder.init_state(batch), aligned=True)[0])


def test_one_block_is_a_decoder_over_all_rows() -> None:
    """With the causal mask, [m ; block ; m] passes through an ordinary decoder."""
    model = CASES["rmt, causal, M > C"].model
    params, tokens = random_parameters(model), some_tokens(SIZE)
    one = Reader(model, params, ROWS)
    logits = one.read(tokens, aligned=True)
    memory = np.broadcast_to(params["memory"]["memory_rows"], (ROWS, 5, model.model_dim))
    rows = np.concatenate([memory, params["embedding"]["table"][tokens], memory], axis=1)
    above = decode_rows(model, params, rows)
    np.testing.assert_allclose(logits, above[:, 5 : 5 + SIZE] @ params["unembedding"]["kernel"], **EXACT)
    np.testing.assert_allclose(one.state.shared, above[:, -5:], **EXACT)


def test_the_masks_differ_and_rows_see_their_block() -> None:
    tokens, model = some_tokens(), CASES["rmt"].model
    causal = dataclasses.replace(model, memory=RmtConfig(length=2, mask="causal"))
    params = random_parameters(model)
    one, other = (Reader(each, params, ROWS) for each in (model, causal))
    first, second = one.read(tokens, aligned=True), other.read(tokens, aligned=True)
    assert np.abs(first - second)[:, :SIZE].max() > 1e-6


def test_a_trained_model_starts_from_embeddings() -> None:
    model = dataclasses.replace(CASES["rmt"].model, scale_embeddings=True)
    table = jnp.asarray(np.random.default_rng(0).normal(size=(model.vocab_size, model.model_dim)))
    rows = np.asarray(start_of_memory(model, table, 3)["memory/memory_rows"]) / model.model_dim**0.5
    assert rows.shape == (2, model.model_dim)
    assert np.abs(rows[:, None] - np.asarray(table)).max(axis=2).min(axis=1).max() < 1e-5


def test_the_state_has_the_dtype_of_activations() -> None:
    model = dataclasses.replace(CASES["rmt"].model, dtype="bfloat16")
    state = jax.eval_shape(lambda: build(model, random_parameters(model)).init_state(1))
    leaves = jax.tree.leaves((state.shared, state.layers))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("bfloat16")}
