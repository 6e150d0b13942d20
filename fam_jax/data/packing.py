"""Training batches of one row length, packed from examples; resumable at any step, on any number of processes.

Examples are joined one after another and cut into rows, with no attention mask between them (section 3.1 of the paper).
A row continues where another one ended, so every token is used and nothing is padding.
"""

import dataclasses
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import logging

from fam_jax.config import DataConfig, UserError
from fam_jax.data.interface import Batch, BatchSpec, Source, check_state, new_streams
from fam_jax.data.randomness import permutation
from fam_jax.data.rows import Rows, TextBatches, empty_rows

if TYPE_CHECKING:
    from fam_jax.data.bookmarks import Bookmarks


@dataclasses.dataclass(frozen=True)
class Position:
    """A place in the examples: the next token to read."""

    epoch: int = 0
    # Place in the order of the epoch.
    example: int = 0
    token: int = 0


class PackedBatches(TextBatches):
    """Endless batches of rows of data.sequence_length tokens; implements :class:`~fam_jax.data.interface.Batches`.

    Rows are cut in the source's order, and shuffled within groups of data.shuffle_batches batches. Where a row begins
    depends on the lengths of all rows before it, so every process reads all examples and keeps its own rows. A thread
    reads one group ahead.
    """

    def __init__(
        self,
        data: DataConfig,
        source: Source,
        spec: BatchSpec,
        *,
        rows: range | None = None,
        bookmarks: "Bookmarks | None" = None,
        name: str = "",
    ):
        """Prepare the batches. The first call of :meth:`next` reads the first examples.

        Args:
          data: row length, shuffling, repeated segment.
          source: examples to pack.
          spec: the size of batches, and the seed of shuffling and of the repeated segments.
          rows: numbers of the rows to keep; None: those of this process.
          bookmarks: those that the source makes, if it makes any: they are kept for the positions of states.
          name: of the examples, for an error message; by default the fingerprint of the source.

        Raises:
          ConfigError: a row is too short for the segment.
          UserError: the number of processes does not divide B.
        """
        super().__init__(data, source.vocabulary, spec)
        index, processes = spec.shard
        if index == 0 and processes > 1:
            logging.warning(
                "config.data.layout: with packed, each of the %d processes tokenizes the whole batch, with by_row its "
                "own rows only",
                processes,
            )
        self.source, self._bookmarks, self._name = source, bookmarks, name or source.fingerprint
        if rows is not None:
            self._own_rows = rows
        self.start(0, Position())

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
        rows = self._rows.at(batch)
        first = self._step * self.spec.batch_size + self._own_rows.start
        self._step += 1
        return self._with_repetition(rows, first) | {"start": new_streams(len(rows.inputs))}

    def metrics(self) -> dict[str, float]:
        """Return the epoch in which the current group of batches begins."""
        return {"epoch": self._group.epoch}

    def state(self) -> dict[str, Any]:
        """Return the position, and which examples it refers to, as JSON values.

        Restoring it reads at most one group of batches again.
        """
        return {"stream": self.identity(), "step": self._step, "group": dataclasses.asdict(self.position())}

    def position(self) -> Position:
        """Return where the group of the next batch begins; keep the last bookmark before it."""
        group = self._group if self._step % self.data.shuffle_batches else self._group_end
        if self._bookmarks is not None:
            self._bookmarks.keep(group.epoch, group.example)
        return group

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a :meth:`state`.

        Raises:
          UserError: the state is of another task or version, or of other examples.
        """
        check_state(state, {"stream", "step", "group"}, self.identity())
        self.start(state["step"], Position(**state["group"]))

    def identity(self) -> dict[str, Any]:
        """Return what the batches after a position depend on."""
        data = self.data
        return self._segments | {
            "seed": self.spec.seed,
            "batch_size": self.spec.batch_size,
            "sequence_length": data.sequence_length,
            "shuffle_batches": data.shuffle_batches,
            "repeat_segment": data.repeat_segment,
            "contents": self.source.fingerprint,
        }

    def start(self, step: int, group: Position) -> None:
        """Continue with the batch of a step, from the :meth:`position` before it."""
        self._step = step
        # Where the current group begins and ends.
        self._group = self._group_end = group
        # This process's rows of the current group: (batches, B / count, n).
        self._rows: Rows | None = None
        self._cut = self._cut_rows(group)
        self._thread = ThreadPoolExecutor(1, "packing")
        self._ahead: Future[tuple[Rows, Position]] | None = None

    def _begin_group(self) -> None:
        self.read_ahead()
        assert self._ahead is not None
        self._rows, end = self._ahead.result()
        self._group, self._group_end = self._group_end, end
        if self._bookmarks is not None:
            self._bookmarks.passed(self._group.epoch, self._group.example)
        self._ahead = None
        self.read_ahead(1)

    def read_ahead(self, groups: int = 0) -> None:
        """Begin to read the group of the next batch, or one behind it, unless a group is being read."""
        if self._ahead is None:
            number = self._step // self.data.shuffle_batches + groups
            self._ahead = self._thread.submit(self._read_group, number, self._cut)

    def _read_group(self, number: int, cut: Iterator[tuple[Rows, Position]]) -> tuple[Rows, Position]:
        """Return this process's rows of a group, cut one after the other, and where the group ends."""
        batches, size = self.data.shuffle_batches, self.spec.batch_size
        own = empty_rows(batches, len(self._own_rows), self._body)
        # Place in the group of each row, in the order in which rows are cut.
        for place in np.argsort(permutation(batches * size, "rows", self.spec.seed, number)).tolist():
            rows, end = next(cut)
            batch, row = divmod(place, size)
            if row in self._own_rows:
                for into, part in zip(own, rows, strict=True):
                    into[batch, row - self._own_rows.start] = part
        return own, end

    def _cut_rows(self, start: Position) -> Iterator[tuple[Rows, Position]]:
        """Yield all rows from a position on, each with the position where it ends."""
        length, epoch, first, skipped = self._body, start.epoch, start.example, start.token
        rows, filled = empty_rows(length), 0
        while True:
            read = first + skipped
            for index, example in enumerate(self.source.epoch(epoch, first), first):
                source, size = self._tokens_of(example), len(example.ids)
                begin, skipped = skipped, 0
                read += size
                while begin < size:
                    count = min(length - filled, size - begin)
                    for into, part in zip(rows, source, strict=True):
                        into[filled : filled + count] = part[begin : begin + count]
                    filled, begin = filled + count, begin + count
                    if filled == length:
                        yield rows, Position(epoch, index, begin)
                        rows, filled = empty_rows(length), 0
            if read == 0:
                raise UserError(f"config.data.task: there are no tokens in {self._name}; use other data")
            epoch, first, skipped = epoch + 1, 0, 0
