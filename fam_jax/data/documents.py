"""Text files as numbered documents: find the files, check them before training begins, read one document at a time.

Imports no TensorFlow. Paths may be on any filesystem that `etils.epath` supports, such as gs://.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from etils import epath

from fam_jax.config import ConfigError

WILDCARD = re.compile(r"[*?\[]")


class Span(NamedTuple):
    """The place of a document."""

    path: epath.Path
    # First byte in the file.
    begin: int
    # Bytes in the file: all of them, or one line of JSON.
    size: int
    # True: a line of JSON. False: plain text.
    is_json: bool


def find_files(entries: Sequence[str], suffixes: Sequence[str], field: str) -> list[epath.Path]:
    """Return the files that `entries` name, sorted and without duplicates.

    Args:
      entries: files, folders (all files below them that end in one of `suffixes`) and patterns such as `books/*.txt`.
      suffixes: endings of the files that count in folders, such as ".txt".
      field: the config field or flag that the entries come from, for error messages.

    Raises:
      ConfigError: an entry names no file.
    """
    found: dict[str, epath.Path] = {}
    for entry in entries:
        found |= {_identity(path): path for path in _files_of(entry, suffixes, field)}
    return [found[name] for name in sorted(found)]


def _files_of(entry: str, suffixes: Sequence[str], field: str) -> list[epath.Path]:
    path = epath.Path(entry).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        if files := [each for each in _below(path) if each.name.endswith(tuple(suffixes))]:
            return files
        setting = "--suffixes" if field.startswith("--") else "config.data.file_suffixes"
        raise ConfigError(
            f"{field}: the folder {entry} has no files that end in {' or '.join(suffixes)}; "
            f"set {setting} to the endings of its files"
        )
    wild = next((i for i, part in enumerate(path.parts) if WILDCARD.search(part)), None)
    if wild is None:
        raise ConfigError(f"{field}: {entry}: no such file or folder; check the path")
    if "**" in path.parts:
        raise ConfigError(f"{field}: {entry}: ** is not supported; name the folder to use all files below it")
    root = epath.Path(*path.parts[:wild])
    if files := [each for each in root.glob("/".join(path.parts[wild:])) if each.is_file()]:
        return files
    raise ConfigError(f"{field}: no file matches {entry}; check the pattern")


def _below(folder: epath.Path) -> Iterator[epath.Path]:
    for path in folder.iterdir():
        if path.is_dir():
            yield from _below(path)
        else:
            yield path


def _identity(path: epath.Path) -> str:
    """Return a name that is the same for a file and for links to it."""
    name = str(path)
    return name if "://" in name else os.path.realpath(name)


def check_apart(train: Sequence[epath.Path], heldout: Sequence[epath.Path]) -> None:
    """Raise :class:`ConfigError` if a held-out file is a training file too."""
    shared = sorted({_identity(path) for path in train} & {_identity(path) for path in heldout})
    if shared:
        others = f" and {len(shared) - 1} more" if shared[1:] else ""
        raise ConfigError(
            f"config.data.heldout_files: {shared[0]}{others} is in train_files too; hold out other files"
        )


class Documents:
    """The documents of files, by number; a text file is one document, and so is each line of a `.jsonl` file.

    Empty documents are left out. All files are read once at the start, so that an unreadable one stops the program
    before training begins, and so that `fingerprint` covers the contents. For more text than can be read that way in
    reasonable time, use TFDS or a seqio task.
    """

    def __init__(self, paths: Sequence[epath.Path], field: str):
        """Read and check the files.

        Args:
          paths: of :func:`find_files`.
          field: the config field or flag that names them, for error messages.

        Raises:
          ConfigError: a file is not UTF-8 or cannot be read, a line of JSONL has no text, or all files are empty.
        """
        self._spans: list[Span] = []
        contents = hashlib.blake2b(digest_size=8)
        for path in paths:
            for span, text in _checked(path, field):
                if text:
                    self._spans.append(span)
                    contents.update(len(text).to_bytes(8, "little") + text)
        if not self._spans:
            raise ConfigError(
                f"{field}: there is no text in {len(paths)} files, the first of which is {paths[0]}; name other files"
            )
        self.fingerprint = contents.hexdigest()

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> str:
        span = self._spans[index]
        with span.path.open("rb") as file:
            file.seek(span.begin)
            raw = file.read(span.size).decode()
        return json.loads(raw)["text"] if span.is_json else raw


def _checked(path: epath.Path, field: str) -> Iterator[tuple[Span, bytes]]:
    """Yield the documents of a file, and the text of each in UTF-8."""
    try:
        raw = path.read_bytes()
        raw.decode()
    except OSError as error:
        raise ConfigError(
            f"{field}: {path}: cannot be read ({error.strerror or error}); check its permissions or leave it out"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{field}: {path}: not UTF-8 at byte {error.start} (0x{error.object[error.start]:02x}); "
            "convert the file or leave it out"
        ) from error
    if path.suffix != ".jsonl":
        yield Span(path, 0, len(raw), is_json=False), raw
        return
    begin = 0
    for number, line in enumerate(raw.splitlines(keepends=True), 1):
        if line.strip():
            text = _text_of(line, f"{field}: {path}: line {number}")
            yield Span(path, begin, len(line), is_json=True), text
        begin += len(line)


def _text_of(line: bytes, where: str) -> bytes:
    try:
        return json.loads(line)["text"].encode()
    # ValueError includes UnicodeEncodeError, which half of a surrogate pair raises.
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f'{where}: expected an object with a text under "text"; correct or remove the line'
        ) from error
