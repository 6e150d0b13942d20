"""Adapt a `tokenizer.json` of the tokenizers library to seqio's Vocabulary."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import tokenizers

from fam_jax.data.quiet_seqio import seqio, tf
from fam_jax.data.tokenizer_folder import load_tokenizer


class TokenizerVocabulary(seqio.Vocabulary):
    """A tokenizer that adds no special tokens of its own; chat templates are the caller's business.

    Special tokens that are spelled in a text become their ids, as in transformers. The start and end tokens are those
    that the files in the same folder name. If none names a start token, it is the one that the tokenizer itself puts
    before a text; without a name there is no end token.
    """

    def __init__(self, path: str):
        """Read the file at `path`, on any filesystem that etils supports, and the files beside it.

        Raises:
          OSError: the file cannot be read.
          ValueError: it is not a tokenizer.json, or is damaged.
          UserError: a file beside it is damaged.
        """
        super().__init__()
        self._folder = load_tokenizer(path)
        self._tokenizer = self._folder.tokenizer

    @property
    def bos_id(self) -> int | None:
        """Return the id of the start token; None: there is none."""
        named = self._folder.id_of("bos_token")
        if named is not None:
            return named
        before = self._folder.before_text()
        return before[0] if len(before) == 1 else None

    @property
    def eos_id(self) -> int | None:
        """Return the id of the end token; None: there is none."""
        return self._folder.id_of("eos_token")

    @property
    def unk_id(self) -> int | None:
        """Return the id of the unknown token; None for byte-level tokenizers, which can encode everything."""
        return self._folder.id_of("unk_token")

    def token_id(self, text: str) -> int | None:
        """Return the id of the token whose text is exactly `text`; None: there is none."""
        return self._tokenizer.token_to_id(text)

    @property
    def named_tokens(self) -> dict[str, str]:
        """Return the spelling of special tokens by role, such as "eos_token"."""
        return self._folder.named

    @functools.cached_property
    def control_tokens(self) -> dict[str, int]:
        """Return the ids of special tokens, which decoding leaves out, by their spelling."""
        added = self._tokenizer.get_added_tokens_decoder()
        return {token.content: id_ for id_, token in added.items() if token.special}

    def encode_with_offsets(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Return the ids of each text, and first and last + 1 character of each; on all cores."""
        found = self._untrimmed.encode_batch([*texts], add_special_tokens=False)
        return [(each.ids, each.offsets) for each in found]

    @functools.cached_property
    def _untrimmed(self) -> tokenizers.Tokenizer:
        """Return a tokenizer to the same ids, whose offsets do not leave out the blanks at the ends of tokens."""
        made = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        made.encode_special_tokens = self._tokenizer.encode_special_tokens
        made.post_processor = None
        return made

    @functools.cached_property
    def ordinary_size(self) -> int:
        """Return one more than the highest id of a piece that is not an added token."""
        return self._folder.ordinary_size

    @functools.cached_property
    def _base_vocab_size(self) -> int:
        return self._folder.size

    def piece(self, id_: int) -> str | None:
        """Return the piece with an id; None: there is none."""
        return self._tokenizer.id_to_token(id_)

    def encode_together(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, as `encode` does; tokenize on all cores while other threads go on."""
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [each.ids for each in encoded]

    def _encode(self, s: str) -> list[int]:
        return self._tokenizer.encode(s, add_special_tokens=False).ids

    def _decode(self, ids: Any) -> str:
        return self._tokenizer.decode([int(i) for i in ids])

    def _encode_tf(self, s: Any) -> Any:
        def encode(text: bytes) -> np.ndarray:
            return np.asarray(self._encode(text.decode()), np.int32)

        ids = tf.numpy_function(encode, [s], tf.int32)
        ids.set_shape([None])
        return ids

    def _decode_tf(self, ids: Any) -> Any:
        def decode(ids: np.ndarray) -> np.ndarray:
            rows = ids.reshape(-1, ids.shape[-1])
            texts = [self._decode(row).encode() for row in rows]
            return np.asarray(texts, object).reshape(ids.shape[:-1])

        texts = tf.numpy_function(decode, [ids], tf.string)
        texts.set_shape(ids.shape[:-1])
        return texts
