"""Read many documents of any length in a few rows: a row whose document has ended takes the next one.

Batches of documents would cost the longest of each in every row. Refilled rows, with the longest documents first, cost
little more than the documents themselves. Nothing is truncated.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fam_jax.evaluation.midway import Midway
from fam_jax.generation.compiled import row_ways
from fam_jax.generation.streaming import Streamer
from fam_jax.model import StreamState


class Unread(NamedTuple):
    """A document to read."""

    key: str
    # Make its token ids (n,) int32.
    load: Callable[[], np.ndarray]
    # Rough length, in any unit.
    size: int


class Read(NamedTuple):
    """A document whose whole blocks have been read."""

    key: str
    # Of one stream, at a block border; None: the document is shorter than a block, so nothing was read.
    state: StreamState | None
    # The ids after that border: at least one if the document has any, at most a block.
    rest: np.ndarray
    # Tokens of the document.
    tokens: int


@dataclasses.dataclass
class Cost:
    """What reading has cost, in tokens of all rows together."""

    needed: int = 0
    paid: int = 0


@dataclasses.dataclass
class _Row:
    key: str
    ids: np.ndarray
    # Of the document, and read so far.
    blocks: int
    done: int = 0


def rows_to_use(sizes: Sequence[int], most: int, ways: int = 1) -> int:
    """Return how many rows documents of these sizes can keep busy: the longest alone takes as long as its size.

    Args:
      sizes: of the documents.
      most: largest number of rows.
      ways: devices that the rows are divided over, if they divide the rows; if not, each computes all rows.
    """
    longest = max(sizes, default=0)
    count = max(1, min(most, sum(sizes) // longest)) if longest else 1
    return max(ways, count // ways * ways) if ways <= most else count


def read_documents(
    streamer: Streamer,
    documents: Sequence[Unread],
    *,
    rows: int,
    chunk_blocks: int,
    cost: Cost | None = None,
    midway: Midway | None = None,
) -> Iterator[Read]:
    """Read documents, the longest first, and yield each as soon as its whole blocks are read.

    Only `rows` documents exist as ids at one time, and the memory of the device does not depend on their lengths.

    Args:
      streamer: the model.
      documents: in any order.
      rows: most documents to read at one time.
      chunk_blocks: most blocks of each row to read at one time.
      cost: counts tokens that were needed and paid for.
      midway: has the memories of documents that were begun before, and saves those of long ones. They are read first.
    """
    size, cost = streamer.config.block_size, cost or Cost()
    begun = midway.begun() if midway else {}
    waiting = iter(sorted(documents, key=lambda each: (each.key not in begun, -each.size)))
    count = rows_to_use([each.size for each in documents], rows, row_ways(streamer.mesh))
    busy: dict[int, _Row] = {}
    state, fresh = None, None

    def fill(row: int) -> Iterator[Read]:
        """Give a row the next document that has a whole block; yield shorter ones, which need no row."""
        for document in waiting:
            ids = document.load()
            blocks = max(0, len(ids) - 1) // size  # a token stays, so that what follows is never empty
            if blocks:
                done = begun[document.key][0] if document.key in begun else 0
                if done >= blocks:  # of another text
                    done, _ = 0, begun.pop(document.key)
                busy[row] = _Row(document.key, ids, blocks, done)
                return
            yield Read(document.key, None, ids, len(ids))

    for number in range(count):
        yield from fill(number)
    if busy:
        state, fresh = streamer.start(count), streamer.start(1)
        for number, row in busy.items():
            if row.key in begun:
                state = state.replace_row(number, begun.pop(row.key)[1])
    while busy:
        assert state is not None and fresh is not None
        state = _read_on(streamer, busy, count, chunk_blocks, state, cost)
        for number in [number for number, row in busy.items() if row.done == row.blocks]:
            row = busy.pop(number)
            yield Read(row.key, state.select([number]), row.ids[row.blocks * size :], len(row.ids))
            yield from fill(number)
            if number in busy:
                _, memory = begun.pop(busy[number].key, (0, fresh))
                state = state.replace_row(number, memory)
        if midway:
            midway.offer({number: (row.key, row.done) for number, row in busy.items()}, state)


def _read_on(
    streamer: Streamer, busy: Mapping[int, _Row], count: int, chunk: int, state: StreamState, cost: Cost
) -> StreamState:
    """Read as many blocks of every busy row as all of them have left, at most `chunk`; return the state after them."""
    size = streamer.config.block_size
    blocks = call_blocks(min(row.blocks - row.done for row in busy.values()), chunk)
    tokens = np.zeros((count, blocks * size), np.int32)
    for number, row in busy.items():
        tokens[number] = row.ids[row.done * size :][: blocks * size]
        row.done += blocks
    _, state = streamer.read([*tokens], state, chunk_blocks=blocks)
    cost.paid += tokens.size
    cost.needed += len(busy) * blocks * size
    return state


def call_blocks(left: int, chunk: int) -> int:
    """Return the blocks of the next call: the chunk, or a quarter of it and so on, as every size is compiled."""
    while chunk > left:
        chunk = max(chunk // 4, 1)
    return chunk
