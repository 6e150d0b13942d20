"""Pairs of keys and values to recall, values that are written again, and lists to copy or to reverse."""

import functools

import numpy as np

from fam_jax.data.synthetic.sample import (
    NOUNS,
    Make,
    Placed,
    Sample,
    choose,
    names,
    passkey_filler,
    random_numbers,
    spread,
)

WORD = r"\b[a-z]+\b"


def _pair(key: str, value: str) -> str:
    return f"{key} has the {value}."


def recall(random: np.random.Generator, depth: float, *, writes: int = 1) -> Sample:
    """Return a sample of pairs that asks for the value of a key.

    Args:
      random: of keys, values and places.
      depth: of the key's first value.
      writes: values that the key gets, one after the other; the last one counts.
    """
    key, values = names(random, 1)[0], choose(random, NOUNS, writes)
    depths = spread(random, depth, writes)
    placed = tuple(Placed(at, _pair(key, value), True) for at, value in zip(depths, values, strict=True))
    filler = functools.partial(_other_pair, int(random.integers(1 << 62)), key)
    last = " last" if writes > 1 else ""
    head = "Memorize who has what."
    return Sample(
        placed, head, f"\n\nWhat does {key} have{last}? {key} has the", (values[-1],), WORD, filler, first=1
    )


def _other_pair(seed: int, key: str, number: int) -> str:
    random = random_numbers("pairs", seed, number)
    return _pair(names(random, 1, (key,))[0], choose(random, NOUNS)[0])


def repeat(random: np.random.Generator, depth: float, *, count: int = 8, backwards: bool = False) -> Sample:
    """Return a sample that asks for a list of words, in its order or in the reverse one.

    Args:
      random: of the words.
      depth: of the list.
      count: words of the list.
      backwards: whether the order is to be reversed.
    """
    listed = choose(random, NOUNS, count)
    text = f"The list to remember is: {', '.join(listed)}."
    order = "in reverse order" if backwards else "in the same order"
    question = f"\n\nRepeat the list to remember {order}. The list {order} is:"
    answers = tuple(reversed(listed)) if backwards else tuple(listed)
    head = "A list is hidden within the following text. Memorize it."
    return Sample((Placed(depth, text, True),), head, question, answers, WORD, passkey_filler, first=count)


TASKS: dict[str, Make] = {
    "recall": recall,
    "rewrite": functools.partial(recall, writes=3),
    "copy": repeat,
    "reverse": functools.partial(repeat, backwards=True),
}
