"""Documents in UTF-8 files: found, checked as a whole before anything is trained on them, read one by one.

Loads no TensorFlow. Paths may be of any filesystem that `etils.epath` reads, such as gs://.
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
    """Where a document lies."""

    path: epath.Path
    begin: int  # bytes
    size: int  # bytes in the file, all of it if it is one document
    is_json: bool  # a line of JSON; else plain text


def find_files(entries: Sequence[str], suffixes: Sequence[str], field: str) -> list[epath.Path]:
    """The files that `entries` name, sorted, each once.

    Args:
      entries: files, folders (all files below them that end in one of `suffixes`) and patterns such as `books/*.txt`.
      suffixes: of files in folders.
      field: of the config, or argument, for errors.

    Raises:
      ConfigError: an entry names nothing.
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
            f"{setting} says which count"
        )
    wild = next((i for i, part in enumerate(path.parts) if WILDCARD.search(part)), None)
    if wild is None:
        raise ConfigError(f"{field}: {entry}: no such file or folder")
    if "**" in path.parts:
        raise ConfigError(
            f"{field}: {entry}: ** is not supported; name the folder, and all files below it count"
        )
    root = epath.Path(*path.parts[:wild])
    if files := [each for each in root.glob("/".join(path.parts[wild:])) if each.is_file()]:
        return files
    raise ConfigError(f"{field}: no file matches {entry}")


def _below(folder: epath.Path) -> Iterator[epath.Path]:
    """All files in a folder and its folders."""
    for path in folder.iterdir():
        if path.is_dir():
            yield from _below(path)
        else:
            yield path


def _identity(path: epath.Path) -> str:
    """The same for all names of a file."""
    name = str(path)
    return name if "://" in name else os.path.realpath(name)


def check_apart(train: Sequence[epath.Path], heldout: Sequence[epath.Path]) -> None:
    """Raises :class:`ConfigError` if a file is both trained on and held out."""
    shared = sorted({_identity(path) for path in train} & {_identity(path) for path in heldout})
    if shared:
        others = f" and {len(shared) - 1} more" if shared[1:] else ""
        raise ConfigError(
            f"config.data.heldout_files: {shared[0]}{others} is in train_files too; hold out other files"
        )


class Documents:
    """Documents of files, by number. A file is one, a line of a `.jsonl` file too; those without text are left out.

    All files are read through once at the start: what is wrong with one is told before a training begins, and
    `fingerprint` tells other contents from these. More text than that is good for belongs in TFDS or a seqio task.
    """

    def __init__(self, paths: Sequence[epath.Path], field: str):
        """Reads and checks the files.

        Raises:
          ConfigError: a file is not UTF-8 or cannot be read, a line of JSONL has no text, or there is no text at all.
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
                f"{field}: there is no text in {len(paths)} files, the first of which is {paths[0]}"
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
    """The documents of a file, and the text of each as UTF-8."""
    try:
        raw = path.read_bytes()
        raw.decode()
    except OSError as error:
        raise ConfigError(f"{field}: {path}: cannot be read ({error.strerror or error})") from error
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
            yield (
                Span(path, begin, len(line), is_json=True),
                _text_of(line, f"{field}: {path}: line {number}"),
            )
        begin += len(line)


def _text_of(line: bytes, where: str) -> bytes:
    try:
        return json.loads(line)["text"].encode()
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:  # UnicodeEncodeError, of half a pair, too
        raise ConfigError(f'{where}: expected an object with a text under "text"') from error
