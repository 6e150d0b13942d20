"""Train a SentencePiece model on text files.

    python -m launch.train_vocabulary --files=books/ --size=8000 --out=books.model

Then train a model with --config.data.vocabulary=books.model --config.model.vocab_size=8000. Characters without a piece
are encoded as bytes, so decoding gives back any text exactly.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from etils import epath
from rich.console import Console

from . import cli

if TYPE_CHECKING:
    from fam_jax.data.documents import Documents


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Raises:
      UserError: an argument is unknown, missing or malformed.
    """
    parser = cli.Parser("train_vocabulary", __doc__)
    add = parser.add_argument
    add(
        "--files",
        type=cli.paths,
        required=True,
        metavar="PATH,...",
        help="UTF-8 files, folders or patterns; *.jsonl, *.json, *.parquet and *.gz hold documents",
    )
    add(
        "--suffixes",
        type=cli.words,
        default=(".txt",),
        metavar=".txt,...",
        help="endings of the files that count in a folder; default: .txt",
    )
    add(
        "--size",
        type=cli.at_least(1),
        required=True,
        metavar="N",
        help="number of pieces, 259 of which are bytes and special ids",
    )
    add(
        "--megabytes",
        type=cli.at_least(1),
        default=100,
        metavar="N",
        help="amount of text to learn from, taken from all over the files; default: %(default)s",
    )
    add("--out", type=epath.Path, required=True, metavar="FILE", help="where to write the model")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Train a vocabulary and write it; return the exit code.

    Raises:
      UserError: the command line has a mistake, or a file cannot be read or written.
    """
    arguments = parse_arguments(argv)
    train(
        arguments.files, arguments.suffixes, arguments.out, size=arguments.size, megabytes=arguments.megabytes
    )
    return 0


def train(
    files: Sequence[str], suffixes: Sequence[str], out: epath.Path, *, size: int, megabytes: int
) -> None:
    """Train a SentencePiece model of `size` pieces on some megabytes of `files`, and write it to `out`.

    Raises:
      UserError: a file cannot be read or written, or the text is too short for that many pieces.
    """
    from fam_jax.checkpoint.new_file import check_output_file, output_file
    from fam_jax.data.documents import Documents, find_files
    from fam_jax.data.text_vocabulary import train_text_vocabulary

    out = out.expanduser()
    check_output_file(out)
    documents = Documents(find_files(files, suffixes, "--files"), "--files")
    with Console(stderr=True).status(f"counting pieces of {len(documents):,} documents"):
        model = train_text_vocabulary(sample(documents, megabytes), size, threads=os.cpu_count() or 1)
    with output_file(out) as file:
        file.write(model)
    print(f"{size} pieces written to {out}", file=sys.stderr)


def sample(documents: "Documents", megabytes: int) -> Iterator[str]:
    """Yield documents from all over the files, up to so many million characters; the last one may be cut."""
    left, step = megabytes * 1_000_000, max(1, len(documents) // 1000)
    for first in range(step):
        for index in range(first, len(documents), step):
            if left <= 0:
                return
            text = documents[index][:left]
            left -= len(text)
            yield text


if __name__ == "__main__":
    cli.run(main)
