"""Sources that seqio reads: its tasks and mixtures, and prepared TFDS datasets."""

import dataclasses
import importlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fam_jax.config import ConfigError
from fam_jax.data.interface import Example
from fam_jax.data.quiet_seqio import seqio, tf
from fam_jax.data.randomness import random_key
from fam_jax.data.tfds_rows import check_split, prepared_builder


@dataclasses.dataclass(frozen=True)
class SeqioSource:
    """Examples of a seqio task or mixture: inputs, of loss weight 0, then targets, of weight 1 (section 3.1).

    seqio has no access by number: to start at an example, those before it are made and dropped. Random preprocessing
    repeats exactly if it takes its seeds from seqio.
    """

    # seqio.Task | seqio.Mixture.
    provider: Any
    split: str
    seed: int
    # True: each epoch has an order of its own, and a mixture is one endless epoch, mixed by its rates. False: examples
    # come in seqio's order, and those of a mixture task by task, each once.
    shuffle: bool = True

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
        seed = random_key("seqio", self.seed, epoch) % 2**31
        with seqio.map_seed_manager(seed):
            dataset = self.provider.get_dataset(
                # Longer examples are not truncated.
                sequence_length=None,
                split=self.split,
                shuffle=self.shuffle,
                seed=seed,
                num_epochs=None if mixture else 1,
            )
        names = [name for name in ("inputs", "targets") if name in self.provider.output_features]
        for example in dataset.skip(first).as_numpy_iterator():
            parts = [np.asarray(example[name], np.int32) for name in names]
            weights = np.repeat(np.arange(2 - len(parts), 2), [len(part) for part in parts])
            text = example.get("targets_pretokenized", b"") if len(parts) == 1 else b""
            yield Example(np.concatenate(parts), weights.astype(np.float32), len(text))


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
    for module in imports:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ConfigError(
                f"config.data.imports: {module} cannot be imported ({error}); check its name and PYTHONPATH"
            ) from error
    if name not in {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}:
        raise ConfigError(
            f"config.data.task: seqio has no task or mixture {name}; "
            "add the module that registers it to config.data.imports"
        )
    provider = seqio.get_mixture_or_task(name)
    if mistake := _mistake_in(provider, split):
        raise ConfigError(f"config.data.task: {name} {mistake}")
    return SeqioSource(provider, split, seed, shuffle)


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


def tfds_source(
    name: str, split: str, vocabulary: seqio.Vocabulary, seed: int, field: str, *, shuffle: bool = True
) -> SeqioSource:
    """Return the documents of a prepared TFDS dataset: its feature "text", or its only text feature.

    Args:
      name: of the dataset, such as pg19 or c4/en:3.0.1.
      split: such as train or train[:90%].
      vocabulary: with an end-of-sequence id, which ends each document.
      seed: of the order.
      field: the config field that names the dataset, for error messages.
      shuffle: see :class:`SeqioSource`.

    Raises:
      ConfigError: TFDS has no such dataset or split, it is not prepared on this machine, or it has several texts.
    """
    import tensorflow_datasets as tfds

    builder = prepared_builder(name, field)
    texts = [key for key, feature in builder.info.features.items() if isinstance(feature, tfds.features.Text)]
    text = "text" if "text" in texts else texts[0] if len(texts) == 1 else None
    if text is None:
        raise ConfigError(
            f"{field}: {name} has no feature text, and its text features are {', '.join(texts) or 'none'}; "
            "register a seqio task that chooses one"
        )
    check_split(builder, name, split, field)

    def load(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        read = tfds.ReadConfig(shuffle_seed=seed, enable_ordering_guard=False)
        return builder.as_dataset(split=split, shuffle_files=shuffle_files, read_config=read)

    task = seqio.Task(
        "tfds_text",
        source=seqio.FunctionDataSource(load, splits=(split,)),
        preprocessors=[
            _as_targets(text),
            seqio.preprocessors.tokenize,
            seqio.preprocessors.append_eos,
        ],
        output_features={"targets": seqio.Feature(vocabulary)},
    )
    return SeqioSource(task, split, seed, shuffle)


def _as_targets(text: str) -> Any:
    def rename(dataset: tf.data.Dataset) -> tf.data.Dataset:
        return dataset.map(lambda example: {"targets": example[text]})

    return rename
