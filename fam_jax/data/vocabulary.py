"""Vocabularies by name: the one of the PassKey task, bytes, any SentencePiece model or `tokenizer.json`."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from absl import logging
from google.protobuf.message import DecodeError

from fam_jax.config import UserError
from fam_jax.data.hf_tokenizer import TokenizerVocabulary
from fam_jax.data.quiet_seqio import seqio, tf

SHIPPED = {"passkey": Path(__file__).parent / "assets" / "passkey.model"}


def load_vocabulary(name: str) -> seqio.Vocabulary:
    """Loads "passkey" (ships with the package), "bytes", or the file at path `name`.

    That is a SentencePiece model or, if the name ends in .json, a file of the tokenizers library.

    The size, `vocabulary.vocab_size`, is what `model.vocab_size` must at least be. Paths may be of any
    filesystem that TensorFlow reads, such as gs://.

    Raises:
      UserError: the file is missing, cannot be read, or is neither of the two.
    """
    if name == "bytes":
        return seqio.ByteVocabulary()
    if name.endswith(".json"):
        return _load_tokenizer(name)
    vocabulary = seqio.SentencePieceVocabulary(str(SHIPPED.get(name, name)))
    try:
        # Now, or a bad file shows only when the first text is encoded; and without a warning that the padding id is
        # not T5's, for nothing here pads with it.
        with _warnings_held_back():
            vocabulary.load_model()
    except tf.errors.NotFoundError as error:
        raise UserError(
            f"vocabulary {name!r}: no such file; name a SentencePiece model file, or one of bytes, passkey"
        ) from error
    except (tf.errors.OpError, OSError) as error:
        raise UserError(f"vocabulary {name!r}: cannot be read ({type(error).__name__})") from error
    except (DecodeError, RuntimeError) as error:
        raise UserError(f"vocabulary {name!r}: not a SentencePiece model, or a damaged one") from error
    return vocabulary


@contextlib.contextmanager
def _warnings_held_back() -> Iterator[None]:
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _load_tokenizer(name: str) -> seqio.Vocabulary:
    try:
        return TokenizerVocabulary(name)
    except FileNotFoundError as error:
        raise UserError(f"vocabulary {name!r}: no such file; name a tokenizer.json") from error
    except OSError as error:
        raise UserError(f"vocabulary {name!r}: cannot be read ({type(error).__name__})") from error
    except ValueError as error:
        raise UserError(f"vocabulary {name!r}: not a tokenizer.json, or a damaged one") from error
