"""The benchmark of rows that go on: its trainings, and differences of evaluations."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from benchmarks.continuous import ARMS, QUICK, difference
from fam_jax.config.overrides import Override
from launch.config_file import load_config


def test_trainings_of_a_seed_differ_in_what_rows_go_on_with_only() -> None:
    found = {}
    for arm, (memory, own) in ARMS.items():
        flags = QUICK.flags(Path("books"), 5, arm)
        name, *changes = (flag.removeprefix("--") for flag in flags)
        assert name == f"config=configs/text.py:{memory}"
        config = load_config(
            name.removeprefix("config="), [Override(*change.split("=", 1)) for change in changes]
        )
        found[arm] = dataclasses.asdict(config)
        assert config.train.seed == 5 and config.data.layout == "continuous"
        assert {"train.carry": config.train.carry, "train.random_state_passing": config.train.random_state_passing} == {
            "train.carry": "none", "train.random_state_passing": 0.0
        } | own  # fmt: skip
    plain = found["fam"]
    for arm in ("fam, random states", "fam, all"):
        assert found[arm] | {"train": plain["train"]} == plain


def test_differences_are_per_token_and_by_document() -> None:
    own = {"by_document": [{"tokens": [4, 2], "nats": [8.0, 3.0]}, {"tokens": [4], "nats": [6.0]}]}
    plain = {"by_document": [{"tokens": [4, 2], "nats": [6.0, 4.0]}, {"tokens": [4], "nats": [6.0]}]}
    assert difference(own, plain, 0)["mean"] == pytest.approx(2 / 8)
    assert difference(own, plain, 1)["mean"] == pytest.approx(-1 / 2)
    assert difference(own, plain, None)["mean"] == pytest.approx(1 / 10)
    low, high = difference(own, plain, None)["low"], difference(own, plain, None)["high"]
    assert low is not None and high is not None and np.isclose(low + high, 0.2) and low < 0 < high
    other = {"by_document": [{"tokens": [5], "nats": [1.0]}, {"tokens": [4], "nats": [6.0]}]}
    with pytest.raises(ValueError, match="not of the same documents"):
        difference(own, other, None)
