"""Text and PassKey in turns: each stream's own batches in their order, drawn by seed and step, resumed exactly."""

import json
import pathlib
from typing import Any

import numpy as np
import pytest

from fam_jax.config import Config, ConfigError, UserError, resolve
from fam_jax.data.build import packed_stream
from fam_jax.data.curriculum import MIN_REPORTS, Batch, PasskeyStream
from fam_jax.data.mixture import MixedStream
from fam_jax.train.loop import train

ROW = 24


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(5):
        (folder / f"{number}.txt").write_text(f"text {number} " * (9 + number))
    return folder


def config_of(corpus: pathlib.Path, **data: Any) -> Config:
    values = {
        "task": "text+passkey", "vocabulary": "bytes", "train_files": (str(corpus),), "sequence_length": ROW,
        "stage_blocks": (2, 3), "digits": 1,
    }  # fmt: skip
    return resolve({"data": values | data, "model": {"block_size": 8}, "train": {"batch_size": 2}})


def parts(config: Config, shard: tuple[int, int] = (0, 1)) -> tuple[Any, PasskeyStream]:
    size, seed = config.train.batch_size, config.train.seed
    block = config.model.block_size
    passkey = PasskeyStream(config.data, block_size=block, batch_size=size, seed=seed, shard=shard)
    return packed_stream(config, shard), passkey


def make(corpus: pathlib.Path, seed: int = 0, shard: tuple[int, int] = (0, 1), **data: Any) -> MixedStream:
    config = config_of(corpus, **data)
    return MixedStream(
        *parts(config, shard),
        passkey_fraction=config.data.passkey_fraction,
        last_stage_fraction=config.data.last_stage_passkey_fraction,
        seed=seed,
    )


def is_passkey(batch: Batch) -> bool:
    return batch["inputs"].shape[1] != ROW


def assert_equal(one: list[Batch], other: list[Batch]) -> None:
    for left, right in zip(one, other, strict=True):
        assert left.keys() == right.keys()
        for name in left:
            np.testing.assert_array_equal(left[name], right[name])


def test_each_stream_goes_on_as_if_it_were_alone(corpus: pathlib.Path) -> None:
    stream = make(corpus)
    batches = [stream.next_batch() for _ in range(24)]
    text, passkey = parts(config_of(corpus))
    for name, alone, chosen in (
        ("passkey", passkey, [batch for batch in batches if is_passkey(batch)]),
        ("text", text, [batch for batch in batches if not is_passkey(batch)]),
    ):
        assert len(chosen) > 3, name
        assert_equal(chosen, [alone.next_batch() for _ in chosen])


@pytest.mark.parametrize(("fraction", "low", "high"), [(0.0, 0, 0), (1.0, 200, 200), (0.25, 30, 70)])
def test_the_fraction(
    corpus: pathlib.Path, fraction: float, low: int, high: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within four standard deviations of 50."""
    stream = make(corpus, passkey_fraction=fraction)
    for part in (stream.text, stream.passkey):
        monkeypatch.setattr(part, "next_batch", lambda part=part: part)
    count = sum(stream.next_batch() is stream.passkey for _ in range(200))
    assert low <= count <= high


def test_the_last_stage_may_have_a_fraction_of_its_own(corpus: pathlib.Path) -> None:
    stream = make(corpus, passkey_fraction=1.0, last_stage_passkey_fraction=0.25)
    while stream.passkey.advancing:  # of the earlier stage: all batches are PassKey's
        assert is_passkey(stream.next_batch())
        stream.report(1.0)
    kinds = [is_passkey(stream.next_batch()) for _ in range(200)]
    assert 30 <= sum(kinds) <= 70  # within about three standard deviations of 50


def test_the_order_depends_on_the_seed(corpus: pathlib.Path) -> None:
    orders = set()
    for seed in range(3):
        stream = make(corpus, seed)
        orders.add(tuple(is_passkey(stream.next_batch()) for _ in range(24)))
    assert len(orders) == 3


@pytest.mark.parametrize("stop", [0, 1, 5, 9])
def test_resumed_it_goes_on_with_the_batches_to_come(corpus: pathlib.Path, stop: int) -> None:
    whole = make(corpus)
    batches = []
    for step in range(14):
        if step == stop:
            state = json.loads(json.dumps(whole.state()))
        batches.append(whole.next_batch())
        whole.report(1.0)
    resumed = make(corpus)
    resumed.restore(state)
    for expected in batches[stop:]:
        assert_equal([resumed.next_batch()], [expected])
        resumed.report(1.0)


def test_processes_share_every_batch(corpus: pathlib.Path) -> None:
    whole, halves = make(corpus), [make(corpus, shard=(i, 2)) for i in range(2)]
    for _ in range(8):
        expected, found = whole.next_batch(), [half.next_batch() for half in halves]
        joined = {name: np.concatenate([half[name] for half in found]) for name in expected}
        assert_equal([joined], [expected])


def test_reports_of_text_do_not_advance_the_curriculum(corpus: pathlib.Path) -> None:
    stream = make(corpus)
    reported = 0
    while stream.passkey.stage == 0:
        passkey = is_passkey(stream.next_batch())
        assert stream.advancing == passkey
        stream.report(1.0)
        reported += passkey
        assert stream.metrics()["passkey_batch"] == passkey
    assert reported == MIN_REPORTS
    assert not stream.advancing  # no stage to come


def test_a_state_of_another_task_is_refused(corpus: pathlib.Path) -> None:
    stream = make(corpus)
    with pytest.raises(
        UserError, match=r"data state: expected the fields passkey, step, text; it is of another"
    ):
        stream.restore(stream.text.state())
    state = stream.state()
    state["passkey"]["stream"]["digits"] = 3
    with pytest.raises(UserError, match="data state: digits was 3 when it was saved and is 1 now"):
        stream.restore(state)


def test_mistakes_of_the_config(corpus: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match=r"train_files: the task text\+passkey needs files to train on"):
        config_of(corpus, train_files=())
    with pytest.raises(ConfigError, match="passkey_fraction: must be between 0 and 1, got 2"):
        config_of(corpus, passkey_fraction=2.0)
    with pytest.raises(ConfigError, match=r"passkey_fraction: belongs to the task text\+passkey"):
        config_of(corpus, task="text", stage_blocks=(2, 3, 4, 6, 9, 13, 18), digits=5, passkey_fraction=0.1)


@pytest.mark.slow
def test_training_on_both(corpus: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = config_of(corpus)
    values = {
        "data": {**vars(config.data)},
        "model": {"vocab_size": 264, "num_layers": 1, "model_dim": 8, "num_heads": 1, "num_kv_heads": 1,
                  "head_dim": 8, "ff_dim": 8, "block_size": 8, "fam_length": 2},
        "train": {"batch_size": 8, "steps": 8, "log_every": 1},
    }  # fmt: skip
    train(resolve(values), str(tmp_path / "run"), quiet=True)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {line["passkey_batch"] for line in lines} == {0.0, 1.0}
    assert all(line["stage_blocks"] == 2 and line["loss"] > 0 for line in lines)
