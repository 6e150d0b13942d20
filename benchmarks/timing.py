"""Times calls against each other, interleaved: what slows the machine down for a while slows down all of them."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

LEAST_ROUNDS = 3
MOST_ROUNDS = 30
SHORTEST = 0.05  # seconds that a measurement lasts at least; a shorter call is repeated within it


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median and quartiles over rounds."""

    median: float
    q1: float
    q3: float
    rounds: int

    def __str__(self) -> str:
        """The median, with the quartiles behind it."""
        return f"{self.median:.3g} ({self.q1:.3g}-{self.q3:.3g})"


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds per call, by name, for every round."""

    rounds: list[dict[str, float]]

    def over_rounds(self, quantity: Callable[[dict[str, float]], float]) -> Spread:
        """Median and quartiles of something that each round's times give."""
        q1, median, q3 = np.quantile([quantity(times) for times in self.rounds], (0.25, 0.5, 0.75))
        return Spread(float(median), float(q1), float(q3), len(self.rounds))

    def seconds(self) -> dict[str, Spread]:
        """Of every call."""
        return {name: self.over_rounds(lambda times, name=name: times[name]) for name in self.rounds[0]}  # type: ignore[misc]

    def ratio(self, name: str, base: str) -> Spread:
        """How many times as long `name` takes as `base`, of the same round."""
        return self.over_rounds(lambda times: times[name] / times[base])


def interleave(calls: Mapping[str, Callable[[], Any]], seconds: float) -> Times:
    """Times all `calls` once per round, A B A B ..., every other round in reverse order: B A.

    Each is called twice before, to compile and to touch its memory. All arrays that a call returns are waited for.

    Args:
      calls: by name.
      seconds: rounds go on for about so long, warm-up apart; there are LEAST_ROUNDS to MOST_ROUNDS of them.
    """
    repeats = {}
    for name, call in calls.items():
        jax.block_until_ready(call())
        repeats[name] = max(1, math.ceil(SHORTEST / _time(call, 1)))
    order = list(calls)
    rounds: list[dict[str, float]] = []
    started = time.perf_counter()
    while len(rounds) < LEAST_ROUNDS or (
        len(rounds) < MOST_ROUNDS and time.perf_counter() - started < seconds
    ):
        rounds.append({name: _time(calls[name], repeats[name]) for name in order})
        order.reverse()
    return Times([{name: times[name] for name in calls} for times in rounds])


def _time(call: Callable[[], Any], repeats: int) -> float:
    """Seconds per call."""
    started = time.perf_counter()
    for _ in range(repeats):
        jax.block_until_ready(call())
    return (time.perf_counter() - started) / repeats
