"""TFDS datasets read by number: the same examples in the same order as when seqio streamed them."""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tokenizers

from fam_jax.config import Config, ConfigError, UserError, resolve
from fam_jax.data import build, tfds_source
from fam_jax.data.interface import BatchSpec, Example
from fam_jax.data.packing import PackedBatches
from fam_jax.data.randomness import permutation
from fam_jax.data.seqio_source import SeqioSource
from fam_jax.data.sources import TextSource
from fam_jax.data.text_vocabulary import train_text_vocabulary
from fam_jax.data.vocabulary import load_vocabulary

# Of several scripts, so that vocabularies use all their ways to encode. Lengths vary.
# More than seqio shuffles at a time.
TEXTS = [f"Text {i}: größer, 日本語, Ελλάδα\n\t{'na ' * (i * 7 % 23)}🙂 {i * 37}" for i in range(1050)]
FEW = 300
BYTES = load_vocabulary("bytes")
FIELD = "config.data.train_files"


def store(folder: pathlib.Path, name: str, texts: list[str], shards: int, **options: Any) -> None:
    import tensorflow_datasets as tfds

    tfds.dataset_builders.store_as_tfds_dataset(
        name=name,
        version="1.0.0",
        features=tfds.features.FeaturesDict(
            {"text": tfds.features.Text(), "id": tfds.features.Scalar(np.int64)}
        ),
        split_datasets={"train": [(i, {"text": text, "id": i}) for i, text in enumerate(texts)]},
        data_dir=folder,
        download_config=tfds.download.DownloadConfig(num_shards=shards),
        **options,
    )


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
    """Return a folder with datasets of many files, with different numbers of examples in a file."""
    import tensorflow_datasets as tfds

    folder = tmp_path_factory.mktemp("tfds")
    # More files than are read in turn, and several blocks of examples in each.
    store(folder, "fam_many", TEXTS, 19)
    store(folder, "fam_ordered", TEXTS[:FEW], 3, disable_shuffling=True)
    store(folder, "fam_array", TEXTS[:FEW], 3, file_format="array_record")
    store(folder, "fam_parquet", TEXTS[:9], 1, file_format="parquet")
    tfds.core.utils.file_utils.add_data_dir(folder)
    yield folder
    tfds.core.utils.file_utils.clear_registered_data_dirs()


def config_of(entry: str, **data: Any) -> Config:
    fields = {"task": "text", "vocabulary": "bytes", "train_files": (entry,), "sequence_length": 64}
    return resolve({"data": fields | data, "model": {"block_size": 32}})


def batches_of(entry: str, **data: Any) -> Any:
    return build.make_batches(config_of(entry, **data).data, BatchSpec(32, 4, 5))


def source_of(entry: str, vocabulary: Any = BYTES, shuffle: bool = True) -> Any:
    name, _, split = entry.partition(":")
    return tfds_source.tfds_source(name, split, vocabulary, 5, FIELD, shuffle=shuffle)


def streamed(entry: str, vocabulary: Any = BYTES, shuffle: bool = True) -> SeqioSource:
    """Return the documents as seqio itself reads them."""
    import tensorflow_datasets as tfds

    name, _, split = entry.partition(":")
    return tfds_source._streamed(tfds.builder(name), split, "text", vocabulary, 5, shuffle)


def decoded(example: Example) -> str:
    return BYTES.decode(example.ids[:-1].tolist())


def assert_same(one: list[Example], other: list[Example]) -> None:
    for left, right in zip(one, other, strict=True):
        np.testing.assert_array_equal(left.ids, right.ids)
        np.testing.assert_array_equal(left.weights, right.weights)
        assert left.text_bytes == right.text_bytes


@pytest.mark.parametrize(
    ("entry", "shuffle", "places"),
    [
        ("fam_many:train", True, [(0, 0), (1, 333)]),
        ("fam_many:train[13%:90%]", False, [(1, 400)]),
        ("fam_ordered:train[:90%]", True, [(2, 0)]),
        ("fam_ordered:train", False, [(0, 0)]),
    ],
)
def test_the_order_is_that_of_seqio(
    data_dir: pathlib.Path, entry: str, shuffle: bool, places: list[tuple[int, int]]
) -> None:
    found, expected = source_of(entry, shuffle=shuffle), streamed(entry, shuffle=shuffle)
    assert found.fingerprint == expected.fingerprint
    for epoch, first in places:
        whole = list(found.epoch(epoch, first))
        assert_same(whole, list(expected.epoch(epoch, first)))
        assert len({decoded(example) for example in whole}) == len(whole) > 100


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("vocabularies")
    (folder / "text.model").write_bytes(train_text_vocabulary(TEXTS[:200], 320))
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(TEXTS[:200], vocab_size=320, special_tokens=["<end>"])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    return {name: load_vocabulary(str(folder / name)) for name in ("text.model", "tokenizer.json")}


@pytest.mark.parametrize("name", ["text.model", "tokenizer.json"])
def test_texts_tokenized_together_have_the_ids_that_each_has_alone(
    data_dir: pathlib.Path, vocabularies: dict[str, Any], name: str
) -> None:
    """And the ids that seqio's own pipeline gives them."""
    vocabulary = vocabularies[name]
    found = list(source_of("fam_many:train", vocabulary).epoch(2, 1000))
    assert_same(found, list(streamed("fam_many:train", vocabulary).epoch(2, 1000)))
    together = [example.ids.tolist() for example in TextSource(Texts(), vocabulary).read(range(100))]
    assert together == [[*vocabulary.encode(text), vocabulary.eos_id] for text in TEXTS[:100]]


class Texts:
    fingerprint = "texts"

    def __len__(self) -> int:
        return len(TEXTS)

    def __getitem__(self, index: int) -> str:
        return TEXTS[index]


def test_a_run_that_began_with_seqio_goes_on(data_dir: pathlib.Path) -> None:
    data = config_of("tfds:fam_many:train", shuffle_batches=2).data
    before = PackedBatches(data, streamed("fam_many:train"), BatchSpec(32, 4, 5))
    for _ in range(9):
        before.next()
    now = batches_of("tfds:fam_many:train", shuffle_batches=2)
    now.restore(json.loads(json.dumps(before.state())))
    for _ in range(4):
        found, expected = now.next(), before.next()
        for part in expected:
            np.testing.assert_array_equal(found[part], expected[part])


def test_examples_before_the_first_are_not_read(
    data_dir: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    texts = tfds_source.TfdsTexts
    original = texts.__getitem__

    def counted(self: Any, index: int) -> str:
        read.append(index)
        return original(self, index)

    monkeypatch.setattr(texts, "__getitem__", counted)
    found = list(source_of("fam_many:train").epoch(0, 1040))
    assert len(found) == len(read) == 10


def test_array_records_are_read_by_number(data_dir: pathlib.Path) -> None:
    source = source_of("fam_array:train[100:]")
    assert len(source.source) == 200
    whole = [decoded(example) for example in source.epoch(0)]
    assert len(set(whole)) == 200 and set(whole) < set(TEXTS)
    assert [decoded(example) for example in source.epoch(0, 190)] == whole[190:]
    assert [decoded(example) for example in source.epoch(1)] != whole
    held_out = source_of("fam_array:train", shuffle=False)
    assert [e.ids.tolist() for e in held_out.epoch(3, 7)] == [
        held_out.source[i].ids.tolist() for i in range(7, FEW)
    ]


@pytest.mark.parametrize("name", ["fam_many", "fam_array"])
@pytest.mark.parametrize("layout", ["by_row", "continuous"])
def test_rows_of_their_own(data_dir: pathlib.Path, name: str, layout: str) -> None:
    batches, resumed = (batches_of(f"tfds:{name}:train", layout=layout) for _ in range(2))
    source = source_of(f"{name}:train").source
    first = source[permutation(len(source), "documents", 5, 0)[0]]
    batch = batches.next()
    row = batch["targets"][0][batch["weights"][0] > 0].tolist()
    begins = [0] if layout == "by_row" else range(0, len(first.ids), 32)
    assert row[:32] in [first.ids[begin : begin + 32].tolist() for begin in begins]
    batches.next()
    state = batches.state()
    assert state["stream"]["contents"] == f"{name}/1.0.0:train"
    resumed.restore(state)
    for _ in range(3):
        np.testing.assert_array_equal(batches.next()["targets"], resumed.next()["targets"])


def test_formats_that_are_read_in_order_only(data_dir: pathlib.Path) -> None:
    source = source_of("fam_parquet:train", shuffle=False)
    assert sorted(map(decoded, source.epoch(0))) == TEXTS[:9]
    batches = batches_of("tfds:fam_parquet:train", layout="by_row", seqio_shards=1)
    assert len(batches.next()["targets"]) == 4
    with pytest.raises(ConfigError) as caught:
        batches_of("tfds:fam_parquet:train", layout="continuous")
    assert str(caught.value) == (
        "config.data.layout: continuous reads examples by number, but those of tfds:fam_parquet:train can be read in "
        "order only; use by_row, or prepare the dataset with `tfds build --file_format=array_record`"
    )
    fields = {
        "task": "seqio:fam_test_answers",
        "imports": ("tests.data.text_seqio_tasks",),
        "layout": "continuous",
    }
    data = resolve({"data": {**fields, "sequence_length": 64}, "model": {"block_size": 32}}).data
    with pytest.raises(
        ConfigError,
        match=r"by number, but those of seqio:fam_test_answers can be read in order only; use by_row$",
    ):
        build.make_batches(data, BatchSpec(32, 4, 5))


def test_damaged_files_are_rejected(data_dir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    source = source_of("fam_ordered:train", shuffle=False).source
    records = source.documents.records
    assert source.documents[FEW - 1] == TEXTS[FEW - 1] and len(source) == FEW
    copy = tmp_path / "copy.tfrecord"
    shutil.copy(records._spans[0].filename, copy)
    span = dataclasses.replace(records._spans[0], filename=str(copy))
    assert tfds_source.RecordFiles([span], FIELD)[3] == records[3]
    raw = copy.read_bytes()
    texts = tfds_source.TfdsTexts([b"\x80", b"", raw[12:40]], "text", "fam/1.0.0:train", FIELD)
    for index in range(3):
        with pytest.raises(
            UserError, match=f"^{FIELD}: the text text of example {index} of fam/1.0.0:train is dam"
        ):
            texts[index]
    copy.write_bytes(raw[:-5])
    with pytest.raises(
        UserError, match=r"^config\.data\.train_files: .*copy\.tfrecord: is not a TFRecord file of"
    ):
        tfds_source.RecordFiles([span], FIELD)[0]
    copy.unlink()
    with pytest.raises(
        UserError, match=r"copy\.tfrecord: cannot be read \(No such file or directory\); check"
    ):
        tfds_source.RecordFiles([span], FIELD)[0]
