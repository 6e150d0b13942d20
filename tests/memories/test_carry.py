"""Rows that go on with what the last step left (train.carry)."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fam_jax.config import Config, ConfigError, DataConfig
from fam_jax.config import changed as replace_groups
from fam_jax.memories.autocompressor import AutoCompressorConfig
from fam_jax.memories.fam import FamConfig
from fam_jax.memories.window import BlockSlidingWindowConfig
from fam_jax.model import StreamState, from_dict
from fam_jax.training.loop import make_trainer
from fam_jax.training.optimizer import make_optimizer
from fam_jax.training.state import TrainState, init_state, model_structure
from tests.memories import toys
from tests.training.tiny import ROWS, TINY, TOKENS, assert_close, changed, compiled_step, some_batch

DATA = DataConfig(
    task="text", vocabulary="bytes", train_files=("x",), layout="continuous", sequence_length=TOKENS
)
CARRIES = changed(dataclasses.replace(TINY, data=DATA), train__carry="all", memory__previous_blocks=2)
STEPS = 4
# Rows begin together, then at different steps; the first never begins again, and another does at every step.
BEGINS = np.array(
    [[1] * ROWS, [0, 1, 0, 0, 1, 0, 1, 0], [0, 0, 1, 0, 1, 0, 0, 0], [0, 1, 0, 1, 1, 0, 0, 1]], bool
)
MEMORIES = {
    "fam": FamConfig(segments=1, length=2, previous_blocks=2),
    "window": BlockSlidingWindowConfig(segments=4),
    "in turn": toys.ReadWriteConfig(segments=1),
    "slots": AutoCompressorConfig(length=2, summaries=3, segments=1),
}


def batch_of(step: int) -> dict[str, np.ndarray]:
    return some_batch(step) | {"start": BEGINS[step]}


def begin(config: Config) -> TrainState:
    return jax.jit(lambda: init_state(config, make_optimizer(config.optimizer, config.train.steps), 0))()


def run(config: Config, steps: int = STEPS) -> tuple[TrainState, list[Any]]:
    state, found = begin(config), []
    for step in range(steps):
        state, metrics = compiled_step(config)(state, batch_of(step))
        found.append(jax.tree.map(float, metrics))
    return state, found


def without_window(state: StreamState) -> StreamState:
    layers = dataclasses.replace(
        state.layers, keys=jnp.zeros_like(state.layers.keys), values=jnp.zeros_like(state.layers.values)
    )
    position = dataclasses.replace(state.position, blocks=jnp.zeros_like(state.position.blocks))
    return dataclasses.replace(state, layers=layers, position=position)


def losses_of_documents(config: Config, params: Any) -> list[float]:
    """Return the loss of every step, from each row's document read alone, not by steps but at once.

    With carry=memory it is read step by step, with the window removed between the steps.
    """
    graphdef, abstract = model_structure(config)

    @jax.jit
    def cross_entropy(tokens: jax.Array, targets: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, from_dict(abstract, params))
        state, parts = model.init_state(1), []
        step = TOKENS if config.train.carry == "memory" else tokens.shape[1]
        for at in range(0, tokens.shape[1], step):
            # Not aligned, as generation reads.
            hidden, state = model.hidden(tokens[:, at : at + step], state)
            parts.append(model.logits(hidden))
            state = without_window(state)
        logs = jax.nn.log_softmax(jnp.concatenate(parts, axis=1))
        return -jnp.take_along_axis(logs, targets[..., None], -1)[0, :, 0]

    batches, sums = [batch_of(step) for step in range(STEPS)], np.zeros((2, STEPS))
    for row in range(ROWS):
        begins = [*np.flatnonzero(BEGINS[:, row]), STEPS]
        for first, end in itertools.pairwise(begins):
            tokens, targets, weights = (
                np.concatenate([batches[step][name][row] for step in range(first, end)])
                for name in ("inputs", "targets", "weights")
            )
            lost = np.asarray(cross_entropy(tokens[None], targets[None])) * weights
            sums[:, first:end] += [lost.reshape(-1, TOKENS).sum(1), weights.reshape(-1, TOKENS).sum(1)]
    return (sums[0] / sums[1]).tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("memory", "carry"),
    [
        ("fam", "all"),
        ("fam", "memory"),
        ("window", "all"),
        ("in turn", "all"),
        ("in turn", "memory"),
        ("slots", "all"),
        ("slots", "memory"),
    ],
)
def test_steps_have_the_losses_of_documents_read_alone(memory: str, carry: str) -> None:
    config = changed(
        CARRIES, model__memory=MEMORIES[memory], train__carry=carry, optimizer__learning_rate=0.0
    )
    state, found = run(config)
    expected = losses_of_documents(config, state.params)
    np.testing.assert_allclose([metrics["loss"] for metrics in found], expected, rtol=2e-5)
    assert [metrics["from_saved_state"] for metrics in found] == [(~begins).mean() for begins in BEGINS]
    # Documents read from the middle on have other losses.
    alone = changed(config, train__carry="none")
    assert max(abs(np.subtract(expected, [metrics["loss"] for metrics in run(alone)[1]]))[1:]) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("carry", ["all", "memory"])
def test_accumulation_and_meshes_change_nothing(carry: str) -> None:
    config = changed(CARRIES, train__carry=carry)
    whole, metrics = run(config, 3)
    parts, same = run(changed(config, train__accumulation=4), 3)
    assert_close(same, metrics, rtol=1e-4, atol=1e-5)
    assert_close(parts.carried, whole.carried, rtol=1e-4, atol=1e-5)
    assert_close(parts.params, whole.params, rtol=1e-4, atol=1e-5)

    mesh = changed(config, mesh__data=2, mesh__fsdp=2, mesh__tensor=2, train__accumulation=2)
    trainer = make_trainer(mesh)
    where = jax.tree.map(lambda leaf: leaf.sharding, trainer.state_shapes)
    state = jax.device_put(begin(config), where)
    for step in range(3):
        state, found = trainer.step(state, batch_of(step))
    assert_close(jax.tree.map(float, found), metrics[-1], rtol=1e-4, atol=1e-5)
    assert_close(state.carried, whole.carried, rtol=1e-4, atol=1e-5)
    for leaf in jax.tree.leaves(state.carried["layers"]):
        assert leaf.sharding.shard_shape(leaf.shape)[1] == ROWS // 4


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        (
            {"data": {"layout": "by_row"}},
            "config.train.carry: all needs rows that go on in the next batch; set data",
        ),
        (
            {"train": {"random_state_passing": 0.5}},
            "config.train.carry: all and random_state_passing 0.5 both choose",
        ),
        (
            {"train": {"carry": "memory"}, "model": {"memory": BlockSlidingWindowConfig()}},
            "config.train.carry: bswa has no state beyond its window to carry; use all",
        ),
    ],
)
def test_what_carry_does_not_go_with(groups: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        replace_groups(CARRIES, **groups)
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)
