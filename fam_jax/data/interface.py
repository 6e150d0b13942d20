"""The two interfaces of the data code: `Source`, which gives examples, and `Batches`, which gives training batches.

`PackedBatches` makes batches from any source, `RowBatches` from one whose examples are read by number, `ShardedBatches`
from shards of a seqio task, and `MixedBatches` from several batches. `fam_jax.data.build` chooses.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from fam_jax.config import UserError

if TYPE_CHECKING:
    from fam_jax.data.quiet_seqio import seqio  # TensorFlow, which takes seconds to import


class Example(NamedTuple):
    """A text as tokens, which a model is to predict one after the other."""

    # (n,) int32.
    ids: np.ndarray
    # (n,) float32: loss weight of each token.
    weights: np.ndarray
    # Length of the text in UTF-8, for bits per byte; 0 if the example is not plain text.
    text_bytes: int


class Source(Protocol):
    """Examples in a fixed order, which differs between epochs."""

    @property
    def vocabulary(self) -> "seqio.Vocabulary":
        """Return the vocabulary of the token ids."""

    @property
    def fingerprint(self) -> str:
        """Return a short text that changes when the examples change."""

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Example]:
        """Yield the examples of an epoch, starting at place `first` of its order.

        The order depends on the source and the epoch alone, so a resumed run continues with the same examples.
        """


class IndexedSource(Protocol):
    """A finite number of examples, any of which can be read without the others.

    `fam_jax.data.sources.Shuffled` makes a :class:`Source` of it.
    """

    @property
    def vocabulary(self) -> "seqio.Vocabulary":
        """Return the vocabulary of the token ids."""

    @property
    def fingerprint(self) -> str:
        """Return a short text that changes when the examples change."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def read(self, indices: Iterable[int]) -> Iterator[Example]:
        """Yield the examples with these numbers, in this order; faster than one at a time."""


Batch = dict[str, np.ndarray]
"""Rows of a batch; b rows of T tokens.

inputs, targets: (b, T) int32.
weights: (b, T) float32, loss weight of each target; 0 for padding.
answer: (b, T) bool, targets that count for the answer accuracy and the exact match.
start: (b,) bool, rows that begin a new stream. The others continue the row of the previous batch.
"""


class Batches(Protocol):
    """Endless training batches.

    The processes of a job make the same calls with the same values; each receives its own rows of a batch. Which
    batches come depends on the config, the examples and what :meth:`observe` was told, not on the number of processes.
    """

    @property
    def vocabulary(self) -> "seqio.Vocabulary":
        """Return the vocabulary of the token ids."""

    @property
    def longest_row(self) -> int:
        """Return the largest T of all batches to come, in tokens."""

    @property
    def needs_metrics(self) -> bool:
        """Return whether the metrics of the latest batch can change which batches come next.

        If not, a caller can skip :meth:`observe` and need not wait for the device.
        """

    def next(self) -> Batch:
        """Return this process's rows of the next batch.

        Raises:
          UserError: the source has no tokens, or cannot be read.
        """

    def observe(self, metrics: Mapping[str, Any]) -> None:
        """Take in the metrics of a training step on the latest batch. Without effect unless `needs_metrics`."""

    def metrics(self) -> dict[str, float]:
        """Return figures on the data, for the log."""

    def name_scores(self, metrics: dict[str, float]) -> dict[str, float]:
        """Return the metrics of a step on the latest batch, with its scores named after what they measure.

        Args:
          metrics: answer_accuracy and exact_match over the targets where `answer` is true, among others.
        """

    def describe(self, values: Mapping[str, Any]) -> str:
        """Return a few words for the progress line.

        Args:
          values: :meth:`name_scores` of the metrics of a step, and :meth:`metrics`.
        """

    def state(self) -> dict[str, Any]:
        """Return the position as JSON values. It is the same in all processes and fits any number of them.

        All processes have to call this after the same batch, because they may exchange their positions.
        """

    def restore(self, state: dict[str, Any]) -> None:
        """Continue with the batches that come after a :meth:`state`.

        Raises:
          UserError: the state is of another data.task or version, or belongs to other examples.
        """


class BatchSpec(NamedTuple):
    """The size and the randomness of training batches, and the part of them that a process makes."""

    # C, tokens of a block of the model.
    block_size: int
    # B, rows of the global batch.
    batch_size: int
    # Of everything random.
    seed: int
    # (index, count) of this process. It makes rows index * B / count up to (index + 1) * B / count.
    shard: tuple[int, int] = (0, 1)
    # V of the model. A text with a token beyond it is an error, once it is read; None: not checked.
    vocab_size: int | None = None
    # Joins the arrays of all processes along the first axis, in their order; all of them call it together. Layouts
    # whose processes know only their own rows need it for Batches.state. None: there is one process.
    gather: Callable[[np.ndarray], np.ndarray] | None = None
    # Where examples that can be read in order only have their bookmarks: a folder of the run. None: they have none.
    bookmarks: str | None = None

    @property
    def own_rows(self) -> range:
        """Return the numbers of this process's rows in a batch; all processes have equally many.

        Raises:
          UserError: the number of processes does not divide B.
        """
        index, count = self.shard
        if self.batch_size % count:
            raise UserError(
                f"batch_size: {self.batch_size} is not divisible by the {count} processes; "
                f"choose a multiple of {count}"
            )
        share = self.batch_size // count
        return range(index * share, (index + 1) * share)


def new_streams(rows: int) -> np.ndarray:
    """Return `start` of a batch whose rows all begin a new stream."""
    return np.ones(rows, np.bool_)


def check_state(state: Any, fields: Collection[str], identity: Mapping[str, Any]) -> None:
    """Check a saved state before :meth:`Batches.restore` uses it.

    Args:
      state: from a checkpoint.
      fields: names it must have, and no others.
      identity: values that its field "stream" must have, or the state would mean other examples; empty: none.

    Raises:
      UserError: a field is missing or unknown, or a value of the identity is different.
    """
    if not isinstance(state, dict) or set(state) != {*fields}:
        raise UserError(
            f"data state: must have the fields {', '.join(sorted(fields))}, so it is of another task or version; "
            "resume with the config and the version of the run"
        )
    for name, value in identity.items():
        saved = state["stream"].get(name)
        if saved != value:
            raise UserError(
                f"data state: {name} was {saved} when it was saved and is {value} now; "
                "resume with the config and the data of the run"
            )
