"""Tokenized examples, in an order that depends on a seed and the epoch only, from any one of them on."""

import dataclasses
import importlib
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from fam_jax.config import ConfigError
from fam_jax.data.documents import Documents
from fam_jax.data.passkey import random_key
from fam_jax.data.quiet_seqio import seqio, tf

TOGETHER = 32  # documents tokenized at a time, on all cores


class Example(NamedTuple):
    """The tokens that a model is to predict, one after the other."""

    ids: np.ndarray  # (n,) int32
    weights: np.ndarray  # (n,) float32, of the loss
    text_bytes: int  # of the text in UTF-8; 0 where there is none


class Examples(Protocol):
    """A source of examples."""

    @property
    def vocabulary(self) -> seqio.Vocabulary:
        """Of the ids."""

    @property
    def fingerprint(self) -> str:
        """Differs where the examples do."""

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Example]:
        """The examples of an epoch from number `first` on, in an order of its own."""


def permutation(size: int, *key: Any) -> np.ndarray:
    """A random order of `size` things that depends on `key` only, in every version of NumPy."""
    draws = np.random.Philox(key=random_key(*key)).random_raw(size)
    return np.argsort(draws, kind="stable")


@dataclasses.dataclass(frozen=True)
class TextExamples:
    """Documents of files; each ends in the end-of-sequence id, and all tokens count."""

    documents: Documents
    vocabulary: seqio.Vocabulary
    seed: int

    @property
    def fingerprint(self) -> str:
        """Of the contents of the files."""
        return self.documents.fingerprint

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Example]:
        """See :class:`Examples`; those before `first` are not read."""
        order = permutation(len(self.documents), "documents", self.seed, epoch)[first:]
        for begin in range(0, len(order), TOGETHER):
            texts = [self.documents[index] for index in order[begin : begin + TOGETHER]]
            for text, encoded in zip(texts, self._encode(texts), strict=True):
                ids = np.array([*encoded, self.vocabulary.eos_id], np.int32)
                yield Example(ids, np.ones(len(ids), np.float32), len(text.encode()))

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if isinstance(self.vocabulary, seqio.SentencePieceVocabulary):
            return self.vocabulary.tokenizer.encode(texts, num_threads=os.cpu_count())
        return [self.vocabulary.encode(text) for text in texts]


@dataclasses.dataclass(frozen=True)
class SeqioExamples:
    """Examples of a seqio task or mixture: inputs, of loss weight 0, then targets, of weight 1 (section 3.1).

    To start at an example, those before it are made and dropped. Random preprocessing repeats exactly if it takes its
    seeds from seqio.
    """

    provider: Any  # seqio.Task | seqio.Mixture
    split: str
    seed: int
    shuffle: bool = True  # in an order of each epoch's own; else as they come, and a mixture ends

    @property
    def vocabulary(self) -> seqio.Vocabulary:
        """Of the targets."""
        return self.provider.output_features["targets"].vocabulary

    @property
    def fingerprint(self) -> str:
        """Name and split: seqio does not tell of contents."""
        return f"{self.provider.name}:{self.split}"

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Example]:
        """See :class:`Examples`; of a mixture that is shuffled there is a single, endless one."""
        mixture = isinstance(self.provider, seqio.Mixture)
        if mixture and not self.shuffle:  # as a whole; seqio would end with its shortest task
            tasks = [task for task in self.provider.tasks if self.split in task.splits]
            each = (dataclasses.replace(self, provider=task).epoch(epoch) for task in tasks)
            yield from itertools.islice(itertools.chain.from_iterable(each), first, None)
            return
        seed = random_key("seqio", self.seed, epoch) % 2**31
        with seqio.map_seed_manager(seed):
            dataset = self.provider.get_dataset(
                sequence_length=None,  # nothing is cut off
                split=self.split,
                shuffle=self.shuffle,
                seed=seed,
                num_epochs=None if mixture else 1,
            )
        names = [name for name in ("inputs", "targets") if name in self.provider.output_features]
        for example in dataset.skip(first).as_numpy_iterator():
            parts = [np.asarray(example[name], np.int32) for name in names]
            counts = np.repeat(np.arange(2 - len(parts), 2), [len(part) for part in parts])
            text = example.get("targets_pretokenized", b"") if len(parts) == 1 else b""
            yield Example(np.concatenate(parts), counts.astype(np.float32), len(text))


def seqio_examples(
    name: str, imports: Sequence[str], split: str, seed: int, *, shuffle: bool = True
) -> SeqioExamples:
    """Examples of the task or mixture that seqio knows as `name` once the modules `imports` are imported.

    Raises:
      ConfigError: a module cannot be imported, nothing has that name or split, or its features are not token ids.
    """
    for module in imports:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ConfigError(f"config.data.imports: {module} cannot be imported ({error})") from error
    if name not in {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}:
        raise ConfigError(
            f"config.data.task: seqio knows no task or mixture {name}; "
            "config.data.imports must name the module that registers it"
        )
    provider = seqio.get_mixture_or_task(name)
    features = provider.output_features
    if "targets" not in features:
        raise ConfigError(
            f"config.data.task: {name} has no feature targets; its features are {', '.join(features)}"
        )
    wrong = [
        key
        for key in ("inputs", "targets")
        if key in features and not (features[key].dtype.is_integer and features[key].rank == 1)
    ]
    if wrong:
        raise ConfigError(f"config.data.task: {name}: the feature {wrong[0]} is not a list of token ids")
    if "inputs" in features and features["inputs"].vocabulary != features["targets"].vocabulary:
        raise ConfigError(f"config.data.task: {name}: inputs and targets are of different vocabularies")
    if split not in provider.splits:
        raise ConfigError(
            f"config.data.task: {name} has no split {split}; it has {', '.join(provider.splits) or 'none'}"
        )
    return SeqioExamples(provider, split, seed, shuffle)


def tfds_examples(
    name: str, split: str, vocabulary: seqio.Vocabulary, seed: int, field: str, *, shuffle: bool = True
) -> SeqioExamples:
    """Documents of a prepared TFDS dataset: of its feature "text", or else of its only text.

    Raises:
      ConfigError: there is no such dataset or split, it is not prepared on this machine, or which text is unclear.
    """
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name)
    except (tfds.core.registered.DatasetNotFoundError, ValueError) as error:
        raise ConfigError(f"{field}: TFDS has no dataset {name}") from error
    if not builder.is_prepared():  # downloading would retry for minutes, and is not a training's business
        raise ConfigError(
            f"{field}: {name} is not prepared in {builder.data_path}; run tfds build {name}, or set TFDS_DATA_DIR"
        )
    texts = [key for key, feature in builder.info.features.items() if isinstance(feature, tfds.features.Text)]
    text = "text" if "text" in texts else texts[0] if len(texts) == 1 else None
    if text is None:
        raise ConfigError(
            f"{field}: {name} has no feature text, and its texts are {', '.join(texts) or 'none'}"
        )
    try:
        builder.as_dataset(split=split)
    except ValueError as error:
        raise ConfigError(
            f"{field}: {name} has no split {split}; it has {', '.join(builder.info.splits)}"
        ) from error

    def load(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        read = tfds.ReadConfig(shuffle_seed=seed, enable_ordering_guard=False)
        return builder.as_dataset(split=split, shuffle_files=shuffle_files, read_config=read)

    task = seqio.Task(
        "tfds_text",
        source=seqio.FunctionDataSource(load, splits=(split,)),
        preprocessors=[
            _rekeyed(text),
            seqio.preprocessors.tokenize,
            seqio.preprocessors.append_eos,
        ],
        output_features={"targets": seqio.Feature(vocabulary)},
    )
    return SeqioExamples(task, split, seed, shuffle)


def _rekeyed(text: str) -> Any:
    def rekey(dataset: tf.data.Dataset) -> tf.data.Dataset:
        return dataset.map(lambda example: {"targets": example[text]})

    return rekey
