"""Variables to follow through assignments, and words to count."""

import functools

import numpy as np

from fam_jax.data.synthetic.sample import (
    NOUNS,
    Make,
    Placed,
    Sample,
    choose,
    numbers,
    passkey_filler,
    random_numbers,
    spread,
)

_LETTERS = [*"ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
_SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
# Times that a word which is asked for occurs, and one that is not.
COMMON, RARE = 12, 2


def tracking(random: np.random.Generator, depth: float, *, hops: int = 4, chains: int = 2) -> Sample:
    """Return a sample that asks which variables have a value, after assignments to each other.

    Args:
      random: of names, values and places.
      depth: of the first assignment that is asked for.
      hops: assignments of one variable to the next.
      chains: values that are handed on; one is asked for.
    """
    variables: dict[str, None] = {}
    while len(variables) < chains * (hops + 1):
        variables["".join(_LETTERS[int(n)] for n in random.integers(0, 26, 5))] = None
    every, values = [*variables], numbers(random, chains, 5)
    placed = []
    for chain in range(chains):
        own = every[chain * (hops + 1) : (chain + 1) * (hops + 1)]
        depths = spread(random, float(random.random()) if chain else depth, len(own))
        sources = [values[chain], *(f"VAR {name}" for name in own[:-1])]
        placed += [
            Placed(at, f"VAR {name} = {source}.", chain == 0)
            for at, name, source in zip(depths, own, sources, strict=True)
        ]
    question = (
        f"\n\nFind all variables that are assigned the value {values[0]} in the text above. According to the chain of "
        f"assignments, the {hops + 1} variables that are assigned the value {values[0]} are"
    )
    order = tuple(sorted(placed, key=lambda each: each.depth))
    head = "Memorize the variables that are assigned in the following text."
    return Sample(order, head, question, tuple(every[: hops + 1]), r"\b[A-Z]{5}\b", passkey_filler)


def words(random: np.random.Generator, depth: float, *, count: int = 5) -> Sample:
    """Return a sample that asks for the most common words of a list.

    Args:
      random: of words and places.
      depth: of the first occurrence of the first word.
      count: words that are asked for.
    """
    common = choose(random, NOUNS, count)
    depths = [depth, *(float(x) for x in random.random(count * COMMON - 1))]
    placed = [Placed(at, f"{common[n % count]}.", True) for n, at in enumerate(depths)]
    question = (
        f"\n\nWhat are the {count} most common words in the list above? The {count} most common words are"
    )
    filler = functools.partial(_rare_word, int(random.integers(1 << 62)))
    order = tuple(sorted(placed, key=lambda each: each.depth))
    head = "The following is a list of words, some of which come often. Memorize the most common ones."
    return Sample(order, head, question, tuple(common), r"\b[a-z]+\b", filler)


def _rare_word(seed: int, number: int) -> str:
    """Return word `number` of a list in which every word comes `RARE` times, if not by chance more often."""
    random = random_numbers("words", seed, number // RARE)
    return "".join(_SYLLABLES[int(n)] for n in random.integers(0, len(_SYLLABLES), 4)) + "."


TASKS: dict[str, Make] = {"tracking": tracking, "words": words}
