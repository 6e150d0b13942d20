"""Rows of JSON Lines, JSON and Parquet files, compressed or not, checked when they are read and kept by number.

Imports no TensorFlow. Paths may be on any filesystem that `etils.epath` supports, such as gs://.
"""

import array
import contextlib
import errno
import gzip
import hashlib
import io
import json
import os
import tempfile
import typing
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

from etils import epath

from fam_jax.config import ConfigError
from fam_jax.config.strict_json import dump_json, parse_json
from fam_jax.data.text_files import (
    BEGINNING,
    GZIP,
    JSON,
    JSON_LINES,
    NOT_READ,
    PARQUET,
    TextError,
    check_encoding,
    decode_text,
    parquet_rows,
)

# Endings of the files that count in a folder.
SUFFIXES = (*JSON_LINES, JSON, PARQUET, *(f"{ending}{GZIP}" for ending in (*JSON_LINES, JSON, PARQUET)))
SKIP = "set data.skip_bad=true to leave such rows out"


class RowError(TextError):
    """A row cannot be used; `data.skip_bad` leaves it out."""


class Row(NamedTuple):
    """A row of a file."""

    # The file, and the line or entry, for messages.
    where: str
    value: dict[str, Any]


# What a reader does with a row that cannot be used: raise the error, or count it.
OnBad = Callable[[RowError], None]
# A function as read_rows.
ReadRows = Callable[..., Iterator[Row]]


def is_rows(name: str) -> bool:
    """Return whether a file holds rows, by its name."""
    return name.lower().endswith(SUFFIXES)


def refuse(error: RowError) -> None:
    """Raise the error of a row that cannot be used."""
    raise error


def read_rows(
    path: epath.Path, field: str, *, keys: Iterable[str] = (), bad: OnBad = refuse
) -> Iterator[Row]:
    """Yield the rows of a file in order.

    A .jsonl or .ndjson file has an object per line; empty lines do not count. A .json file has an array of objects, one
    object, or lines. .parquet has columns. Any of them may be compressed, as in .jsonl.gz. A byte-order mark at the
    beginning is left out.

    Args:
      path: the file; its name says the format.
      field: the config field or flag that names the file, for messages.
      keys: columns of Parquet that are read, as far as the file has them; empty: all.
      bad: called with the error of a row that is not a JSON object of valid text. If it returns, the row is left out.

    Raises:
      OSError: the file cannot be read.
      TextError: the format is not supported, or the file is damaged.
      RowError: raised by `bad`.
    """
    where, name = f"{field}: {path}", path.name.lower()
    inner = name.removesuffix(GZIP)
    if not is_rows(name):
        ending = next((end for end in NOT_READ if name.endswith(end)), f".{name.rpartition('.')[2]}")
        raise TextError(
            f"{where}: {ending} files hold no rows that are read; convert it to JSON Lines, an object per line, under "
            "a name that ends in .jsonl, or to .parquet"
        )
    try:
        with _opened(path) as file:
            if inner.endswith(PARQUET):
                yield from _parquet_rows(file, where, frozenset(keys), bad)
                return
            check_encoding(file.read(BEGINNING), where)
            file.seek(0)
            rows = _lines if inner.endswith(JSON_LINES) else _json_rows
            yield from rows(file, where, bad)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise TextError(
            f"{where}: is damaged or not a gzip file; compress it again or leave it out"
        ) from error


@contextlib.contextmanager
def _opened(path: epath.Path) -> Iterator[BinaryIO]:
    """Open a file, and decompress what is read if its name says so."""
    with path.open("rb") as file:
        if not path.name.lower().endswith(GZIP):
            yield file
            return
        with gzip.open(file) as inner:
            # Parquet is read from its end, which decompression cannot start with.
            whole = path.name.lower().removesuffix(GZIP).endswith(PARQUET)
            yield io.BytesIO(inner.read()) if whole else typing.cast(BinaryIO, inner)


def _lines(file: BinaryIO, where: str, bad: OnBad) -> Iterator[Row]:
    """Yield the rows of JSON Lines."""
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        place = f"{where}: line {number}"
        try:
            yield Row(place, _object(decode_text(line, place), place))
        except RowError as error:
            bad(error)
        except TextError as error:
            bad(RowError(f"{error}, or {SKIP}"))


def _json_rows(file: BinaryIO, where: str, bad: OnBad) -> Iterator[Row]:
    """Yield the rows of a .json file: an array of objects, an object, or JSON Lines."""
    try:
        found = parse_json(decode_text(file.read(), where))
    except (ValueError, RecursionError):
        file.seek(0)
        yield from _lines(file, where, bad)
        return
    for number, value in enumerate(found if isinstance(found, list) else [found], 1):
        place = f"{where}: entry {number}"
        try:
            yield Row(place, _checked(value, place))
        except RowError as error:
            bad(error)


def _parquet_rows(file: BinaryIO, where: str, keys: frozenset[str], bad: OnBad) -> Iterator[Row]:
    """Yield the rows of a Parquet file: dicts of its columns."""

    def choose(names: list[str]) -> list[str]:
        # Without any of the columns, the error of the first row names those that there are.
        return [name for name in names if name in keys] or names

    for number, value in enumerate(parquet_rows(file, where, choose), 1):
        place = f"{where}: row {number}"
        try:
            yield Row(place, _checked(value, place))
        except RowError as error:
            bad(error)


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        return _checked(parse_json(text), where)
    except (ValueError, RecursionError) as error:
        raise RowError(f"{where}: is not valid JSON; correct or remove the line, or {SKIP}") from error


def _checked(value: Any, where: str) -> dict[str, Any]:
    """Return a row whose texts can be written in UTF-8."""
    if not isinstance(value, dict):
        found = "null" if value is None else type(value).__name__
        raise RowError(f"{where}: expected an object, got {found}; correct or remove it, or {SKIP}")
    for key, entry in value.items():
        if wrong := half_pair(entry):
            raise RowError(
                f"{where}: {key} has half a surrogate pair, {wrong}, which is no text; correct or remove it, or {SKIP}"
            )
    return value


def half_pair(value: Any) -> str:
    """Return the first half of a surrogate pair in a JSON value, as an escape; empty: there is none."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            return f"\\u{ord(value[error.start]):04x}"
        return ""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next(filter(None, map(half_pair, inner)), "")


class Records:
    """JSON values made from the rows of files, by number.

    All files are read once. The values are copied to a temporary file, so that any of them can be read later without
    the others, however the files are compressed, and whatever becomes of the files. `fingerprint` is a hash of the
    values, whatever files they come from.
    """

    def __init__(
        self,
        paths: Sequence[Any],
        field: str,
        make: Callable[[Row], Iterable[Any]] = lambda row: (row.value,),
        *,
        keys: Iterable[str] = (),
        skip_bad: bool = False,
        read: ReadRows = read_rows,
    ):
        """Read the files.

        Args:
          paths: of :func:`fam_jax.data.documents.find_files`, or whatever `read` reads.
          field: the config field or flag that names them, for messages.
          make: returns the values of a row, which may be none; raises :class:`RowError` if it cannot be used.
          keys: see :func:`read_rows`.
          skip_bad: count rows that cannot be used in `skipped`, instead of raising their error.
          read: yields the rows of a path, as :func:`read_rows`.

        Raises:
          ConfigError: a file cannot be read, is damaged or of another format, a row cannot be used, or no row is left.
        """
        # Rows that were left out.
        self.skipped = 0
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  (removed with this object)
        self._ends = array.array("q", [0])
        self._first_bad: RowError | None = None
        contents = hashlib.blake2b(digest_size=8)
        bad = self._count if skip_bad else refuse
        try:
            for path in paths:
                for row in read(path, field, keys=keys, bad=bad):
                    try:
                        values = [*make(row)]
                    except RowError as error:
                        bad(error)
                        continue
                    for value in values:
                        contents.update(self._add(value))
        except TextError as error:
            raise ConfigError(str(error)) from error
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise ConfigError(
                    f"{field}: there is no space for a copy of the rows in {tempfile.gettempdir()}; set TMPDIR to "
                    "another folder"
                ) from error
            reason = error.strerror or error
            raise ConfigError(
                f"{field}: {path}: cannot be read ({reason}); check its permissions or leave it out"
            ) from error
        if not len(self):
            if self._first_bad:
                raise ConfigError(f"{self._first_bad}; no row of {len(paths)} files can be used")
            raise ConfigError(
                f"{field}: there are no rows in {len(paths)} files, the first of which is {paths[0]}; name other files"
            )
        self._file.flush()
        self.fingerprint = contents.hexdigest()

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Any:
        """Return a value."""
        begin, end = self._ends[index], self._ends[index + 1]
        # No position is shared with other threads.
        return json.loads(os.pread(self._file.fileno(), end - begin, begin))

    def _add(self, value: Any) -> bytes:
        text = dump_json(value, ensure_ascii=False, sort_keys=True, default=str).encode()  # dates of Parquet
        self._file.write(text)
        self._ends.append(self._ends[-1] + len(text))
        return len(text).to_bytes(8, "little") + text

    def _count(self, error: RowError) -> None:
        self.skipped += 1
        self._first_bad = self._first_bad or error
