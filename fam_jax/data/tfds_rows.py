"""Rows of prepared TFDS datasets."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from fam_jax.config import ConfigError
from fam_jax.data.quiet_seqio import tf
from fam_jax.data.records import OnBad, Row, RowError, refuse

# The name may contain a version, as in c4/en:3.0.1, and the split a slice, as in train[:90%].
TFDS = re.compile(r"tfds:(?P<name>[\w./@+-]+?(:[\d.*]+)?):(?P<split>[A-Za-z_]\w*(\[.*\])?)")


def prepared_builder(name: str, field: str) -> Any:
    """Return the builder of a prepared TFDS dataset.

    Args:
      name: of the dataset, such as pg19 or c4/en:3.0.1.
      field: the config field that names the dataset, for error messages.

    Raises:
      ConfigError: TFDS has no such dataset, or it is not prepared on this machine.
    """
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name)
    except (tfds.core.registered.DatasetNotFoundError, ValueError) as error:
        raise ConfigError(f"{field}: TFDS has no dataset {name}; check the name") from error
    # Preparing it here would download for hours on every process of a job, or retry for minutes without a network.
    if not builder.is_prepared():
        raise ConfigError(
            f"{field}: {name} is not prepared in {builder.data_path}; run `tfds build {name}`, or set TFDS_DATA_DIR"
        )
    return builder


def check_split(builder: Any, name: str, split: str, field: str) -> None:
    """Raise :class:`ConfigError` unless a dataset has a split."""
    try:
        builder.as_dataset(split=split)
    except ValueError as error:
        raise ConfigError(
            f"{field}: {name} has no split {split}; use one of {', '.join(builder.info.splits)}"
        ) from error


def tfds_rows(entry: str, field: str, *, keys: Iterable[str] = (), bad: OnBad = refuse) -> Iterator[Row]:
    """Yield the examples of a split as rows, in the order of the dataset.

    Args:
      entry: tfds:NAME:SPLIT.
      field: the config field that names it, for messages.
      keys: features that are read, as far as the dataset has them; empty: all.
      bad: called with the error of a row whose text is not UTF-8. If it returns, the row is left out.

    Raises:
      ConfigError: `entry` has another form, or TFDS has no such dataset or split, or it is not prepared.
      RowError: raised by `bad`.
    """
    found = TFDS.fullmatch(entry)
    if found is None:
        raise ConfigError(f"{field}: expected tfds:NAME:SPLIT, got {entry}")
    name, split = found["name"], found["split"]
    builder = prepared_builder(name, field)
    check_split(builder, name, split, field)
    names = [*builder.info.features]
    chosen = {*keys} & {*names} or {*names}
    examples = builder.as_dataset(split=split, shuffle_files=False)
    for number, example in enumerate(examples.as_numpy_iterator(), 1):
        where = f"{field}: {entry}: row {number}"
        try:
            yield Row(where, {key: _plain(value) for key, value in example.items() if key in chosen})
        except UnicodeDecodeError:
            bad(RowError(f"{where}: holds text that is not UTF-8; leave it out with data.skip_bad=true"))


def _plain(value: Any) -> Any:
    """Return a value of JSON's types."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, tf.RaggedTensor | tf.compat.v1.ragged.RaggedTensorValue):
        value = value.to_list()
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return value.decode() if isinstance(value, bytes) else value
