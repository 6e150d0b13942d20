"""SentencePiece models for text: nothing that is written is lost in them."""

import io
import re
from collections.abc import Iterable, Iterator

import sentencepiece

from fam_jax.config import UserError

SENTENCE_BYTES = 4000  # SentencePiece leaves longer ones out
LINE = re.compile(r"[^\n]+")
SPECIAL = 3 + 256  # padding, end, unknown; and a piece for every byte


def train_text_vocabulary(texts: Iterable[str], size: int, *, threads: int = 1) -> bytes:
    """A serialised model of `size` pieces that decodes what it encodes to the very same text (but U+2581 to a space).

    Spaces and line ends are kept as they are, digits stand alone, letters without a piece become bytes. Ids 0, 1 and 2
    are padding, end of sequence and unknown, as seqio has it.

    Args:
      texts: to count pieces in.
      size: V.
      threads: more are faster.

    Raises:
      UserError: there is too little text for so many pieces, or none at all.
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
        raise UserError(f"size: SentencePiece cannot make {size} pieces of this text ({reason})") from error
    return model.getvalue()


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Lines, long ones in pieces, without characters that SentencePiece refuses."""
    for text in texts:
        for line in LINE.findall(text.replace("\0", "")):
            characters = SENTENCE_BYTES // 4  # of four bytes at most
            for begin in range(0, len(line), characters):
                yield line[begin : begin + characters]
