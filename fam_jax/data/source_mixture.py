"""Examples of several sources, each with a rate."""

import functools
import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fam_jax.data.interface import Example, IndexedSource
from fam_jax.data.randomness import permutation, random_key

if TYPE_CHECKING:
    from fam_jax.data.quiet_seqio import seqio

# Examples read at a time.
TOGETHER = 32
# Draws made at a time; a multiple of the 4 words that Philox makes at a time.
BLOCK = 4096


class Place(NamedTuple):
    """Where an example comes from."""

    part: int
    # How many examples before it come from the same part.
    before: int


class SourceMixture:
    """An endless sequence of examples whose part of origin is random, by rates.

    The part of example n depends on the seed and n, and it is the part's next example, in an order that differs between
    the epochs of the part. So the place of any example is known without reading others. An epoch of the mixture has as
    many examples as the part that takes longest needs to come once, on average.

    It is a :class:`~fam_jax.data.interface.Source`, and an :class:`~fam_jax.data.interface.IndexedSource` of the
    examples of the sequence.
    """

    def __init__(self, parts: Sequence[IndexedSource], rates: Sequence[float], seed: int):
        """Mix sources.

        Args:
          parts: with the same vocabulary.
          rates: relative to each other, above 0.
          seed: of the draws and of the order of each part.
        """
        self.parts, self._seed = parts, seed
        total = math.fsum(rates)
        self._rates = [rate / total for rate in rates]
        below = np.cumsum(self._rates)[:-1]
        # A word below the first belongs to the first part, and so on.
        self._limits = np.array([min(int(limit * 2.0**64), 2**64 - 1) for limit in below], np.uint64)
        self._key = random_key("source mixture", seed)
        # Examples of each part before every block of draws.
        self._counts = [np.zeros(len(parts), np.int64)]
        # Parts are in few epochs at a time.
        self._order = functools.lru_cache(2 * len(parts))(self._permuted)
        self._draws = functools.lru_cache(8)(self._drawn)

    @property
    def vocabulary(self) -> "seqio.Vocabulary":
        """Return the vocabulary of all parts."""
        return self.parts[0].vocabulary

    @property
    def fingerprint(self) -> str:
        """Return a hash of the fingerprints of the parts, their order and their rates."""
        parts = [f"{rate!r} {part.fingerprint}" for rate, part in zip(self._rates, self.parts, strict=True)]
        return hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()

    def __len__(self) -> int:
        return max(math.ceil(len(part) / rate) for part, rate in zip(self.parts, self._rates, strict=True))

    def __getitem__(self, index: int) -> Example:
        return next(self.read([index]))

    def place(self, number: int) -> Place:
        """Return where an example of the sequence comes from."""
        block, within = divmod(number, BLOCK)
        while len(self._counts) <= block:
            drawn = np.bincount(self._draws(len(self._counts) - 1), minlength=len(self.parts))
            self._counts.append(self._counts[-1] + drawn)
        draws = self._draws(block)
        part = int(draws[within])
        return Place(part, int(self._counts[block][part]) + int(np.count_nonzero(draws[:within] == part)))

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Example]:
        """Yield the examples of an epoch from place `first` on, without reading those before."""
        return self.read(range(epoch * len(self) + first, (epoch + 1) * len(self)))

    def read(self, indices: Iterable[int]) -> Iterator[Example]:
        """Yield the examples of the sequence with these numbers, which may lie beyond the first epoch."""
        numbers = indices if isinstance(indices, range) else [*indices]
        for begin in range(0, len(numbers), TOGETHER):
            places = [self.place(number) for number in numbers[begin : begin + TOGETHER]]
            found: dict[Place, Example] = {}
            for part in {place.part for place in places}:
                wanted = [place for place in places if place.part == part]
                examples = self.parts[part].read([self._index(place) for place in wanted])
                found |= dict(zip(wanted, examples, strict=True))
            yield from (found[place] for place in places)

    def _index(self, place: Place) -> int:
        """Return the number of an example in its part."""
        epoch, within = divmod(place.before, len(self.parts[place.part]))
        return int(self._order(place.part, epoch)[within])

    def _permuted(self, part: int, epoch: int) -> np.ndarray:
        return permutation(len(self.parts[part]), "mixed documents", self._seed, part, epoch)

    def _drawn(self, block: int) -> np.ndarray:
        """Return the part of each example of a block."""
        words = np.random.Philox(key=self._key, counter=block * BLOCK // 4).random_raw(BLOCK)
        return np.searchsorted(self._limits, words, side="right").astype(np.int32)
