"""Training batches of one row length, packed from examples; resumable at any step, on any number of processes.

Examples are joined one after another and cut into rows, with no attention mask between them (section 3.1 of the paper).
A row continues where another one ended, so every token is used and nothing is padding.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from fam_jax.config import ConfigError, DataConfig, UserError
from fam_jax.data.interface import Batch, Source, check_state, new_streams, own_rows
from fam_jax.data.randomness import permutation, random_key, random_words
from fam_jax.data.repetition import segment_places
from fam_jax.data.vocabulary import check_ids, first_input

REPEAT_PROMPT = "[repeat random segment]:"


@dataclasses.dataclass(frozen=True)
class Position:
    """A place in the examples: the next token to read."""

    epoch: int = 0
    # Place in the order of the epoch.
    example: int = 0
    token: int = 0


class Rows(NamedTuple):
    """Tokens cut from the examples. The input of an example's first token is :func:`first_input`."""

    # (..., n) int32.
    inputs: np.ndarray
    # (..., n) int32.
    targets: np.ndarray
    # (..., n) float32.
    weights: np.ndarray


class PackedBatches:
    """Endless batches of rows of data.sequence_length tokens; implements :class:`~fam_jax.data.interface.Batches`.

    Rows are cut in the source's order, and shuffled within groups of data.shuffle_batches batches. Where a row begins
    depends on the lengths of all rows before it, so every process reads all examples and keeps its own rows. A thread
    reads one group ahead.

    With data.repeat_segment, a row ends with the prompt "[repeat random segment]:" and that many consecutive tokens of
    the row, chosen at random.
    """

    def __init__(
        self,
        data: DataConfig,
        source: Source,
        *,
        batch_size: int,
        seed: int,
        shard: tuple[int, int] = (0, 1),
        vocab_size: int | None = None,
        block_size: int | None = None,
    ):
        """Prepare the batches. The first call of :meth:`next` reads the first examples.

        Args:
          data: row length, shuffling, repeated segment.
          source: examples to pack.
          batch_size: B, rows of the global batch.
          seed: of shuffling and of the repeated segments.
          shard: (index, count) of this process.
          vocab_size: V of the model; None: not checked.
          block_size: C, tokens, for data.repeat_before_blocks.

        Raises:
          ConfigError: a row is too short for the segment.
          UserError: count does not divide B.
        """
        self._own_rows = own_rows(batch_size, shard)
        self.data, self.source, self.batch_size, self.seed = data, source, batch_size, seed
        self.vocabulary, self._vocab_size = source.vocabulary, vocab_size
        self._start_id = first_input(self.vocabulary, data)
        self._prompt = np.array(
            self.vocabulary.encode(REPEAT_PROMPT) if data.repeat_segment else [], np.int32
        )
        appended = len(self._prompt) + data.repeat_segment
        # Tokens of a row that come from examples.
        self._body = data.sequence_length - appended
        if self._body < max(1, data.repeat_segment):
            raise ConfigError(
                f"config.data.repeat_segment: {data.repeat_segment} tokens and their prompt of {len(self._prompt)} "
                f"leave too little of sequence_length {data.sequence_length} to repeat; change one of the two"
            )
        self._places = segment_places(data, self._body, block_size) if data.repeat_segment else 0
        self._block_size = block_size
        self._start(0, Position())

    # There is no curriculum.
    needs_metrics = False

    @property
    def longest_row(self) -> int:
        """Return the length of every row, in tokens."""
        return self.data.sequence_length

    def next(self) -> Batch:
        """Return this process's rows of the next batch.

        Weights are those of the examples, 0 on the prompt to repeat and data.repeat_weight on the repetition. Targets
        of examples with a weight count as the answer.

        Raises:
          UserError: the source has no tokens or cannot be read, or a text has a token beyond the model's vocabulary.
        """
        batch = self._step % self.data.shuffle_batches
        if self._rows is None or batch == 0:
            self._begin_group()
        assert self._rows is not None
        rows = Rows(*(part[batch] for part in self._rows))
        first = self._step * self.batch_size + self._own_rows.start
        self._step += 1
        return self._with_repetition(rows, first) | {"start": new_streams(len(rows.inputs))}

    def observe(self, metrics: Mapping[str, Any]) -> None:
        """Ignore the metrics, on which no batch depends."""

    def metrics(self) -> dict[str, float]:
        """Return the epoch in which the current group of batches begins."""
        return {"epoch": self._group.epoch}

    def name_scores(self, metrics: dict[str, float]) -> dict[str, float]:
        """Call the accuracy `accuracy`, and leave out the exact match of whole rows, which is no measure of text."""
        names = {"answer_accuracy": "accuracy"}
        return {names.get(name, name): value for name, value in metrics.items() if name != "exact_match"}

    def describe(self, values: Mapping[str, Any]) -> str:
        """Return accuracy and epoch, for the progress line."""
        return f"accuracy {values['accuracy']:.3f}  epoch {values['epoch']}"

    def state(self) -> dict[str, Any]:
        """Return the position, and which examples it refers to, as JSON values.

        Restoring it reads at most one group of batches again.
        """
        begun = self._step % self.data.shuffle_batches
        group = self._group if begun else self._group_end
        return {"stream": self._identity(), "step": self._step, "group": dataclasses.asdict(group)}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a :meth:`state`.

        Raises:
          UserError: the state is of another task or version, or of other examples.
        """
        check_state(state, {"stream", "step", "group"}, self._identity())
        self._start(state["step"], Position(**state["group"]))

    def _identity(self) -> dict[str, Any]:
        """Return what the batches after a position depend on."""
        data = self.data
        # States of versions without it go on to fit.
        before = {"repeat_before_blocks": data.repeat_before_blocks, "block_size": self._block_size}
        return (before if data.repeat_segment and data.repeat_before_blocks else {}) | {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "sequence_length": data.sequence_length,
            "shuffle_batches": data.shuffle_batches,
            "repeat_segment": data.repeat_segment,
            "contents": self.source.fingerprint,
        }

    def _start(self, step: int, group: Position) -> None:
        self._step = step
        # Where the current group begins and ends.
        self._group = self._group_end = group
        # This process's rows of the current group: (batches, B / count, n).
        self._rows: Rows | None = None
        self._cut = self._cut_rows(group)
        self._thread = ThreadPoolExecutor(1, "packing")
        self._ahead: Future[tuple[Rows, Position]] | None = None

    def _begin_group(self) -> None:
        number = self._step // self.data.shuffle_batches
        ahead = self._ahead or self._thread.submit(self._read_group, number)
        self._rows, end = ahead.result()
        self._group, self._group_end = self._group_end, end
        self._ahead = self._thread.submit(self._read_group, number + 1)

    def _read_group(self, number: int) -> tuple[Rows, Position]:
        """Return this process's rows of a group, and where the group ends."""
        batches, size = self.data.shuffle_batches, self.batch_size
        own = _empty_rows(batches, len(self._own_rows), self._body)
        # Place in the group of each row, in the order in which rows are cut.
        for place in np.argsort(permutation(batches * size, "rows", self.seed, number)).tolist():
            rows, end = next(self._cut)
            batch, row = divmod(place, size)
            if row in self._own_rows:
                for into, part in zip(own, rows, strict=True):
                    into[batch, row - self._own_rows.start] = part
        return own, end

    def _cut_rows(self, start: Position) -> Iterator[tuple[Rows, Position]]:
        """Yield all rows from a position on, each with the position where it ends."""
        length, epoch, first, skipped = self._body, start.epoch, start.example, start.token
        rows, filled = _empty_rows(length), 0
        while True:
            read = first + skipped
            for index, (ids, weights, _) in enumerate(self.source.epoch(epoch, first), first):
                if self._vocab_size is not None:
                    check_ids(ids, self.vocabulary, self._vocab_size)
                source = Rows(np.append(np.int32(self._start_id), ids[:-1])[: len(ids)], ids, weights)
                begin, skipped = skipped, 0
                read += len(ids)
                while begin < len(ids):
                    count = min(length - filled, len(ids) - begin)
                    for into, part in zip(rows, source, strict=True):
                        into[filled : filled + count] = part[begin : begin + count]
                    filled, begin = filled + count, begin + count
                    if filled == length:
                        yield rows, Position(epoch, index, begin)
                        rows, filled = _empty_rows(length), 0
            if read == 0:
                raise UserError(
                    f"config.data.task: there are no tokens in {self.source.fingerprint}; use other data"
                )
            epoch, first, skipped = epoch + 1, 0, 0

    def _with_repetition(self, rows: Rows, first: int) -> Batch:
        """Return the rows, with segments repeated at their ends; `first` is the first one's number in the whole run."""
        inputs, targets, weights = rows
        answer = weights > 0
        if segment := self.data.repeat_segment:
            key, count = random_key("repeat", self.seed), len(targets)
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


def _empty_rows(*shape: int) -> Rows:
    return Rows(np.empty(shape, np.int32), np.empty(shape, np.int32), np.empty(shape, np.float32))
