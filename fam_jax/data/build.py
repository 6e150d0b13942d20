"""The tasks of a config: what text or seqio gives to train on, what is held out, how long rows get."""

import dataclasses
import re
from collections.abc import Sequence
from typing import NamedTuple

from fam_jax.config import Config, ConfigError
from fam_jax.data.curriculum import PasskeyStream
from fam_jax.data.documents import Documents, check_apart, find_files
from fam_jax.data.examples import (
    Example,
    Examples,
    SeqioExamples,
    TextExamples,
    seqio_examples,
    tfds_examples,
)
from fam_jax.data.packing import PackedStream
from fam_jax.data.quiet_seqio import seqio
from fam_jax.data.vocabulary import load_vocabulary

# A version such as c4/en:3.0.1 may stand in the name, and a slice such as train[:90%] in the split.
TFDS = re.compile(r"tfds:(?P<name>.+?):(?P<split>[A-Za-z_]\w*(\[.*\])?)")


class Heldout(NamedTuple):
    """Examples to evaluate on, and the vocabulary that made them."""

    examples: list[Example]
    vocabulary: seqio.Vocabulary


def packed_stream(config: Config, shard: tuple[int, int] = (0, 1)) -> PackedStream:
    """Packed training batches of a config with text or a seqio task; `shard` is (index, count) of this process.

    Raises:
      ConfigError: files are missing, not UTF-8 or held out too; seqio does not know the task; ...
      UserError: the vocabulary cannot be loaded.
    """
    data, seed = config.data, config.train.seed
    examples: Examples
    if not data.task.startswith("seqio:"):
        examples = _text(config, data.train_files, "config.data.train_files", seed, shuffle=True)
        if not any(map(_is_tfds, (*data.train_files, *data.heldout_files))):
            train = find_files(data.train_files, data.file_suffixes, "config.data.train_files")
            heldout = find_files(data.heldout_files, data.file_suffixes, "config.data.heldout_files")
            check_apart(train, heldout)
    else:
        examples = _seqio(config, "train", seed, shuffle=True)
    return PackedStream(data, examples, batch_size=config.train.batch_size, seed=seed, shard=shard)


def heldout_examples(config: Config, files: Sequence[str] = (), suffixes: Sequence[str] = ()) -> Heldout:
    """The examples that config.evaluate asks for: texts of `files` or data.heldout_files; of seqio, "validation".

    Texts of `files` can be had whatever the task was; `suffixes` stand in place of data.file_suffixes.

    Raises:
      ConfigError: there are none, or as :func:`packed_stream`.
    """
    data, evaluate = config.data, config.evaluate
    examples: Examples
    if data.task.startswith("seqio:") and not files:
        examples = _seqio(config, "validation", evaluate.seed, shuffle=False)
    else:
        if not files and not data.heldout_files:
            raise ConfigError("config.data.heldout_files: names no files to evaluate on")
        field = "--files" if files else "config.data.heldout_files"
        if suffixes:
            config = dataclasses.replace(
                config, data=dataclasses.replace(data, file_suffixes=tuple(suffixes))
            )
        examples = _text(config, files or data.heldout_files, field, evaluate.seed, shuffle=False)
    chosen: list[Example] = []
    for example in examples.epoch(0):
        if len(example.ids) >= max(1, evaluate.min_tokens):
            chosen.append(example)
            if len(chosen) == evaluate.documents:
                break
    if not chosen:
        raise ConfigError(
            f"config.evaluate.min_tokens: no held-out document has {max(1, evaluate.min_tokens)} tokens"
        )
    return Heldout(chosen, examples.vocabulary)


def longest_row(config: Config) -> int:
    """Tokens of the longest rows of training batches: PassKey's grow with the curriculum, all others are as set."""
    data = config.data
    if data.task not in ("passkey", "text+passkey"):
        return data.sequence_length
    stream = PasskeyStream(
        data, block_size=config.model.block_size, batch_size=config.train.batch_size, seed=config.train.seed
    )
    passkey = stream.stage_tokens[-1]
    return passkey if data.task == "passkey" else max(passkey, data.sequence_length)


def task_vocabulary(config: Config) -> seqio.Vocabulary:
    """What the task's text is tokenized with.

    Raises:
      ConfigError, UserError: as :func:`packed_stream`.
    """
    if config.data.task.startswith("seqio:"):
        return _seqio(config, "train", seed=0, shuffle=False).vocabulary
    return load_vocabulary(config.data.vocabulary)


def _seqio(config: Config, split: str, seed: int, *, shuffle: bool) -> SeqioExamples:
    data = config.data
    return seqio_examples(data.task.removeprefix("seqio:"), data.imports, split, seed, shuffle=shuffle)


def _is_tfds(entry: str) -> bool:
    return entry.startswith("tfds:")


def _text(
    config: Config, entries: Sequence[str], field: str, seed: int, *, shuffle: bool
) -> TextExamples | SeqioExamples:
    data = config.data
    vocabulary = task_vocabulary(config)
    if vocabulary.eos_id is None or vocabulary.eos_id < 0:
        raise ConfigError(
            f"config.data.vocabulary: {data.vocabulary!r} has no end-of-sequence id to end documents with"
        )
    if not any(map(_is_tfds, entries)):
        return TextExamples(
            Documents(find_files(entries, data.file_suffixes, field), field), vocabulary, seed
        )
    found = TFDS.fullmatch(entries[0])
    if found is None or len(entries) > 1:
        raise ConfigError(f"{field}: expected files, or one tfds:NAME:SPLIT alone, got {', '.join(entries)}")
    return tfds_examples(found["name"], found["split"], vocabulary, seed, field, shuffle=shuffle)
