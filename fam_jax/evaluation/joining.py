"""Token ids where a document, a context and a continuation meet.

A text that is encoded in parts must have the ids of the whole text, or likelihoods are those of a text that no model
has seen. Vocabularies put a mark before a text, join a blank with the word behind it, or punctuation with a newline.
Therefore: a part is encoded behind the end of the part before it; the whole is encoded and cut where the ids of the
context end; and the end of a document waits for what follows.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fam_jax.config import UserError
from fam_jax.data.vocabulary import check_ids
from fam_jax.evaluation.item import Document, Encoded
from fam_jax.generation.tokenize import (
    CONTEXT,
    check_unicode,
    encode_behind,
    encode_pieces,
    last_border,
    last_words,
)

# Characters at the end of a document in which a border is looked for.
END = 512


class Prefix(NamedTuple):
    """A document up to the place from which its ids depend on what follows."""

    # (n,) int32, with the start token.
    ids: np.ndarray
    # The last words of the text of `ids`; empty: there is no text before.
    behind: str
    # The rest of the document's text.
    held: str


class Joiner:
    """Encodes documents, contexts and continuations with one vocabulary."""

    def __init__(
        self,
        vocabulary: Any,
        vocab_size: int,
        begin: Sequence[int],
        first: int,
        *,
        keep_blanks: bool = False,
    ):
        """Create a joiner.

        Args:
          vocabulary: that the model was trained with.
          vocab_size: V of the model.
          begin: ids before every text: the start token or none.
          first: the id that a continuation without any context is predicted from.
          keep_blanks: whether prompts keep the blanks at their ends, and continuations may be blanks alone.
        """
        self.vocabulary, self._vocab_size = vocabulary, vocab_size
        self._begin, self._first, self._keep_blanks = [*begin], first, keep_blanks
        self._encode: Callable[[str], Sequence[int]] = vocabulary.encode

    def encode_by(self, encode: Callable[[str], Sequence[int]]) -> None:
        """Encode all texts with another function than the vocabulary's own from now on."""
        self._encode = encode

    @property
    def start(self) -> list[int]:
        """Return the ids before every text: the start token or none."""
        return self._begin

    def prefix(self, document: Document) -> Prefix:
        """Encode a document.

        Raises:
          UserError: it is not valid Unicode, or has a token that the model has no embedding for.
        """
        found = document.load()
        if isinstance(found, Encoded):
            return Prefix(np.concatenate([self._array(self._begin), found.ids]), found.behind, found.held)
        check_unicode(found, f"document {document.key}")
        text = found.rstrip()
        window = text[-END:]
        border = len(text) - len(window) + last_border(self.encode, window) if window else 0
        head = text[:border]
        ids = [token for piece in encode_pieces(self.encode, [head]) for token in piece] if head else []
        return Prefix(self._array([*self._begin, *ids]), last_words(head, CONTEXT), text[border:])

    def join(self, prefix: Prefix, context: str, continuation: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of a context and of its continuation, which together are those of the whole text.

        Blanks at the end of the context go to the continuation. A context that comes first in a stream and has no
        tokens gets the token that texts begin with.

        Raises:
          UserError: the continuation has no tokens, or one that the model has no embedding for.
        """
        text = prefix.held + context
        check_unicode(text + continuation, "an item")
        whole = encode_behind(self.encode, prefix.behind, text + continuation)
        alone = encode_behind(self.encode, prefix.behind, text.rstrip())
        shared = _common(whole, alone)
        cut = min(shared, len(whole) - 1)
        if not whole or not (continuation if self._keep_blanks else continuation.strip()):
            raise UserError(f"the continuation {continuation!r}: has no tokens; leave the item out")
        return self._first_of(prefix, self._array(whole[:cut])), self._array(whole[cut:])

    def prompt(self, prefix: Prefix, context: str) -> np.ndarray:
        """Return the ids of a context that a text is generated behind, by default without the blanks at its end."""
        text = prefix.held + context
        text = text if self._keep_blanks else text.rstrip()
        check_unicode(text, "an item")
        return self._first_of(prefix, self._array(encode_behind(self.encode, prefix.behind, text)))

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without a start token."""
        return [*self._encode(text)]

    def _first_of(self, prefix: Prefix, ids: np.ndarray) -> np.ndarray:
        return ids if len(ids) or len(prefix.ids) else self._array([self._first])

    def _array(self, ids: Sequence[int]) -> np.ndarray:
        check_ids(ids, self.vocabulary, self._vocab_size)
        return np.asarray(ids, np.int32)


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """Return how many ids at the beginning are the same."""
    count = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        count += 1
    return count
