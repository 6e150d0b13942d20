"""The tokenizer of a Hugging Face folder: which file it is, whether it fits the model, how it begins a text."""

import itertools
from pathlib import Path

import sentencepiece
import tokenizers
from etils import epath

from fam_jax.hf.errors import ConvertError
from fam_jax.hf.folder import read_json
from fam_jax.hf.options import short

FILES = ("tokenizer.model", "tokenizer.json")
SETTINGS = "tokenizer_config.json"
SPECIAL = ("bos_token", "eos_token", "unk_token")
PADDING = 1024  # rows of an embedding table that may have no piece: tables are padded to round sizes


def find_tokenizer(folder: Path) -> Path | None:
    """The SentencePiece model or, if there is none, the `tokenizers` file in `folder`."""
    return next((folder / name for name in FILES if (folder / name).is_file()), None)


def copy_tokenizer(vocabulary: str, folder: Path) -> None:
    """Puts the file of a config's `data.vocabulary`, if it names one, where :func:`find_tokenizer` looks for it."""
    file = epath.Path(vocabulary)
    if vocabulary and file.is_file():
        (folder / FILES[file.suffix == ".json"]).write_bytes(file.read_bytes())


def check_tokenizer(path: Path, vocab_size: int) -> None:
    """Raises :class:`ConvertError` unless the tokenizer can be read and has the size of the model's vocabulary.

    Added pieces of no use to the text model, such as those for images, may lie beyond it. The config of the tokenizer,
    if there is one in the same folder, must be readable too: it says which pieces are special.
    """
    if (path.parent / SETTINGS).exists():
        _check_settings(path.parent / SETTINGS)
    size, added = _sizes(path)
    if size > vocab_size or size + added < vocab_size - PADDING:
        raise ConvertError(
            f"{path}: has {size + added} pieces, and the model's vocab_size is {vocab_size}; give the model's own by "
            "--tokenizer=FILE, or --tokenizer=none"
        )


def adds_bos(tokenizer: Path) -> bool:
    """Whether BOS is put before a text: by `add_bos_token` beside the tokenizer, else by what the tokenizer does.

    Args:
      tokenizer: a `tokenizer.json`, whose template tells, or a SentencePiece model, whose families begin with BOS if
        there is one. Both can be read, as :func:`check_tokenizer` has found.

    Raises:
      ConvertError: other tokens are put before a text.
    """
    beside = tokenizer.with_name(SETTINGS)
    told = read_json(beside).get("add_bos_token") if beside.is_file() else None
    if isinstance(told, bool):
        return told
    if tokenizer.suffix != ".json":
        return sentencepiece.SentencePieceProcessor(model_file=str(tokenizer)).bos_id() >= 0
    template = tokenizers.Tokenizer.from_file(str(tokenizer))
    encoding = template.encode("a")
    before = [*itertools.compress(encoding.tokens, itertools.takewhile(bool, encoding.special_tokens_mask))]
    if len(before) > 1:
        raise ConvertError(
            f"{tokenizer}: puts {' '.join(before)} before a text, and one start token is all that is supported; "
            "give another by --tokenizer=FILE, or --tokenizer=none"
        )
    return bool(before)


def _check_settings(path: Path) -> None:
    settings = read_json(path)
    for name in SPECIAL:
        piece = settings.get(name)
        piece = piece.get("content") if isinstance(piece, dict) else piece
        if piece is not None and not isinstance(piece, str):
            raise ConvertError(
                f"{path}: {name}: expected a text, or a group with its content, got {short(settings[name])}; "
                "fetch the file again"
            )


def _sizes(path: Path) -> tuple[int, int]:
    """Pieces, and added ones."""
    if not path.is_file():
        raise ConvertError(
            f"{path}: no such file; give a tokenizer.model or tokenizer.json by --tokenizer=FILE"
        )
    try:
        if path.suffix == ".json":
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
            size = tokenizer.get_vocab_size(with_added_tokens=False)
            return size, tokenizer.get_vocab_size(with_added_tokens=True) - size
        return sentencepiece.SentencePieceProcessor(model_file=str(path)).vocab_size(), 0
    except Exception as error:  # both libraries raise bare exceptions
        raise ConvertError(
            f"{path}: is no tokenizer, or is damaged ({str(error).splitlines()[0][:120] if str(error) else ''}); "
            "give another by --tokenizer=FILE, or --tokenizer=none"
        ) from error
