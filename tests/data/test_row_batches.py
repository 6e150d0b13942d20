"""Rows with examples of their own: against a naive version, on any number of processes, resumed after any step."""

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fam_jax.config import ConfigError, DataConfig, UserError, resolve
from fam_jax.data.interface import Batch, BatchSpec, Example
from fam_jax.data.packing import PackedBatches
from fam_jax.data.randomness import permutation, random_key, random_words
from fam_jax.data.row_batches import RowBatches
from fam_jax.data.rows import REPEAT_PROMPT
from fam_jax.data.sources import Shuffled
from fam_jax.data.vocabulary import load_vocabulary

VOCABULARY = load_vocabulary("bytes")
EOS = VOCABULARY.eos_id
BLOCK = 4
LAYOUTS = ("by_row", "continuous")


@dataclasses.dataclass
class Made:
    """Examples whose tokens are all different: 1000 * (number of the example + 1) + position."""

    lengths: Sequence[int]
    read_numbers: list[int] = dataclasses.field(default_factory=list)

    vocabulary = VOCABULARY
    fingerprint = "made"

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        ids = (1000 * (index + 1) + np.arange(self.lengths[index])).astype(np.int32)
        return Example(ids, (ids % 3 / 2).astype(np.float32), 0)

    def read(self, indices: Iterable[int]) -> Iterator[Example]:
        for index in indices:
            self.read_numbers.append(index)
            yield self[index]


def config(layout: str, **values: Any) -> DataConfig:
    return DataConfig(task="text", layout=layout, **{"sequence_length": 8, **values})


def make(data: DataConfig, source: Any, rows: int, **options: Any) -> RowBatches:
    return RowBatches(data, source, BatchSpec(BLOCK, rows, **{"seed": 0, **options}))


class Job:
    """The processes of a job, in one."""

    def __init__(self, data: DataConfig, source: Any, rows: int, processes: int):
        self.parts: list[RowBatches] = []
        for index in range(processes):
            gather = None if processes == 1 else self._gather
            self.parts.append(make(data, source, rows, shard=(index, processes), gather=gather))

    def _gather(self, own: np.ndarray) -> np.ndarray:
        assert any(own is part._end for part in self.parts)
        return np.concatenate([part.positions() for part in self.parts])

    def next(self) -> Batch:
        found = [part.next() for part in self.parts]
        return {name: np.concatenate([part[name] for part in found]) for name in found[0]}

    def state(self) -> dict[str, Any]:
        states = [json.loads(json.dumps(part.state())) for part in self.parts]
        assert all(state == states[0] for state in states)
        return states[0]

    def restore(self, state: dict[str, Any]) -> None:
        for part in self.parts:
            part.restore(state)


def examples_of(source: Made, row: int, rows: int) -> Iterator[Example]:
    """Yield the examples of a row, by the definition."""
    for k in itertools.count():
        epoch, place = divmod(k * rows + row, len(source))
        yield source[permutation(len(source), "documents", 0, epoch)[place]]


def naive_row(data: DataConfig, source: Made, row: int, rows: int) -> Iterator[tuple[list[Any], bool]]:
    """Yield a row of every batch as (input, target, weight) of each token, and whether it begins a stream."""
    length = data.sequence_length
    pending: list[Any] = []
    for k, (ids, weights, _) in enumerate(examples_of(source, row, rows)):
        tokens = [*zip([EOS, *ids.tolist()], ids.tolist(), weights.tolist(), strict=False)]
        if data.layout == "by_row":
            pending += tokens
            while len(pending) >= length:
                yield pending[:length], True
                pending = pending[length:]
        elif tokens:
            if k == 0:
                blocks = [*range(0, len(tokens), BLOCK)]
                tokens = tokens[blocks[random_words(random_key("first block", 0), row)[0] % len(blocks)] :]
            for begin in range(0, len(tokens), length):
                piece = tokens[begin : begin + length]
                yield [*piece, *[(0, 0, 0.0)] * (length - len(piece))], begin == 0


def assert_rows(batch: Batch, expected: Sequence[tuple[list[Any], bool]]) -> None:
    for row, (tokens, start) in enumerate(expected):
        found = [batch[name][row].tolist() for name in ("inputs", "targets", "weights")]
        assert [*zip(*found, strict=True)] == tokens
        assert batch["start"][row] == start
        assert batch["answer"][row].tolist() == [weight > 0 for _, _, weight in tokens]


def assert_equal(one: Batch, other: Batch) -> None:
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])
        assert one[name].dtype == other[name].dtype


LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any)


@given(
    layout=st.sampled_from(LAYOUTS),
    lengths=LENGTHS,
    rows=st.sampled_from([4, 8]),
    processes=st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4])),
    stop=st.integers(0, 12),
)
@example(layout="continuous", lengths=[40], rows=8, processes=(1, 4), stop=2)
@example(layout="by_row", lengths=[1], rows=4, processes=(4, 2), stop=3)
@settings(max_examples=40)
def test_rows_are_those_of_the_definition_on_any_processes_and_after_any_interruption(
    layout: str, lengths: list[int], rows: int, processes: tuple[int, int], stop: int
) -> None:
    data, source = config(layout), Made(lengths)
    naive = [naive_row(data, source, row, rows) for row in range(rows)]
    job = Job(data, source, rows, processes[0])
    for _ in range(stop):
        assert_rows(job.next(), [next(row) for row in naive])
    state = job.state()
    resumed = Job(data, source, rows, processes[1])
    resumed.restore(state)
    assert resumed.state() == state
    for _ in range(4):
        batch = resumed.next()
        assert_rows(batch, [next(row) for row in naive])
        assert_equal(batch, job.next())
    assert resumed.state() == job.state()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_process_reads_the_examples_of_its_rows_only_each_once(layout: str) -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 500).tolist()
    order = permutation(500, "documents", 0, 0)
    for index in range(4):
        source = Made(lengths)
        part = make(config(layout), source, 8, shard=(index, 4))
        for _ in range(12):
            part.next()
        own = {order[k * 8 + row] for k in range(60) for row in (2 * index, 2 * index + 1)}
        assert set(source.read_numbers) <= own
        assert len(source.read_numbers) == len(set(source.read_numbers))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resuming_reads_one_example_of_each_row_again(layout: str) -> None:
    lengths = np.random.default_rng(1).integers(30, 60, 4000).tolist()
    batches = make(config(layout), Made(lengths), 4)
    for _ in range(500):
        batches.next()
    source = Made(lengths)
    resumed = make(config(layout), source, 4)
    resumed.restore(batches.state())
    assert not source.read_numbers
    assert_equal(resumed.next(), batches.next())
    order = permutation(4000, "documents", 0, 0)
    going_on = [k for k, _ in batches.state()["rows"]]
    assert min(going_on) > 20
    # The thread may already have read more.
    assert set(source.read_numbers[:4]) <= {
        order[k * 4 + row] for row in range(4) for k in (going_on[row], going_on[row] - 1)
    }
    assert len(source.read_numbers) < 4 * 30


def test_reading_ahead_does_not_change_the_state() -> None:
    batches = make(config("by_row"), Made([5, 7, 30, 2]), 2)
    batches.next()
    before = batches.state()
    for future in batches._ahead:
        future.result()
    assert batches.state() == before
    assert before["rows"] == batches.positions().tolist()


def test_the_first_examples_end_in_different_batches() -> None:
    """All examples are equally long, so without a random first block all rows would end together."""
    batches = make(config("continuous"), Made([80] * 32), 16)
    starts = np.stack([batches.next()["start"] for _ in range(30)])
    assert starts[0].all()
    # Rows begin their second examples in at least 5 of 10 possible batches.
    assert len(set(np.argmax(starts[1:], axis=0).tolist())) >= 5
    # After the first, an example takes 10 batches.
    for row in starts.T:
        begun = np.flatnonzero(row)
        assert (np.diff(begun)[1:] == 10).all() and np.diff(begun)[0] <= 10


def test_one_row_reads_the_examples_in_the_order_of_packed_batches() -> None:
    source = Made([9, 31, 4, 16, 50])
    batches = make(config("by_row"), source, 1)
    packed = PackedBatches(
        config("packed", sequence_length=8, shuffle_batches=1), Shuffled(source, 0), BatchSpec(BLOCK, 1, 0)
    )
    for _ in range(40):
        assert_equal(batches.next(), packed.next())


def test_a_repeated_segment() -> None:
    prompt = VOCABULARY.encode(REPEAT_PROMPT)
    source = Made([30, 50, 7])
    data = config("by_row", sequence_length=20 + len(prompt) + 6, repeat_segment=6, repeat_weight=0.25)
    plain = make(config("by_row", sequence_length=20), source, 4)
    whole, halves = Job(data, source, 4, 1), Job(data, source, 4, 2)
    for _ in range(5):
        batch, without = whole.next(), plain.next()
        assert_equal(batch, halves.next())
        for name in ("inputs", "targets", "weights", "answer"):
            np.testing.assert_array_equal(batch[name][:, :20], without[name])
        for targets, weights in zip(batch["targets"], batch["weights"], strict=True):
            np.testing.assert_array_equal(targets[20:-6], prompt)
            windows = np.lib.stride_tricks.sliding_window_view(targets[:20], 6)
            assert (windows == targets[-6:]).all(axis=1).any()
            assert (weights[20:-6] == 0).all() and (weights[-6:] == 0.25).all()


def test_states_of_other_batches_are_rejected() -> None:
    source = Made([30, 50, 7])
    state = make(config("by_row"), source, 4).state()
    with pytest.raises(
        UserError, match="batch_size was 4 when it was saved and is 8 now; resume with the config"
    ):
        make(config("by_row"), source, 8).restore(state)
    with pytest.raises(UserError, match="layout was by_row when it was saved and is continuous now"):
        make(config("continuous"), source, 4).restore(state)
    with pytest.raises(UserError, match="seed was 0 when it was saved and is 3 now"):
        make(config("by_row"), source, 4, seed=3).restore(state)
    packed = PackedBatches(config("packed"), Shuffled(source, 0), BatchSpec(BLOCK, 4, 0))
    with pytest.raises(UserError, match="of another task or version"):
        packed.restore(state)
    with pytest.raises(UserError, match="of another task or version"):
        make(config("by_row"), source, 4).restore(packed.state())
    with pytest.raises(UserError, match="batch_size: 4 is not divisible by the 3 processes"):
        make(config("by_row"), source, 4, shard=(0, 3))
    with pytest.raises(ValueError, match="pass `gather`"):
        make(config("by_row"), source, 4, shard=(0, 2)).state()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sources_that_are_empty_or_broken(layout: str) -> None:
    with pytest.raises(UserError, match="there are no tokens in made"):
        make(config(layout), Made([0, 0]), 2).next()

    class Broken(Made):
        def read(self, indices: Iterable[int]) -> Iterator[Example]:
            raise UserError("a damaged file")

    with pytest.raises(UserError, match="a damaged file"):
        make(config(layout), Broken([3]), 2).next()
    with pytest.raises(UserError, match=r"the text has the token .* \(id 1000\)"):
        make(config(layout), Made([3]), 2, vocab_size=300).next()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"layout": "rows"}, "config.data.layout: expected one of packed, by_row, continuous, got 'rows'"),
        (
            {"layout": "by_row", "shuffle_batches": 2},
            "config.data.shuffle_batches: belongs to the layout packed, but data.layout is by_row; leave it",
        ),
        (
            {"layout": "continuous", "repeat_segment": 4},
            "config.data.repeat_segment: would interrupt the documents of the layout continuous; set it to 0",
        ),
        (
            {"layout": "continuous", "sequence_length": 1030},
            "config.data.sequence_length: 1030 is not a multiple of model.block_size 1024, as the layout",
        ),
        (
            {"layout": "continuous", "task": "text+passkey"},
            "config.data.layout: batches of PassKey would interrupt the documents of continuous; with the task",
        ),
        (
            {"layout": "by_row", "task": "passkey", "vocabulary": "passkey", "train_files": ()},
            "config.data.layout: belongs to the task text or seqio or instructions, but data.task is passkey",
        ),
    ],
)
def test_mistakes_in_the_config(values: dict[str, Any], says: str) -> None:
    data = {"task": "text", "vocabulary": "bytes", "train_files": ("x.txt",), **values}
    with pytest.raises(ConfigError) as caught:
        resolve({"data": data, "model": {"block_size": 1024}})
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)
