"""What batches of text rows have in common, however examples are divided into rows."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fam_jax.config import ConfigError, DataConfig
from fam_jax.data.interface import Batch, BatchSpec, Example
from fam_jax.data.randomness import random_key, random_words
from fam_jax.data.repetition import segment_places
from fam_jax.data.vocabulary import check_ids, first_input

if TYPE_CHECKING:
    from fam_jax.data.quiet_seqio import seqio

REPEAT_PROMPT = "[repeat random segment]:"


class Rows(NamedTuple):
    """Tokens of examples. The input of an example's first token is :func:`first_input`."""

    # (..., n) int32.
    inputs: np.ndarray
    # (..., n) int32.
    targets: np.ndarray
    # (..., n) float32.
    weights: np.ndarray

    def at(self, place: int | slice) -> "Rows":
        """Return the tokens at a place of all three arrays."""
        return Rows(*(part[place] for part in self))


def empty_rows(*shape: int) -> Rows:
    """Return rows of this shape, to be written to."""
    return Rows(np.empty(shape, np.int32), np.empty(shape, np.int32), np.empty(shape, np.float32))


class TextBatches:
    """The part of :class:`~fam_jax.data.interface.Batches` that all rows of data.sequence_length tokens share.

    With data.repeat_segment, a row ends with the prompt "[repeat random segment]:" and that many consecutive tokens of
    the row, chosen at random.
    """

    # There is no curriculum.
    needs_metrics = False

    def __init__(self, data: DataConfig, vocabulary: "seqio.Vocabulary", spec: BatchSpec):
        """Check the lengths.

        Args:
          data: row length, start token, repeated segment.
          vocabulary: of the examples.
          spec: the size of batches, and the seed of the repeated segments.

        Raises:
          ConfigError: a row is too short for the segment.
          UserError: the number of processes does not divide B.
        """
        self.data, self.vocabulary, self.spec = data, vocabulary, spec
        self._own_rows = spec.own_rows
        self._start_id = first_input(vocabulary, data)
        self._prompt = np.array(vocabulary.encode(REPEAT_PROMPT) if data.repeat_segment else [], np.int32)
        appended = len(self._prompt) + data.repeat_segment
        # Tokens of a row that come from examples.
        self._body = data.sequence_length - appended
        if self._body < max(1, data.repeat_segment):
            raise ConfigError(
                f"config.data.repeat_segment: {data.repeat_segment} tokens and their prompt of {len(self._prompt)} "
                f"leave too little of sequence_length {data.sequence_length} to repeat; change one of the two"
            )
        self._places = segment_places(data, self._body, spec.block_size) if data.repeat_segment else 0
        # What the segments depend on, for the identity of a state; nothing by default, as in earlier versions.
        self._segments: dict[str, Any] = {}
        if data.repeat_segment and data.repeat_before_blocks:
            self._segments = {
                "repeat_before_blocks": data.repeat_before_blocks,
                "block_size": spec.block_size,
            }

    @property
    def longest_row(self) -> int:
        """Return the length of every row, in tokens."""
        return self.data.sequence_length

    def observe(self, metrics: Mapping[str, Any]) -> None:
        """Ignore the metrics, on which no batch depends."""

    def name_scores(self, metrics: dict[str, float]) -> dict[str, float]:
        """Call the accuracy `accuracy`, and leave out the exact match of whole rows, which is no measure of text."""
        names = {"answer_accuracy": "accuracy"}
        return {names.get(name, name): value for name, value in metrics.items() if name != "exact_match"}

    def describe(self, values: Mapping[str, Any]) -> str:
        """Return accuracy and epoch, for the progress line."""
        return f"accuracy {values['accuracy']:.3f}  epoch {values['epoch']}"

    def _tokens_of(self, example: Example) -> Rows:
        """Return inputs, targets and weights of an example, after checking its ids."""
        ids = example.ids
        if self.spec.vocab_size is not None:
            check_ids(ids, self.vocabulary, self.spec.vocab_size)
        return Rows(np.append(np.int32(self._start_id), ids[:-1])[: len(ids)], ids, example.weights)

    def _with_repetition(self, rows: Rows, first: int) -> Batch:
        """Return the rows, with segments repeated at their ends; `first` is the first one's number in the whole run."""
        inputs, targets, weights = rows
        answer = weights > 0
        if segment := self.data.repeat_segment:
            key, count = random_key("repeat", self.spec.seed), len(targets)
            draws = [random_words(key, first + row)[0] for row in range(count)]
            begin = np.array([draw % self._places for draw in draws])
            repeated = targets[np.arange(count)[:, None], begin[:, None] + np.arange(segment)]
            tail = np.concatenate([np.tile(self._prompt, (count, 1)), repeated], axis=1)
            inputs = np.concatenate([inputs, targets[:, -1:], tail[:, :-1]], axis=1)
            targets = np.concatenate([targets, tail], axis=1)
            tail_weights = np.where(np.arange(tail.shape[1]) < len(self._prompt), 0, self.data.repeat_weight)
            weights = np.concatenate([weights, np.tile(tail_weights, (count, 1))], axis=1, dtype=np.float32)
            answer = np.concatenate([answer, np.zeros_like(tail, bool)], axis=1)
        return {"inputs": inputs, "targets": targets, "weights": weights, "answer": answer}
