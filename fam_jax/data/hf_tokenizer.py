"""A `tokenizer.json` of the tokenizers library as a seqio vocabulary."""

import itertools
import json
from typing import Any

import numpy as np
import tokenizers
from etils import epath

from fam_jax.data.quiet_seqio import seqio, tf


class TokenizerVocabulary(seqio.Vocabulary):
    """Encodes text as it is, without adding special tokens; chat templates are left to the caller.

    Which pieces begin and end a text is read from `tokenizer_config.json` in the same folder; if it does not say, what
    the tokenizer itself puts before a text begins it, and nothing ends it.
    """

    def __init__(self, path: str):
        """Reads the file at `path`, of any filesystem.

        Raises:
          OSError: it cannot be read.
          ValueError: it is no such file, or a damaged one.
        """
        super().__init__()
        file = epath.Path(path)
        text = file.read_text()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing more specific
            raise ValueError(f"{path}: {error}") from error
        beside = file.parent / "tokenizer_config.json"
        self._special = json.loads(beside.read_text()) if beside.exists() else {}

    @property
    def bos_id(self) -> int | None:
        """Id of the piece that begins a text."""
        named = self._id("bos_token")
        if named is not None:
            return named
        encoding = self._tokenizer.encode("a", add_special_tokens=True)
        before = [*itertools.compress(encoding.ids, itertools.takewhile(bool, encoding.special_tokens_mask))]
        return before[0] if len(before) == 1 else None

    @property
    def eos_id(self) -> int | None:
        """Id of the piece that ends a text."""
        return self._id("eos_token")

    @property
    def unk_id(self) -> int | None:
        """Id of the piece for what has none; None for byte-level tokenizers, which encode everything."""
        return self._id("unk_token")

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
