"""Packed batches: every token is used, and neither processes nor interruptions change them."""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from fam_jax.config import ConfigError, DataConfig, UserError
from fam_jax.data.interface import Batch, BatchSpec, Example
from fam_jax.data.packing import PackedBatches
from fam_jax.data.rows import REPEAT_PROMPT
from fam_jax.data.vocabulary import load_vocabulary

VOCABULARY = load_vocabulary("bytes")
EOS = VOCABULARY.eos_id
DATA = DataConfig(task="text", sequence_length=16, shuffle_batches=3)
# Of the examples.
LENGTHS = (1, 40, 7, 16, 3, 100, 22, 5)


@dataclasses.dataclass
class Made:
    """A source whose tokens are all different: 1000 * (number of the example + 1) + position, then EOS."""

    lengths: tuple[int, ...] = LENGTHS
    begun: list[tuple[int, int]] = dataclasses.field(default_factory=list)

    vocabulary = VOCABULARY
    fingerprint = "made"

    def ids(self, index: int) -> np.ndarray:
        return np.array([*(1000 * (index + 1) + np.arange(self.lengths[index] - 1)), EOS], np.int32)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Example]:
        self.begun.append((epoch, first))
        order = np.roll(np.arange(len(self.lengths)), epoch)
        for index in order[first:]:
            ids = self.ids(index)
            yield Example(ids, (ids % 3 / 2).astype(np.float32), 0)


def make(data: DataConfig = DATA, source: Any = None, **options: Any) -> PackedBatches:
    return PackedBatches(
        data, source or Made(), BatchSpec(**{"block_size": 4, "batch_size": 4, "seed": 0, **options})
    )


def batches(packed: PackedBatches, count: int) -> list[Batch]:
    return [packed.next() for _ in range(count)]


def assert_equal(one: list[Batch], other: list[Batch]) -> None:
    for left, right in zip(one, other, strict=True):
        assert left.keys() == right.keys()
        for name in left:
            np.testing.assert_array_equal(left[name], right[name])


def tokens_of(epochs: int) -> tuple[np.ndarray, np.ndarray]:
    """Return all inputs and targets of some epochs, in order."""
    ids = [example.ids for epoch in range(epochs) for example in Made().epoch(epoch)]
    return np.concatenate([np.append(EOS, each[:-1]) for each in ids]), np.concatenate(ids)


def test_every_token_occurs_once_per_epoch_in_shuffled_rows() -> None:
    inputs, targets = tokens_of(12)
    group = 3 * 4 * 16
    for number in range(5):
        packed = make()
        packed.restore({**packed.state(), "step": 0})
        found = batches(packed, 3 * (number + 1))[-3:]
        rows = [(tuple(i), tuple(t)) for b in found for i, t in zip(b["inputs"], b["targets"], strict=True)]
        part = slice(number * group, (number + 1) * group)
        expected = zip(inputs[part].reshape(-1, 16), targets[part].reshape(-1, 16), strict=True)
        expected = [(tuple(i), tuple(t)) for i, t in expected]
        assert sorted(rows) == sorted(expected)
        assert rows != expected


def test_types_weights_and_document_ends() -> None:
    batch = make().next()
    types = {"inputs": np.int32, "targets": np.int32, "weights": np.float32, "answer": np.bool_}
    start = batch.pop("start")
    assert start.dtype == np.bool_ and start.tolist() == [True] * 4
    assert {name: array.dtype for name, array in batch.items()} == types
    assert all(array.shape == (4, 16) for array in batch.values())
    np.testing.assert_array_equal(batch["weights"], (batch["targets"] % 3 / 2).astype(np.float32))
    np.testing.assert_array_equal(batch["answer"], batch["weights"] > 0)
    after_end = batch["inputs"][:, 1:][batch["targets"][:, :-1] == EOS]
    assert len(after_end) and (after_end == EOS).all()


def test_batches_resume_at_any_step() -> None:
    """Also before the first batch, within a group and at its end."""
    packed, states = make(), []
    expected = []
    for _ in range(11):
        states.append(json.loads(json.dumps(packed.state())))
        expected.append(packed.next())
    for step in range(11):
        resumed = make()
        resumed.restore(states[step])
        assert resumed.state() == states[step]
        assert_equal(batches(resumed, 11 - step), expected[step:])


def test_resuming_does_not_read_from_the_start() -> None:
    packed = make()
    batches(packed, 10)
    source = Made()
    resumed = make(source=source)
    resumed.restore(packed.state())
    resumed.next()
    # 9 batches of 64 tokens are two epochs of 194 tokens, and 188 more.
    assert source.begun[0] == (2, 7)


def test_batches_do_not_depend_on_the_number_of_processes() -> None:
    whole = make()
    expected = batches(whole, 8)
    for count in (2, 4):
        shards = [make(shard=(index, count)) for index in range(count)]
        found = [batches(shard, 8) for shard in shards]
        joined = [
            {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            for parts in zip(*found, strict=True)
        ]
        assert_equal(joined, expected)
        assert all(shard.state() == whole.state() for shard in shards)
        halves = [make(shard=(index, 2)) for index in range(2)]
        for half in halves:
            half.restore(shards[0].state())
        rows = np.concatenate([half.next()["targets"] for half in halves])
        np.testing.assert_array_equal(rows, batches(make(), 9)[-1]["targets"])


def test_the_seed_changes_the_order() -> None:
    assert (make(seed=0).next()["inputs"] != make(seed=1).next()["inputs"]).any()


def test_the_end_of_a_row_repeats_a_segment() -> None:
    prompt = VOCABULARY.encode(REPEAT_PROMPT)
    data = dataclasses.replace(
        DATA, sequence_length=20 + len(prompt) + 8, repeat_segment=8, repeat_weight=0.25
    )
    repeating, plain = make(data), make(dataclasses.replace(DATA, sequence_length=20))
    begins = []
    for batch, without in zip(batches(repeating, 7), batches(plain, 7), strict=True):
        for row in range(4):
            names = ("inputs", "targets", "weights", "answer")
            inputs, targets, weights, answer = (batch[name][row] for name in names)
            for name in names:
                np.testing.assert_array_equal(batch[name][row, :20], without[name][row])
            np.testing.assert_array_equal(inputs[21:], targets[20:-1])
            assert inputs[20] == targets[19]
            np.testing.assert_array_equal(targets[20:-8], prompt)
            windows = np.lib.stride_tricks.sliding_window_view(targets[:20], 8)
            [begin] = np.flatnonzero((windows == targets[-8:]).all(axis=1))
            begins.append(begin)
            assert (weights[20:-8] == 0).all() and (weights[-8:] == 0.25).all() and not answer[20:].any()
    # With this seed, the 28 draws include every possible place.
    assert set(begins) == set(range(13))


def test_segments_do_not_depend_on_processes_or_interruptions() -> None:
    data = dataclasses.replace(DATA, sequence_length=60, repeat_segment=8)
    expected = batches(make(data), 5)
    shards = [make(data, shard=(index, 2)) for index in range(2)]
    found = [batches(shard, 5) for shard in shards]
    np.testing.assert_array_equal(
        np.concatenate([part[4]["targets"] for part in found]), expected[4]["targets"]
    )
    resumed = make(data)
    packed = make(data)
    batches(packed, 4)
    resumed.restore(packed.state())
    assert_equal(batches(resumed, 1), expected[4:])


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_a_window_of_blocks_does_not_see_the_segment(blocks: int) -> None:
    """The segments are drawn from everywhere before the blocks, and from nowhere else."""
    size, prompt = 8, len(VOCABULARY.encode(REPEAT_PROMPT))
    body = 43
    data = dataclasses.replace(
        DATA, sequence_length=body + prompt + 4, repeat_segment=4, repeat_before_blocks=blocks
    )
    begins, source = set(), Made(lengths=(900,) * 8)
    packed = make(data, source, block_size=size)
    plain = make(dataclasses.replace(DATA, sequence_length=body), source)
    for batch, without in zip(batches(packed, 40), batches(plain, 40), strict=True):
        np.testing.assert_array_equal(batch["targets"][:, :body], without["targets"])
        for row in batch["targets"]:
            windows = np.lib.stride_tricks.sliding_window_view(row[:body], 4)
            [begin] = np.flatnonzero((windows == row[-4:]).all(axis=1))
            begins.add(int(begin))
    first_seen = (body // size - blocks) * size
    # With this seed, the draws include the first and the last place.
    assert (min(begins), max(begins)) == (0, first_seen - 4) and len(begins) > 0.9 * (first_seen - 4)
    state = packed.state()
    assert state["stream"]["repeat_before_blocks"] == blocks
    make(data, block_size=size).restore(state)
    with pytest.raises(UserError, match="repeat_before_blocks was"):
        make(dataclasses.replace(data, repeat_before_blocks=blocks + 1), block_size=size).restore(state)


def test_a_row_too_short_for_segments_before_blocks_is_rejected() -> None:
    data = dataclasses.replace(DATA, sequence_length=80, repeat_segment=8, repeat_before_blocks=4)
    with pytest.raises(
        ConfigError, match=r"^config\.data\.repeat_before_blocks: a row has \d+ tokens before the last 4"
    ):
        make(data, block_size=16)


def test_a_row_too_short_for_its_segment_is_rejected() -> None:
    prompt = len(VOCABULARY.encode(REPEAT_PROMPT))
    make(dataclasses.replace(DATA, sequence_length=prompt + 16, repeat_segment=8))
    with pytest.raises(ConfigError, match=r"^config\.data\.repeat_segment: 8 tokens and their prompt of"):
        make(dataclasses.replace(DATA, sequence_length=prompt + 15, repeat_segment=8))


def test_states_of_other_data_or_versions_are_rejected() -> None:
    state = make().state()
    with pytest.raises(UserError, match="seed was 0 when it was saved and is 5 now"):
        make(seed=5).restore(state)
    source = Made()
    source.fingerprint = "others"  # type: ignore[misc]
    with pytest.raises(UserError, match="contents was made when it was saved and is others now"):
        make(source=source).restore(state)
    with pytest.raises(UserError, match="of another task or version"):
        make().restore({"stream": {}, "step": 3})
    with pytest.raises(UserError, match="batch_size: 4 is not divisible by the 3 processes"):
        make(shard=(0, 3))


def test_a_source_without_tokens_is_rejected() -> None:
    class Nothing(Made):
        def epoch(self, epoch: int, first: int = 0) -> Iterator[Example]:
            return iter(())

    with pytest.raises(UserError, match="there are no tokens in made"):
        make(source=Nothing()).next()


def test_an_error_in_the_reading_thread_reaches_the_caller() -> None:
    class Broken(Made):
        def epoch(self, epoch: int, first: int = 0) -> Iterator[Example]:
            yield from itertools.islice(super().epoch(epoch, first), 2)
            raise UserError("a damaged file")

    with pytest.raises(UserError, match="a damaged file"):
        make(source=Broken()).next()


def test_the_row_length_need_not_be_a_multiple_of_the_block_size() -> None:
    """Rows of the paper have 8.5k tokens, eight and a half blocks."""
    batch = make(dataclasses.replace(DATA, sequence_length=21)).next()
    assert batch["inputs"].shape == (4, 21)
