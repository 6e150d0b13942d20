"""Which scores of block attention exist: positions, distances and masks.

Inside the kernels scores are multiplied by log2(e) / sqrt(hd), because the hardware's exponential has base 2.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

LOG2_E = 1.4426950408889634
# Value of hidden scores. Not -inf, because the difference of two hidden scores must be a number.
HIDDEN = -1e30


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Static sizes of one call, after padding."""

    # C
    block_size: int
    # N
    blocks: int
    # m, at most the number of blocks that exist before a block
    segments: int
    # Distance in tokens from which keys are hidden; 0 sets no limit.
    window: int
    # S, padded to whole tiles
    extra_slots: int
    # S before padding
    extra_keys: int
    # H
    heads: int
    # K
    kv_heads: int
    # hd
    head_dim: int
    stop_gradient: bool
    # Tokens that the last block lacks; only the resident kernels take other values than 0.
    missing: int = 0
    # Blocks of past slots that the resident kernels read: 0 or m
    cached: int = 0
    # Whether the past slots get gradients
    past_gradient: bool = False

    @property
    def group(self) -> int:
        """G, query heads per key head."""
        return self.heads // self.kv_heads

    @property
    def tokens(self) -> int:
        """T, after padding."""
        return self.blocks * self.block_size - self.missing

    @property
    def whole_blocks(self) -> int:
        """Number of blocks without missing tokens: all, or all but the last."""
        return self.blocks - 1 if self.missing else self.blocks

    @property
    def scale(self) -> float:
        """Factor of the scores, 1 / sqrt(hd)."""
        return self.head_dim**-0.5

    @property
    def factor(self) -> float:
        """Factor of the exponents to base 2, log2(e) / sqrt(hd)."""
        return self.scale * LOG2_E


class Span(NamedTuple):
    """Positions [start, start + size) relative to the first token of the queries' block; the past is negative."""

    # int, or traced where the kernel loops
    start: Any
    size: int

    @property
    def last(self) -> Any:
        """The last position."""
        return self.start + self.size - 1

    def split(self, size: int) -> list["Span"]:
        """Return the span in pieces of `size`; the last one may be shorter."""
        end = self.start + self.size
        return [Span(at, min(size, end - at)) for at in range(self.start, end, size)]


def sight(queries: Span, keys: Span, window: int) -> Literal["all", "some", "none"]:
    """Return how many of `keys` the `queries` see: causally, and nearer than `window` if that is positive."""
    nearest, farthest = queries.start - keys.last, queries.last - keys.start
    if farthest < 0 or (window and nearest >= window):
        return "none"
    if nearest >= 0 and (not window or farthest < window):
        return "all"
    return "some"


def token_mask(queries: Span, keys: Span, window: int, query_axis: int) -> jax.Array:
    """Return a bool array, True where a query sees a key: not in the future and within the window.

    Queries lie along `query_axis` (0 or 1), keys along the other axis.
    """
    shape = (queries.size, keys.size) if query_axis == 0 else (keys.size, queries.size)
    query = jax.lax.broadcasted_iota(jnp.int32, shape, query_axis)
    key = jax.lax.broadcasted_iota(jnp.int32, shape, 1 - query_axis)
    distance = query - key + (queries.start - keys.start)
    seen = distance >= 0
    return seen & (distance < window) if window else seen


def extra_mask(count: Any, slots: int, queries: int, query_axis: int) -> jax.Array:
    """Return a bool array of `queries` and `slots` extra keys, True for the first `count` keys.

    Queries lie along `query_axis` (0 or 1), keys along the other axis.
    """
    shape = (queries, slots) if query_axis == 0 else (slots, queries)
    return jax.lax.broadcasted_iota(jnp.int32, shape, 1 - query_axis) < count
