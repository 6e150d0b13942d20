"""Training batches of one row length, packed from examples: resumable at any step, the same on any number of processes.

Examples are joined one after the other and cut into rows, with no attention mask between them (section 3.1 of the
paper). A row goes on where another one stopped: nothing is left out, and nothing is padding.
"""

import dataclasses
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from fam_jax.config import ConfigError, DataConfig, UserError
from fam_jax.data.bos import first_input
from fam_jax.data.examples import Examples, permutation
from fam_jax.data.passkey import random_key

Batch = dict[str, np.ndarray]

REPEAT_PROMPT = "[repeat random segment]:"


@dataclasses.dataclass(frozen=True)
class Position:
    """A place in the examples: the next token to be read."""

    epoch: int = 0
    example: int = 0  # in the order of the epoch
    token: int = 0


class Rows(NamedTuple):
    """What is cut from the examples; the input of an example's first token is :func:`first_input`."""

    inputs: np.ndarray  # (..., n) int32
    targets: np.ndarray  # (..., n) int32
    weights: np.ndarray  # (..., n) float32


class PackedStream:
    """Endless batches of rows of `data.sequence_length` tokens.

    Rows are cut in an order that depends on the seed only, and shuffled within groups of `data.shuffle_batches`
    batches. Where a row begins depends on the lengths of all rows before it; so every process reads all examples and
    keeps its own rows, a group ahead, in a thread. With `data.repeat_segment` the end of each row is the prompt
    "[repeat random segment]:" and that many consecutive tokens of the row, chosen at random.
    """

    def __init__(
        self,
        data: DataConfig,
        examples: Examples,
        *,
        batch_size: int,
        seed: int,
        shard: tuple[int, int] = (0, 1),
    ):
        """Prepares the stream; the first examples are read by the first :meth:`next_batch`.

        Args:
          data: row length, shuffling, repeated segment.
          examples: to pack.
          batch_size: B, rows of the global batch.
          seed: of everything random here.
          shard: (index, count) of this process; it makes rows [index * B / count, (index + 1) * B / count).

        Raises:
          ConfigError: a row is too short for the segment.
          UserError: count does not divide B.
        """
        self.shard_index, self.shard_count = shard
        if batch_size % self.shard_count:
            raise UserError(f"batch_size {batch_size} is not divisible by the {self.shard_count} processes")
        self.data, self.examples, self.batch_size, self.seed = data, examples, batch_size, seed
        self.vocabulary = examples.vocabulary
        self._start_id = first_input(self.vocabulary, data)
        self._prompt = np.array(
            self.vocabulary.encode(REPEAT_PROMPT) if data.repeat_segment else [], np.int32
        )
        appended = len(self._prompt) + data.repeat_segment
        self._body = data.sequence_length - appended  # tokens of a row that come from examples
        if self._body < max(1, data.repeat_segment):
            raise ConfigError(
                f"config.data.repeat_segment: {data.repeat_segment} tokens and their prompt of {len(self._prompt)} "
                f"leave too little of sequence_length {data.sequence_length} to repeat"
            )
        self._start(0, Position())

    advancing = False  # there is no curriculum that results could advance

    def report(self, exact_match: float) -> None:
        """Nothing here depends on results."""

    def metrics(self) -> dict[str, float]:
        """What the log says of the data."""
        return {"epoch": self._group.epoch}

    def note(self, values: dict[str, Any]) -> str:
        """Part of the line that reports a step's metrics."""
        return f"accuracy {values['answer_accuracy']:.3f}  epoch {values['epoch']}"

    def next_batch(self) -> Batch:
        """This process's rows of the next global batch.

        Returns:
          inputs, targets (B / count, T) int32; weights (B / count, T) float32: those of the examples, 0 on the prompt
          to repeat, repeat_weight on the repetition; answer (B / count, T) bool: targets of examples with a weight.

        Raises:
          UserError: the source has no tokens.
        """
        batch = self._step % self.data.shuffle_batches
        if self._rows is None or batch == 0:
            self._begin_group()
        assert self._rows is not None
        rows = Rows(*(part[batch] for part in self._rows))
        first = self._step * self.batch_size + self.shard_index * len(rows.inputs)
        self._step += 1
        return self._with_repetition(rows, first)

    def state(self) -> dict[str, Any]:
        """JSON-able; a stream with it restored continues with the very batches that this one would give.

        It is the same in all processes and may be restored with another number of them. Restored, at most a group of
        batches is read again.
        """
        begun = self._step % self.data.shuffle_batches
        group = self._group if begun else self._group_end
        return {"stream": self._identity(), "step": self._step, "group": dataclasses.asdict(group)}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from a :meth:`state`.

        Raises:
          UserError: the state is of another version, or belongs to a stream of other examples.
        """
        if not isinstance(state, dict) or set(state) != {"stream", "step", "group"}:
            raise UserError(
                "data state: expected the fields group, step, stream; it is of another task or version"
            )
        for name, value in self._identity().items():
            saved = state["stream"].get(name)
            if saved != value:
                raise UserError(
                    f"data state: {name} was {saved} when it was saved and is {value} now; "
                    "resume with the config and the data of the run"
                )
        self._start(state["step"], Position(**state["group"]))

    def _identity(self) -> dict[str, Any]:
        """What must agree for a state to mean the same batches."""
        data = self.data
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "sequence_length": data.sequence_length,
            "shuffle_batches": data.shuffle_batches,
            "repeat_segment": data.repeat_segment,
            "contents": self.examples.fingerprint,
        }

    def _start(self, step: int, group: Position) -> None:
        self._step = step
        self._group = self._group_end = group  # where the current group begins and ends
        self._rows: Rows | None = None  # of the current group: (batches, B / count, n)
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
        """This process's rows of a group, and where the group ends."""
        batches, size = self.data.shuffle_batches, self.batch_size
        order = permutation(batches * size, "rows", self.seed, number)
        place = np.argsort(order)  # of each row that is cut, in the group
        share = size // self.shard_count
        own = Rows(
            *(np.empty((batches, share, self._body), kind) for kind in (np.int32, np.int32, np.float32))
        )
        for where in place:
            rows, end = next(self._cut)
            row = where % size - self.shard_index * share
            if 0 <= row < share:
                for into, part in zip(own, rows, strict=True):
                    into[where // size, row] = part
        return own, end

    def _cut_rows(self, start: Position) -> Iterator[tuple[Rows, Position]]:
        """All rows from a position on, each with the position where it ends."""
        length, epoch, first, skipped = self._body, start.epoch, start.example, start.token
        rows, filled = _empty_row(length), 0
        while True:
            read = first + skipped
            for index, (ids, weights, _) in enumerate(self.examples.epoch(epoch, first), first):
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
                        rows, filled = _empty_row(length), 0
            if read == 0:
                raise UserError(f"config.data.task: there are no tokens in {self.examples.fingerprint}")
            epoch, first, skipped = epoch + 1, 0, 0

    def _with_repetition(self, rows: Rows, first: int) -> Batch:
        """A batch of the rows, whose numbers among all rows of the run count from `first`."""
        inputs, targets, weights = rows
        answer = weights > 0
        if segment := self.data.repeat_segment:
            key, count = random_key("repeat", self.seed), len(targets)
            draws = [int(np.random.Philox(key=key, counter=first + row).random_raw()) for row in range(count)]
            begin = np.array([draw % (self._body - segment + 1) for draw in draws])
            repeated = targets[np.arange(count)[:, None], begin[:, None] + np.arange(segment)]
            tail = np.concatenate([np.tile(self._prompt, (count, 1)), repeated], axis=1)
            inputs = np.concatenate([inputs, targets[:, -1:], tail[:, :-1]], axis=1)
            targets = np.concatenate([targets, tail], axis=1)
            tail_weights = np.where(np.arange(tail.shape[1]) < len(self._prompt), 0, self.data.repeat_weight)
            weights = np.concatenate([weights, np.tile(tail_weights, (count, 1))], axis=1, dtype=np.float32)
            answer = np.concatenate([answer, np.zeros_like(tail, bool)], axis=1)
        return {"inputs": inputs, "targets": targets, "weights": weights, "answer": answer}


def _empty_row(length: int) -> Rows:
    return Rows(np.empty(length, np.int32), np.empty(length, np.int32), np.empty(length, np.float32))
