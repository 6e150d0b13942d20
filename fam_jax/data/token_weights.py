"""Tokens of texts with loss weights, and the special tokens of a vocabulary by their spelling."""

import itertools
import operator
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fam_jax.data.chat import Run

if TYPE_CHECKING:
    from fam_jax.data.quiet_seqio import seqio

# The end token of a vocabulary that spells none, in templates.
END = "</s>"
# Token ids of a run, and the parts of it that the first and the last character of each token belong to.
Tokens = tuple[np.ndarray, np.ndarray, np.ndarray]


class TokenWeights:
    """Tokenizes runs: a token gets the largest weight of the parts that it has characters of."""

    def __init__(self, vocabulary: "seqio.Vocabulary"):
        """Find the control tokens of a vocabulary, those that decoding leaves out.

        Args:
          vocabulary: of :func:`fam_jax.data.vocabulary.load_vocabulary`.
        """
        from fam_jax.data.quiet_seqio import seqio  # loaded already, with the vocabulary

        self._vocabulary = vocabulary
        # Ids by spelling, and spellings by the name that templates have for them.
        self.control_tokens: dict[str, int]
        self.named: dict[str, str]
        if hasattr(vocabulary, "encode_with_offsets"):
            self.control_tokens, self.named = vocabulary.control_tokens, vocabulary.named_tokens
        elif isinstance(vocabulary, seqio.SentencePieceVocabulary):
            model = vocabulary.tokenizer
            self.control_tokens = {
                model.IdToPiece(id_): id_ for id_ in range(model.GetPieceSize()) if model.IsControl(id_)
            }
            ids = {"bos_token": model.bos_id(), "eos_token": model.eos_id()}
            self.named = {name: model.IdToPiece(id_) for name, id_ in ids.items() if id_ >= 0}
        else:
            self.control_tokens, self.named = {END: vocabulary.eos_id}, {"eos_token": END}
        spelled = sorted(self.control_tokens, key=len, reverse=True)
        self._divider = re.compile(f"({'|'.join(map(re.escape, spelled))})") if spelled else None

    def encode(self, examples: Sequence[Sequence[Run]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return ids (n,) int32 and weights (n,) float32 of each example.

        Args:
          examples: runs, which are tokenized by themselves.
        """
        runs = [run for example in examples for run in example]
        if hasattr(self._vocabulary, "encode_with_offsets"):
            encoded = self._vocabulary.encode_with_offsets(["".join(text for text, _ in run) for run in runs])
            tokens = [_by_offsets(run, *each) for run, each in zip(runs, encoded, strict=True)]
        else:
            tokens = [self._by_parts(run) for run in runs]
        found = iter([_weighted(run, each) for run, each in zip(runs, tokens, strict=True)])
        empty = (np.zeros(0, np.int32), np.zeros(0, np.float32))
        made = []
        for example in examples:
            parts = [empty, *(next(found) for _ in example)]
            made.append((np.concatenate([ids for ids, _ in parts]), np.concatenate([w for _, w in parts])))
        return made

    def _by_parts(self, run: Run) -> Tokens:
        """Return the tokens of a vocabulary that takes control tokens in a text for text, and gives no offsets."""
        ids: list[int] = []
        begin: list[int] = []
        end: list[int] = []
        for texts, numbers in self._between_control_tokens(run):
            whole = "".join(texts)
            if whole in self.control_tokens:
                new = [self.control_tokens[whole]]
                firsts, lasts = [0], [len(texts) - 1]
            else:
                new, firsts, lasts = self._plain_tokens(texts)
            ids += new
            begin += [numbers[first] for first in firsts]
            end += [numbers[last] for last in lasts]
        return np.array(ids, np.int32), np.array(begin, np.int64), np.array(end, np.int64)

    def _between_control_tokens(self, run: Run) -> Iterator[tuple[list[str], list[int]]]:
        """Yield a run between its control tokens, and these: the texts, and the numbers of the parts they are of."""
        whole = "".join(text for text, _ in run)
        ends = np.cumsum([len(text) for text, _ in run])
        begin = 0
        for text in self._divider.split(whole) if self._divider else [whole]:
            numbers = [*range(int(np.searchsorted(ends, begin, side="right")), len(run))]
            cuts = [begin, *(int(end) for end in ends if begin < end < begin + len(text)), begin + len(text)]
            if text:
                yield [whole[a:b] for a, b in itertools.pairwise(cuts)], numbers
            begin += len(text)

    def _plain_tokens(self, texts: list[str]) -> tuple[list[int], list[int], list[int]]:
        """Return the ids of joined texts, and the number of the first and the last text of each.

        The ids of a text's beginning are those of the whole up to there, or have the longest beginning in common with
        them. The token behind it then belongs to both sides.
        """
        ids = [*self._vocabulary.encode("".join(texts))]
        first, last = [0] * len(ids), [0] * len(ids)
        for number in range(1, len(texts)):
            before = self._vocabulary.encode("".join(texts[:number]))
            same = map(operator.eq, before, ids)
            clean = sum(1 for _ in itertools.takewhile(bool, same))
            for token in range(clean, len(ids)):
                last[token] = number
            for token in range(clean if clean == len(before) else clean + 1, len(ids)):
                first[token] = number
        return ids, first, last


def _by_offsets(run: Run, ids: Sequence[int], offsets: Sequence[tuple[int, int]]) -> Tokens:
    """Return the tokens of a run by the characters they begin and end at; one without any belongs to the next."""
    ends = np.cumsum([len(text) for text, _ in run])
    places = np.array(offsets, np.int64).reshape(len(ids), 2)
    begin = np.searchsorted(ends, places[:, 0], side="right")
    end = np.searchsorted(ends, np.maximum(places[:, 1] - 1, places[:, 0]), side="right")
    last = len(run) - 1
    return np.array(ids, np.int32), np.minimum(begin, last), np.minimum(end, last)


def _weighted(run: Run, tokens: Tokens) -> tuple[np.ndarray, np.ndarray]:
    """Return ids, and the largest weight of the parts that each token has characters of."""
    ids, begin, end = tokens
    weights = np.array([weight for _, weight in run], np.float32)
    found = weights[begin]
    for index in np.flatnonzero(begin != end):
        found[index] = weights[begin[index] : end[index] + 1].max()
    return ids, found
