"""Text files as numbered documents: find the files, check them before training begins, read one document at a time.

Imports no TensorFlow. Paths may be on any filesystem that `etils.epath` supports, such as gs://.
"""

import fnmatch
import hashlib
import io
import itertools
import os
import re
import stat
import tempfile
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple

from absl import logging
from etils import epath

from fam_jax.config import ConfigError, UserError
from fam_jax.data.text_files import (
    TextError,
    begins_as_json_lines,
    decode_text,
    is_json_lines,
    is_plain,
    json_line,
    packed_documents,
)

WILDCARD = re.compile(r"[*?\[]")


class Span(NamedTuple):
    """The place of a document."""

    # None: the temporary file of :class:`Documents`, which holds text.
    path: epath.Path | None
    # First byte in the file.
    begin: int
    # Bytes in the file: all of them, or one line of JSON.
    size: int
    # Number of the line of JSON; 0: plain text.
    line: int
    # Of these bytes, to notice a file that changes later.
    digest: bytes = b""


def find_files(entries: Sequence[str], suffixes: Sequence[str], field: str) -> list[epath.Path]:
    """Return the files that `entries` name, sorted and without duplicates.

    A path that exists is taken literally, also if it has characters of a pattern. Links are followed; a folder or file
    that several paths lead to counts once. Below folders, and for `*` and `?`, hidden files and folders do not count:
    those whose names begin with a dot, such as `.git` or `._a.txt`.

    Args:
      entries: files, folders (all files below them that end in one of `suffixes`) and patterns such as `books/*.txt`.
      suffixes: endings of the files that count in folders, such as ".txt"; upper and lower case are the same.
      field: the config field or flag that the entries come from, for error messages.

    Raises:
      ConfigError: an entry names no file, or a pipe, or a folder cannot be read.
    """
    endings = tuple(suffix.strip().lower() for suffix in suffixes)
    found: dict[str, epath.Path] = {}
    try:
        for entry in entries:
            found |= {_identity(path): path for path in _files_of(entry, endings, field)}
        for path in found.values():
            if _is_stream(path):
                raise ConfigError(
                    f"{field}: {path}: is a pipe or a device, which cannot be read again; write its content to a file"
                )
    except OSError as error:
        raise ConfigError(
            f"{field}: {error.filename}: cannot be read ({error.strerror or error}); check its permissions"
        ) from error
    return [found[name] for name in sorted(found)]


def _files_of(entry: str, endings: tuple[str, ...], field: str) -> list[epath.Path]:
    if not entry.strip():
        raise ConfigError(f"{field}: an entry is empty; name files, folders or patterns")
    path = epath.Path(entry).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        if files := [each for each in _below(path, set()) if each.name.lower().endswith(endings)]:
            return files
        setting = "--suffixes" if field.startswith("--") else "config.data.file_suffixes"
        raise ConfigError(
            f"{field}: the folder {entry} has no files that end in {' or '.join(endings)}; "
            f"set {setting} to the endings of its files"
        )
    if not WILDCARD.search(entry):
        raise ConfigError(f"{field}: {entry}: no such file or folder; check the path")
    if files := [each for each in _matching(path, field) if each.is_file()]:
        return files
    raise ConfigError(f"{field}: no file matches {entry}; check the pattern")


def _matching(pattern: epath.Path, field: str) -> list[epath.Path]:
    """Return the paths that match a pattern. Its parts that exist as they are written are taken literally."""
    parts = pattern.parts
    wild = next(i for i, part in enumerate(parts) if WILDCARD.search(part))
    # A folder may have brackets in its name. epath's own `glob` would take them for a pattern.
    while wild < len(parts) and epath.Path(*parts[: wild + 1]).exists():
        wild += 1
    if "**" in parts[wild:]:
        raise ConfigError(
            f"{field}: {pattern}: ** is not supported; name the folder to use all files below it"
        )
    places = [epath.Path(*parts[:wild])]
    for part in parts[wild:]:
        places = list(itertools.chain.from_iterable(_children(place, part) for place in places))
    return places


def _children(folder: epath.Path, part: str) -> list[epath.Path]:
    """Return what one part of a pattern matches in a folder."""
    if not WILDCARD.search(part) or (folder / part).exists():
        return [folder / part]
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if fnmatch.fnmatchcase(path.name, part)]
    return found if part.startswith(".") else [path for path in found if not _hidden(path)]


def _below(folder: epath.Path, visited: set[str]) -> Iterator[epath.Path]:
    """Yield all files below a folder; a folder that links lead to again is not entered twice."""
    if _identity(folder) in visited:
        return
    visited.add(_identity(folder))
    for path in folder.iterdir():
        if _hidden(path):
            continue
        if path.is_dir():
            yield from _below(path, visited)
        else:
            yield path


def _hidden(path: epath.Path) -> bool:
    return path.name.startswith(".")


def _identity(path: epath.Path) -> str:
    """Return a name that is the same for a file and for links to it."""
    name = str(path)
    return name if "://" in name else os.path.realpath(name)


def _is_stream(path: epath.Path) -> bool:
    """Return whether a path leads to a pipe, a socket or a device. Opening a pipe waits for a writer."""
    name = str(path)
    if "://" in name or not os.path.exists(name):  # a dead link is reported when it is read
        return False
    return not stat.S_ISREG(os.stat(name).st_mode)


def check_apart(train: Sequence[epath.Path], heldout: Sequence[epath.Path]) -> None:
    """Raise :class:`ConfigError` if a held-out file is a training file too."""
    shared = sorted({_identity(path) for path in train} & {_identity(path) for path in heldout})
    if shared:
        others = f" and {len(shared) - 1} more" if shared[1:] else ""
        raise ConfigError(
            f"config.data.heldout_files: {shared[0]}{others} is in train_files too; hold out other files"
        )


class Documents:
    """The documents of files, by number.

    A file is one document, unless its name says otherwise, in upper or lower case: each line of .jsonl and .ndjson, and
    each entry of .json, is an object with a text under "text"; .parquet has a column "text"; .gz is decompressed first.

    Empty documents are left out. All files are read once at the start, so that an unreadable one stops the program
    before training begins, and so that `fingerprint` covers the contents. Documents of formats that cannot be read from
    the middle are copied to a temporary file. For more text than can be read that way in reasonable time, use TFDS or a
    seqio task.
    """

    def __init__(self, paths: Sequence[epath.Path], field: str):
        """Read and check the files.

        Args:
          paths: of :func:`find_files`.
          field: the config field or flag that names them, for error messages.

        Raises:
          ConfigError: a file is not UTF-8, damaged, of a format that is not read or cannot be read, a line of JSON has
            no text, or all files are empty.
        """
        self._field = field
        self._spans: list[Span] = []
        # Bytes of the files that are read again.
        self._sizes: dict[epath.Path, int] = {}
        self._unpacked = tempfile.TemporaryFile()  # noqa: SIM115  (removed with this object)
        contents = hashlib.blake2b(digest_size=8)
        for path in paths:
            for span, text in self._read_file(path):
                if text:
                    self._spans.append(span)
                    contents.update(len(text).to_bytes(8, "little") + text)
        if not self._spans:
            raise ConfigError(
                f"{field}: there is no text in {len(paths)} files, the first of which is {paths[0]}; name other files"
            )
        self._unpacked.flush()
        self.fingerprint = contents.hexdigest()

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> str:
        """Return the text of a document.

        Raises:
          UserError: its file was removed or changed since the start.
        """
        span = self._spans[index]
        if span.path is None:
            # No position is shared with other threads.
            return os.pread(self._unpacked.fileno(), span.size, span.begin).decode()
        try:
            with span.path.open("rb") as file:
                file.seek(span.begin)
                raw = file.read(span.size)
                size = _size_of(file)
        except OSError as error:
            raise UserError(
                f"{self._field}: {span.path}: can no longer be read ({error.strerror or error}); put the file back "
                "and run the same command to go on"
            ) from error
        if _digest(raw) != span.digest or size not in (None, self._sizes[span.path]):
            raise UserError(
                f"{self._field}: {span.path}: has changed since this program began; put the old file back and run the "
                "same command to go on, or start a new run with the new one"
            )
        return self._text(raw, span)

    def _text(self, raw: bytes, span: Span) -> str:
        """Return the text in the bytes of a span. Both the check at the start and all reading later come here."""
        where = f"{self._field}: {span.path}"
        return json_line(raw, f"{where}: line {span.line}") if span.line else decode_text(raw, where)

    def _read_file(self, path: epath.Path) -> Iterator[tuple[Span, bytes]]:
        """Yield the documents of a file, and the text of each in UTF-8."""
        try:
            if is_json_lines(path.name):
                raw, begin = path.read_bytes(), 0
                self._sizes[path] = len(raw)
                # A file that is not UTF-8 is reported as such, rather than as a wrong line of JSON.
                decode_text(raw, f"{self._field}: {path}")
                for number, line in enumerate(raw.splitlines(keepends=True), 1):
                    span = Span(path, begin, len(line), number, _digest(line))
                    if line.strip():
                        yield span, self._text(line, span).encode()
                    begin += len(line)
                return
            if is_plain(path.name):
                raw = path.read_bytes()
                self._sizes[path] = len(raw)
                span = Span(path, 0, len(raw), 0, _digest(raw))
                text = self._text(raw, span)
                if begins_as_json_lines(text):
                    logging.warning(
                        "%s: %s: holds JSON, but counts as one text by its name; let the name end in .jsonl for a "
                        "document per line",
                        self._field,
                        path,
                    )
                yield span, text.encode()
                return
            for text in packed_documents(path, f"{self._field}: {path}"):
                content = text.encode()
                yield Span(None, self._unpacked.tell(), len(content), 0), content
                self._unpacked.write(content)
        except TextError as error:
            raise ConfigError(str(error)) from error
        except OSError as error:
            raise ConfigError(self._unreadable(path, error)) from error

    def _unreadable(self, path: epath.Path, error: OSError) -> str:
        reason = error.strerror or error
        return f"{self._field}: {path}: cannot be read ({reason}); check its permissions or leave it out"


def _size_of(file: BinaryIO) -> int | None:
    """Return the size of an open file; None if it is in a bucket."""
    try:
        return os.fstat(file.fileno()).st_size
    except (AttributeError, io.UnsupportedOperation):
        return None


def _digest(raw: bytes) -> bytes:
    return hashlib.blake2b(raw, digest_size=8).digest()
