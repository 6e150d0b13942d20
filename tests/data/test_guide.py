"""The code of docs/data.md, as it stands there."""

import itertools
import pathlib
import re
from typing import Any

import numpy as np
import pytest

from fam_jax.config import DataConfig
from fam_jax.data.build import TASKS, find_task
from fam_jax.data.interface import BatchSpec


def test_the_source_of_the_guide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its examples are sums, any place of an epoch can be read alone, and batches of the task resume."""
    guide = (pathlib.Path(__file__).parents[2] / "docs" / "data.md").read_text()
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", guide, re.DOTALL):
        exec(code, names)
    source = names["Sums"](seed=0)
    examples = list(itertools.islice(source.epoch(0), 20))
    for ids, weights, _ in examples:
        left, right = source.vocabulary.decode(ids.tolist()).split("=")
        assert sum(map(int, left.split("+"))) == int(right)
        np.testing.assert_array_equal(weights, [0] * (len(left) + 1) + [1] * (len(right) + 1))
    np.testing.assert_array_equal(next(source.epoch(0, 7)).ids, examples[7].ids)
    assert names["batch"]["targets"].shape == (4, 64)

    monkeypatch.setitem(TASKS, "sums", names["SumsTask"])
    task = find_task(DataConfig(task="sums", sequence_length=64))
    batches, resumed = (task.batches(BatchSpec(block_size=32, batch_size=4, seed=0)) for _ in range(2))
    batches.next()
    resumed.restore(batches.state())
    np.testing.assert_array_equal(resumed.next()["targets"], batches.next()["targets"])
