"""Whether texts of a Hugging Face folder begin with the start token (BOS), as its tokenizer has it."""

import json
from pathlib import Path

import sentencepiece
import tokenizers

from fam_jax.convert.families import ConvertError

TOKENIZER_CONFIG = "tokenizer_config.json"


def adds_bos(tokenizer: Path) -> bool:
    """Whether BOS is put before a text: by `add_bos_token` beside the tokenizer, else by what the tokenizer does.

    Args:
      tokenizer: a `tokenizer.json`, whose template tells, or a SentencePiece model, whose families begin with BOS if
        there is one. Both can be read, as :func:`check_tokenizer` has found.

    Raises:
      ConvertError: other tokens are put before a text.
    """
    beside = tokenizer.with_name(TOKENIZER_CONFIG)
    told = json.loads(beside.read_text()).get("add_bos_token") if beside.is_file() else None
    if isinstance(told, bool):
        return told
    if tokenizer.suffix != ".json":
        return sentencepiece.SentencePieceProcessor(model_file=str(tokenizer)).bos_id() >= 0
    template = tokenizers.Tokenizer.from_file(str(tokenizer))
    encoding = template.encode("a")
    before = encoding.tokens[: encoding.special_tokens_mask.index(0)]
    if len(before) > 1:
        raise ConvertError(
            f"{tokenizer}: puts {' '.join(before)} before a text, and one start token is all that is supported; "
            "give another by --tokenizer=FILE, or --tokenizer=none"
        )
    return bool(before)
