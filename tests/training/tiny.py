"""A training problem small enough to compile its step many times, and ways to run it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from fam_jax.config import Config, ModelConfig, OptimizerConfig, TrainConfig
from fam_jax.config import changed as replace_fields
from fam_jax.memories.fam import FamConfig
from fam_jax.training.optimizer import make_optimizer
from fam_jax.training.state import TrainState, init_state
from fam_jax.training.step import make_train_step

ROWS, TOKENS = 8, 12

TINY = Config(
    model=ModelConfig(
        vocab_size=12,
        num_layers=2,
        model_dim=8,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        ff_dim=16,
        block_size=4,
        memory=FamConfig(segments=1, length=2),
    ),
    optimizer=OptimizerConfig(learning_rate=0.03, beta2=0.9, min_factored_dim=8),
    train=TrainConfig(steps=60, batch_size=ROWS, loss_chunk=32),
)


def changed(config: Config = TINY, **values: Any) -> Config:
    """Return `config` with fields such as train__seed or memory__length set."""
    groups: dict[str, dict[str, Any]] = {}
    for field, value in values.items():
        group, name = field.split("__")
        groups.setdefault(group, {})[name] = value
    if memory := groups.pop("memory", None):
        groups.setdefault("model", {})["memory"] = dataclasses.replace(config.model.memory, **memory)
    return replace_fields(config, **groups)


def some_batch(seed: int = 0) -> dict[str, np.ndarray]:
    """Return random tokens in rows of different lengths, with an answer at the end of each."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, TINY.model.vocab_size, (ROWS, TOKENS + 1)).astype(np.int32)
    lengths = rng.integers(TOKENS - 3, TOKENS + 1, (ROWS, 1))
    index = np.arange(TOKENS)
    answer = (index < lengths) & (index >= lengths - 2)
    weights = np.where(answer, 1.0, np.where(index < lengths, 0.3, 0.0)).astype(np.float32)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights, "answer": answer}


@functools.cache
def compiled_step(config: Config) -> Callable[..., Any]:
    return jax.jit(
        make_train_step(config, make_optimizer(config.optimizer, config.train.steps)), donate_argnums=0
    )


@functools.cache
def _compiled_start(config: Config) -> Callable[[int], TrainState]:
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    return jax.jit(lambda seed: init_state(config, optimizer, seed))


def start(config: Config, seed: int = 0) -> TrainState:
    """Return the state before the first step, compiled once for all configs with the same model, optimizer and lora."""
    return _compiled_start(
        dataclasses.replace(TINY, model=config.model, optimizer=config.optimizer, lora=config.lora)
    )(seed)


def run(config: Config, steps: int, state: TrainState | None = None) -> tuple[Any, list[Any]]:
    """Take steps on `some_batch(0)`, `some_batch(1)`, ...; return the state and the metrics of each step."""
    state = start(config) if state is None else state
    found = []
    for step in range(steps):
        state, metrics = compiled_step(config)(state, some_batch(step))
        found.append(jax.tree.map(float, metrics))
    return state, found


def assert_close(found: Any, expected: Any, **tolerance: float) -> None:
    """Compare two trees of arrays leaf by leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(expected)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, (path, other) in zip(jax.tree.leaves(found), leaves, strict=True):
        np.testing.assert_allclose(one, other, err_msg=jax.tree_util.keystr(path), **tolerance)
