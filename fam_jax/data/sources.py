"""Sources whose examples are read by number: documents of text files, and their order in each epoch."""

import dataclasses
import functools
import itertools
import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Protocol

import numpy as np
from absl import logging

from fam_jax.data.interface import Example, IndexedSource
from fam_jax.data.randomness import permutation

if TYPE_CHECKING:
    from fam_jax.data.quiet_seqio import seqio

# Documents tokenized at a time, on all cores.
TOGETHER = 32


class NumberedTexts(Protocol):
    """Texts that are read by number."""

    @property
    def fingerprint(self) -> str:
        """Return a short text that changes when the texts change."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> str: ...


@dataclasses.dataclass(frozen=True)
class TextSource:
    """Documents as examples: each ends with the end-of-sequence id, and every token has loss weight 1."""

    documents: NumberedTexts
    vocabulary: "seqio.Vocabulary"
    # Control tokens that texts spell, and that the log has named.
    _named: set[int] = dataclasses.field(default_factory=set, init=False, repr=False, compare=False)

    @property
    def fingerprint(self) -> str:
        """Return a hash of the texts, whatever files they are in, or the name of their dataset."""
        return self.documents.fingerprint

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> Example:
        return next(self.read([index]))

    def read(self, indices: Iterable[int]) -> Iterator[Example]:
        """Yield the examples with these numbers; tokenize :data:`TOGETHER` documents at a time."""
        numbers = iter(indices)
        while chunk := [*itertools.islice(numbers, TOGETHER)]:
            texts = [self.documents[number] for number in chunk]
            for text, encoded in zip(texts, self._encode(texts), strict=True):
                ids = np.array([*encoded, self.vocabulary.eos_id], np.int32)
                self._warn_of_control_tokens(ids[:-1])
                yield Example(ids, np.ones(len(ids), np.float32), len(text.encode()))

    def _warn_of_control_tokens(self, ids: np.ndarray) -> None:
        """Warn once of each control token that a text spells: a model learns it as the end of a turn, for example."""
        found = ids[self._is_control[np.minimum(ids, len(self._is_control) - 1)]]
        for token in {*found.tolist()} - self._named:
            self._named.add(token)
            piece = next(text for text, id_ in self._control_tokens.items() if id_ == token)
            logging.warning(
                "a text spells %s, which becomes the control token %d as in transformers; if it is meant as text, "
                "write it otherwise (docs/data.md)",
                piece,
                token,
            )

    @property
    def _control_tokens(self) -> dict[str, int]:
        return getattr(self.vocabulary, "control_tokens", {})

    @functools.cached_property
    def _is_control(self) -> np.ndarray:
        """Return a bool for every id up to the last control token, and False for all larger ones."""
        ids = [*self._control_tokens.values()]
        table = np.zeros(max(ids, default=-1) + 2, np.bool_)
        table[ids] = True
        return table

    def _encode(self, texts: list[str]) -> list[list[int]]:
        from fam_jax.data.quiet_seqio import seqio  # loaded already, with the vocabulary

        if isinstance(self.vocabulary, seqio.SentencePieceVocabulary):
            return self.vocabulary.tokenizer.encode(texts, num_threads=os.cpu_count())
        if hasattr(self.vocabulary, "encode_together"):
            return self.vocabulary.encode_together(texts)
        return [self.vocabulary.encode(text) for text in texts]


@dataclasses.dataclass(frozen=True)
class Shuffled:
    """All examples of an indexed source in every epoch, in an order that depends on the seed and the epoch."""

    source: IndexedSource
    seed: int

    @property
    def vocabulary(self) -> "seqio.Vocabulary":
        """Return the vocabulary of the source."""
        return self.source.vocabulary

    @property
    def fingerprint(self) -> str:
        """Return the fingerprint of the source."""
        return self.source.fingerprint

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Example]:
        """Yield the examples of an epoch from place `first` on, without reading those before."""
        return self.source.read(self.order(epoch, first))

    def order(self, epoch: int, first: int = 0) -> Iterator[int]:
        """Yield the numbers of the examples of an epoch, from place `first` of its order on."""
        return iter(permutation(len(self.source), "documents", self.seed, epoch)[first:].tolist())
