"""The tokenizer of a Hugging Face folder: which file it is, whether it fits the model, and how it begins a text."""

from pathlib import Path

import sentencepiece
from etils import epath

from fam_jax.checkpoint.links import check_inside
from fam_jax.config import UserError
from fam_jax.data.tokenizer_folder import (
    ADDED,
    BESIDE,
    CHAT_TEMPLATE,
    SETTINGS,
    UNDERSCORE,
    FolderTokenizer,
    extra_tokens,
    load_tokenizer,
    named_tokens,
    spelling,
)
from fam_jax.hf.config_json import ConvertError, check_no_pointer, first_line, read_json, short

# tokenizer.json first, as transformers does: a tokenizer.model may be older than the tokens that were added to it.
FILES = ("tokenizer.json", "tokenizer.model")
BOTH = (
    "make a tokenizer.json of both with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
)
SPECIAL = ("bos_token", "eos_token", "unk_token")
# Embedding tables are padded to round sizes: up to this many rows may have no piece.
PADDING = 1024


def find_tokenizer(folder: Path) -> Path | None:
    """Return the tokenizer.json in `folder`, else its SentencePiece model, else None."""
    return next((folder / name for name in FILES if (folder / name).is_file()), None)


def copy_tokenizer(vocabulary: str, folder: Path) -> None:
    """Copy the file of `data.vocabulary`, if it names one, to where :func:`find_tokenizer` looks for it.

    The files that a tokenizer.json is read with go with it, and its chat template.

    Raises:
      UserError: one of them is a link that leads out of the folder.
    """
    file = epath.Path(vocabulary)
    if vocabulary and file.is_file():
        name = FILES[0] if file.suffix == ".json" else FILES[1]
        (folder / name).write_bytes(file.read_bytes())
        for beside in (*BESIDE, CHAT_TEMPLATE) if name == FILES[0] else ():
            if (file.parent / beside).is_file():
                check_inside(file.parent / beside, file.parent)
                (folder / beside).write_bytes((file.parent / beside).read_bytes())


def check_tokenizer(path: Path, vocab_size: int) -> None:
    """Raise :class:`ConvertError` unless a tokenizer can be read and fits the vocabulary of a model.

    Added tokens that the text model has no embedding for, such as those for images, may lie beyond the vocabulary, but
    not those that begin and end texts. A SentencePiece model is accepted only if the files beside it name no token that
    it does not have.
    """
    if not path.is_file():
        raise ConvertError(
            f"{path}: no such file; give a tokenizer.model or tokenizer.json with --tokenizer=FILE"
        )
    check_no_pointer(path)
    settings = path.with_name(SETTINGS)
    if settings.exists():
        _check_settings(settings)
    if path.suffix == ".json":
        loaded = _load_json(path)
        ends = [loaded.id_of("eos_token"), loaded.id_of("bos_token"), *loaded.before_text()]
        needed, size = (
            max(loaded.ordinary_size, *(1 + id_ for id_ in ends if id_ is not None), 0),
            loaded.size,
        )
    else:
        model = _load_model(path)
        _check_alone(path, model)
        needed = size = model.vocab_size()
    if needed > vocab_size or size < vocab_size - PADDING:
        raise ConvertError(
            f"{path}: has {size} pieces, but the model's vocab_size is {vocab_size}; give the model's own "
            "tokenizer with --tokenizer=FILE, or pass --tokenizer=none"
        )


def adds_bos(tokenizer: Path) -> bool:
    """Return whether texts begin with the start token (BOS).

    The template of a tokenizer.json decides. For a SentencePiece model, `add_bos_token` in tokenizer_config.json does;
    without it, texts begin with BOS if the model has it.

    Args:
      tokenizer: a file that :func:`check_tokenizer` accepts.

    Raises:
      ConvertError: texts begin with several tokens.
    """
    if tokenizer.suffix != ".json":
        settings = tokenizer.with_name(SETTINGS)
        add_bos_token = read_json(settings).get("add_bos_token") if settings.is_file() else None
        return add_bos_token if isinstance(add_bos_token, bool) else _load_model(tokenizer).bos_id() >= 0
    loaded = _load_json(tokenizer)
    first = loaded.before_text()
    if len(first) > 1:
        pieces = " ".join(str(loaded.tokenizer.id_to_token(id_)) for id_ in first)
        raise ConvertError(
            f"{tokenizer}: puts {pieces} before a text, but only one start token is supported; give another "
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


def _load_json(path: Path) -> FolderTokenizer:
    try:
        return load_tokenizer(path)
    except UserError as error:  # of a file beside it
        raise ConvertError(str(error)) from error
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _load_model(path: Path) -> sentencepiece.SentencePieceProcessor:
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except Exception as error:  # the library raises bare exceptions
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ConvertError:
    return ConvertError(
        f"{path}: is damaged or not a tokenizer ({first_line(error)}); give another with --tokenizer=FILE, or "
        "pass --tokenizer=none"
    )


def _check_alone(path: Path, model: sentencepiece.SentencePieceProcessor) -> None:
    """Check that the files beside a SentencePiece model say nothing else than the model does.

    Fine-tuning adds tokens in these files, which SentencePiece does not read. They may also change the beginning of a
    text.
    """
    pieces = {model.id_to_piece(id_): id_ for id_ in range(model.vocab_size())}
    roles = {"bos_token": model.bos_id(), "eos_token": model.eos_id(), "unk_token": model.unk_id()}
    for name in BESIDE:
        file = path.with_name(name)
        if not file.is_file():
            continue
        content = read_json(file)
        if name == ADDED:
            tokens = {piece: pieces.get(piece) == id_ for piece, id_ in content.items()}
        else:
            tokens = {piece: piece in pieces for piece in extra_tokens(content)}
            for role, piece in named_tokens(content).items():
                tokens[piece] = pieces.get(piece, -1) == roles.get(role, pieces.get(piece))
            listed = content.get("added_tokens_decoder")
            for id_, fields in listed.items() if isinstance(listed, dict) else ():
                piece = spelling(fields) or ""
                tokens[piece] = tokens.get(piece, True) and str(pieces.get(piece)) == id_
        prefix = content.get("add_prefix_space") if name == SETTINGS else None
        if isinstance(prefix, bool) and prefix != _adds_prefix(model):
            raise ConvertError(
                f"{path}: {'puts no' if prefix else 'puts a'} blank before a text, but add_prefix_space in {name} is "
                f"{str(prefix).lower()}; {BOTH}"
            )
        if wrong := [piece for piece, same in tokens.items() if not same]:
            raise ConvertError(
                f"{path}: does not have the token {wrong[0]} as {name} beside it has it; {BOTH}"
            )


def _adds_prefix(model: sentencepiece.SentencePieceProcessor) -> bool:
    """Return whether a blank comes before every text."""
    return model.encode("a", out_type=str)[0].startswith(UNDERSCORE)
