"""Training batches whose groups of rows each have a shard of the examples, so that a process reads its own only."""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fam_jax.config import DataConfig
from fam_jax.data.interface import Batch, BatchSpec, check_state
from fam_jax.data.packing import PackedBatches, Position
from fam_jax.data.randomness import random_key

if TYPE_CHECKING:
    from fam_jax.data.quiet_seqio import seqio
    from fam_jax.data.seqio_source import SeqioSource

MakeShard = Callable[[int, int], "SeqioSource"]
"""Returns one of `count` shards of the examples, for (index, count)."""


class ShardedBatches:
    """Endless batches of rows of data.sequence_length tokens; implements :class:`~fam_jax.data.interface.Batches`.

    The rows of a batch are divided into gcd(B, data.seqio_shards) groups of neighbours. Each group has a shard of the
    examples, and its rows are packed like a batch of :class:`PackedBatches`. The shards do not depend on the number of
    processes. A process reads the shards of its rows, so with at most as many processes as shards, it reads no others.
    """

    # There is no curriculum.
    needs_metrics = False

    def __init__(self, data: DataConfig, make_shard: MakeShard, spec: BatchSpec):
        """Prepare the batches. The first call of :meth:`next` reads the first examples.

        Args:
          data: row length, shards, shuffling, repeated segment.
          make_shard: makes the shards of this process's rows.
          spec: the size of batches, and the seed of shuffling and of the repeated segments. Several processes need its
            `gather` for :meth:`state`.

        Raises:
          ConfigError: a row is too short for the segment.
          UserError: the number of processes does not divide B.
        """
        self.data, self.spec = data, spec
        self.shards = math.gcd(spec.batch_size, data.seqio_shards)
        share, own = spec.batch_size // self.shards, spec.own_rows
        # Shards of this process, and its rows of each.
        self._rows: dict[int, int] = {}
        self._parts: dict[int, PackedBatches] = {}
        for index in range(own.start // share, (own.stop - 1) // share + 1):
            source = make_shard(index, self.shards)
            part = spec._replace(batch_size=share, seed=self._seed_of(index), shard=(0, 1), gather=None)
            rows = range(max(own.start - index * share, 0), min(own.stop - index * share, share))
            self._rows[index] = len(rows)
            name = f"shard {index} of {self.shards} of {source.fingerprint} (config.data.seqio_shards)"
            self._parts[index] = PackedBatches(
                data, source, part, rows=rows, bookmarks=source.bookmarks, name=name
            )
        self._first = next(iter(self._parts.values()))
        self._step = 0

    def _seed_of(self, index: int) -> int:
        """Return the seed of a shard's shuffling and repeated segments."""
        return random_key("shard", self.spec.seed, index) % 2**31

    @property
    def parts(self) -> list[PackedBatches]:
        """Return the packed batches of this process's shards."""
        return [*self._parts.values()]

    @property
    def vocabulary(self) -> "seqio.Vocabulary":
        """Return the vocabulary of the examples."""
        return self._first.vocabulary

    @property
    def longest_row(self) -> int:
        """Return the length of every row, in tokens."""
        return self._first.longest_row

    def next(self) -> Batch:
        """Return this process's rows of the next batch.

        Raises:
          UserError: a shard has no tokens or cannot be read, or a text has a token beyond the model's vocabulary.
        """
        for part in self._parts.values():  # all of them read at the same time
            part.read_ahead()
        batches = [part.next() for part in self._parts.values()]
        self._step += 1
        return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}

    def observe(self, metrics: Mapping[str, Any]) -> None:
        """Ignore the metrics, on which no batch depends."""

    def metrics(self) -> dict[str, float]:
        """Return the epoch in which the first shard's group of batches begins."""
        return self._first.metrics()

    def name_scores(self, metrics: dict[str, float]) -> dict[str, float]:
        """Name the scores as those of packed rows."""
        return self._first.name_scores(metrics)

    def describe(self, values: Mapping[str, Any]) -> str:
        """Return accuracy and epoch, for the progress line."""
        return self._first.describe(values)

    def state(self) -> dict[str, Any]:
        """Return the positions of all shards, and which examples they refer to, as JSON values.

        Restoring it reads at most one group of batches again, and of seqio tasks what lies between that and the last
        bookmark. All processes have to call this together.
        """
        # The position of each row's shard, since processes that share a shard have equally many rows.
        rows = np.array(
            [
                [position.epoch, position.example, position.token]
                for index, part in self._parts.items()
                for position in [part.position()] * self._rows[index]
            ],
            np.int32,
        )
        if self.spec.gather is not None:
            rows = self.spec.gather(rows)
        elif self.spec.shard[1] > 1:
            raise ValueError("ShardedBatches.state: with several processes, pass `gather`")
        positions = np.asarray(rows)[:: self.spec.batch_size // self.shards].tolist()
        return {"stream": self._identity(), "step": self._step, "shards": positions}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a :meth:`state`.

        Raises:
          UserError: the state is of another task, layout or version, or of other examples, another B or other shards.
        """
        check_state(state, {"stream", "step", "shards"}, self._identity())
        self._step = state["step"]
        for index, part in self._parts.items():
            part.start(self._step, Position(*state["shards"][index]))

    def _identity(self) -> dict[str, Any]:
        """Return what the batches after a position depend on."""
        own = {"layout": self.data.layout, "shards": self.shards, "batch_size": self.spec.batch_size}
        return self._first.identity() | own | {"seed": self.spec.seed}
