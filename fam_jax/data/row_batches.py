"""Training batches whose rows each have examples of their own, so that a process reads those of its rows only.

Row r's k-th example is number k B + r in the sequence of all epochs. This depends on no lengths, so neither a row nor
its process needs to know what the other rows read.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from fam_jax.config import DataConfig, UserError
from fam_jax.data.interface import Batch, BatchSpec, IndexedSource, check_state, new_streams
from fam_jax.data.randomness import permutation, random_key, random_words
from fam_jax.data.rows import Rows, TextBatches

# Batches that are made ahead of the training step, and whose texts are tokenized together.
AHEAD = 8
# Times that all examples of a source may turn out to be empty.
EMPTY_EPOCHS = 64


class Cut(NamedTuple):
    """This process's rows of a batch, and where they end."""

    # (b, n) each.
    rows: Rows
    # (b,) bool: rows that begin an example of the layout continuous.
    start: np.ndarray
    # (b, 2) int32: the example and the token in it that each row goes on with.
    end: np.ndarray


@dataclasses.dataclass
class Row:
    """A row of all batches: the examples that were read for it, and the place of the next token."""

    number: int
    # Number in the row of the first example of `read`.
    example: int = 0
    # Next token of that example.
    token: int = 0
    read: collections.deque[Rows] = dataclasses.field(default_factory=collections.deque)

    def remaining(self) -> Iterator[int]:
        """Yield how many tokens are left of each example that was read."""
        for place, tokens in enumerate(self.read):
            yield len(tokens.inputs) - (0 if place else self.token)

    def take(self, length: int) -> Rows:
        """Return up to `length` tokens of the first example, and go on behind them."""
        part = self.read[0].at(slice(self.token, self.token + length))
        self.token += len(part.inputs)
        if self.token >= len(self.read[0].inputs):
            self.read.popleft()
            self.example, self.token = self.example + 1, 0
        return part


class RowBatches(TextBatches):
    """Endless batches of rows of data.sequence_length tokens; implements :class:`~fam_jax.data.interface.Batches`.

    With the layout by_row, the examples of a row follow one another without padding, through all batches. With
    continuous, a row of a batch holds one example only. A longer one goes on in the same row of the next batch, and
    behind its last token the row is padded with loss weight 0. `start` is True where an example begins. The first
    example of each row is read from a random block on, so that examples do not end in all rows together.

    A thread tokenizes ahead of the training step.
    """

    def __init__(self, data: DataConfig, source: IndexedSource, spec: BatchSpec):
        """Prepare the batches. The first call of :meth:`next` reads the first examples.

        Args:
          data: layout, row length, repeated segment.
          source: examples to read by number.
          spec: the size of batches, and the seed of the order of the examples and of the repeated segments. Several
            processes need its `gather` for :meth:`state`.

        Raises:
          ConfigError: a row is too short for the segment.
          UserError: the number of processes does not divide B.
        """
        super().__init__(data, source.vocabulary, spec)
        self.source = source
        # Rows may be in different epochs, most of them in two that follow each other.
        self._order = functools.lru_cache(4)(
            lambda epoch: permutation(len(source), "documents", spec.seed, epoch)
        )
        self._start(0, np.zeros((len(self._own_rows), 2), np.int32))

    def next(self) -> Batch:
        """Return this process's rows of the next batch.

        Weights are those of the examples, 0 on padding and on the prompt to repeat, and data.repeat_weight on the
        repetition. Targets of examples with a weight count as the answer.

        Raises:
          UserError: the source has no tokens or cannot be read, or a text has a token beyond the model's vocabulary.
        """
        while len(self._ahead) < AHEAD:
            self._ahead.append(self._thread.submit(next, self._cuts))
        rows, start, self._end = self._ahead.popleft().result()
        first = self._step * self.spec.batch_size + self._own_rows.start
        self._step += 1
        return self._with_repetition(rows, first) | {"start": start}

    def metrics(self) -> dict[str, float]:
        """Return the epoch of the first row's next token. Rows with short examples are ahead of others."""
        example = int(self._end[0, 0])
        return {"epoch": (example * self.spec.batch_size + self._own_rows.start) // len(self.source)}

    def positions(self) -> np.ndarray:
        """Return (b, 2) int32: the example, and the token in it, with which each row of this process goes on."""
        return self._end.copy()

    def state(self) -> dict[str, Any]:
        """Return the positions of all rows of all processes, and which examples they refer to, as JSON values.

        Restoring it reads one example of each row again. All processes have to call this together.
        """
        rows = self._end
        if self.spec.gather is not None:
            rows = self.spec.gather(rows)
        elif self.spec.shard[1] > 1:
            raise ValueError("RowBatches.state: with several processes, pass `gather`")
        return {"stream": self._identity(), "step": self._step, "rows": np.asarray(rows).tolist()}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a :meth:`state`.

        Raises:
          UserError: the state is of another task, layout or version, or of other examples or another B.
        """
        check_state(state, {"stream", "step", "rows"}, self._identity())
        own = slice(self._own_rows.start, self._own_rows.stop)
        self._start(state["step"], np.array(state["rows"][own], np.int32))

    def _identity(self) -> dict[str, Any]:
        """Return what the batches after a position depend on."""
        data = self.data
        identity = {
            "layout": data.layout,
            "seed": self.spec.seed,
            "batch_size": self.spec.batch_size,
            "sequence_length": data.sequence_length,
            "repeat_segment": data.repeat_segment,
            "contents": self.source.fingerprint,
        }
        return (
            identity
            | self._segments
            | ({"block_size": self.spec.block_size} if data.layout == "continuous" else {})
        )

    def _start(self, step: int, positions: np.ndarray) -> None:
        self._step = step
        self._end = positions
        rows = [Row(r, *position) for r, position in zip(self._own_rows, positions.tolist(), strict=True)]
        # Used by the thread alone.
        self._cuts: Iterator[Cut] = self._cut_batches(rows)
        self._thread: ThreadPoolExecutor = ThreadPoolExecutor(1, "rows")
        self._ahead: collections.deque[Future[Cut]] = collections.deque()

    def _cut_batches(self, rows: Sequence[Row]) -> Iterator[Cut]:
        """Yield all batches from the positions of the rows on."""
        cut = self._cut_piece if self.data.layout == "continuous" else self._cut_joined
        # Examples and tokens read so far.
        counts, together = [0, 0], 1
        while True:
            while any(self._pieces(row) == 0 for row in rows):
                self._read(rows, together, counts)
            # The first batch does not wait for the texts of later ones.
            together = min(2 * together, AHEAD)
            parts, starts = zip(*(cut(row) for row in rows), strict=True)
            end = np.array([(row.example, row.token) for row in rows], np.int32)
            yield Cut(
                Rows(*(np.stack(each) for each in zip(*parts, strict=True))), np.concatenate(starts), end
            )

    def _pieces(self, row: Row) -> int:
        """Return the number of rows that the examples read for a row are enough for."""
        if self.data.layout == "continuous":
            return sum(-(-left // self._body) for left in row.remaining())
        return sum(row.remaining()) // self._body

    def _read(self, rows: Sequence[Row], together: int, counts: list[int]) -> None:
        """Read the next examples of all rows that have too few for this many batches; at least one for each."""
        mean = max(1.0, counts[1] / max(counts[0], 1))
        if self.data.layout == "continuous":
            mean = max(mean, self._body)
        wanted: list[tuple[Row, int]] = []
        for row in rows:
            if (missing := together - self._pieces(row)) > 0:
                count = max(1, int(missing * self._body / mean)) if counts[1] else 1
                first = row.example + len(row.read)
                wanted += [(row, self._index(row.number, k)) for k in range(first, first + count)]
        examples = self.source.read([index for _, index in wanted])
        for (row, _), example in zip(wanted, examples, strict=True):
            row.read.append(self._tokens_of(example))
            counts[0] += 1
            counts[1] += len(example.ids)
        if counts[1] == 0 and counts[0] > EMPTY_EPOCHS * len(self.source):
            raise UserError(
                f"config.data.task: there are no tokens in {self.source.fingerprint}; use other data"
            )

    def _index(self, row: int, k: int) -> int:
        """Return the number in the source of a row's k-th example."""
        epoch, place = divmod(k * self.spec.batch_size + row, len(self.source))
        return int(self._order(epoch)[place])

    def _cut_joined(self, row: Row) -> tuple[Rows, np.ndarray]:
        """Return the next tokens of a row, of as many examples as it takes; like those of packed rows, a new stream."""
        parts, missing = [], self._body
        while missing:
            parts.append(row.take(missing))
            missing -= len(parts[-1].inputs)
        return Rows(*(np.concatenate(each) for each in zip(*parts, strict=True))), new_streams(1)

    def _cut_piece(self, row: Row) -> tuple[Rows, np.ndarray]:
        """Return the next tokens of a row's example, padded, and whether the example begins with them."""
        while not len(row.read[0].inputs):
            row.take(0)
        start = row.token == 0
        if start and row.example == 0:
            blocks = -(-len(row.read[0].inputs) // self.spec.block_size)
            [word] = random_words(random_key("first block", self.spec.seed), row.number)
            row.token = word % blocks * self.spec.block_size
        part = row.take(self._body)
        padding = self._body - len(part.inputs)
        return Rows(*(np.pad(each, (0, padding)) for each in part)), np.array([start])
