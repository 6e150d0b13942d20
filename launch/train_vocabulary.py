"""Trains a SentencePiece model on text files.

    python -m launch.train_vocabulary --files=books/ --size=8000 --out=books.model

Then train with `--config.data.vocabulary=books.model --config.model.vocab_size=8000`. Letters without a piece are
encoded as bytes, and all text decodes to what it was.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence

from etils import epath
from rich.console import Console

from fam_jax.config import UserError
from fam_jax.data.documents import Documents, find_files
from fam_jax.data.text_vocabulary import train_text_vocabulary
from launch import cli


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line.

    Raises:
      UserError: an argument is unknown, missing or malformed.
    """
    parser = cli.Parser("train_vocabulary", __doc__)
    parser.add_argument("--files", type=cli.words, required=True, metavar="PATH,...",
                        help="UTF-8 files, folders or patterns; of *.jsonl files the texts")  # fmt: skip
    parser.add_argument(
        "--suffixes",
        type=cli.words,
        default=(".txt",),
        metavar=".txt,...",
        help="of files that count in folders",
    )
    parser.add_argument(
        "--size", type=int, required=True, help="number of pieces; 259 of them are bytes and special ids"
    )
    parser.add_argument(
        "--megabytes", type=int, default=100, help="of text to look at, from all over the files"
    )
    parser.add_argument("--out", type=epath.Path, required=True, help="file to write the model to")
    return parser.parse_args(arguments)


def sample(documents: Documents, megabytes: int) -> Iterator[str]:
    """Documents from all over the files, until there are so many million characters."""
    left, step = megabytes * 1_000_000, max(1, len(documents) // 1000)
    for first in range(step):
        for index in range(first, len(documents), step):
            if left <= 0:
                return
            text = documents[index][:left]
            left -= len(text)
            yield text


def main(argv: Sequence[str] | None = None) -> int:
    """Train a vocabulary; return the exit code."""
    arguments = parse_arguments(argv)
    out = arguments.out.expanduser()
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}")
    documents = Documents(find_files(arguments.files, arguments.suffixes, "--files"), "--files")
    with Console(stderr=True).status(f"counting pieces of {len(documents):,} documents"):
        model = train_text_vocabulary(
            sample(documents, arguments.megabytes), arguments.size, threads=os.cpu_count() or 1
        )
    try:
        out.write_bytes(model)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from error
    print(f"{arguments.size} pieces, written to {out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    cli.run(main)
