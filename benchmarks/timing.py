"""Time calls alternately: a temporary slowdown of the machine then affects all of them."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

LEAST_ROUNDS = 3
MOST_ROUNDS = 30
# Minimum seconds of a measurement. Shorter calls are repeated within it.
SHORTEST = 0.05


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median and quartiles over rounds."""

    median: float
    q1: float
    q3: float
    rounds: int

    def __str__(self) -> str:
        """Return the median, and the quartiles in parentheses."""
        return f"{self.median:.3g} ({self.q1:.3g}-{self.q3:.3g})"


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds per call, by name, for every round."""

    rounds: list[dict[str, float]]

    def over_rounds(self, quantity: Callable[[dict[str, float]], float]) -> Spread:
        """Return median and quartiles of a quantity that is computed from the times of each round."""
        q1, median, q3 = np.quantile([quantity(times) for times in self.rounds], (0.25, 0.5, 0.75))
        return Spread(float(median), float(q1), float(q3), len(self.rounds))

    def seconds(self) -> dict[str, Spread]:
        """Return the seconds of every call."""
        return {name: self.over_rounds(lambda times, name=name: times[name]) for name in self.rounds[0]}  # type: ignore[misc]

    def ratio(self, name: str, base: str) -> Spread:
        """Return the time of `name` divided by that of `base` in the same round."""
        return self.over_rounds(lambda times: times[name] / times[base])


def interleave(calls: Mapping[str, Callable[[], Any]], seconds: float) -> Times:
    """Time all calls once per round, in reverse order in every other round: A B, B A, ...

    Two earlier runs of each call compile it and touch its memory. A call ends when all its results are ready.

    Args:
      calls: the calls by name.
      seconds: approximate duration of all rounds without warm-up. There are LEAST_ROUNDS to MOST_ROUNDS rounds.
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
    """Return the seconds per call."""
    started = time.perf_counter()
    for _ in range(repeats):
        jax.block_until_ready(call())
    return (time.perf_counter() - started) / repeats
