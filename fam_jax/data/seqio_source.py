"""Sources that seqio reads: its tasks and mixtures."""

import copy
import dataclasses
import importlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import logging

from fam_jax.config import ConfigError
from fam_jax.data.bookmarks import Bookmark, Bookmarks, restore, savable
from fam_jax.data.interface import Example
from fam_jax.data.quiet_seqio import seqio, tf
from fam_jax.data.randomness import random_key
from fam_jax.data.records import SKIP, OnBad, Row, RowError, refuse

# Steps of preprocessing that make one example of each, and draw nothing at random.
TOKENIZATION = (seqio.preprocessors.tokenize, seqio.preprocessors.append_eos)
# Name of the feature for examples that are not yet tokenized.
HELD_BACK = "fam_jax_held_back"
# Begins an entry that names a task.
SEQIO = "seqio:"
# Features in which `seqio.preprocessors.tokenize` keeps texts.
PRETOKENIZED = ("inputs_pretokenized", "targets_pretokenized")


@dataclasses.dataclass(frozen=True)
class SeqioSource:
    """Examples of a seqio task or mixture: inputs, of loss weight 0, then targets, of weight 1 (section 3.1).

    seqio has no access by number. To start at an example, the last bookmark before it is opened. Examples between the
    two, or all of the epoch if there is no bookmark, are made and dropped. Those of a task are not tokenized if
    tokenization is the last step of its preprocessing. Random preprocessing repeats exactly if it takes its seeds from
    seqio.
    """

    # seqio.Task | seqio.Mixture.
    provider: Any
    split: str
    seed: int
    # True: each epoch has an order of its own, and a mixture is one endless epoch, mixed by its rates. False: examples
    # come in seqio's order, and those of a mixture task by task, each once.
    shuffle: bool = True
    # (index, count): seqio divides the examples into `count` shards, and this source has one of them.
    shard: tuple[int, int] = (0, 1)
    # Where to begin in place of the start of an epoch; None: nowhere.
    bookmarks: Bookmarks | None = None

    @property
    def vocabulary(self) -> seqio.Vocabulary:
        """Return the vocabulary of the targets."""
        return self.provider.output_features["targets"].vocabulary

    @property
    def fingerprint(self) -> str:
        """Return name and split. seqio cannot fingerprint the contents."""
        return f"{self.provider.name}:{self.split}"

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Example]:
        """Yield the examples of an epoch from place `first` on; a shuffled mixture never ends."""
        mixture = isinstance(self.provider, seqio.Mixture)
        if mixture and not self.shuffle:
            # seqio would end the mixture with its shortest task.
            tasks = [task for task in self.provider.tasks if self.split in task.splits]
            each = (dataclasses.replace(self, provider=task).epoch(epoch) for task in tasks)
            yield from itertools.islice(itertools.chain.from_iterable(each), first, None)
            return
        names = [name for name in ("inputs", "targets") if name in self.provider.output_features]
        iterator, skipped = self._iterator_at(epoch, first)
        for place in itertools.count(first):
            if self.bookmarks is not None and self.bookmarks.due():
                self.bookmarks.add(Bookmark(epoch, place, skipped), iterator, self._untokenized())
            if (example := next(iterator, None)) is None:
                return
            parts = [np.asarray(example[name], np.int32) for name in names]
            weights = np.repeat(np.arange(2 - len(parts), 2), [len(part) for part in parts])
            text = example.get("targets_pretokenized", b"") if len(parts) == 1 else b""
            yield Example(np.concatenate(parts), weights.astype(np.float32), len(text))

    def _iterator_at(self, epoch: int, first: int) -> tuple[tf.data.NumpyIterator, int]:
        """Return an iterator over an epoch from place `first` on, and how many examples its dataset skips."""
        for mark, state in self.bookmarks.until(epoch, first) if self.bookmarks is not None else ():
            iterator = self._dataset(epoch, mark.skipped).as_numpy_iterator()
            try:
                restore(iterator, state)
            except (ValueError, OSError) as error:
                logging.warning(
                    "%s: a saved place in the data cannot be used (%s); the examples before it are read again",
                    self.provider.name,
                    error,
                )
                continue
            for _ in itertools.islice(iterator, first - mark.place):
                pass
            return iterator, mark.skipped
        return self._dataset(epoch, first).as_numpy_iterator(), first

    def _untokenized(self) -> Iterator[tf.data.Dataset]:
        """Yield the datasets of all tasks, before tokenization, which has no state though it may call Python."""
        mixture = isinstance(self.provider, seqio.Mixture)
        for task in self.provider.tasks if mixture else [self.provider]:
            if self.split in task.splits:
                yield _without_tokenization(task)[0].get_dataset(
                    None, self.split, shuffle=self.shuffle, seed=0
                )

    def _dataset(self, epoch: int, first: int) -> tf.data.Dataset:
        """Return the examples of an epoch from place `first` on, as seqio makes them."""
        mixture, (index, count) = isinstance(self.provider, seqio.Mixture), self.shard
        task, last = (self.provider, []) if mixture else _without_tokenization(self.provider)
        seed = random_key("seqio", self.seed, epoch) % 2**31
        # Shards have the seed of the order in common, so that each example is in one of them, and nothing else.
        own = seed if count == 1 else random_key("seqio shard", self.seed, epoch, index) % 2**31
        if mixture and count > 1:
            task = _mixed_by(self.provider, own)
        with seqio.map_seed_manager(own):
            dataset = task.get_dataset(
                # Longer examples are not truncated.
                sequence_length=None,
                split=self.split,
                shuffle=self.shuffle,
                seed=seed,
                shard_info=seqio.ShardInfo(index, count) if count > 1 else None,
                num_epochs=None if mixture else 1,
            ).skip(first)
        for step in last:
            dataset = step(dataset)
        return savable(dataset.prefetch(tf.data.AUTOTUNE))


def _mixed_by(mixture: seqio.Mixture, seed: int) -> seqio.Mixture:
    """Return a mixture that draws the tasks of its examples by this seed, whatever the seed of their order."""
    own, sample = copy.copy(mixture), mixture._sample_fn
    own._sample_fn = lambda datasets, rates, _: sample(datasets, rates, seed)
    return own


def _without_tokenization(task: Any) -> tuple[Any, list[Callable[[tf.data.Dataset], tf.data.Dataset]]]:
    """Return a task whose examples are not yet tokenized, and what makes those of `task` of them.

    The examples have the order of those of `task`, because steps that make one example of each, and draw nothing at
    random, can be taken before or after shuffling.
    """
    features, steps = task.output_features, [*task.preprocessors]
    end = len(steps)
    while end and steps[end - 1] in TOKENIZATION:
        end -= 1
    if end == len(steps) or type(task) is not seqio.Task:
        return task, []

    def hold_back(dataset: tf.data.Dataset) -> tf.data.Dataset:
        # seqio checks that a task's examples have its features.
        empty = {name: tf.zeros([0] * feature.rank, feature.dtype) for name, feature in features.items()}
        return dataset.map(lambda example: {**empty, HELD_BACK: example})

    def give_back(dataset: tf.data.Dataset) -> tf.data.Dataset:
        return dataset.map(lambda example: example[HELD_BACK])

    last = [
        seqio.utils.add_kwargs_to_transform(step, sequence_length=None, output_features=features)
        for step in steps[end:]
    ]
    return task.replace(preprocessors=[*steps[:end], hold_back]), [give_back, *last]


def seqio_source(
    name: str, imports: Sequence[str], split: str, seed: int, *, shuffle: bool = True
) -> SeqioSource:
    """Return the source of a registered seqio task or mixture.

    Args:
      name: of the task or mixture.
      imports: modules to import first, which register it.
      split: such as "train".
      seed: of the order and of random preprocessing.
      shuffle: see :class:`SeqioSource`.

    Raises:
      ConfigError: a module cannot be imported, seqio has no such name or split, or its features are not token ids.
    """
    provider = _registered(name, imports, "config.data.task")
    if mistake := _mistake_in(provider, split):
        raise ConfigError(f"config.data.task: {name} {mistake}")
    return SeqioSource(provider, split, seed, shuffle)


def _registered(name: str, imports: Sequence[str], field: str) -> Any:
    """Return the task or mixture of a name, after importing modules that may register it."""
    for module in imports:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ConfigError(
                f"config.data.imports: {module} cannot be imported ({error}); check its name and PYTHONPATH"
            ) from error
    if name not in {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}:
        raise ConfigError(
            f"{field}: seqio has no task or mixture {name}; "
            "add the module that registers it to config.data.imports"
        )
    return seqio.get_mixture_or_task(name)


def seqio_rows(
    entry: str, field: str, *, imports: Sequence[str], keys: Iterable[str] = (), bad: OnBad = refuse
) -> Iterator[Row]:
    """Yield the examples of a seqio task as rows with the texts that seqio tokenizes, in seqio's order.

    Args:
      entry: seqio:NAME or seqio:NAME:SPLIT; the split is "train" if it is not named.
      field: the config field that names it, for messages.
      imports: modules to import first, which register the task.
      keys: ignored, since a row has two keys at most.
      bad: called with the error of a row whose text is not UTF-8. If it returns, the row is left out.

    Raises:
      ConfigError: a module cannot be imported; the name is that of a mixture, or of nothing; the task has no such split
        or does not keep its texts.
      RowError: raised by `bad`.
    """
    del keys
    name, _, split = entry.removeprefix(SEQIO).partition(":")
    split = split or "train"
    task = _registered(name, imports, field)
    if isinstance(task, seqio.Mixture):
        raise ConfigError(f"{field}: {name} is a mixture of seqio; name its tasks, each with a rate")
    if mistake := _mistake_in(task, split):
        raise ConfigError(f"{field}: {name} {mistake}")
    dataset = task.get_dataset(sequence_length=None, split=split, shuffle=False, num_epochs=1)
    for number, example in enumerate(dataset.as_numpy_iterator(), 1):
        where = f"{field}: {entry}: row {number}"
        if not isinstance(example.get(PRETOKENIZED[1]), bytes):
            raise ConfigError(
                f"{field}: {name} does not keep its texts as {' and '.join(PRETOKENIZED)}; add "
                "seqio.preprocessors.tokenize to it, or train on it alone with data.task=seqio:NAME"
            )
        try:
            texts = {key: example[key].decode() for key in PRETOKENIZED if key in example}
        except UnicodeDecodeError:
            bad(RowError(f"{where}: holds text that is not UTF-8; {SKIP}"))
            continue
        yield Row(where, texts if len(texts) == len(PRETOKENIZED) else {"text": texts[PRETOKENIZED[1]]})


def _mistake_in(provider: Any, split: str) -> str:
    """Return why a task cannot be trained on, and what to do; empty if it can."""
    features = provider.output_features
    if "targets" not in features:
        return f"has no feature targets, only {', '.join(features)}; rename one of them"
    for name in ("inputs", "targets"):
        if name in features and not (features[name].dtype.is_integer and features[name].rank == 1):
            return f"has a feature {name} that is not a list of token ids; tokenize it"
    if "inputs" in features and features["inputs"].vocabulary != features["targets"].vocabulary:
        return "has different vocabularies for inputs and targets; give both the same one"
    if split not in provider.splits:
        return f"has no split {split}, only {', '.join(provider.splits) or 'none'}; add it to the task"
    return ""
