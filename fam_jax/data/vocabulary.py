"""Vocabularies by name: the one of the PassKey task, bytes, or any SentencePiece model."""

from pathlib import Path

from google.protobuf.message import DecodeError

from fam_jax.config import UserError
from fam_jax.data.quiet_seqio import seqio, tf

SHIPPED = {"passkey": Path(__file__).parent / "assets" / "passkey.model"}


def load_vocabulary(name: str) -> seqio.Vocabulary:
    """Loads "passkey" (ships with the package), "bytes", or the SentencePiece model file at path `name`.

    The size, `vocabulary.vocab_size`, is what `model.vocab_size` must at least be. Paths may be of any
    filesystem that TensorFlow reads, such as gs://.

    Raises:
      UserError: the file is missing, cannot be read, or is not a SentencePiece model.
    """
    if name == "bytes":
        return seqio.ByteVocabulary()
    vocabulary = seqio.SentencePieceVocabulary(str(SHIPPED.get(name, name)))
    try:
        vocabulary.load_model()  # otherwise a bad file shows only when the first text is encoded
    except tf.errors.NotFoundError as error:
        raise UserError(
            f"vocabulary {name!r}: no such file; name a SentencePiece model file, or one of bytes, passkey"
        ) from error
    except (tf.errors.OpError, OSError) as error:
        raise UserError(f"vocabulary {name!r}: cannot be read ({type(error).__name__})") from error
    except (DecodeError, RuntimeError) as error:
        raise UserError(f"vocabulary {name!r}: not a SentencePiece model, or a damaged one") from error
    return vocabulary
