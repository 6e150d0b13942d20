"""Truncated backpropagation through time: results do not change, and gradients reach as far as the config says."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fam_jax.config import ConfigError, TrainConfig
from fam_jax.model import empty_state
from fam_jax.model.truncation import FULL, Truncation, truncation_of
from tests.memories.cases import BLOCKS, CASES, SIZE, random_parameters
from tests.model.tiny import build
from tests.training.tiny import changed, run
from tests.variants import rest_slow

pytestmark = pytest.mark.usefixtures("float64")

CHUNKED, LAST = Truncation(2, "chunked"), Truncation(1, "last")
# Memories of both orders, read at once, by a chain, and block by block.
NAMES = [name for name, case in CASES.items() if case.memory.has_state]
OFTEN = [("rmt", CHUNKED), ("fam, prefix, R=2", LAST)]
every = pytest.mark.parametrize(
    ("name", "truncation"), rest_slow([(name, how) for name in NAMES for how in (CHUNKED, LAST)], OFTEN)
)


@pytest.mark.parametrize(
    ("truncation", "length", "parts"),
    [
        (FULL, 14, [14]),
        (Truncation(1), 14, [4, 4, 4, 2]),
        (Truncation(2), 14, [8, 6]),
        (Truncation(2), 16, [8, 8]),
        (Truncation(4), 14, [14]),
        (Truncation(1, "last"), 14, [12, 2]),
        (Truncation(3, "last"), 16, [4, 12]),
        (Truncation(4, "last"), 16, [16]),
        (Truncation(0, "last"), 16, [16]),
    ],
)
def test_parts(truncation: Truncation, length: int, parts: list[int]) -> None:
    assert truncation.parts(length, SIZE) == parts


def losses_of_blocks(name: str, truncation: Truncation) -> Callable[..., Any]:
    """Return a function of embeddings (V, D) and tokens (B, T): the losses of the blocks, and the logits."""
    model, params = CASES[name].model, random_parameters(CASES[name].model)

    def losses(table: jax.Array, tokens: jax.Array) -> Any:
        decoder = build(model, {**params, "embedding": {"table": table}})
        start = empty_state(model, len(tokens), past_slots=False)
        offset = jnp.arange(1, len(tokens) + 1, dtype=jnp.int32)
        hidden, state = decoder.hidden(
            tokens, start, aligned=True, position_offset=offset, truncation=truncation
        )
        logits = decoder.logits(hidden)
        blocks = jnp.square(logits[:, : BLOCKS * SIZE]).reshape(BLOCKS, -1).sum(axis=1)
        return blocks, (logits, jax.tree.leaves(state))

    return losses


@every
def test_gradients_stop_where_they_should(name: str, truncation: Truncation) -> None:
    """T4: a block's loss reaches what it reaches without truncation, up to the border where gradients stop."""
    case = CASES[name]
    table = random_parameters(case.model)["embedding"]["table"]
    tokens = jnp.arange(SIZE * BLOCKS, dtype=jnp.int32)[None]  # each once, so a row of the table is one place
    slopes, _ = jax.jit(jax.jacrev(losses_of_blocks(name, truncation), has_aux=True))(table, tokens)
    reached = np.abs(np.asarray(slopes)[:, : SIZE * BLOCKS]).reshape(BLOCKS, BLOCKS, -1).max(axis=2)
    k = truncation.blocks
    part = np.arange(BLOCKS) // k if truncation.kind == "chunked" else np.arange(BLOCKS) >= BLOCKS - k
    expected = np.array(
        [[case.reach(i, j) and part[i] == part[j] for j in range(BLOCKS)] for i in range(BLOCKS)]
    )
    np.testing.assert_array_equal(reached[~expected], 0)
    assert reached[expected].min() > 1e-9
    assert expected.sum() < sum(case.reach(i, j) for i in range(BLOCKS) for j in range(BLOCKS))


@pytest.mark.parametrize(
    ("name", "truncation"),
    rest_slow(
        [(name, how) for name in NAMES for how in (Truncation(1), LAST)], [("autocompressor", Truncation(1))]
    ),
)
def test_results_do_not_change(name: str, truncation: Truncation) -> None:
    """Logits and states are those of whole rows, with random position offsets and an unfinished block, too."""
    table = random_parameters(CASES[name].model)["embedding"]["table"]
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 16, (2, SIZE * BLOCKS + 3)), jnp.int32)
    whole, parts = (jax.jit(losses_of_blocks(name, how))(table, tokens)[1] for how in (FULL, truncation))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-11), parts, whole)


@pytest.mark.slow
def test_a_training_step_truncates() -> None:
    """The loss is that of whole rows, the gradient is not."""
    with jax.enable_x64(False):
        whole = changed(model__memory=CASES["rmt"].memory)
        parts = changed(whole, train__bptt_blocks=1, train__bptt_kind="last")
        (_, (first,)), (_, (second,)) = run(whole, 1), run(parts, 1)
    np.testing.assert_allclose(second["loss"], first["loss"], rtol=1e-5)
    assert abs(second["gradient_norm"] - first["gradient_norm"]) > 1e-3 * first["gradient_norm"]


def test_config_fields() -> None:
    assert truncation_of(TrainConfig()) == FULL
    assert truncation_of(TrainConfig(bptt_blocks=3, bptt_kind="last")) == Truncation(3, "last")
    with pytest.raises(ConfigError, match=r"config\.train\.bptt_kind: expected one of chunked, last"):
        dataclasses.replace(TrainConfig(), bptt_kind="sliding")
