"""Mixtures of sources: rates, places that depend on nothing but the number, and each part's own order."""

import collections
import itertools
from collections.abc import Iterable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fam_jax.config import DataConfig
from fam_jax.data.interface import BatchSpec, Example
from fam_jax.data.packing import PackedBatches
from fam_jax.data.randomness import random_key
from fam_jax.data.source_mixture import BLOCK, SourceMixture
from fam_jax.data.vocabulary import load_vocabulary


class Numbered:
    """Examples with two ids: the part, and the number in the part."""

    vocabulary = load_vocabulary("bytes")

    def __init__(self, part: int, size: int):
        self.part, self.size, self.fingerprint = part, size, f"part {part} of {size}"

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Example:
        assert 0 <= index < self.size
        return Example(np.array([3 + self.part, 3 + index], np.int32), np.ones(2, np.float32), 0)

    def read(self, indices: Iterable[int]) -> Iterator[Example]:
        return map(self.__getitem__, indices)


def mixture(sizes: list[int], rates: list[float], seed: int = 0) -> SourceMixture:
    return SourceMixture([Numbered(part, size) for part, size in enumerate(sizes)], rates, seed)


def numbers(examples: Iterable[Example]) -> list[tuple[int, int]]:
    return [(int(ids[0]) - 3, int(ids[1]) - 3) for ids, _, _ in examples]


@settings(max_examples=20, deadline=None)
@given(
    parts=st.lists(st.tuples(st.integers(1, 200), st.floats(0.05, 9)), min_size=1, max_size=4),
    seed=st.integers(0, 5),
    first=st.integers(0, 3 * BLOCK),
)
def test_any_place_can_be_read_alone(parts: list[tuple[int, float]], seed: int, first: int) -> None:
    """Against a version that draws one word after another."""
    sizes, rates = [size for size, _ in parts], [rate for _, rate in parts]
    made = mixture(sizes, rates, seed)
    words = np.random.Philox(key=random_key("source mixture", seed)).random_raw(first + 40)
    counts: collections.Counter[int] = collections.Counter()
    expected = []
    for word in words.tolist():
        part = next(
            (i for i in range(len(rates)) if word / 2**64 < sum(rates[: i + 1]) / sum(rates)), len(rates) - 1
        )
        expected.append((part, counts[part]))
        counts[part] += 1
    assert [tuple(made.place(n)) for n in range(first, first + 40)] == expected[first:]
    epoch, place = divmod(first, len(made))
    found = numbers(itertools.islice(made.epoch(epoch, place), 40))
    assert found == numbers(made.read(range(first, first + len(found))))
    assert [part for part, _ in found] == [part for part, _ in expected[first : first + len(found)]]


def test_rates_and_epochs_of_the_parts() -> None:
    made = mixture([10, 30, 5], [0.5, 0.3, 0.2])
    assert len(made) == 100  # 30 examples at a rate of 0.3
    found = numbers(itertools.islice(itertools.chain.from_iterable(map(made.epoch, itertools.count())), 6000))
    for part, (size, rate) in enumerate([(10, 0.5), (30, 0.3), (5, 0.2)]):
        own = [index for which, index in found if which == part]
        # Five standard deviations.
        assert abs(len(own) / 6000 - rate) < 5 * (rate * (1 - rate) / 6000) ** 0.5
        epochs = [own[i : i + size] for i in range(0, len(own) - size + 1, size)]
        assert all(sorted(epoch) == [*range(size)] for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 10


def test_the_fingerprint_changes_with_rates_and_parts() -> None:
    prints = [
        mixture(sizes, rates).fingerprint
        for sizes, rates in [([3, 4], [1, 2]), ([4, 3], [1, 2]), ([3, 4], [2, 1]), ([3, 4, 4], [1, 2, 2])]
    ]
    assert len({*prints}) == 4


@pytest.mark.parametrize("step", [1, 2, 7, 13])
def test_batches_resume_at_any_step_on_any_number_of_processes(step: int) -> None:
    data = DataConfig(task="seqio:x", sequence_length=16, shuffle_batches=2)

    def make(shard: tuple[int, int] = (0, 1)) -> PackedBatches:
        source = mixture([7, 50, 3], [0.4, 0.4, 0.2])
        return PackedBatches(data, source, BatchSpec(block_size=8, batch_size=4, seed=0, shard=shard))

    whole = make()
    for _ in range(step):
        whole.next()
    shards = [make((index, 2)) for index in range(2)]
    for shard in shards:
        shard.restore(whole.state())
    for _ in range(4):
        rows = np.concatenate([shard.next()["targets"] for shard in shards])
        np.testing.assert_array_equal(rows, whole.next()["targets"])
