"""The registry of data tasks, and what a config's task provides: training batches, held-out examples, a vocabulary.

To add a data source, write a subclass of :class:`DataTask`, or of :class:`PackedTask` if its examples are packed into
rows, and add a line to :data:`TASKS`. Its config fields and its name go to `fam_jax/config/data.py`.
"""

import abc
import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from absl import logging
from etils import epath

from fam_jax.config import ConfigError, DataConfig, EvaluateConfig
from fam_jax.config.data import ALGORITHMIC, INSTRUCTIONS, MIXED, PASSKEY, SEQIO, TEXT
from fam_jax.data.algorithmic import AlgorithmicCurriculum, algorithmic_stage_tokens
from fam_jax.data.bookmarks import Bookmarks
from fam_jax.data.documents import Documents, check_apart, find_files
from fam_jax.data.instructions import InstructionSource, chat_template
from fam_jax.data.interface import Batches, BatchSpec, Example, Source
from fam_jax.data.mixture import MixedBatches
from fam_jax.data.packing import PackedBatches
from fam_jax.data.passkey_curriculum import PasskeyCurriculum, stage_tokens
from fam_jax.data.quiet_seqio import seqio
from fam_jax.data.records import SUFFIXES, Row, is_rows, read_rows
from fam_jax.data.row_batches import RowBatches
from fam_jax.data.seqio_source import SeqioSource, seqio_rows, seqio_source
from fam_jax.data.sharded_batches import ShardedBatches
from fam_jax.data.source_mixture import SourceMixture
from fam_jax.data.sources import Shuffled, TextSource
from fam_jax.data.tfds_rows import TFDS, tfds_rows
from fam_jax.data.tfds_source import tfds_source
from fam_jax.data.vocabulary import load_vocabulary


class Heldout(NamedTuple):
    """Examples to evaluate on, and the vocabulary of their ids."""

    examples: list[Example]
    vocabulary: seqio.Vocabulary


class DataTask(abc.ABC):
    """A kind of training data. Methods raise ConfigError or UserError if data is missing or unusable."""

    def __init__(self, data: DataConfig):
        self.data = data

    @abc.abstractmethod
    def batches(self, spec: BatchSpec) -> Batches:
        """Return the training batches."""

    @abc.abstractmethod
    def longest_row(self, block_size: int) -> int:
        """Return the tokens of the longest row of a batch, without reading any data."""

    def vocabulary(self) -> seqio.Vocabulary:
        """Return the vocabulary that text is tokenized with."""
        return load_vocabulary(self.data.vocabulary)

    def heldout(self, seed: int) -> Source:
        """Return the examples to evaluate on: by default the documents of data.heldout_files."""
        field = "config.data.heldout_files"
        if not self.data.heldout_files:
            raise ConfigError(f"{field}: names no files to evaluate on; set it, or name files with --files")
        return self.text(self.data.heldout_files, field, seed, shuffle=False)

    def text(self, entries: Sequence[str], field: str, seed: int, *, shuffle: bool) -> Source:
        """Return the documents of text files, or of a TFDS dataset.

        Args:
          entries: files, folders and patterns, or one tfds:NAME:SPLIT alone.
          field: the config field or flag that names them, for error messages.
          seed: of the order.
          shuffle: if False, the documents of a TFDS dataset come in its order. Those of files are always shuffled.
        """
        vocabulary = self._ending_vocabulary()
        if not any(map(_is_tfds, entries)):
            documents = Documents(find_files(entries, self.data.file_suffixes, field), field)
            return Shuffled(TextSource(documents, vocabulary), seed)
        found = TFDS.fullmatch(entries[0])
        if found is None or len(entries) > 1:
            raise ConfigError(
                f"{field}: expected files, or one tfds:NAME:SPLIT alone, got {', '.join(entries)}"
            )
        return tfds_source(found["name"], found["split"], vocabulary, seed, field, shuffle=shuffle)

    def _ending_vocabulary(self) -> seqio.Vocabulary:
        """Return the vocabulary, after checking that it can end documents."""
        vocabulary = self.vocabulary()
        if vocabulary.eos_id is None or vocabulary.eos_id < 0:
            raise ConfigError(
                f"config.data.vocabulary: {self.data.vocabulary!r} has no end-of-sequence id to end documents with; "
                "use another vocabulary"
            )
        return vocabulary


class PasskeyTask(DataTask):
    """PassKey with a curriculum of filler lengths."""

    def batches(self, spec: BatchSpec) -> PasskeyCurriculum:
        """Return the batches of the curriculum."""
        return PasskeyCurriculum(self.data, spec)

    def longest_row(self, block_size: int) -> int:
        """Return the row length of the last stage."""
        return stage_tokens(self.data, self.vocabulary(), block_size)[-1]


class AlgorithmicTask(DataTask):
    """Pairs to remember, or lists to copy or reverse, with a curriculum of lengths; data.task is algorithmic:NAME."""

    def batches(self, spec: BatchSpec) -> AlgorithmicCurriculum:
        """Return the batches of the curriculum."""
        return AlgorithmicCurriculum(self.data, spec)

    def longest_row(self, block_size: int) -> int:
        """Return the row length of the last stage."""
        return algorithmic_stage_tokens(self.data, block_size)[-1]


class PackedTask(DataTask):
    """Examples of a source, in rows of data.sequence_length tokens: packed, or in another data.layout."""

    # What to do if the examples can be read in order only, for an error message.
    in_order = "use packed"

    @abc.abstractmethod
    def source(self, seed: int) -> Source:
        """Return the examples to train on; layouts other than packed need a :class:`Shuffled`, or by_row seqio."""

    def batches(self, spec: BatchSpec) -> Batches:
        """Return batches of the source in data.layout."""
        source = self.source(spec.seed)
        if isinstance(source, SeqioSource) and self.data.layout in ("packed", "by_row"):
            return seqio_batches(self.data, source, spec)
        if self.data.layout != "packed":
            if not isinstance(source, Shuffled):
                raise ConfigError(
                    f"config.data.layout: {self.data.layout} reads examples by number, but those of "
                    f"{', '.join(self.data.train_files) or self.data.task} can be read in order only; {self.in_order}"
                )
            return RowBatches(self.data, source.source, spec)
        return PackedBatches(self.data, source, spec)

    def longest_row(self, block_size: int) -> int:
        """Return data.sequence_length."""
        return self.data.sequence_length


class TextTask(PackedTask):
    """Documents of text files or of a prepared TFDS dataset."""

    in_order = "use by_row, or prepare the dataset with `tfds build --file_format=array_record`"

    def source(self, seed: int) -> Source:
        """Return the documents of data.train_files, which may share no file with data.heldout_files."""
        data, field = self.data, "config.data.train_files"
        source = self.text(data.train_files, field, seed, shuffle=True)
        if not any(map(_is_tfds, (*data.train_files, *data.heldout_files))):
            train = find_files(data.train_files, data.file_suffixes, field)
            heldout = find_files(data.heldout_files, data.file_suffixes, "config.data.heldout_files")
            check_apart(train, heldout)
        return source


class InstructionsTask(PackedTask):
    """Rows of files, TFDS datasets or seqio tasks with prompts and answers, of one source or of several with rates."""

    def source(self, seed: int) -> Source:
        """Return the rows of data.train_files or data.mixture, which may share no file with data.heldout_files."""
        data, field = self.data, "config.data.mixture" if self.data.mixture else "config.data.train_files"
        entries: list[Sequence[str]] = [(files,) for files, _ in data.mixture] or [data.train_files]
        found = [self._sources(each, field) for each in entries]
        heldout = self._sources(data.heldout_files, "config.data.heldout_files")
        check_apart(_paths([each for sources in found for each in sources]), _paths(heldout))
        parts = [self._rows(sources, field, seed) for sources in found]
        if not data.mixture:
            return Shuffled(parts[0], seed)
        mixture = SourceMixture(parts, [rate for _, rate in data.mixture], seed)
        # Other layouts read examples by number, in an order of their own.
        return mixture if data.layout == "packed" else Shuffled(mixture, seed)

    def text(self, entries: Sequence[str], field: str, seed: int, *, shuffle: bool) -> Source:
        """Return the rows of files or TFDS datasets; of files without rows, such as .txt, the documents."""
        sources = self._sources(entries, field)
        if not any(isinstance(each, str) or is_rows(each.name) for each in sources):
            return super().text(entries, field, seed, shuffle=shuffle)
        return Shuffled(self._rows(sources, field, seed), seed)

    def _sources(self, entries: Sequence[str], field: str) -> list[epath.Path | str]:
        """Return the files of entries, and those that are TFDS datasets or seqio tasks as they are."""
        suffixes = self.data.file_suffixes
        suffixes = SUFFIXES if suffixes == DataConfig().file_suffixes else suffixes
        files = [entry for entry in entries if not _is_dataset(entry)]
        return [*find_files(files, suffixes, field), *filter(_is_dataset, entries)]

    def _rows(self, sources: Sequence[epath.Path | str], field: str, seed: int) -> InstructionSource:
        vocabulary = self._ending_vocabulary()
        template = chat_template(self.data, vocabulary)
        read = functools.partial(_read_rows, imports=self.data.imports)
        source = InstructionSource(sources, field, self.data, vocabulary, template, seed, read=read)
        if skipped := source.records.skipped:
            logging.warning("%s: left out %d rows, %d examples are left", field, skipped, len(source))
        return source


class SeqioTask(PackedTask):
    """A seqio task or mixture that a module of data.imports registers; data.task is seqio:NAME."""

    in_order = "use by_row"

    def source(self, seed: int) -> Source:
        """Return the split "train"."""
        return self._split("train", seed, shuffle=True)

    def heldout(self, seed: int) -> Source:
        """Return the split "validation"."""
        return self._split("validation", seed, shuffle=False)

    def vocabulary(self) -> seqio.Vocabulary:
        """Return the vocabulary of the targets."""
        return self._split("train", seed=0, shuffle=False).vocabulary

    def _split(self, split: str, seed: int, *, shuffle: bool) -> SeqioSource:
        name = self.data.task.partition(":")[2]
        return seqio_source(name, self.data.imports, split, seed, shuffle=shuffle)


class MixedTask(DataTask):
    """Batches of text and of PassKey in random turns: a model learns to remember, and keeps what it knew before."""

    def __init__(self, data: DataConfig):
        super().__init__(data)
        self._text, self._passkey = TextTask(data), PasskeyTask(data)

    def batches(self, spec: BatchSpec) -> MixedBatches:
        """Return batches of either; the fraction of PassKey may change with the last stage of its curriculum."""
        text, passkey, data = self._text.batches(spec), self._passkey.batches(spec), self.data

        def fractions() -> dict[str, float]:
            last = data.last_stage_passkey_fraction
            return {"passkey": last if passkey.on_last_stage and last else data.passkey_fraction}

        return MixedBatches({"passkey": passkey, "text": text}, fractions, seed=spec.seed)

    def longest_row(self, block_size: int) -> int:
        """Return the longer of the longest rows of both."""
        return max(self._text.longest_row(block_size), self._passkey.longest_row(block_size))


# By the part of data.task before a colon.
TASKS: dict[str, type[DataTask]] = {
    PASSKEY: PasskeyTask,
    TEXT: TextTask,
    SEQIO: SeqioTask,
    INSTRUCTIONS: InstructionsTask,
    MIXED: MixedTask,
    ALGORITHMIC: AlgorithmicTask,
}


def find_task(data: DataConfig) -> DataTask:
    """Return the task that data.task names.

    Raises:
      ConfigError: there is no such task.
    """
    kind = data.task.partition(":")[0]
    if kind not in TASKS:
        raise ConfigError(f"config.data.task: {data.task!r} is unknown; choose one of {', '.join(TASKS)}")
    return TASKS[kind](data)


def make_batches(data: DataConfig, spec: BatchSpec) -> Batches:
    """Return the training batches of a config.

    Raises:
      ConfigError: files are missing, not UTF-8 or held out too; seqio has no such task; a row is too short; the
        examples cannot be read in data.layout.
      UserError: the vocabulary cannot be loaded or cannot express the task, or the number of processes does not divide
        B.
    """
    return find_task(data).batches(spec)


def seqio_batches(data: DataConfig, source: SeqioSource, spec: BatchSpec) -> Batches:
    """Return batches of examples that seqio reads, with bookmarks: packed, or with the layout by_row of its shards."""

    def shard(index: int, count: int) -> SeqioSource:
        bookmarks = None
        if spec.bookmarks:
            run = hashlib.blake2b(f"{source.fingerprint} {spec.seed}".encode(), digest_size=8).hexdigest()
            folder = epath.Path(spec.bookmarks) / run / f"{index}-of-{count}"
            # Of the processes that share a shard, the one with its first row makes them.
            makes = index * (spec.batch_size // count) in spec.own_rows
            bookmarks = Bookmarks(folder, source.fingerprint, makes=makes)
        return dataclasses.replace(source, shard=(index, count), bookmarks=bookmarks)

    if data.layout == "by_row":
        return ShardedBatches(data, shard, spec)
    packed = shard(0, 1)
    return PackedBatches(data, packed, spec, bookmarks=packed.bookmarks)


def heldout_examples(
    data: DataConfig, evaluate: EvaluateConfig, files: Sequence[str] = (), suffixes: Sequence[str] = ()
) -> Heldout:
    """Return the examples to evaluate on: the first evaluate.documents that have evaluate.min_tokens.

    Args:
      data: the task and its fields; a seqio task has a split "validation", others name data.heldout_files.
      evaluate: how many documents, how long, and the seed of their order.
      files: text files to use instead, whatever the task.
      suffixes: endings of files that count in folders, instead of data.file_suffixes.

    Raises:
      ConfigError: there are no such examples, or as in :func:`make_batches`.
    """
    if suffixes:
        data = dataclasses.replace(data, file_suffixes=tuple(suffixes))
    task = find_task(data)
    if files:
        source = task.text(files, "--files", evaluate.seed, shuffle=False)
    else:
        source = task.heldout(evaluate.seed)
    least = max(1, evaluate.min_tokens)
    chosen: list[Example] = []
    for example in source.epoch(0):
        if len(example.ids) >= least:
            chosen.append(example)
            if len(chosen) == evaluate.documents:
                break
    if not chosen:
        raise ConfigError(
            f"config.evaluate.min_tokens: no held-out document has {least} tokens; lower it or add documents"
        )
    return Heldout(chosen, source.vocabulary)


def longest_row(data: DataConfig, *, block_size: int) -> int:
    """Return the tokens of the longest row that training will see, without reading the training data.

    Raises:
      UserError: the vocabulary of a PassKey task cannot be loaded.
    """
    return find_task(data).longest_row(block_size)


def task_vocabulary(data: DataConfig) -> seqio.Vocabulary:
    """Return the vocabulary of a task.

    Raises:
      ConfigError: seqio has no such task.
      UserError: the vocabulary cannot be loaded.
    """
    return find_task(data).vocabulary()


def _paths(sources: Sequence[epath.Path | str]) -> list[epath.Path]:
    return [each for each in sources if not isinstance(each, str)]


def _read_rows(
    source: epath.Path | str, field: str, *, imports: Sequence[str], **options: Any
) -> Iterator[Row]:
    """Yield the rows of a file, of tfds:NAME:SPLIT, or of seqio:NAME."""
    if not isinstance(source, str):
        return read_rows(source, field, **options)
    if source.startswith(f"{SEQIO}:"):
        return seqio_rows(source, field, imports=imports, **options)
    return tfds_rows(source, field, **options)


def _is_tfds(entry: str) -> bool:
    return entry.startswith("tfds:")


def _is_dataset(entry: str) -> bool:
    return _is_tfds(entry) or entry.startswith(f"{SEQIO}:")
