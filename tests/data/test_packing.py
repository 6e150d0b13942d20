"""Packed batches: nothing is left out, and they depend on the config alone, not on processes or interruptions."""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fam_jax.data.examples import Example

from fam_jax.config import ConfigError, DataConfig, UserError
from fam_jax.data.packing import REPEAT_PROMPT, Batch, PackedStream
from fam_jax.data.vocabulary import load_vocabulary

VOCABULARY = load_vocabulary("bytes")
EOS = VOCABULARY.eos_id
DATA = DataConfig(task="text", sequence_length=16, shuffle_batches=3)
LENGTHS = (1, 40, 7, 16, 3, 100, 22, 5)  # of examples, none of them alike


@dataclasses.dataclass
class Made:
    """Examples whose every token can be told from all others: 100 * (number of the example) + place."""

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


def make(data: DataConfig = DATA, examples: Any = None, **options: Any) -> PackedStream:
    return PackedStream(data, examples or Made(), **{"batch_size": 4, "seed": 0, **options})


def batches(stream: PackedStream, count: int) -> list[Batch]:
    return [stream.next_batch() for _ in range(count)]


def assert_equal(one: list[Batch], other: list[Batch]) -> None:
    for left, right in zip(one, other, strict=True):
        assert left.keys() == right.keys()
        for name in left:
            np.testing.assert_array_equal(left[name], right[name])


def stream_of(epochs: int) -> tuple[np.ndarray, np.ndarray]:
    """All inputs and targets of some epochs, one after the other."""
    ids = [example.ids for epoch in range(epochs) for example in Made().epoch(epoch)]
    return np.concatenate([np.append(EOS, each[:-1]) for each in ids]), np.concatenate(ids)


def test_every_token_comes_exactly_once_an_epoch_in_rows_that_join() -> None:
    inputs, targets = stream_of(12)
    group = 3 * 4 * 16
    for number in range(5):
        stream = make()
        stream.restore({**stream.state(), "step": 0})
        found = batches(stream, 3 * (number + 1))[-3:]
        rows = [(tuple(i), tuple(t)) for b in found for i, t in zip(b["inputs"], b["targets"], strict=True)]
        part = slice(number * group, (number + 1) * group)
        expected = zip(inputs[part].reshape(-1, 16), targets[part].reshape(-1, 16), strict=True)
        expected = [(tuple(i), tuple(t)) for i, t in expected]
        assert sorted(rows) == sorted(expected)
        assert rows != expected, "they are shuffled"


def test_types_weights_and_ends() -> None:
    batch = make().next_batch()
    types = {"inputs": np.int32, "targets": np.int32, "weights": np.float32, "answer": np.bool_}
    assert {name: array.dtype for name, array in batch.items()} == types
    assert all(array.shape == (4, 16) for array in batch.values())
    np.testing.assert_array_equal(batch["weights"], (batch["targets"] % 3 / 2).astype(np.float32))
    np.testing.assert_array_equal(batch["answer"], batch["weights"] > 0)
    after_end = batch["inputs"][:, 1:][batch["targets"][:, :-1] == EOS]
    assert len(after_end) and (after_end == EOS).all()


def test_a_stream_resumes_at_any_step() -> None:
    """From a state as JSON, in the middle of a group, at its border, and before the first batch."""
    stream, states = make(), []
    expected = []
    for _ in range(11):
        states.append(json.loads(json.dumps(stream.state())))
        expected.append(stream.next_batch())
    for step in range(11):
        resumed = make()
        resumed.restore(states[step])
        assert resumed.state() == states[step]
        assert_equal(batches(resumed, 11 - step), expected[step:])


def test_a_resumed_stream_does_not_read_from_the_start() -> None:
    stream = make()
    batches(stream, 10)
    examples = Made()
    resumed = make(examples=examples)
    resumed.restore(stream.state())
    resumed.next_batch()
    assert examples.begun[0] == (2, 7)  # 9 batches of 64 tokens are two epochs of 194, and 188 more


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
        rows = np.concatenate([half.next_batch()["targets"] for half in halves])
        np.testing.assert_array_equal(rows, batches(make(), 9)[-1]["targets"])


def test_seeds_shuffle_differently() -> None:
    assert (make(seed=0).next_batch()["inputs"] != make(seed=1).next_batch()["inputs"]).any()


def test_the_end_of_a_row_repeats_a_segment_of_it() -> None:
    prompt = VOCABULARY.encode(REPEAT_PROMPT)
    data = dataclasses.replace(
        DATA, sequence_length=20 + len(prompt) + 8, repeat_segment=8, repeat_weight=0.25
    )
    stream, plain = make(data), make(dataclasses.replace(DATA, sequence_length=20))
    begins = []
    for batch, without in zip(batches(stream, 7), batches(plain, 7), strict=True):
        for row in range(4):
            inputs, targets, weights, answer = (batch[name][row] for name in batch)
            for name in batch:
                np.testing.assert_array_equal(batch[name][row, :20], without[name][row])
            np.testing.assert_array_equal(inputs[21:], targets[20:-1])
            assert inputs[20] == targets[19]
            np.testing.assert_array_equal(targets[20:-8], prompt)
            windows = np.lib.stride_tricks.sliding_window_view(targets[:20], 8)
            [begin] = np.flatnonzero((windows == targets[-8:]).all(axis=1))
            begins.append(begin)
            assert (weights[20:-8] == 0).all() and (weights[-8:] == 0.25).all() and not answer[20:].any()
    assert set(begins) == set(range(13)), "every place of 28 draws among 13; the seed is fixed"


def test_segments_do_not_depend_on_processes_or_interruptions() -> None:
    data = dataclasses.replace(DATA, sequence_length=60, repeat_segment=8)
    expected = batches(make(data), 5)
    shards = [make(data, shard=(index, 2)) for index in range(2)]
    found = [batches(shard, 5) for shard in shards]
    np.testing.assert_array_equal(
        np.concatenate([part[4]["targets"] for part in found]), expected[4]["targets"]
    )
    resumed = make(data)
    stream = make(data)
    batches(stream, 4)
    resumed.restore(stream.state())
    assert_equal(batches(resumed, 1), expected[4:])


def test_a_row_too_short_for_its_segment_is_refused() -> None:
    prompt = len(VOCABULARY.encode(REPEAT_PROMPT))
    make(dataclasses.replace(DATA, sequence_length=prompt + 16, repeat_segment=8))
    with pytest.raises(ConfigError, match=r"^config\.data\.repeat_segment: 8 tokens and their prompt of"):
        make(dataclasses.replace(DATA, sequence_length=prompt + 15, repeat_segment=8))


def test_other_data_and_other_states_are_refused() -> None:
    state = make().state()
    with pytest.raises(UserError, match="seed was 0 when it was saved and is 5 now"):
        make(seed=5).restore(state)
    examples = Made()
    examples.fingerprint = "others"  # type: ignore[misc]
    with pytest.raises(UserError, match="contents was made when it was saved and is others now"):
        make(examples=examples).restore(state)
    with pytest.raises(UserError, match="of another task or version"):
        make().restore({"stream": {}, "step": 3})
    with pytest.raises(UserError, match="batch_size 4 is not divisible by the 3 processes"):
        make(shard=(0, 3))


def test_a_source_without_tokens_ends_in_an_error() -> None:
    class Nothing(Made):
        def epoch(self, epoch: int, first: int = 0) -> Iterator[Example]:
            return iter(())

    with pytest.raises(UserError, match="there are no tokens in made"):
        make(examples=Nothing()).next_batch()


def test_a_mistake_found_while_reading_reaches_the_caller() -> None:
    class Broken(Made):
        def epoch(self, epoch: int, first: int = 0) -> Iterator[Example]:
            yield from itertools.islice(super().epoch(epoch, first), 2)
            raise UserError("a damaged file")

    with pytest.raises(UserError, match="a damaged file"):
        make(examples=Broken()).next_batch()


def test_a_row_may_end_within_a_block(tmp_path: pathlib.Path) -> None:
    """The paper's 8.5k tokens are eight blocks and a half."""
    batch = make(dataclasses.replace(DATA, sequence_length=21)).next_batch()
    assert batch["inputs"].shape == (4, 21)
