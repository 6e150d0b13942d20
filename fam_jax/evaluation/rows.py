"""Rows of a task's data: files of JSON Lines, JSON and Parquet below the folders of `--data`, or datasets of TFDS."""

import functools
import gzip
import importlib
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fam_jax.config import UserError
from fam_jax.config.strict_json import parse_json
from fam_jax.data.records import half_pair
from fam_jax.data.text_files import JSON, PARQUET, decode_text, parquet_rows
from fam_jax.evaluation.item import ItemTask, Row

TFDS = "tfds"
# Stands for any one name in a source, so that its rows come from several files, such as one for each length.
ANY = "*"
# Endings of files with rows, in the order in which they are looked for.
ENDINGS = (".jsonl", ".jsonl.gz", JSON, f"{JSON}.gz", PARQUET)


class MissingDataError(UserError):
    """The data of a task is not on disk, or not enough of it."""


class Data:
    """Where the data of tasks is looked for. What has been read stays in memory, as tasks share it."""

    def __init__(self, places: Sequence[str]):
        """Take folders, and "tfds" for the datasets that TFDS has prepared.

        Raises:
          UserError: a folder does not exist.
        """
        self._places = [place if place == TFDS else os.path.expanduser(place) for place in places]
        for place in self._places:
            if place != TFDS and not Path(place).is_dir():
                raise UserError(f"--data={place}: no such folder; name folders with data, or tfds")
        self._read = functools.lru_cache(maxsize=4)(_read_rows)

    def texts(self, name: str) -> dict[str, str]:
        """Return the text files of a folder of this name by their names without ending, in the first place with one.

        Raises:
          MissingDataError: no place has such a folder with .txt files.
          UserError: a file cannot be read.
        """
        folder = Path(self.folder(name) or "")
        found = {path.stem: path for path in sorted(folder.glob("*.txt"))} if folder.name else {}
        if not found:
            raise MissingDataError(f"{name}: is not on disk; put its .txt files into a folder of --data")
        try:
            return {stem: decode_text(path.read_bytes(), str(path)) for stem, path in found.items()}
        except OSError as error:
            raise UserError(
                f"{error.filename}: cannot be read ({error.strerror}); correct or replace the file"
            ) from error

    def rows(self, task: ItemTask, split: str) -> list[Row]:
        """Return the rows of a split.

        Raises:
          MissingDataError: it is not on disk; the message says how to prepare it.
          UserError: a file is damaged, or holds no rows.
        """
        source = self.source(task, split)
        found = self._read(source)
        if not found:
            raise UserError(f"{source}: holds no rows; give the data of the task {task.name}")
        return found

    def folder(self, name: str) -> str | None:
        """Return the folder of this name in the first place that has one; None: there is none."""
        found = (Path(place) / name for place in self._places if place != TFDS)
        return next((str(path) for path in found if path.is_dir()), None)

    def dataset(self, name: str) -> str | None:
        """Return `name`, tfds:NAME:SPLIT, if "tfds" is among the places and has prepared it; else None."""
        return name if name and TFDS in self._places and _is_prepared(name) else None

    def source(self, task: ItemTask, split: str) -> str:
        """Return where the rows of a split are read from: a path, or tfds:NAME:SPLIT.

        Raises:
          MissingDataError: nowhere.
        """
        names = task.sources[split]
        for place in self._places:
            for name in names:
                if name.startswith(f"{TFDS}:"):
                    if place == TFDS and _is_prepared(name):
                        return name
                elif place != TFDS:
                    for ending in ENDINGS:
                        path = Path(place) / f"{name}{ending}"
                        if path.is_file() or (ANY in name and _files(str(path))):
                            return str(path)
        raise MissingDataError(f"task {task.name}: its data is not on disk; {how_to_prepare(names)}")


def how_to_prepare(names: Sequence[str]) -> str:
    """Return what puts the data of a split on disk."""
    files = [name for name in names if not name.startswith(f"{TFDS}:")]
    ways = [f"put {files[0].replace(ANY, 'LENGTH')}.jsonl into a folder of --data"] if files else []
    for name in names:
        if name.startswith(f"{TFDS}:"):
            ways.append(f"run `tfds build {name.split(':')[1]}` and use --data=tfds")
            break
    return " or ".join(reversed(ways))


def _read_rows(source: str) -> list[Row]:
    if source.startswith(f"{TFDS}:"):
        return _numbered(_tfds_rows(source), source)
    if Path(source).is_file():
        return _numbered(_file_rows(Path(source)), source)
    rows = []
    for part, path in _files(source).items():
        rows += _numbered(_file_rows(path), str(path), part)
    return rows


def _numbered(values: Iterable[Mapping[str, Any]], source: str, part: str = "") -> list[Row]:
    begin = f"{part}/" if part else ""
    return [
        Row(f"{begin}{number}", row, f"{source}: row {number + 1}", part) for number, row in enumerate(values)
    ]


def _files(pattern: str) -> dict[str, Path]:
    """Return the files of a pattern by what its last * stands for: a name, or the beginning of one."""
    before, _, after = pattern.rpartition(ANY)
    folder = Path(before)
    if not before.endswith("/") or not folder.is_dir():
        return {}
    found = {}
    for entry in sorted(folder.iterdir()):
        part = entry.name if after.startswith("/") else entry.name.removesuffix(after)
        path = folder / f"{part}{after}"
        if part and not part.startswith(".") and path.is_file():
            found[part] = path
    return found


def _file_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a file; its name says the format.

    Raises:
      UserError: it cannot be read, is damaged, or has a row that is no object.
    """
    try:
        if path.name.endswith(PARQUET):
            with path.open("rb") as file:
                yield from parquet_rows(file, str(path), choose=list)  # all columns
            return
        raw = path.read_bytes()
        if path.name.endswith(".gz"):
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason}); correct or replace the file") from error
    text = decode_text(raw, str(path))
    if path.name.removesuffix(".gz").endswith(JSON):
        found = _parsed(text, str(path))
        # Published files wrap their rows in an object, as {"version": .., "data": [..]}.
        lists = [each for each in found.values() if isinstance(each, list)] if isinstance(found, dict) else []
        found = lists[0] if len(lists) == 1 else found
        entries = enumerate(found if isinstance(found, list) else [found], 1)
        yield from (_object(row, f"{path}: entry {number}") for number, row in entries)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}: line {number}"
            yield _object(_parsed(line, where), where)


def _parsed(text: str, where: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise UserError(f"{where}: is not valid JSON; correct or remove it") from error


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected an object with fields, got {type(value).__name__}; correct it")
    if wrong := half_pair(value):
        raise UserError(
            f"{where}: has half a surrogate pair, {wrong}, which is no text; correct or remove it"
        )
    return value


def _is_prepared(source: str) -> bool:
    """Return whether a split of a TFDS dataset is on disk. Nothing is downloaded."""
    tfds = _tfds()
    _, name, split = source.split(":")
    try:
        return split in tfds.builder(name).info.splits  # there are none until it is prepared
    except (tfds.core.DatasetNotFoundError, ValueError):
        return False


def _tfds() -> Any:
    """Import TFDS, after TensorFlow without its log output."""
    importlib.import_module("fam_jax.data.quiet_seqio")
    return importlib.import_module("tensorflow_datasets")


def _tfds_rows(source: str) -> Iterator[Mapping[str, Any]]:
    tfds = _tfds()
    _, name, split = source.split(":")
    for row in tfds.as_numpy(tfds.builder(name).as_dataset(split=split, shuffle_files=False)):
        yield {key: plain(value) for key, value in row.items()}


def plain(value: Any) -> Any:
    """Return a value of TFDS as JSON has it: text for bytes, lists for arrays and ragged tensors."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, np.ndarray):
        return [plain(each) for each in value] if value.ndim else plain(value[()])
    if isinstance(value, np.generic):
        return value.item()
    if hasattr(value, "to_list"):  # a ragged tensor
        return plain(value.to_list())
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value
