"""The train step: accumulation, random state passing, position offsets, metrics, remat, determinism."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fam_jax.config import Config
from fam_jax.model import Transformer, empty_state, with_passed_on
from tests.model.tiny import build
from tests.training.tiny import ROWS, TINY, assert_close, changed, compiled_step, run, some_batch, start
from tests.variants import rest_slow

ALWAYS = changed(train__random_state_passing=1.0)
SOMETIMES = changed(train__random_state_passing=0.5, train__random_state_passing_from=3, model__remat="dots")
OFFSET = changed(train__random_position_offset=True)
TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}


@functools.cache
def compiled_hidden(config: Config) -> Any:
    @jax.jit
    def call(params: Any, inputs: jax.Array, fam: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        memory = with_passed_on(empty_state(config.model, inputs.shape[0]), {"fam": fam}, rows)
        model: Transformer = build(config.model, params)
        hidden, memory = model.hidden(inputs, memory, aligned=True)
        return model.logits(hidden), memory.layers.fam

    return call


def forward(params: Any, inputs: np.ndarray, fam: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """Return logits (B, T, V) and last FAM (L, B, M, D) of the tiny model; rows start from `fam` (L, M, D) if given."""
    model = TINY.model
    zeros = jnp.zeros((model.num_layers, model.memory.length, model.model_dim))
    rows = jnp.full(len(inputs), fam is not None)
    return jax.tree.map(
        np.asarray, compiled_hidden(TINY)(params, inputs, zeros if fam is None else fam, rows)
    )


def cross_entropy(logits: np.ndarray, batch: dict[str, np.ndarray]) -> float:
    logits = logits.astype(np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    log_probability = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = np.take_along_axis(log_probability, batch["targets"][..., None], -1)[..., 0]
    return -(batch["weights"] * chosen).sum() / batch["weights"].sum()


def copy(tree: Any) -> Any:
    """Copy a tree to the host, where donation does not affect it."""
    return jax.tree.map(np.array, tree)


def test_accumulation_changes_nothing() -> None:
    """Compare two steps, the second from the saved FAM; the weights of the micro-batches differ."""
    whole, metrics = run(ALWAYS, 2)
    parts, same = run(changed(ALWAYS, train__accumulation=4), 2)
    assert_close(parts.params, whole.params, **TOLERANCE)
    assert_close(parts.optimizer, whole.optimizer, **TOLERANCE)
    assert_close(parts.carried, whole.carried, **TOLERANCE)
    assert_close(same, metrics, **TOLERANCE)


@pytest.mark.parametrize(
    "config",
    [pytest.param(SOMETIMES, marks=pytest.mark.slow), changed(ALWAYS, model__remat="full")],
    ids=["dots", "full"],
)
def test_remat_changes_nothing(config: Config) -> None:
    """Compare the first step, in which no state has been passed on yet."""
    without, metrics = run(ALWAYS, 1)
    state, same = run(config, 1)
    assert_close(same, metrics, **TOLERANCE)
    assert_close(state.params, without.params, **TOLERANCE)


def test_the_saved_fam_is_the_last_of_the_first_example_and_the_next_step_starts_from_it() -> None:
    before = start(ALWAYS)
    params = copy(before.params)
    assert not before.has_carried
    state, metrics = compiled_step(ALWAYS)(before, some_batch(0))
    logits, fam = forward(params, some_batch(0)["inputs"])
    assert metrics["from_saved_state"] == 0
    assert metrics["loss"] == pytest.approx(cross_entropy(logits, some_batch(0)), rel=1e-4)
    assert state.has_carried
    np.testing.assert_allclose(state.carried["fam"], fam[:, 0], **TOLERANCE)
    assert np.abs(fam[:, 0] - fam[:, 1]).max() > 0.01  # examples can be told apart

    params, saved = copy(state.params), copy(state.carried["fam"])
    state, metrics = compiled_step(ALWAYS)(state, some_batch(1))
    logits, fam = forward(params, some_batch(1)["inputs"], saved)
    fresh, _ = forward(params, some_batch(1)["inputs"])
    assert metrics["from_saved_state"] == 1
    assert metrics["loss"] == pytest.approx(cross_entropy(logits, some_batch(1)), rel=1e-4)
    assert abs(cross_entropy(fresh, some_batch(1)) - cross_entropy(logits, some_batch(1))) > 1e-3
    np.testing.assert_allclose(state.carried["fam"], fam[:, 0], **TOLERANCE)


def test_random_state_passing_at_probability_0_between_and_1() -> None:
    always = [m["from_saved_state"] for m in run(ALWAYS, 4)[1]]
    assert always == [0, 1, 1, 1]
    never = [m["from_saved_state"] for m in run(OFFSET, 4)[1]]
    assert never == [0, 0, 0, 0]
    sometimes = [m["from_saved_state"] for m in run(SOMETIMES, 15)[1]]
    assert sometimes[:3] == [0, 0, 0]  # steps 0, 1 and 2: it begins at 3
    assert len(set(sometimes[3:])) > 2
    assert 0.3 < np.mean(sometimes[3:]) < 0.7  # of 96 draws
    assert sometimes == [m["from_saved_state"] for m in run(SOMETIMES, 15)[1]]
    other_key = [m["from_saved_state"] for m in run(SOMETIMES, 15, start(SOMETIMES, seed=1))[1]]
    assert other_key[:3] == [0, 0, 0]
    assert other_key != sometimes


def losses_by_key(config: Config) -> list[float]:
    """Return the losses of one step with the same parameters and batch, for several random keys."""
    found = []
    for seed in range(3):
        state = start(config)
        with_key = type(state)(**{**vars(state), "key": jax.random.key(seed)})
        found.append(float(compiled_step(config)(with_key, some_batch(0))[1]["loss"]))
    return found


@pytest.mark.slow
def test_position_offsets_matter_to_absolute_positions_only() -> None:
    """FAM at relative positions moves along with the tokens; FAM at position zero does not."""
    base = run(ALWAYS, 1)[1][0]["loss"]
    np.testing.assert_allclose(losses_by_key(OFFSET), base, rtol=1e-3)
    zero = losses_by_key(changed(OFFSET, memory__positions="zero"))
    assert max(zero) - min(zero) > 5e-3, zero


def test_metrics() -> None:
    batch = some_batch(0)
    state = start(ALWAYS)
    logits, _ = forward(copy(state.params), batch["inputs"])
    # All answers of rows 0 to 2 are right, one token of row 3 is wrong, the others are random.
    right = batch["answer"] & (np.arange(ROWS)[:, None] <= 3)
    batch["targets"] = np.where(right, logits.argmax(-1), batch["targets"]).astype(np.int32)
    wrong = (3, np.flatnonzero(batch["answer"][3])[0])
    batch["targets"][wrong] = logits[wrong].argmin()
    hits = logits.argmax(-1) == batch["targets"]
    exact = [all(hits[row][batch["answer"][row]]) for row in range(ROWS)]
    assert exact[:4] == [True, True, True, False]

    _, metrics = compiled_step(ALWAYS)(state, batch)
    assert metrics["exact_match"] == pytest.approx(np.mean(exact))
    assert metrics["answer_accuracy"] == pytest.approx(hits[batch["answer"]].mean())
    assert metrics["loss"] == pytest.approx(cross_entropy(logits, batch), rel=1e-4)
    assert metrics["objective"] == pytest.approx(float(metrics["loss"]))  # without z-loss
    assert metrics["learning_rate"] == pytest.approx(TINY.optimizer.learning_rate)
    assert metrics["gradient_norm"] > 0 and metrics["update_norm"] > 0


def test_the_seed_decides_everything() -> None:
    one, metrics = run(ALWAYS, 3)
    two, same = run(ALWAYS, 3)
    other, _ = run(ALWAYS, 3, start(ALWAYS, seed=1))
    assert metrics == same
    for a, b, c in zip(*(jax.tree.leaves(s.params) for s in (one, two, other)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(a, c) or np.ptp(np.asarray(a)) == 0
    assert one.step == 3


def test_the_state_is_donated() -> None:
    """Parameters and momentum are donated; placeholders of the optimizer, which it never reads, may stay."""
    state = start(ALWAYS)
    shapes = {leaf.shape for leaf in jax.tree.leaves(state.params)}
    large = [leaf for leaf in jax.tree.leaves((state.params, state.optimizer)) if leaf.shape in shapes]
    compiled_step(ALWAYS)(state, some_batch(0))
    assert len(large) >= 2 * len(jax.tree.leaves(state.params))
    assert all(leaf.is_deleted() for leaf in large)


@pytest.mark.parametrize("optimizer", rest_slow(["adafactor", "adamw"], ["adafactor"]))
def test_training_learns(optimizer: str) -> None:
    """The model memorizes the tokens of one batch."""
    config = ALWAYS if optimizer == "adafactor" else changed(optimizer__name="adamw", optimizer__epsilon=1e-8)
    state = start(config)
    losses = []
    for _ in range(60):
        state, metrics = compiled_step(config)(state, some_batch(0))
        losses.append(float(metrics["loss"]))
    assert losses[0] > 2.2  # log 12 = 2.5 is chance
    assert losses[-1] < 0.6 * losses[0]
