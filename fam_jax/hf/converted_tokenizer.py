"""Convert the tokenizer.model of a folder without a tokenizer.json, as AutoTokenizer of transformers does."""

import contextlib
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fam_jax.config.strict_json import dump_json
from fam_jax.data.tokenizer_folder import ADDED, SETTINGS, SPECIAL_MAP, load_tokenizer
from fam_jax.hf.config_json import ConvertError, first_line, read_json
from fam_jax.hf.folder import copy_companions
from fam_jax.hf.tokenizer import FILES, find_tokenizer

JSON, MODEL = FILES
# Beside a tokenizer.model that an export of ours wrote: SentencePiece reads it, as it did in training.
READER = "tokenizer_reader.json"
SENTENCEPIECE = {"reader": "sentencepiece"}
# Settings that change how a tokenizer divides a text, and that transformers leaves out when it saves one.
NOT_SAVED = ("legacy",)
# Settings that say how the tokenizer was loaded.
OF_LOADING = ("is_local", "local_files_only")
# The tokenizer that is written must divide these as AutoTokenizer does; {} is a special token.
PROBES = (
    "The year 1984,\n\tand  a Grün 漢字 😀", " leading and trailing ", "x{0}y {0} z", "{0}user\n{0} a", " {0}{0}b",
)  # fmt: skip


def mark_reader(folder: Path) -> None:
    """Record in the folder of an export that SentencePiece reads its tokenizer.model, if it has no tokenizer.json."""
    if find_tokenizer(folder) == folder / MODEL:
        (folder / READER).write_text(dump_json(SENTENCEPIECE) + "\n")


def needs_conversion(folder: Path) -> bool:
    """Return whether a folder has a tokenizer.model alone that SentencePiece would not read as AutoTokenizer does.

    Raises:
      ConvertError: the file that names the reader is damaged.
    """
    if find_tokenizer(folder) != folder / MODEL:
        return False
    return not (folder / READER).is_file() or read_json(folder / READER) != SENTENCEPIECE


@contextlib.contextmanager
def converted_tokenizer(folder: Path) -> Iterator[Path]:
    """Convert the tokenizer.model of a folder to a tokenizer.json with the ids of AutoTokenizer.

    transformers builds another tokenizer from the pieces of a SentencePiece model. It treats blanks and special tokens
    otherwise than SentencePiece does, and takes the files beside the model into account.

    Yields:
      A temporary folder with the tokenizer.json and the files that it is read with.

    Raises:
      ConvertError: transformers is not installed, cannot read the tokenizer, or reads it otherwise than this package
        reads the result.
    """
    name = folder / MODEL
    by_itself = f"--tokenizer={name} to read it with SentencePiece alone"
    transformers = _transformers(name, by_itself)
    with tempfile.TemporaryDirectory(prefix="fam_tokenizer_") as place:
        out = Path(place)
        copy_companions(folder, out)  # the class of a tokenizer may depend on the model's config.json
        for said in (ADDED, SPECIAL_MAP):  # what they say is in the files that transformers writes
            (out / said).unlink(missing_ok=True)
        try:
            with _quiet(transformers):
                auto = transformers.AutoTokenizer.from_pretrained(
                    folder, local_files_only=True, trust_remote_code=False
                )
                auto.save_pretrained(out)
        except Exception as error:  # the library raises errors of all kinds
            raise ConvertError(
                f"{name}: transformers cannot read it ({first_line(error)}); pass {by_itself}, or give another file"
            ) from error
        _correct_settings(folder, out)
        _check_same(name, auto, out, by_itself)
        yield out


def _transformers(name: Path, by_itself: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ConvertError(
            f"{name}: there is no tokenizer.json beside it, and only transformers reads it as AutoTokenizer does; "
            f"run `pip install 'transformers>=5'`, or pass {by_itself}"
        ) from error
    if int(transformers.__version__.partition(".")[0]) < 5:
        raise ConvertError(
            f"{name}: is converted by transformers 5, but {transformers.__version__} is installed; run "
            f"`pip install 'transformers>=5'`, or pass {by_itself}"
        )
    return transformers


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Keep warnings of transformers from the terminal."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(before)


def _correct_settings(folder: Path, out: Path) -> None:
    """Complete the settings that transformers saved by those that it leaves out."""
    original = read_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
    saved = {key: value for key, value in read_json(out / SETTINGS).items() if key not in OF_LOADING}
    saved |= {key: original[key] for key in NOT_SAVED if key in original}
    (out / SETTINGS).write_text(dump_json(saved, indent=2, ensure_ascii=False) + "\n")


def _check_same(name: Path, auto: Any, out: Path, by_itself: str) -> None:
    """Raise :class:`ConvertError` unless the files that were written give the ids of AutoTokenizer."""
    ours = load_tokenizer(out / JSON)
    special = auto.eos_token or auto.bos_token or ""
    for text in (probe.format(special) for probe in PROBES):
        if ours.tokenizer.encode(text).ids != auto(text)["input_ids"]:
            raise ConvertError(
                f"{name}: cannot be converted to a tokenizer.json with the ids of AutoTokenizer ({text!r} differs); "
                f"pass {by_itself}, or --tokenizer=none"
            )
