"""Batches of text and of PassKey in turns: each part's own batches in order, chosen by seed and step."""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

import numpy as np
import pytest

from fam_jax.config import Config, ConfigError, ModelConfig, TrainConfig, UserError, resolve
from fam_jax.data.build import PasskeyTask, TextTask, find_task, make_batches
from fam_jax.data.curriculum import MIN_REPORTS
from fam_jax.data.interface import Batch, Batches, BatchSpec
from fam_jax.memories.fam import FamConfig
from fam_jax.training.loop import train

ROW = 24


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(5):
        (folder / f"{number}.txt").write_text(f"text {number} " * (9 + number))
    return folder


def config_of(corpus: pathlib.Path, **data: Any) -> Config:
    values = {
        "task": "text+passkey",
        "vocabulary": "bytes",
        "train_files": (str(corpus),),
        "sequence_length": ROW,
        "stage_blocks": (2, 3),
        "digits": 1,
    }
    return resolve({"data": values | data, "model": {"block_size": 8}, "train": {"batch_size": 2}})


def make(corpus: pathlib.Path, seed: int = 0, shard: tuple[int, int] = (0, 1), **data: Any) -> Any:
    config = config_of(corpus, **data)
    return make_batches(config.data, BatchSpec(8, 2, seed, shard))


def is_passkey(batch: Batch) -> bool:
    return batch["inputs"].shape[1] != ROW


def assert_equal(one: list[Batch], other: list[Batch]) -> None:
    for left, right in zip(one, other, strict=True):
        assert left.keys() == right.keys()
        for name in left:
            np.testing.assert_array_equal(left[name], right[name])


def test_each_part_returns_the_batches_that_it_returns_alone(corpus: pathlib.Path) -> None:
    mixed = make(corpus)
    batches = [mixed.next() for _ in range(24)]
    data = config_of(corpus).data
    spec = BatchSpec(block_size=8, batch_size=2, seed=0)
    for task, expected in ((PasskeyTask(data), True), (TextTask(data), False)):
        alone: Batches = task.batches(spec)
        chosen = [batch for batch in batches if is_passkey(batch) == expected]
        assert len(chosen) > 3
        assert_equal(chosen, [alone.next() for _ in chosen])


def test_the_longest_row_is_known_before_and_after(corpus: pathlib.Path) -> None:
    task = find_task(config_of(corpus).data)
    mixed = make(corpus)
    lengths = {mixed.next()["inputs"].shape[1] for _ in range(24)}
    assert max(lengths) < task.longest_row(8) == mixed.longest_row == mixed.parts["passkey"].stage_tokens[1]


@pytest.mark.parametrize(("fraction", "low", "high"), [(0.0, 0, 0), (1.0, 200, 200), (0.25, 30, 70)])
def test_the_fraction(
    corpus: pathlib.Path, fraction: float, low: int, high: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """50 +- 20 is within four standard deviations."""
    mixed = make(corpus, passkey_fraction=fraction)
    for part in mixed.parts.values():
        monkeypatch.setattr(part, "next", lambda part=part: part)
    count = sum(mixed.next() is mixed.parts["passkey"] for _ in range(200))
    assert low <= count <= high


def test_the_last_stage_can_have_its_own_fraction(corpus: pathlib.Path) -> None:
    mixed = make(corpus, passkey_fraction=1.0, last_stage_passkey_fraction=0.25)
    # In the earlier stage, all batches are PassKey's.
    while not mixed.parts["passkey"].on_last_stage:
        assert is_passkey(mixed.next())
        mixed.observe({"exact_match": 1.0})
    kinds = [is_passkey(mixed.next()) for _ in range(200)]
    # Within about three standard deviations of 50.
    assert 30 <= sum(kinds) <= 70


def test_the_order_depends_on_the_seed(corpus: pathlib.Path) -> None:
    orders = set()
    for seed in range(3):
        mixed = make(corpus, seed)
        orders.add(tuple(is_passkey(mixed.next()) for _ in range(24)))
    assert len(orders) == 3


@pytest.mark.parametrize("stop", [0, 1, 5, 9])
def test_a_resumed_mixture_continues_with_the_same_batches(corpus: pathlib.Path, stop: int) -> None:
    whole = make(corpus)
    batches = []
    for step in range(14):
        if step == stop:
            state = json.loads(json.dumps(whole.state()))
        batches.append(whole.next())
        whole.observe({"exact_match": 1.0})
    resumed = make(corpus)
    resumed.restore(state)
    for expected in batches[stop:]:
        assert_equal([resumed.next()], [expected])
        resumed.observe({"exact_match": 1.0})


def test_a_state_of_version_0_1_continues_with_its_batches(corpus: pathlib.Path) -> None:
    """State and hash of the next 8 batches were recorded with that version."""
    state = {
        "step": 30,
        "text": {
            "stream": {
                "seed": 0,
                "batch_size": 2,
                "sequence_length": 24,
                "shuffle_batches": 8,
                "repeat_segment": 0,
                "contents": "c792e0e86d5276f7",
            },
            "step": 15,
            "group": {"epoch": 0, "example": 4, "token": 86},
        },
        "passkey": {
            "stream": {
                "seed": 0,
                "block_size": 8,
                "digits": 1,
                "min_filler_blocks": 1,
                "filler_step": 1,
                "stage_blocks": [2, 3],
            },
            "step": 15,
            "stage": 1,
            "stage_steps": 5,
            "examples": [26, 4],
            "reports": 0,
            "matched": 0.0,
            "weight": 0.0,
        },
    }
    mixed = make(corpus)
    mixed.restore(state)
    assert mixed.state() == state
    found = hashlib.sha256()
    for batch in (mixed.next() for _ in range(8)):
        for name in ("inputs", "targets", "weights", "answer"):
            found.update(batch[name].tobytes())
    assert found.hexdigest() == "a6d8b34b24c1f6662e65462aab6530f35207936286a893c110083e43b2519569"


def test_processes_together_make_every_batch(corpus: pathlib.Path) -> None:
    whole, halves = make(corpus), [make(corpus, shard=(i, 2)) for i in range(2)]
    for _ in range(8):
        expected, found = whole.next(), [half.next() for half in halves]
        joined = {name: np.concatenate([half[name] for half in found]) for name in expected}
        assert_equal([joined], [expected])


def test_metrics_of_text_do_not_advance_the_curriculum(corpus: pathlib.Path) -> None:
    mixed = make(corpus)
    observed = 0
    while mixed.parts["passkey"].stage == 0:
        passkey = is_passkey(mixed.next())
        assert mixed.needs_metrics == passkey
        name = "passkey" if passkey else "text"
        scores = mixed.name_scores({"exact_match": 1.0, "answer_accuracy": 1.0})
        assert mixed.describe({**scores, **mixed.metrics()}).startswith(f"{name}  ")
        mixed.observe({"exact_match": 1.0})
        observed += passkey
        assert mixed.metrics()["passkey_batch"] == passkey
    assert observed == MIN_REPORTS
    # No stage follows.
    assert not mixed.needs_metrics


def test_a_state_of_another_task_is_rejected(corpus: pathlib.Path) -> None:
    mixed = make(corpus)
    with pytest.raises(
        UserError, match=r"data state: must have the fields passkey, step, text, so it is of another"
    ):
        mixed.restore(mixed.parts["text"].state())
    state = mixed.state()
    state["passkey"]["stream"]["digits"] = 3
    with pytest.raises(UserError, match="data state: digits was 3 when it was saved and is 1 now"):
        mixed.restore(state)


def test_mistakes_in_the_config(corpus: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match=r"train_files: the task text\+passkey needs files to train on"):
        config_of(corpus, train_files=())
    with pytest.raises(ConfigError, match="passkey_fraction: must be between 0 and 1, got 2"):
        config_of(corpus, passkey_fraction=2.0)
    with pytest.raises(ConfigError, match=r"passkey_fraction: belongs to the task text\+passkey"):
        config_of(corpus, task="text", stage_blocks=(2, 3, 4, 6, 9, 13, 18), digits=5, passkey_fraction=0.1)


@pytest.mark.slow
def test_training_on_both(corpus: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = config_of(corpus)
    sizes = {"num_layers": 1, "model_dim": 8, "num_heads": 1, "num_kv_heads": 1, "head_dim": 8, "ff_dim": 8}
    model = ModelConfig(vocab_size=264, block_size=8, memory=FamConfig(length=2), **sizes)
    config = dataclasses.replace(config, model=model, train=TrainConfig(batch_size=8, steps=8, log_every=1))
    train(config, str(tmp_path / "run"), quiet=True)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {line["passkey_batch"] for line in lines} == {0.0, 1.0}
    assert all(line["stage_blocks"] == 2 and line["loss"] > 0 for line in lines)
