"""Needles in a haystack: find the number of a key, of several keys, or all numbers of a key."""

import functools

import numpy as np

from fam_jax.data.synthetic.sample import (
    Make,
    Placed,
    Sample,
    names,
    numbers,
    passkey_filler,
    random_numbers,
    spread,
)

NUMBER = r"\d+"
HEAD = "Some special magic numbers are hidden within the following text. Memorize them."


def _statement(key: str, value: str) -> str:
    return f"One of the special magic numbers for {key} is {value}."


def needle(
    random: np.random.Generator,
    depth: float,
    *,
    keys: int = 1,
    values: int = 1,
    queries: int = 1,
    around: str = "filler",
    absent: bool = False,
    near: bool = False,
) -> Sample:
    """Return a sample that asks for numbers of keys.

    Args:
      random: of keys, numbers and places.
      depth: of the first needle that is asked for.
      keys: keys in the text.
      values: numbers of each key.
      queries: keys that are asked for.
      around: "filler", or "needles" of other keys.
      absent: leave the needles out; what a model still finds is guessed.
      near: put the needles right before the question, where every window reaches.
    """
    depth = 1.0 if near else depth
    all_keys, all_values = names(random, keys), numbers(random, keys * values)
    asked = all_keys[:queries]
    wanted = all_values[: queries * values]
    needed = [
        Placed(at, _statement(all_keys[n // values], wanted[n]), True)
        for n, at in enumerate(spread(random, depth, len(wanted)))
    ]
    # Which number comes first must not depend on its key.
    order = random.permutation(len(needed))
    needed = [Placed(at.depth, needed[int(n)].text, True) for at, n in zip(needed, order, strict=True)]
    others = [
        Placed(float(random.random()), _statement(all_keys[n // values], all_values[n]))
        for n in range(len(wanted), keys * values)
    ]
    placed = () if absent else tuple(sorted([*needed, *others], key=lambda each: each.depth))
    several = len(wanted) > 1
    what = " and ".join([", ".join(asked[:-1]), asked[-1]] if asked[1:] else asked)
    question = (
        f"\n\nWhat {'are all the special magic numbers' if several else 'is the special magic number'} for {what}? "
        f"The special magic {'numbers' if several else 'number'} for {what} mentioned in the text "
        f"{'are' if several else 'is'}"
    )
    filler = passkey_filler
    if around == "needles":
        filler = functools.partial(_other_needle, int(random.integers(1 << 62)), tuple(all_keys))
    return Sample(placed, HEAD, question, tuple(wanted), NUMBER, filler)


def _other_needle(seed: int, keys: tuple[str, ...], number: int) -> str:
    random = random_numbers("needles", seed, number)
    return _statement(names(random, 1, keys)[0], numbers(random, 1)[0])


TASKS: dict[str, Make] = {
    "needle": needle,
    "needle:multikey": functools.partial(needle, keys=4),
    "needle:multivalue": functools.partial(needle, values=4),
    "needle:multiquery": functools.partial(needle, keys=4, queries=4),
    "needle:needles": functools.partial(needle, around="needles"),
    "needle:absent": functools.partial(needle, absent=True),
    "needle:near": functools.partial(needle, near=True),
}
