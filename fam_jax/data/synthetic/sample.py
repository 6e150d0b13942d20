"""A sample of a synthetic task: sentences at their depths in filler, and a question."""

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from fam_jax.data.passkey_text import FILLER

# Steps of this size, taken round a circle, fill it evenly, however many there are.
_GOLDEN = (5**0.5 - 1) / 2

_ADJECTIVES = """
    amber ancient bitter blank bold brisk broken calm clever cloudy coarse cold crimson curly deep dusty
    eager early empty faint fancy fierce flat gentle giant golden grave green happy heavy hidden hollow
    humble idle jolly keen late lively lonely loud lucky mellow mighty misty modest narrow noble odd pale
    patient plain proud purple quick quiet rapid rare rough rusty salty sharp shy silent silver simple slow
    smooth solid spare steep still strange striped sturdy sudden swift tame tender thick tiny vivid wild
    wise young
"""
_NOUNS = """
    anchor apron arrow badge barrel basket beacon bell blanket bottle branch bridge bucket button cabin
    candle canvas carpet castle chain chalk cherry cloud clover comet copper coral cotton cradle crystal
    curtain dagger desert dragon drum eagle ember engine falcon feather fiddle flute forest fossil fountain
    garlic glacier glove granite hammer harbor helmet heron island jacket kettle ladder lantern lemon magnet
    maple marble meadow mirror needle nickel oyster paddle parrot pebble pepper pillow planet pocket puzzle
    quarry ribbon river rocket saddle sailor shadow shovel signal spider spoon stable statue sunset temple
    thimble thunder ticket timber tunnel turtle valley velvet violin wagon walnut whistle willow window
"""


ADJECTIVES, NOUNS = tuple(_ADJECTIVES.split()), tuple(_NOUNS.split())


class Placed(NamedTuple):
    """A sentence of the text."""

    # Where it stands in the filler: 0 at the beginning, 1 at the end.
    depth: float
    text: str
    # Whether the answer depends on it.
    needed: bool = False


class Sample(NamedTuple):
    """A text with a question on it, before it is made so many tokens long."""

    # In the order of their depths.
    placed: tuple[Placed, ...]
    # What comes before the text, and what behind it; the answer follows a blank.
    head: str
    question: str
    # What the answer has to name.
    answers: tuple[str, ...]
    # A regular expression for all that an answer could name.
    named: str
    # Sentence n of what stands around.
    filler: Callable[[int], str]
    # How many names at the beginning of an answer count; 0: all.
    first: int = 0


# Makes a sample from random numbers and the depth, between 0 and 1, of what is asked for first.
Make = Callable[[np.random.Generator, float], Sample]


def passkey_filler(number: int) -> str:
    """Return a sentence of PassKey's filler."""
    sentences = [f"{sentence.strip()}." for sentence in FILLER.split(".") if sentence.strip()]
    return sentences[number % len(sentences)]


def random_numbers(*key: object) -> np.random.Generator:
    """Return random numbers that depend on `key` alone, the same on every machine."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(digest)))


def depth_of(index: int, *key: object) -> float:
    """Return the depth of sample `index`: evenly spread over any number of samples in a row, from a random start."""
    return float((random_numbers("depth", *key).random() + index * _GOLDEN) % 1)


def choose(random: np.random.Generator, among: Sequence[str], count: int = 1) -> list[str]:
    """Return different entries of a list."""
    return [among[int(n)] for n in random.choice(len(among), count, replace=False)]


def names(random: np.random.Generator, count: int, without: Sequence[str] = ()) -> list[str]:
    """Return different names of two words each, such as "silent-meadow"."""
    found: dict[str, None] = {}
    while len(found) < count:
        name = f"{choose(random, ADJECTIVES)[0]}-{choose(random, NOUNS)[0]}"
        if name not in without:
            found[name] = None
    return [*found]


def numbers(random: np.random.Generator, count: int, digits: int = 7) -> list[str]:
    """Return different numbers of so many digits; the first is not 0."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[str(random.integers(10 ** (digits - 1), 10**digits))] = None
    return [*found]


def spread(random: np.random.Generator, depth: float, count: int) -> list[float]:
    """Return `count` depths in order, of which the first is `depth` and the others lie behind it."""
    behind = sorted(depth + (1 - depth) * float(x) for x in random.random(count - 1))
    return [depth, *behind]
