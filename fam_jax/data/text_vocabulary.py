"""Train lossless SentencePiece models for text."""

import io
import re
from collections.abc import Iterable, Iterator

import sentencepiece

from fam_jax.config import UserError

# SentencePiece ignores longer sentences unless told otherwise.
SENTENCE_BYTES = 4000
LINE = re.compile(r"[^\n]+")
# Padding, end and unknown, and a piece for every byte.
SPECIAL = 3 + 256


def train_text_vocabulary(texts: Iterable[str], size: int, *, threads: int = 1) -> bytes:
    """Return a serialized model that decodes the ids of any text to that text (only U+2581 becomes a space).

    It keeps spaces and line ends, makes each digit a token, and encodes characters without a piece as bytes. Ids 0, 1
    and 2 are padding, end of sequence and unknown, as seqio expects.

    Args:
      texts: to learn pieces from.
      size: number of pieces V, the special ids and bytes included.
      threads: of the training.

    Raises:
      UserError: `size` is too small for the special ids and bytes, or the text is too short for that many pieces.
    """
    if size <= SPECIAL:
        raise UserError(
            f"size: expected more than {SPECIAL}, the pieces for bytes and special ids, got {size}"
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=size,
            max_sentence_length=2 * SENTENCE_BYTES,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            byte_fallback=True,
            split_digits=True,
            user_defined_symbols=["\n"],
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            num_threads=threads,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split()).rpartition("] ")[2]
        raise UserError(
            f"size: SentencePiece cannot make {size} pieces of this text ({reason}); "
            "choose another size or add text"
        ) from error
    return model.getvalue()


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Yield the lines of texts, long ones in parts, without the characters that SentencePiece rejects."""
    for text in texts:
        for line in LINE.findall(text.replace("\0", "")):
            # A character takes up to four bytes.
            characters = SENTENCE_BYTES // 4
            for begin in range(0, len(line), characters):
                yield line[begin : begin + characters]
