"""Make the text of a sample exactly so many tokens long.

As in PassKey, sentences are encoded one by one behind a full stop, so that their ids do not depend on their place. What
is missing to the length is the end of one more sentence, at the very beginning. The last sentence is encoded together
with the question, as vocabularies join a full stop with the newline behind it.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from fam_jax.config import UserError
from fam_jax.data.synthetic.sample import Sample

Encode = Callable[[str], Sequence[int]]
# What every sentence is encoded behind.
STOP = "."


class Fitted(NamedTuple):
    """The text of a sample up to its last sentence."""

    # (n,) int32.
    ids: np.ndarray
    # The last sentence, with a blank before it.
    held: str
    # Tokens of the last sentence and the question.
    rest: int
    # Where the first sentence begins that the answer depends on; None: there is none.
    first: int | None


def fit(sample: Sample, tokens: int, encode: Encode, name: str) -> Fitted:
    """Return the text of a sample that has exactly `tokens` tokens with its question.

    Raises:
      UserError: it does not fit; the message names `name` and says how many tokens are missing.
    """
    stop = len(encode(STOP))

    def ids_of(text: str) -> list[int]:
        return [*encode(f"{STOP} {text}")][stop:]

    last = sample.filler(0)
    rest = len(ids_of(last + sample.question))
    head, placed = ids_of(sample.head), [ids_of(each.text) for each in sample.placed]
    room = tokens - len(head) - rest - sum(map(len, placed))
    if room < 0:
        raise UserError(f"--lengths: {name} needs {-room} tokens more than {tokens}; give a larger length")
    known: dict[str, list[int]] = {}
    fillers: list[list[int]] = []
    while room:
        text = sample.filler(len(fillers) + 1)
        if text not in known:
            known = known if len(known) < 1000 else {}
            known[text] = ids_of(text)
        fillers.append(known[text][-room:])
        room -= len(fillers[-1])
    beginning = fillers.pop() if fillers else []  # the last one may have been cut
    ids, first = _assembled(sample, beginning + head, fillers, placed)
    return Fitted(ids, f" {last}", rest, first)


def _assembled(
    sample: Sample, start: list[int], fillers: list[list[int]], placed: list[list[int]]
) -> tuple[np.ndarray, int | None]:
    """Return the ids, and where the first sentence begins that the answer depends on.

    Every sentence stands before the first filler that begins at or behind its depth.
    """
    room = sum(map(len, fillers))
    parts, used, first, length = [start], 0, None, len(start)
    waiting = 0
    for filler in [*fillers, None]:
        while waiting < len(placed) and (filler is None or sample.placed[waiting].depth * room <= used):
            if sample.placed[waiting].needed and first is None:
                first = length
            parts.append(placed[waiting])
            length += len(placed[waiting])
            waiting += 1
        if filler is not None:
            parts.append(filler)
            length += len(filler)
            used += len(filler)
    return np.concatenate([np.asarray(part, np.int32) for part in parts]), first
