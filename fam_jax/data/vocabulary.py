"""Vocabularies by name, the start token of a text, and whether a vocabulary fits a model.

A vocabulary is the PassKey task's own, bytes, a SentencePiece model or a `tokenizer.json`. TensorFlow is imported when
one is loaded, not before.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import logging
from google.protobuf.message import DecodeError

from fam_jax.config import ConfigError, DataConfig, ModelConfig, UserError
from fam_jax.config.data import SEQIO

if TYPE_CHECKING:
    from fam_jax.data.quiet_seqio import seqio

SHIPPED = {"passkey": Path(__file__).parent / "assets" / "passkey.model"}


def load_vocabulary(name: str) -> "seqio.Vocabulary":
    """Load a vocabulary.

    Args:
      name: "passkey" (ships with the package), "bytes", or the path of a SentencePiece model or, if it ends in .json,
        of a file of the tokenizers library. Any filesystem that TensorFlow reads will do, such as gs://.

    Raises:
      UserError: the file is missing, cannot be read, or is neither of the two; or a file beside a tokenizer.json is
        damaged.
    """
    from fam_jax.data.quiet_seqio import seqio, tf

    if name == "bytes":
        return seqio.ByteVocabulary()
    if name.endswith(".json"):
        return _load_tokenizer(name)
    vocabulary = seqio.SentencePieceVocabulary(str(SHIPPED.get(name, name)))
    try:
        # seqio would read the file when the first text is encoded, and report a bad one only then. It warns if the
        # padding id is not T5's, but this package pads with no id of the vocabulary.
        with _no_warnings():
            vocabulary.load_model()
    except tf.errors.NotFoundError as error:
        raise UserError(
            f"vocabulary {name!r}: no such file; name a SentencePiece model, a tokenizer.json, bytes or passkey"
        ) from error
    except (tf.errors.OpError, OSError) as error:
        raise UserError(_unreadable(name, error)) from error
    except (DecodeError, RuntimeError) as error:
        raise UserError(
            f"vocabulary {name!r}: is not a SentencePiece model, or is damaged; name another file"
        ) from error
    return vocabulary


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _load_tokenizer(name: str) -> "seqio.Vocabulary":
    from fam_jax.data.hf_tokenizer import TokenizerVocabulary

    try:
        return TokenizerVocabulary(name)
    except FileNotFoundError as error:
        raise UserError(
            f"vocabulary {name!r}: no such file; name the tokenizer.json of a model folder"
        ) from error
    except OSError as error:
        raise UserError(_unreadable(name, error)) from error
    except ValueError as error:
        raise UserError(
            f"vocabulary {name!r}: is not a tokenizer.json, or is a damaged one; name another file"
        ) from error


def _unreadable(name: str, error: Exception) -> str:
    return f"vocabulary {name!r}: cannot be read ({type(error).__name__}); check the path and its permissions"


def task_digest(vocabulary: Any, data: DataConfig) -> str:
    """Return a digest of the vocabulary that a seqio task brings along; empty for other tasks, whose config names it.

    It covers a SentencePiece model as it is, and of other vocabularies the text of every piece and the end token.
    """
    if not data.task.startswith(f"{SEQIO}:"):
        return ""
    if hasattr(vocabulary, "sp_model"):
        return hashlib.sha256(vocabulary.sp_model).hexdigest()
    spell = getattr(vocabulary, "piece", lambda id_: vocabulary.decode([id_]))
    pieces = [spell(id_) for id_ in range(vocabulary.vocab_size)]
    return hashlib.sha256(repr((vocabulary.eos_id, pieces)).encode(errors="backslashreplace")).hexdigest()


def check_vocabulary_size(vocabulary: Any, model: ModelConfig, data: DataConfig) -> None:
    """Check that the model has an embedding for every id that texts cannot do without.

    These are all pieces, and the tokens that begin and end texts. Tokens that were added to a tokenizer.json, such as
    those for images, may lie beyond the model's vocabulary; :func:`check_ids` finds the texts that have them.

    Raises:
      ConfigError: such an id is not below model.vocab_size.
    """
    ends = (vocabulary.eos_id, vocabulary.bos_id if data.add_bos else None)
    needed = max(
        getattr(vocabulary, "ordinary_size", vocabulary.vocab_size), *(1 + (id_ or 0) for id_ in ends)
    )
    if model.vocab_size < needed:
        # A seqio task brings a vocabulary of its own.
        name = data.task if data.task.startswith(f"{SEQIO}:") else data.vocabulary
        raise ConfigError(
            f"config.model.vocab_size: {model.vocab_size} is smaller than the vocabulary {name!r}, which has "
            f"{needed} pieces; set it to at least {needed}, or use the vocabulary that "
            "the model was trained with"
        )


def check_ids(ids: Any, vocabulary: Any, vocab_size: int) -> None:
    """Check that a model has an embedding for every token of a text.

    Args:
      ids: (n,) token ids of the text, or of a part of it.
      vocabulary: that made them.
      vocab_size: V of the model.

    Raises:
      UserError: an id is not below V; the message spells the token.
    """
    beyond = np.flatnonzero(np.asarray(ids) >= vocab_size)
    if not len(beyond):
        return
    wrong, before = int(ids[beyond[0]]), [int(id_) for id_ in ids[max(0, beyond[0] - 20) : beyond[0]]]
    piece = getattr(vocabulary, "piece", lambda id_: None)(wrong)
    raise UserError(
        f"the text has the token {piece or wrong!r} (id {wrong}) after {vocabulary.decode(before)[-60:]!r}, but the "
        f"model has embeddings for {vocab_size} tokens only; remove it from the text"
    )


def bos_ids(vocabulary: Any, data: DataConfig) -> list[int]:
    """Return the ids to put before a text: the start token (BOS) if data.add_bos is set, else none.

    Raises:
      ConfigError: data.add_bos is set, but the vocabulary has no start token.
    """
    if not data.add_bos:
        return []
    bos = vocabulary.bos_id
    if bos is None or bos < 0:
        raise ConfigError(
            f"config.data.add_bos: the vocabulary {data.vocabulary!r} has no start token (BOS); set it to false"
        )
    return [bos]


def first_input(vocabulary: Any, data: DataConfig) -> int:
    """Return the id from which a model predicts a text's first token: BOS, or the end-of-sequence id if there is none.

    Raises:
      ConfigError: data.add_bos is set, but the vocabulary has no start token.
    """
    return (*bos_ids(vocabulary, data), vocabulary.eos_id or 0)[0]


def special_token_id(vocabulary: Any, text: str) -> int | None:
    """Return the id of the special token that `text` names, such as "<|eot_id|>"; None if there is none.

    Special tokens are those that decoding leaves out.
    """
    if hasattr(vocabulary, "token_id"):
        token = vocabulary.token_id(text)
    elif hasattr(vocabulary, "sp_model"):
        token = vocabulary.tokenizer.PieceToId(text)
        token = token if vocabulary.tokenizer.IdToPiece(token) == text else None
    else:
        token = None
    return None if token is None or text in vocabulary.decode([token]) else token
