"""The tokenizer of a Hugging Face folder: which file it is, whether it fits the model, and how it begins a text."""

import itertools
from pathlib import Path

import sentencepiece
import tokenizers
from etils import epath

from fam_jax.hf.config_json import ConvertError, first_line, read_json, short

FILES = ("tokenizer.model", "tokenizer.json")
SETTINGS = "tokenizer_config.json"
SPECIAL = ("bos_token", "eos_token", "unk_token")
# Embedding tables are padded to round sizes: up to this many rows may have no piece.
PADDING = 1024


def find_tokenizer(folder: Path) -> Path | None:
    """Return the SentencePiece model in `folder`, else its tokenizer.json, else None."""
    return next((folder / name for name in FILES if (folder / name).is_file()), None)


def copy_tokenizer(vocabulary: str, folder: Path) -> None:
    """Copy the file of `data.vocabulary`, if it names one, to where :func:`find_tokenizer` looks for it."""
    file = epath.Path(vocabulary)
    if vocabulary and file.is_file():
        name = FILES[1] if file.suffix == ".json" else FILES[0]
        (folder / name).write_bytes(file.read_bytes())


def check_tokenizer(path: Path, vocab_size: int) -> None:
    """Raise :class:`ConvertError` unless a tokenizer can be read and fits the vocabulary of a model.

    Added pieces that the text model has no embedding for, such as those for images, may lie beyond the vocabulary. If
    the folder has a tokenizer_config.json, which says which pieces are special, it has to be readable too.
    """
    if (path.parent / SETTINGS).exists():
        _check_settings(path.parent / SETTINGS)
    size, added = _sizes(path)
    if size > vocab_size or size + added < vocab_size - PADDING:
        raise ConvertError(
            f"{path}: has {size + added} pieces, but the model's vocab_size is {vocab_size}; give the model's own "
            "tokenizer with --tokenizer=FILE, or pass --tokenizer=none"
        )


def adds_bos(tokenizer: Path) -> bool:
    """Return whether texts begin with the start token (BOS).

    `add_bos_token` in tokenizer_config.json decides. Without it, the template of a tokenizer.json does; the families
    with a SentencePiece model begin with BOS if the model has it.

    Args:
      tokenizer: a file that :func:`check_tokenizer` accepts.

    Raises:
      ConvertError: texts begin with several tokens.
    """
    settings = tokenizer.with_name(SETTINGS)
    add_bos_token = read_json(settings).get("add_bos_token") if settings.is_file() else None
    if isinstance(add_bos_token, bool):
        return add_bos_token
    if tokenizer.suffix != ".json":
        return sentencepiece.SentencePieceProcessor(model_file=str(tokenizer)).bos_id() >= 0
    encoding = tokenizers.Tokenizer.from_file(str(tokenizer)).encode("a")
    first = [*itertools.compress(encoding.tokens, itertools.takewhile(bool, encoding.special_tokens_mask))]
    if len(first) > 1:
        raise ConvertError(
            f"{tokenizer}: puts {' '.join(first)} before a text, but only one start token is supported; give another "
            "tokenizer with --tokenizer=FILE, or pass --tokenizer=none"
        )
    return bool(first)


def _check_settings(path: Path) -> None:
    settings = read_json(path)
    for name in SPECIAL:
        piece = settings.get(name)
        piece = piece.get("content") if isinstance(piece, dict) else piece
        if piece is not None and not isinstance(piece, str):
            raise ConvertError(
                f"{path}: {name}: expected a string, or an object with its content, got {short(settings[name])}; "
                "download the file again"
            )


def _sizes(path: Path) -> tuple[int, int]:
    """Return the numbers of ordinary and of added pieces."""
    if not path.is_file():
        raise ConvertError(
            f"{path}: no such file; give a tokenizer.model or tokenizer.json with --tokenizer=FILE"
        )
    try:
        if path.suffix == ".json":
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
            size = tokenizer.get_vocab_size(with_added_tokens=False)
            return size, tokenizer.get_vocab_size(with_added_tokens=True) - size
        return sentencepiece.SentencePieceProcessor(model_file=str(path)).vocab_size(), 0
    except Exception as error:  # both libraries raise bare exceptions
        raise ConvertError(
            f"{path}: is damaged or not a tokenizer ({first_line(error)}); give another with --tokenizer=FILE, or "
            "pass --tokenizer=none"
        ) from error
