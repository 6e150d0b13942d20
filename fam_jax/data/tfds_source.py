"""Documents of prepared TFDS datasets, read by number: those before are neither read nor tokenized."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from etils import epath

from fam_jax.config import ConfigError, UserError
from fam_jax.data.interface import Source
from fam_jax.data.quiet_seqio import seqio, tf
from fam_jax.data.randomness import random_key
from fam_jax.data.seqio_source import SeqioSource
from fam_jax.data.sources import Shuffled, TextSource
from fam_jax.data.tfds_rows import prepared_builder

# How seqio and TFDS read a dataset unless told otherwise: files at a time, examples of each in turn, examples to draw
# the next one from. Runs depend on the order that follows.
FILES_AT_A_TIME = 16
EXAMPLES_IN_TURN = 16
SHUFFLE_BUFFER = seqio.dataset_providers.SHUFFLE_BUFFER_SIZE
# Numbers of examples that are computed at a time.
NUMBERS = 1024


class Span(Protocol):
    """The examples of a file that a split reads; :attr:`SplitInfo.file_instructions` of TFDS has them."""

    filename: str
    # Examples before the first one, and the number of those to read.
    skip: int
    take: int
    # Of the whole file.
    examples_in_shard: int


class RecordFiles:
    """Records of TFRecord files by number. The places of a file's records are looked up when it is first read."""

    def __init__(self, spans: Sequence[Span], field: str):
        """Name the files.

        Args:
          spans: the files, and which of their records count.
          field: the config field that names the dataset, for error messages.
        """
        self._spans, self._field = spans, field
        self._ends = np.cumsum([span.take for span in spans])
        self._places = functools.cache(self._find_records)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> bytes:
        """Return a record.

        Raises:
          UserError: its file cannot be read, or is damaged.
        """
        number = int(np.searchsorted(self._ends, index, side="right"))
        span = self._spans[number]
        record = span.skip + index - int(self._ends[number]) + span.take
        begin, end = self._places(number)[record : record + 2].tolist()
        try:
            with epath.Path(span.filename).open("rb") as file:
                # A record is its length (8 bytes), a checksum (4), the data and a checksum (4).
                file.seek(begin + 12)
                return file.read(end - begin - 16)
        except OSError as error:
            raise UserError(self._unreadable(span, error)) from error

    def _find_records(self, number: int) -> np.ndarray:
        """Return where each record of a file begins, and where the last one ends."""
        span = self._spans[number]
        places = np.zeros(span.examples_in_shard + 1, np.int64)
        try:
            path = epath.Path(span.filename)
            with path.open("rb") as file:
                for record in range(span.examples_in_shard):
                    file.seek(int(places[record]))
                    length = int.from_bytes(file.read(8), "little")
                    places[record + 1] = places[record] + 16 + length
            size = path.stat().length
        except OSError as error:
            raise UserError(self._unreadable(span, error)) from error
        if places[-1] != size:
            raise UserError(
                f"{self._field}: {span.filename}: is not a TFRecord file of {span.examples_in_shard} examples; "
                "prepare the dataset again"
            )
        return places

    def _unreadable(self, span: Span, error: OSError) -> str:
        reason = error.strerror or error
        return f"{self._field}: {span.filename}: cannot be read ({reason}); check its permissions"


@dataclasses.dataclass(frozen=True)
class TfdsTexts:
    """A text feature of a dataset, by number."""

    # tf.train.Example, serialized.
    records: Sequence[bytes] | RecordFiles
    # Name of the feature.
    feature: str
    fingerprint: str
    # The config field that names the dataset, for error messages.
    field: str

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> str:
        """Return the text of an example.

        Raises:
          UserError: the example is damaged, or its text is not UTF-8.
        """
        try:
            example = tf.train.Example.FromString(self.records[index])
            return example.features.feature[self.feature].bytes_list.value[0].decode()
        except UnicodeDecodeError as error:
            reason = f"is not UTF-8 at byte {error.start}"
            raise UserError(self._mistake(index, f"{reason}; convert the dataset")) from error
        except Exception as error:  # protobuf's own class depends on how it is installed
            if isinstance(error, UserError):
                raise
            raise UserError(self._mistake(index, "is damaged; prepare the dataset again")) from error

    def _mistake(self, index: int, what: str) -> str:
        return f"{self.field}: the text {self.feature} of example {index} of {self.fingerprint} {what}"


@dataclasses.dataclass(frozen=True)
class StreamOrder(Shuffled):
    """The order in which seqio streams a TFDS dataset from its files, computed without reading them.

    It makes the same draws as seqio and TFDS, on numbers in place of examples. So runs that began when seqio itself
    read the examples go on with the same ones.
    """

    split: str
    # Examples of each file.
    takes: tuple[int, ...]
    # Files are read one after the other; False: in turn.
    in_order: bool
    # False: each epoch has the order of the files.
    shuffle: bool

    @property
    def fingerprint(self) -> str:
        """Return what the states of such runs hold."""
        return f"tfds_text:{self.split}"

    def order(self, epoch: int, first: int = 0) -> Iterator[int]:
        """Yield the numbers of the examples of an epoch, from place `first` of its order on."""
        seed = random_key("seqio", self.seed, epoch) % 2**31
        ends = np.cumsum(self.takes, dtype=np.int64)
        files = tf.data.Dataset.from_tensor_slices((ends - np.array(self.takes), ends))
        if self.shuffle:
            files = files.shuffle(len(self.takes), seed=seed)
        numbers = files.interleave(
            tf.data.Dataset.range,
            cycle_length=1 if self.in_order else FILES_AT_A_TIME,
            block_length=EXAMPLES_IN_TURN,
            num_parallel_calls=tf.data.AUTOTUNE,
            deterministic=True,
        )
        if self.shuffle:
            numbers = numbers.shuffle(SHUFFLE_BUFFER, seed=seed)
        groups = numbers.skip(first).batch(NUMBERS).as_numpy_iterator()
        return itertools.chain.from_iterable(group.tolist() for group in groups)


@dataclasses.dataclass(frozen=True)
class InOrder(Shuffled):
    """All examples of an indexed source by number, the same in every epoch."""

    def order(self, epoch: int, first: int = 0) -> Iterator[int]:
        """Yield the numbers of the examples of an epoch, from place `first` on."""
        return iter(range(first, len(self.source)))


def tfds_source(
    name: str, split: str, vocabulary: seqio.Vocabulary, seed: int, field: str, *, shuffle: bool = True
) -> Source:
    """Return the documents of a prepared TFDS dataset.

    They are its feature "text", its only text feature, or the only one that ends in "_text", as book_text of pg19.

    Those in TFRecord and ArrayRecord files are read by number, others in order only.

    Args:
      name: of the dataset, such as pg19 or c4/en:3.0.1.
      split: such as train or train[:90%].
      vocabulary: with an end-of-sequence id, which ends each document.
      seed: of the order.
      field: the config field that names the dataset, for error messages.
      shuffle: True: each epoch has an order of its own. False: documents come in the order of the dataset.

    Raises:
      ConfigError: TFDS has no such dataset or split, it is not prepared on this machine, or it has several texts.
    """
    import tensorflow_datasets as tfds

    builder = prepared_builder(name, field)
    feature = _text_feature(builder, name, field)
    try:
        spans = builder.info.splits[split].file_instructions
    except (KeyError, ValueError, AssertionError):
        spans = []
    if not sum(span.take for span in spans):
        raise ConfigError(
            f"{field}: {name} has no split {split}; use one of {', '.join(builder.info.splits)}"
        )
    formats = tfds.core.FileFormat
    if builder.info.file_format not in (formats.TFRECORD, formats.ARRAY_RECORD):
        return _streamed(builder, split, feature, vocabulary, seed, shuffle)
    if by_number := builder.info.file_format == formats.ARRAY_RECORD:
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        records = builder.as_data_source(split=split, deserialize_method=raw)
    else:
        records = RecordFiles(spans, field)
    fingerprint = f"{builder.info.full_name}:{split}"
    source = TextSource(TfdsTexts(records, feature, fingerprint, field), vocabulary)
    if by_number:
        # seqio cannot read such files, so no run depends on its order.
        return Shuffled(source, seed) if shuffle else InOrder(source, seed)
    takes, in_order = tuple(span.take for span in spans), builder.info.disable_shuffling
    return StreamOrder(source, seed, split, takes, in_order, shuffle)


def _text_feature(builder: Any, name: str, field: str) -> str:
    """Return the name of the feature that holds the documents."""
    import tensorflow_datasets as tfds

    texts = [key for key, feature in builder.info.features.items() if isinstance(feature, tfds.features.Text)]
    for found in (
        ["text"] if "text" in texts else [],
        texts,
        [key for key in texts if key.endswith("_text")],
    ):
        if len(found) == 1:
            return found[0]
    raise ConfigError(
        f"{field}: {name} has no feature text, and its text features are {', '.join(texts) or 'none'}; "
        "register a seqio task that chooses one"
    )


def _streamed(
    builder: Any, split: str, feature: str, vocabulary: seqio.Vocabulary, seed: int, shuffle: bool
) -> SeqioSource:
    """Return the documents of a dataset whose files are read from the beginning only."""
    import tensorflow_datasets as tfds

    def load(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        read = tfds.ReadConfig(shuffle_seed=seed, enable_ordering_guard=False)
        return builder.as_dataset(split=split, shuffle_files=shuffle_files, read_config=read)

    def as_targets(dataset: tf.data.Dataset) -> tf.data.Dataset:
        return dataset.map(lambda example: {"targets": example[feature]})

    task = seqio.Task(
        "tfds_text",
        source=seqio.FunctionDataSource(load, splits=(split,)),
        preprocessors=[as_targets, seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features={"targets": seqio.Feature(vocabulary)},
    )
    return SeqioSource(task, split, seed, shuffle)
