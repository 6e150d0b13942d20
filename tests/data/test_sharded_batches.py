"""Batches of seqio's shards, and bookmarks: the same examples on any processes and after any interruption."""

import itertools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import tokenizers
from etils import epath

from fam_jax.config import ConfigError, DataConfig, UserError, resolve
from fam_jax.data import build
from fam_jax.data.bookmarks import KEPT, Bookmark, Bookmarks
from fam_jax.data.interface import Batch, BatchSpec
from fam_jax.data.packing import PackedBatches
from fam_jax.data.quiet_seqio import seqio, tf
from fam_jax.data.randomness import random_key
from fam_jax.data.seqio_source import SeqioSource
from fam_jax.data.sharded_batches import ShardedBatches
from fam_jax.data.vocabulary import load_vocabulary

ROWS = 4
# Examples between two bookmarks.
OFTEN = 5


def data_of(name: str, **fields: Any) -> DataConfig:
    fields = {"layout": "by_row", "seqio_shards": 2, "sequence_length": 16, "shuffle_batches": 1} | fields
    imports = ("tests.data.text_seqio_tasks",)
    return resolve({"data": {"task": f"seqio:{name}", "imports": imports, **fields}}).data


def make(data: DataConfig, *, index: int = 0, count: int = 1, folder: Any = None, **spec: Any) -> Any:
    spec = {"batch_size": ROWS, "seed": 3, "shard": (index, count)} | spec
    return build.make_batches(data, BatchSpec(8, bookmarks=str(folder) if folder else None, **spec))


class Job:
    """Batches of all processes of a job."""

    def __init__(self, data: DataConfig, processes: int, folder: Any = None):
        gather = None if processes == 1 else self._gather
        self.parts = [
            make(data, index=i, count=processes, folder=folder, gather=gather) for i in range(processes)
        ]

    def _gather(self, own: np.ndarray) -> np.ndarray:
        """Join the rows of all processes, in the process that is asked last."""
        self._gathered.append(own)
        return np.concatenate(self._gathered)

    def next(self) -> Batch:
        batches = [part.next() for part in self.parts]
        return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}

    def state(self) -> dict[str, Any]:
        self._gathered: list[np.ndarray] = []
        *_, last = (part.state() for part in self.parts)
        return last

    def restore(self, state: dict[str, Any]) -> None:
        for part in self.parts:
            part.restore(state)


def assert_equal(found: Batch, wanted: Batch) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name])


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a bookmark before every fifth example, in place of every ten seconds."""
    calls: dict[int, int] = {}

    def due(self: Bookmarks) -> bool:
        calls[id(self)] = calls.get(id(self), -1) + 1
        return self._works and calls[id(self)] % OFTEN == 0

    monkeypatch.setattr(Bookmarks, "due", due)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Return a list to which each dataset that is made is appended: its shard, and the examples that it skips."""
    made: list[tuple[int, int]] = []
    dataset = SeqioSource._dataset

    def spied(self: SeqioSource, epoch: int, first: int) -> tf.data.Dataset:
        made.append((self.shard[0], first))
        return dataset(self, epoch, first)

    monkeypatch.setattr(SeqioSource, "_dataset", spied)
    return made


@pytest.mark.parametrize(
    ("name", "shards", "processes"),
    [
        ("fam_test_many", 1, 2),
        ("fam_test_many", 2, 4),
        ("fam_test_questions", 6, 2),
        ("fam_test_many_noise", 2, 2),
        ("fam_test_many_noise", 16, 1),
        ("fam_test_many_mixture", 2, 2),
    ],
)
def test_batches_do_not_depend_on_the_processes_or_interruptions(
    name: str, shards: int, processes: int
) -> None:
    """Also with more processes than shards, and with shards that are no divisor of the batch size."""
    data = data_of(name, seqio_shards=shards, shuffle_batches=2)
    one = Job(data, 1)
    states, expected = [], []
    for _ in range(8):
        states.append(one.state())
        expected.append(one.next())
    assert any((batch["targets"] != expected[0]["targets"]).any() for batch in expected[1:])
    job = Job(data, processes)
    for wanted in expected[:3]:
        assert_equal(job.next(), wanted)
    assert job.state() == states[3]
    job.restore(states[5])
    for wanted in expected[5:]:
        assert_equal(job.next(), wanted)


def test_a_process_reads_the_shards_of_its_rows_only(opened: list[tuple[int, int]]) -> None:
    part = make(data_of("fam_test_many"), index=1, count=2)
    for _ in range(3):
        assert len(part.next()["targets"]) == ROWS // 2
    assert {shard for shard, _ in opened} == {1}


def test_rows_are_those_of_packed_batches_of_a_shard() -> None:
    """Each group of rows is what the shard alone gives, with seeds of its own."""
    data = data_of("fam_test_many", repeat_segment=4, sequence_length=48)
    batches, share = make(data), ROWS // 2
    alone = []
    for index in range(2):
        source = batches._parts[index].source
        assert source.shard == (index, 2)
        seed = random_key("shard", 3, index) % 2**31
        alone.append(PackedBatches(data, source, BatchSpec(8, share, seed)))
    for _ in range(4):
        batch = batches.next()
        for index, part in enumerate(alone):
            rows = slice(index * share, (index + 1) * share)
            assert_equal({name: values[rows] for name, values in batch.items()}, part.next())
    assert batches.metrics() == alone[0].metrics() and batches.longest_row == 48


@pytest.mark.parametrize("count", [1, 3, 4])
def test_shards_have_every_example_once_in_an_epoch(count: int) -> None:
    from tests.data.text_seqio_tasks import SIZE, expected

    source = make(data_of("fam_test_questions", layout="packed")).source
    shards = [SeqioSource(source.provider, "train", 3, shard=(i, count)) for i in range(count)]
    for epoch in range(2):
        found = [tuple(example.ids) for shard in shards for example in shard.epoch(epoch)]
        assert sorted(found) == sorted(tuple(expected(i)[0]) for i in range(SIZE))


def test_shards_of_a_mixture_draw_its_tasks_by_themselves() -> None:
    def drawn(index: int) -> list[bool]:
        provider = seqio.get_mixture_or_task("fam_test_many_mixture")
        examples = SeqioSource(provider, "train", 3, shard=(index, 4)).epoch(0)
        # Only the answers of fam_test_many_noise end with a digit.
        return [next(examples).ids[-2] < 0x40 for _ in range(200)]

    make(data_of("fam_test_many_mixture"))
    one, other = drawn(0), drawn(1)
    assert one != other and np.mean([*one, *other]) == pytest.approx(0.75, abs=0.1)
    # seqio's own object is as it was.
    assert seqio.get_mixture_or_task("fam_test_many_mixture")._sample_fn is not None
    assert drawn(0) == one


@pytest.mark.parametrize(
    ("name", "layout", "processes"),
    [
        ("fam_test_questions", "packed", 1),
        ("fam_test_many_noise", "by_row", 2),
        ("fam_test_many_mixture", "packed", 2),
        ("fam_test_cached_mixture", "packed", 1),
        ("fam_test_many_mixture", "by_row", 1),
    ],
)
@pytest.mark.usefixtures("often")
def test_a_resumed_run_goes_on_from_the_bookmark(
    name: str, layout: str, processes: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And reads nothing again, in any epoch; on other processes, too."""
    data = data_of(name, layout=layout)
    batches = make(data, folder=tmp_path)
    for _ in range(6):
        batches.next()
    # Until the shards are well within an epoch.
    while min(example for _, example, _ in _positions(batches.state())) < OFTEN:
        batches.next()
    state = batches.state()
    expected = [batches.next() for _ in range(3)]
    restored: list[Bookmark] = []
    until = Bookmarks.until

    def spied(self: Bookmarks, epoch: int, place: int) -> Iterator[tuple[Bookmark, bytes]]:
        for mark, raw in until(self, epoch, place):
            # Next to nothing is read again.
            assert mark.epoch == epoch and 0 <= place - mark.place < OFTEN
            restored.append(mark)
            yield mark, raw

    monkeypatch.setattr(Bookmarks, "until", spied)
    resumed = Job(data, processes, tmp_path)
    resumed.restore(state)
    for wanted in expected:
        assert_equal(resumed.next(), wanted)
    # With packed, each process reads all examples.
    readers = processes if layout == "packed" else 1
    assert len([mark for mark in restored if mark.place > 0]) >= readers * len(_positions(state)) > 0


def _positions(state: dict[str, Any]) -> list[list[int]]:
    return state["shards"] if "shards" in state else [[*state["group"].values()]]


@pytest.mark.usefixtures("often")
def test_bookmarks_of_a_resumed_run_are_good_too(tmp_path: pathlib.Path) -> None:
    """Their datasets skip what an earlier bookmark stood for."""
    data = data_of("fam_test_many_mixture")
    whole = make(data)
    expected = [whole.next() for _ in range(10)]
    step, state = 0, None
    while step < len(expected) - 2:
        batches = make(data, folder=tmp_path)
        if state is not None:
            batches.restore(state)
        for _ in range(3):
            assert_equal(batches.next(), expected[step])
            step += 1
        state = batches.state()


def _truncate(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flip(path: pathlib.Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def _of_another_program(path: pathlib.Path) -> None:
    other = Bookmarks(epath.Path(path.parent / "other"), "other")
    mark = Bookmark.of_file(epath.Path(path))
    other.add(mark, tf.data.Dataset.range(9).batch(2).as_numpy_iterator(), [])
    other.keep(mark.epoch, mark.place)
    (path.parent / "other" / path.name).replace(path)


@pytest.mark.parametrize(
    ("damage", "says"),
    [(_truncate, ""), (_flip, ""), (pathlib.Path.unlink, ""), (_of_another_program, "cannot be used")],
)
@pytest.mark.usefixtures("often")
def test_damaged_bookmarks_cost_time_only(
    damage: Callable[[pathlib.Path], None],
    says: str,
    tmp_path: pathlib.Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = data_of("fam_test_many_noise")
    batches = make(data, folder=tmp_path)
    for _ in range(4):
        batches.next()
    state = batches.state()
    expected = [batches.next() for _ in range(2)]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    for path in files:
        damage(path)
    resumed = make(data, folder=tmp_path)
    resumed.restore(state)
    with caplog.at_level("WARNING", logger="absl"):
        for wanted in expected:
            assert_equal(resumed.next(), wanted)
    warned = [message for message in caplog.messages if "saved place" in message]
    assert bool(warned) == bool(says) and all(says in message for message in warned)


@pytest.mark.usefixtures("often")
def test_the_folder_holds_the_last_bookmarks_of_the_run(tmp_path: pathlib.Path) -> None:
    """Going back to an earlier step removes those behind it, which would else look newer."""
    data = data_of("fam_test_many_mixture", layout="packed")
    batches, states = make(data, folder=tmp_path), []

    def kept() -> list[Bookmark]:
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        return sorted(Bookmark.of_file(epath.Path(path)) for path in files)

    for _ in range(3 * KEPT):
        batches.next()
        states.append(batches.state())
    ends = [state["group"]["example"] for state in states]
    places = sorted({end // OFTEN * OFTEN for end in ends})
    assert [mark.place for mark in kept()] == places[-KEPT:] and len(places) > KEPT
    # Those that no checkpoint will want are not kept in memory or on disk.
    assert len(batches._bookmarks._made) < 30

    batches = make(data, folder=tmp_path)
    back = len(states) - 3
    batches.restore(states[back])
    batches.next()
    batches.state()
    assert all(mark.place <= ends[back + 1] for mark in kept())
    # One may have been added, and the oldest removed for it.
    earlier = [place for place in places[-KEPT:] if place <= ends[back + 1]]
    assert {mark.place for mark in kept()} >= {*earlier[1:]} and len(kept()) <= KEPT


@pytest.mark.usefixtures("often")
def test_a_task_whose_place_cannot_be_saved(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    """Python functions have no place. The run says so once, and a resumed one reads the epoch again."""
    name = "fam_test_python"
    if name not in seqio.TaskRegistry.names():
        from tests.data.text_seqio_tasks import BOTH, register

        def python(dataset: tf.data.Dataset) -> tf.data.Dataset:
            def changed(text: tf.Tensor) -> tf.Tensor:
                out = tf.numpy_function(lambda raw: raw + b"!", [text], tf.string)
                return tf.ensure_shape(out, [])

            return dataset.map(lambda example: {**example, "inputs": changed(example["inputs"])})

        # More examples than the shuffle buffer holds; once all of them are in it, their place can be saved.
        register(name, BOTH, lambda dataset: dataset.repeat(200), python)
    data = data_of(name, seqio_shards=1)
    batches = make(data, folder=tmp_path)
    with caplog.at_level("WARNING", logger="absl"):
        for _ in range(5):
            batches.next()
    state = batches.state()
    expected = [batches.next() for _ in range(2)]
    [warned] = [message for message in caplog.messages if "place in the data cannot be saved" in message]
    assert "PyFunc is stateful" in warned and "\n" not in warned
    resumed = make(data, folder=tmp_path)
    resumed.restore(state)
    for wanted in expected:
        assert_equal(resumed.next(), wanted)


@pytest.mark.usefixtures("often")
def test_vocabularies_that_call_python_have_no_state(tmp_path: pathlib.Path) -> None:
    """Such as those of a tokenizer.json; also in a mixture."""
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(["question answer xxx"], 300, special_tokens=["<end>"], show_progress=False)
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    vocabulary = load_vocabulary(str(tmp_path / "tokenizer.json"))
    make(data_of("fam_test_many"))
    feature = seqio.Feature(vocabulary, add_eos=True)
    task = seqio.get_mixture_or_task("fam_test_many_noise").replace(
        name="fam_test_python_vocabulary", output_features={"inputs": feature, "targets": feature}
    )
    mixture = seqio.Mixture("fam_test_python_mixture", [(task, 1.0)])
    for provider in (task, mixture):
        folder = epath.Path(tmp_path / provider.name)

        def source(folder: epath.Path = folder, provider: Any = provider) -> SeqioSource:
            return SeqioSource(provider, "train", 3, bookmarks=Bookmarks(folder, "of a test"))

        reading = source()
        whole = [tuple(example.ids) for example in itertools.islice(reading.epoch(0), 11)]
        assert reading.bookmarks is not None
        reading.bookmarks.keep(0, 7)
        assert [mark.place for mark, _ in reading.bookmarks.until(0, 7)] == [5]
        assert [tuple(example.ids) for example in itertools.islice(source().epoch(0, 7), 4)] == whole[7:]


@pytest.mark.usefixtures("often")
def test_a_folder_that_cannot_be_written_does_not_stop_the_run(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    batches = make(data_of("fam_test_many", seqio_shards=1), folder=tmp_path / "file")
    with caplog.at_level("WARNING", logger="absl"):
        for _ in range(3):
            batches.next()
            batches.state()
    assert len([message for message in caplog.messages if "cannot be saved" in message]) == 1


def test_one_process_makes_the_bookmarks_of_a_shard(tmp_path: pathlib.Path) -> None:
    data = data_of("fam_test_many", seqio_shards=2)
    works = [make(data, index=i, count=4, folder=tmp_path)._first._bookmarks._works for i in range(4)]
    assert works == [True, False, True, False]


def test_packed_batches_of_several_processes_say_what_they_cost(caplog: pytest.LogCaptureFixture) -> None:
    data = data_of("fam_test_many", layout="packed")
    with caplog.at_level("WARNING", logger="absl"):
        make(data)
        make(data, index=1, count=2)
        assert not caplog.messages
        make(data, count=2)
    [said] = caplog.messages
    assert "each of the 2 processes tokenizes the whole batch" in said


def test_states_of_other_batches_are_rejected() -> None:
    data = data_of("fam_test_many")
    state = make(data).state()
    with pytest.raises(ValueError, match="pass `gather`"):
        make(data, count=2).state()
    for other, says in (
        (make(data_of("fam_test_many_noise")), "contents was fam_test_many:train"),
        (make(data_of("fam_test_many", seqio_shards=1)), "shards was 2 when it was saved and is 1 now"),
        (make(data, batch_size=2), "batch_size was 4"),
        (make(data, seed=4), "seed was 3"),
        (make(data_of("fam_test_many", layout="packed")), "must have the fields group, step, stream"),
    ):
        with pytest.raises(Exception, match=says):
            other.restore(state)


def test_mistakes() -> None:
    with pytest.raises(ConfigError, match=r"^config\.data\.layout: continuous reads examples by number"):
        make(data_of("fam_test_many", layout="continuous", shuffle_batches=8, sequence_length=64))
    with pytest.raises(ConfigError, match="shuffle_batches: belongs to the layout packed"):
        data_of("fam_test_many", layout="continuous", sequence_length=64)
    with pytest.raises(UserError, match=r"no tokens in shard 1 of 2 of fam_test_passkey_ids"):
        make(data_of("fam_test_passkey_ids", sequence_length=4)).next()


def test_sharded_batches_are_what_by_row_gives() -> None:
    assert isinstance(make(data_of("fam_test_many")), ShardedBatches)
