"""Data by config: which examples a text or seqio task reads, in which order, and mistakes."""

import dataclasses
import json
import logging
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from fam_jax.config import Config, ConfigError, DataConfig, EvaluateConfig, UserError, resolve
from fam_jax.data import build, quiet_seqio, seqio_source
from fam_jax.data.build import Heldout, longest_row
from fam_jax.data.interface import BatchSpec, Example
from fam_jax.data.quiet_seqio import seqio
from fam_jax.data.randomness import permutation, random_key
from fam_jax.data.text_vocabulary import train_text_vocabulary
from fam_jax.data.vocabulary import load_vocabulary

IMPORTS = ("tests.data.text_seqio_tasks",)
TEXTS = [f"document {i} {'é' * i}\n" for i in range(7)]
BYTES = load_vocabulary("bytes")


@pytest.fixture
def corpus(tmp_path: pathlib.Path) -> pathlib.Path:
    for folder, texts in (("train", TEXTS), ("heldout", ["held", "held out, and longer"])):
        (tmp_path / folder).mkdir()
        for number, text in enumerate(texts):
            (tmp_path / folder / f"{number}.txt").write_text(text)
    return tmp_path


def config_of(data: dict[str, Any], **evaluate: Any) -> Config:
    return resolve(
        {"data": {"sequence_length": 32, **data}, "train": {"batch_size": 2}, "evaluate": evaluate}
    )


def text_config(corpus: pathlib.Path, evaluate: dict[str, Any] | None = None, **data: Any) -> Config:
    files = {"train_files": (f"{corpus}/train",), "heldout_files": (f"{corpus}/heldout",)}
    return config_of({"task": "text", "vocabulary": "bytes", **files, **data}, **(evaluate or {}))


def seqio_config(name: str, evaluate: dict[str, Any] | None = None, **data: Any) -> Config:
    return config_of({"task": f"seqio:{name}", "imports": IMPORTS, **data}, **(evaluate or {}))


def packed(config: Config) -> Any:
    return build.make_batches(config.data, BatchSpec(32, config.train.batch_size, seed=0))


def heldout(config: Config, *files: Any) -> Heldout:
    return build.heldout_examples(config.data, config.evaluate, *files)


def decoded(example: Example) -> str:
    assert example.ids[-1] == BYTES.eos_id
    return BYTES.decode(example.ids[:-1].tolist())


def assert_same(one: list[Example], other: list[Example]) -> None:
    for left, right in zip(one, other, strict=True):
        np.testing.assert_array_equal(left.ids, right.ids)
        np.testing.assert_array_equal(left.weights, right.weights)


def test_every_epoch_has_all_documents_in_another_order(corpus: pathlib.Path) -> None:
    source = packed(text_config(corpus)).source
    epochs = [[decoded(example) for example in source.epoch(epoch)] for epoch in range(3)]
    assert all(sorted(epoch) == sorted(TEXTS) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert [decoded(example) for example in source.epoch(1, 4)] == epochs[1][4:]
    for example in source.epoch(0):
        assert (example.weights == 1).all() and example.weights.shape == example.ids.shape
        assert example.text_bytes == len(example.ids) - 1


def test_an_epoch_can_start_at_any_document(tmp_path: pathlib.Path) -> None:
    """With more documents than are tokenized at a time."""
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": f"d{i}"}) + "\n" for i in range(100)))
    source = packed(
        config_of({"task": "text", "vocabulary": "bytes", "train_files": (f"{tmp_path}/x.jsonl",)})
    ).source
    whole = list(source.epoch(3))
    assert sorted(map(decoded, whole)) == sorted(f"d{i}" for i in range(100))
    for first in (1, 31, 32, 33, 99, 100):
        assert_same(list(source.epoch(3, first)), whole[first:])
    by_number = source.source
    assert len(by_number) == 100
    assert [decoded(by_number[i]) for i in (99, 0, 50)] == ["d99", "d0", "d50"]
    assert [decoded(each) for each in by_number.read([7, 7, 3])] == ["d7", "d7", "d3"]


def test_orders_never_change() -> None:
    """A run that an older version started must find its documents in the same order."""
    assert permutation(8, "documents", 0, 0).tolist() == [0, 7, 2, 1, 3, 5, 6, 4]


def test_sentencepiece_ids_equal_those_of_the_vocabulary(corpus: pathlib.Path) -> None:
    (corpus / "v.model").write_bytes(train_text_vocabulary(TEXTS, 280))
    vocabulary = load_vocabulary(f"{corpus}/v.model")
    source = packed(text_config(corpus, vocabulary=f"{corpus}/v.model")).source
    found = [example.ids.tolist() for example in source.epoch(0)]
    assert sorted(found) == sorted([*vocabulary.encode(text), vocabulary.eos_id] for text in TEXTS)


def test_batches_of_text_consist_of_the_documents(corpus: pathlib.Path) -> None:
    batches = packed(text_config(corpus, shuffle_batches=1))
    tokens = [decoded(example) for epoch in range(2) for example in batches.source.epoch(epoch)]
    whole = np.concatenate([[*BYTES.encode(text), BYTES.eos_id] for text in tokens])
    batch = batches.next()
    assert sorted(map(tuple, batch["targets"])) == sorted(map(tuple, whole[:64].reshape(2, 32)))
    assert (batch["weights"] == 1).all()


def test_only_targets_of_seqio_examples_have_weight() -> None:
    from tests.data.text_seqio_tasks import SIZE, expected

    source = packed(seqio_config("fam_test_questions")).source
    found = sorted(source.epoch(0), key=lambda example: tuple(example.ids))
    wanted = sorted((expected(i) for i in range(SIZE)), key=lambda pair: tuple(pair[0]))
    assert_same(found, [Example(ids, weights, 0) for ids, weights in wanted])
    first = list(source.epoch(0))
    assert_same(list(source.epoch(0)), first)
    assert_same(list(source.epoch(0, 5)), first[5:])
    assert [tuple(e.ids) for e in source.epoch(1)] != [tuple(e.ids) for e in first]


@pytest.mark.parametrize("name", ["fam_test_questions", "fam_test_noise", "fam_test_mixture"])
def test_batches_of_seqio_resume_exactly(name: str) -> None:
    """Also with random preprocessing, in a mixture, and across epochs."""
    config = seqio_config(name, shuffle_batches=2)
    batches, states, expected = packed(config), [], []
    for _ in range(15):
        states.append(batches.state())
        expected.append(batches.next())
    for step in (1, 2, 7, 14):
        resumed = packed(config)
        resumed.restore(states[step])
        for wanted in expected[step:]:
            found = resumed.next()
            for part in wanted:
                np.testing.assert_array_equal(found[part], wanted[part])
    assert name == "fam_test_mixture" or batches.state()["group"]["epoch"] > 0
    weights = np.concatenate([batch["weights"].ravel() for batch in expected])
    assert 0 < weights.mean() < 1 and set(weights) == {0, 1}


@pytest.mark.parametrize("name", ["fam_test_questions", "fam_test_noise"])
def test_examples_are_those_of_seqio(name: str) -> None:
    """Though those that are skipped are not tokenized."""
    source = packed(seqio_config(name)).source
    seed = random_key("seqio", 0, 1) % 2**31
    with seqio.map_seed_manager(seed):
        dataset = source.provider.get_dataset(None, "train", shuffle=True, seed=seed, num_epochs=1)
    expected = [
        np.concatenate([each["inputs"], each["targets"]]) for each in dataset.skip(5).as_numpy_iterator()
    ]
    tokenized = []
    for found, ids in zip(source.epoch(1, 5), expected, strict=True):
        np.testing.assert_array_equal(found.ids, ids)
        tokenized.append(found)
    assert len(tokenized) == 7
    task, last = seqio_source._without_tokenization(source.provider)
    untouched = task.get_dataset(None, "train", shuffle=False)
    assert [*untouched.element_spec[seqio_source.HELD_BACK]] == ["inputs", "targets"]
    assert untouched.element_spec[seqio_source.HELD_BACK]["targets"].dtype == "string" and len(last) == 3


def test_reading_a_task_gives_no_advice_that_does_not_apply(caplog: pytest.LogCaptureFixture) -> None:
    """seqio warns that a function as a source repeats its order; here, every epoch has its own."""

    def said() -> list[str]:
        caplog.clear()
        next(iter(seqio_source.seqio_source("fam_test_questions", IMPORTS, "train", 0).epoch(0)))
        return [message for message in caplog.messages if "uncached" in message]

    logger = logging.getLogger("absl")
    with caplog.at_level("WARNING", logger="absl"):
        assert not said()
        [own] = [each for each in logger.filters if each is quiet_seqio._is_needed]
        logger.removeFilter(own)
        try:
            assert said()
        finally:
            logger.addFilter(own)


def test_held_out_documents(corpus: pathlib.Path) -> None:
    found, vocabulary = heldout(text_config(corpus))
    assert sorted(map(decoded, found)) == ["held", "held out, and longer"]
    assert vocabulary.vocab_size == 259
    assert [decoded(e) for e in heldout(text_config(corpus, {"min_tokens": 6}))[0]] == [
        "held out, and longer"
    ]
    assert len(heldout(text_config(corpus, {"documents": 1}))[0]) == 1
    other = heldout(text_config(corpus), [f"{corpus}/train/3.txt"])[0]
    assert list(map(decoded, other)) == [TEXTS[3]]
    with pytest.raises(
        ConfigError, match=r"^config\.evaluate\.min_tokens: no held-out document has 99 tokens"
    ):
        heldout(text_config(corpus, {"min_tokens": 99}))
    with pytest.raises(ConfigError, match=r"^config\.data\.heldout_files: names no files"):
        heldout(text_config(corpus, heldout_files=()))


def test_held_out_examples_of_seqio() -> None:
    from tests.data.text_seqio_tasks import SIZE, expected

    found = heldout(seqio_config("fam_test_questions")).examples
    assert_same(found, [Example(*expected(i, "validation"), 0) for i in range(SIZE)])
    assert len(heldout(seqio_config("fam_test_mixture")).examples) == 2 * SIZE
    texts = heldout(seqio_config("fam_test_answers", {"documents": 2})).examples
    assert [(len(e.ids), e.weights.tolist()) for e in texts] == [(8, [1.0] * 8), (9, [1.0] * 9)]


def wrong(config: Config, make: Any = packed) -> str:
    with pytest.raises(ConfigError) as caught:
        make(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_mistakes_in_a_text_task(corpus: pathlib.Path) -> None:
    assert "config.data.train_files: " in wrong(text_config(corpus, train_files=(f"{corpus}/none",)))
    assert "config.data.heldout_files: " in wrong(text_config(corpus, heldout_files=(f"{corpus}/none",)))
    both = text_config(corpus, heldout_files=(f"{corpus}/train/2.txt",))
    assert "config.data.heldout_files: " in wrong(both) and "is in train_files too" in wrong(both)
    (corpus / "train" / "8.txt").write_bytes(b"\x80")
    assert "8.txt: not UTF-8 at byte 0 (0x80)" in wrong(text_config(corpus))
    mixed = text_config(corpus, train_files=("tfds:pg19:train", "x.txt"))
    assert "config.data.train_files: expected files, or one tfds:NAME:SPLIT alone" in wrong(mixed)


def test_mistakes_in_a_seqio_task() -> None:
    config = seqio_config("fam_test_questions")
    for name, says in {
        "fam_test_missing": "config.data.task: seqio has no task or mixture fam_test_missing; add the module",
        "fam_test_no_targets": "config.data.task: fam_test_no_targets has no feature targets, only inputs; rename",
        "fam_test_floats": "config.data.task: fam_test_floats has a feature targets that is not a list of token ids",
    }.items():
        assert says in wrong(seqio_config(name))
    absent = dataclasses.replace(config, data=dataclasses.replace(config.data, imports=("no_such_module",)))
    assert wrong(absent).startswith("config.data.imports: no_such_module cannot be imported")


def test_a_prepared_tfds_dataset(tmp_path: pathlib.Path) -> None:
    import tensorflow_datasets as tfds

    texts = [f"text {i} ü" for i in range(9)]
    file_utils = tfds.core.utils.file_utils
    file_utils.add_data_dir(tmp_path)
    try:
        tfds.dataset_builders.store_as_tfds_dataset(
            name="fam_texts",
            version="1.0.0",
            features=tfds.features.FeaturesDict(
                {"text": tfds.features.Text(), "id": tfds.features.Scalar(np.int64)}
            ),
            split_datasets={"train": [(i, {"text": text, "id": i}) for i, text in enumerate(texts)]},
            data_dir=tmp_path,
            disable_shuffling=True,
        )
        files = {"task": "text", "vocabulary": "bytes", "train_files": ("tfds:fam_texts:train[:7]",)}
        source = packed(config_of(files)).source
        assert sorted(map(decoded, source.epoch(0))) == texts[:7]
        assert_same(list(source.epoch(0, 3)), list(source.epoch(0))[3:])
        missing = config_of({**files, "heldout_files": ("tfds:fam_texts/1.0.0:train[7:]",)})
        found = heldout(config_of({**files, "heldout_files": ("tfds:fam_texts:1.0.0:train[7:]",)})).examples
        assert list(map(decoded, found)) == texts[7:]
        assert [example.text_bytes for example in found] == [9, 9]
        assert "TFDS has no dataset" in wrong(missing, heldout)
        assert "has no split test; use one of train" in wrong(
            config_of({**files, "train_files": ("tfds:fam_texts:test",)})
        )
        assert "is not prepared in" in wrong(config_of({**files, "train_files": ("tfds:pg19:train",)}))
        assert "TFDS has no dataset nonsense" in wrong(
            config_of({**files, "train_files": ("tfds:nonsense:train",)})
        )
    finally:
        file_utils.clear_registered_data_dirs()


def test_the_longest_row() -> None:
    def rows(task: str, text: int) -> int:
        data = DataConfig(task=task, vocabulary="bytes", sequence_length=text)
        return longest_row(data, block_size=1024)

    passkey = rows("passkey", 1024)
    # The longest filler has 18 blocks.
    assert passkey > 18 * 1024
    assert rows("text+passkey", passkey - 1) == passkey
    assert rows("text+passkey", passkey + 1) == passkey + 1
    assert rows("text", 24) == rows("seqio:my_passkey", 24) == 24


def test_unknown_tasks_are_rejected() -> None:
    with pytest.raises(
        ConfigError, match=r"^config\.data\.task: 'books' is unknown; choose one of passkey, text"
    ):
        longest_row(DataConfig(task="books"), block_size=8)


def test_processes_have_equally_many_rows() -> None:
    with pytest.raises(
        UserError, match="batch_size: 4 is not divisible by the 3 processes; choose a multiple of 3"
    ):
        _ = BatchSpec(8, 4, 0, shard=(0, 3)).own_rows
    assert [*BatchSpec(8, 6, 0, shard=(1, 3)).own_rows] == [2, 3]


class Digits(build.PackedTask):
    """A new data source: one class, and a line in the registry."""

    def source(self, seed: int) -> Any:
        class Ten:
            vocabulary, fingerprint = BYTES, "digits"

            def epoch(self, epoch: int, first: int = 0) -> Iterator[Example]:
                for digit in range(first, 10):
                    yield Example(np.full(4, 10 + digit, np.int32), np.ones(4, np.float32), 0)

        return Ten()


def test_a_data_source_is_added_by_a_class_and_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(build.TASKS, "digits", Digits)
    data = DataConfig(task="digits", vocabulary="bytes", sequence_length=8, shuffle_batches=1)
    batches = build.make_batches(data, BatchSpec(8, 5, 0))
    assert sorted(row.tolist() for row in batches.next()["targets"]) == [
        [10 + i] * 4 + [11 + i] * 4 for i in range(0, 10, 2)
    ]
    assert longest_row(data, block_size=8) == batches.longest_row == 8
    assert build.task_vocabulary(data).vocab_size == BYTES.vocab_size
    with pytest.raises(ConfigError, match="heldout_files: names no files to evaluate on"):
        build.heldout_examples(data, EvaluateConfig())
