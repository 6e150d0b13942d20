"""What the kernels share: which scores exist, products on the matrix unit, and how arrays are cut into blocks.

Inside the kernels scores are multiplied by `scale * log2(e)` and the exponential is base 2, which the hardware has.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

LOG2_E = 1.4426950408889634
# Hidden scores. Not -inf: the difference of two of them must be a number.
HIDDEN = -1e30


@dataclasses.dataclass(frozen=True)
class Geometry:
    """What is static about a call, after padding."""

    block_size: int  # C
    blocks: int  # N
    segments: int  # m, at most what can be seen
    window: int  # 0 = no further limit
    fam_slots: int  # S, padded
    fam_keys: int  # S before padding
    heads: int  # H
    kv_heads: int  # K
    head_dim: int  # hd
    stop_gradient: bool
    missing: int = 0  # tokens that the last block lacks; not 0 in the resident kernels alone

    @property
    def group(self) -> int:
        """G: query heads per key head."""
        return self.heads // self.kv_heads

    @property
    def tokens(self) -> int:
        """T, after padding."""
        return self.blocks * self.block_size - self.missing

    @property
    def whole_blocks(self) -> int:
        """Blocks that lack nothing: all, or all but the last."""
        return self.blocks - (self.missing > 0)

    @property
    def scale(self) -> float:
        """Of scores."""
        return self.head_dim**-0.5


class Span(NamedTuple):
    """Positions [start, start + size) relative to the first token of the queries' block; the past is negative."""

    start: Any  # int, or traced where the kernel loops
    size: int

    @property
    def last(self) -> Any:
        """The last position."""
        return self.start + self.size - 1


def sight(queries: Span, keys: Span, window: int) -> Literal["all", "some", "none"]:
    """How many of `keys` the `queries` see: causally, and nearer than `window` if that is positive."""
    nearest, farthest = queries.start - keys.last, queries.last - keys.start
    if farthest < 0 or (window and nearest >= window):
        return "none"
    if nearest >= 0 and (not window or farthest < window):
        return "all"
    return "some"


def tiles(span: Span, size: int) -> list[Span]:
    """`span` in pieces of `size`, the last one shorter."""
    return [
        Span(at, min(size, span.start + span.size - at))
        for at in range(span.start, span.start + span.size, size)
    ]


def distances(queries: Span, keys: Span, query_axis: int) -> jax.Array:
    """int32 how far each key lies behind each query; queries along `query_axis`, keys along the other axis."""
    shape = (queries.size, keys.size) if query_axis == 0 else (keys.size, queries.size)
    query = jax.lax.broadcasted_iota(jnp.int32, shape, query_axis)
    key = jax.lax.broadcasted_iota(jnp.int32, shape, 1 - query_axis)
    return query - key + (queries.start - keys.start)


def visible(distance: jax.Array, window: int) -> jax.Array:
    """Of :func:`distances`: neither in the future nor beyond the window."""
    seen = distance >= 0
    return seen & (distance < window) if window else seen


def product(a: jax.Array, b: jax.Array, contract: str) -> jax.Array:
    """Matrix product with float32 sums: "nn" a b, "nt" a b^T, "tn" a^T b. Float32 inputs are not rounded first."""
    dims = {"nn": ((1,), (0,)), "nt": ((1,), (1,)), "tn": ((0,), (0,))}[contract]
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        a, b, (dims, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def as_row(column: jax.Array) -> jax.Array:
    """(R, 1) as (1, R), by a transposition, which every generation has (a reshape needs gathers that v4 lacks)."""
    return jnp.broadcast_to(column, (column.shape[0], 128)).T[:1]


def rows_from(start: jax.Array | int, size: int, unit: int = 0) -> Any:
    """Index of `size` rows from `start`, a multiple of `unit` (of `size` by default), which the compiler cannot see."""
    return pl.ds(start if isinstance(start, int) else pl.multiple_of(start, unit or size), size)


class Layout(NamedTuple):
    """How (B, T, H, hd) arrays are given to a kernel, so that it sees a block of one head as (rows, hd).

    Heads stay side by side in the lanes, (B, T, H * hd), where hd fills whole lanes: no transposition. Else they go
    first, (B, H, T, hd).
    """

    head_dim: int

    @property
    def flat(self) -> bool:
        """Whether heads stay side by side."""
        return self.head_dim % 128 == 0

    def shape(self, batch: int, rows: int, heads: int) -> tuple[int, ...]:
        """Of a view."""
        if self.flat:
            return (batch, rows, heads * self.head_dim)
        return (batch, heads, rows, self.head_dim)

    def view(self, x: jax.Array) -> jax.Array:
        """(B, T, H, hd) as the kernel takes it."""
        return x.reshape(*x.shape[:2], -1) if self.flat else x.swapaxes(1, 2)

    def unview(self, x: jax.Array) -> jax.Array:
        """The reverse of :meth:`view`."""
        return x.reshape(*x.shape[:2], -1, self.head_dim) if self.flat else x.swapaxes(1, 2)

    def spec(self, rows: int, index: Callable[..., tuple]) -> pl.BlockSpec:
        """Blocks of `rows` of one head; `index(*grid)` gives (batch, head, block)."""
        if self.flat:

            def flat_index(*grid: jax.Array) -> tuple:
                b, h, t = index(*grid)
                return b, t, h

            return pl.BlockSpec((None, rows, self.head_dim), flat_index)
        return pl.BlockSpec((None, None, rows, self.head_dim), lambda *grid: (*index(*grid), 0))


def row_spec(size: int, index: Callable[..., tuple]) -> pl.BlockSpec:
    """Blocks (1, size) of (B, H, 1, T) statistics; `index(*grid)` gives (batch, head, block)."""

    def row_index(*grid: jax.Array) -> tuple:
        b, h, t = index(*grid)
        return b, h, 0, t

    return pl.BlockSpec((None, None, 1, size), row_index)
