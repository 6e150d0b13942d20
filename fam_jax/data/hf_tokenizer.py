"""Adapt a `tokenizer.json` of the tokenizers library to seqio's Vocabulary."""

import itertools
import json
from typing import Any

import numpy as np
import tokenizers
from etils import epath

from fam_jax.data.quiet_seqio import seqio, tf


class TokenizerVocabulary(seqio.Vocabulary):
    """A tokenizer that adds no special tokens of its own; chat templates are the caller's business.

    The start and end tokens are those that `tokenizer_config.json` in the same folder names. If it names none, the
    start token is the one that the tokenizer itself puts before a text, and there is no end token.
    """

    def __init__(self, path: str):
        """Read the file at `path`, on any filesystem that etils supports.

        Raises:
          OSError: the file cannot be read.
          ValueError: it is not a tokenizer.json, or is damaged.
        """
        super().__init__()
        file = epath.Path(path)
        text = file.read_text()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        # The library raises nothing more specific.
        except Exception as error:
            raise ValueError(f"{path}: {error}") from error
        beside = file.parent / "tokenizer_config.json"
        self._special = json.loads(beside.read_text()) if beside.exists() else {}

    @property
    def bos_id(self) -> int | None:
        """Return the id of the start token; None: there is none."""
        named = self._id("bos_token")
        if named is not None:
            return named
        encoding = self._tokenizer.encode("a", add_special_tokens=True)
        before = [*itertools.compress(encoding.ids, itertools.takewhile(bool, encoding.special_tokens_mask))]
        return before[0] if len(before) == 1 else None

    @property
    def eos_id(self) -> int | None:
        """Return the id of the end token; None: there is none."""
        return self._id("eos_token")

    @property
    def unk_id(self) -> int | None:
        """Return the id of the unknown token; None for byte-level tokenizers, which can encode everything."""
        return self._id("unk_token")

    def token_id(self, text: str) -> int | None:
        """Return the id of the token whose text is exactly `text`; None: there is none."""
        return self._tokenizer.token_to_id(text)

    @property
    def _base_vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def _id(self, name: str) -> int | None:
        piece = self._special.get(name)
        piece = piece.get("content") if isinstance(piece, dict) else piece
        return None if piece is None else self._tokenizer.token_to_id(piece)

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
