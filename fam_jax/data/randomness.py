"""Random numbers that depend on a key and a position only, never on what was drawn before.

They are the same on every machine and in every version of NumPy, so a resumed run finds the data it left.
"""

import hashlib
from typing import Any

import numpy as np


def random_key(*parts: Any) -> int:
    """Return a 63-bit key for the random numbers named by `parts`; keys of different parts are unrelated."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def random_words(key: int, position: int, count: int = 1) -> list[int]:
    """Return `count` integers, uniform below 2^64, that belong to a position of a key."""
    return np.random.Philox(key=key, counter=position).random_raw(count).tolist()


def permutation(size: int, *parts: Any) -> np.ndarray:
    """Return the numbers below `size` in a random order, named by `parts`."""
    draws = np.random.Philox(key=random_key(*parts)).random_raw(size)
    return np.argsort(draws, kind="stable")
