"""Training batches from several `Batches` in random turns, such as text and PassKey.

Whole batches alternate, not examples within a row. A PassKey row is one example, whose key and question packing would
separate, and its curriculum goes on beside the text.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from fam_jax.data.interface import Batch, Batches, check_state
from fam_jax.data.randomness import random_key, random_words

if TYPE_CHECKING:
    from fam_jax.data.quiet_seqio import seqio


class MixedBatches:
    """Endless batches, each from one of several parts; implements :class:`~fam_jax.data.interface.Batches`.

    Each part returns the batches that it would return alone. Which part a step takes depends on the seed, the step and
    the fractions at that step. Parts may differ in row length; a training step is compiled for each length.
    """

    def __init__(
        self, parts: Mapping[str, Batches], fractions: Callable[[], Mapping[str, float]], *, seed: int
    ):
        """Combine parts.

        Args:
          parts: by name, with the same vocabulary.
          fractions: called at every step; returns the probability of each part but the last, which has the rest. It
            may depend on nothing that :meth:`state` does not restore.
          seed: of the choice.
        """
        self.parts = dict(parts)
        self._fractions = fractions
        self._key = random_key("mixture", seed)
        self._step = 0
        # Where the latest batch came from; None: there is none yet.
        self._latest: str | None = None

    @property
    def vocabulary(self) -> "seqio.Vocabulary":
        """Return the vocabulary of all parts."""
        return next(iter(self.parts.values())).vocabulary

    @property
    def longest_row(self) -> int:
        """Return the longest row of all parts, in tokens."""
        return max(part.longest_row for part in self.parts.values())

    @property
    def needs_metrics(self) -> bool:
        """Return whether the part of the latest batch needs its metrics."""
        return self._latest is not None and self.parts[self._latest].needs_metrics

    def next(self) -> Batch:
        """Return this process's rows of the next batch."""
        self._latest = self._choose()
        self._step += 1
        return self.parts[self._latest].next()

    def observe(self, metrics: Mapping[str, Any]) -> None:
        """Pass the metrics of the latest batch on to its part."""
        if self._latest is not None:
            self.parts[self._latest].observe(metrics)

    def metrics(self) -> dict[str, float]:
        """Return the metrics of all parts, and 1 under NAME_batch if the latest batch came from NAME, else 0.

        The last part has no such figure. The loss and accuracy of a step are those of the latest batch.
        """
        named = [*self.parts][:-1]
        values = {f"{name}_batch": 1.0 if name == self._latest else 0.0 for name in named}
        for part in self.parts.values():
            values |= part.metrics()
        return values

    def name_scores(self, metrics: dict[str, float]) -> dict[str, float]:
        """Name the scores as the part of the latest batch does."""
        return metrics if self._latest is None else self.parts[self._latest].name_scores(metrics)

    def describe(self, values: Mapping[str, Any]) -> str:
        """Return the part of the latest batch, and what it says of the values."""
        return "" if self._latest is None else f"{self._latest}  {self.parts[self._latest].describe(values)}"

    def state(self) -> dict[str, Any]:
        """Return the position, and those of the parts, as JSON values."""
        return {"step": self._step, **{name: part.state() for name, part in self.parts.items()}}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a :meth:`state`.

        Raises:
          UserError: the state is of another task or version, or of other examples.
        """
        check_state(state, {"step", *self.parts}, {})
        for name, part in self.parts.items():
            part.restore(state[name])
        self._step, self._latest = state["step"], None

    def _choose(self) -> str:
        [word] = random_words(self._key, self._step)
        below, fractions = 0.0, self._fractions()
        *others, last = self.parts
        for name in others:
            below += fractions[name]
            if word < below * 2**64:
                return name
        return last
