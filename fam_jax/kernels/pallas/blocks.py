"""How arrays are cut into the blocks that a kernel sees, and products of such blocks."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


class KV(NamedTuple):
    """Keys and values, or their gradients: arrays, block specs, references to fast memory, or shapes of these."""

    k: Any
    v: Any

    def at(self, rows: Any) -> "KV":
        """Return references to some rows of the referenced blocks; nothing is read yet."""
        return KV(self.k.at[rows, :], self.v.at[rows, :])

    def reset(self, rows: Any = ...) -> None:
        """Set some rows of two references to zero."""
        for ref in self:
            ref[rows] = jnp.zeros_like(ref[rows])


def scratch(rows: int, columns: int) -> Any:
    """Return the shape of a float32 block of fast memory."""
    return pltpu.VMEM((rows, columns), jnp.float32)


def product(a: jax.Array, b: jax.Array, contract: str) -> jax.Array:
    """Return a matrix product with float32 sums: "nn" a b, "nt" a b^T, "tn" a^T b. Float32 inputs are not rounded."""
    dims = {"nn": ((1,), (0,)), "nt": ((1,), (1,)), "tn": ((0,), (0,))}[contract]
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        a, b, (dims, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def as_row(column: jax.Array) -> jax.Array:
    """Return an (R, 1) column as a (1, R) row, by a transposition: v4 lacks the gathers that a reshape needs."""
    return jnp.broadcast_to(column, (column.shape[0], 128)).T[:1]


def rows_from(start: jax.Array | int, size: int, unit: int = 0) -> Any:
    """Return an index of `size` rows from `start`, which must be a multiple of `unit` (`size` by default)."""
    return pl.ds(start if isinstance(start, int) else pl.multiple_of(start, unit or size), size)


def rows_at(index: jax.Array | int, size: int) -> Any:
    """Return an index of the tile of `size` rows with number `index`."""
    return rows_from(index * size, size)


class Layout(NamedTuple):
    """Layout of (B, T, H, hd) arrays in which a kernel sees a block of one head as (rows, hd).

    If hd fills whole lanes, heads stay side by side, (B, T, H * hd), and nothing is transposed. Otherwise heads come
    before the tokens, (B, H, T, hd).
    """

    head_dim: int

    @property
    def flat(self) -> bool:
        """True if heads stay side by side."""
        return self.head_dim % 128 == 0

    @property
    def token_axis(self) -> int:
        """Axis of the tokens in a view."""
        return 1 if self.flat else 2

    def shape(self, batch: int, rows: int, heads: int) -> tuple[int, ...]:
        """Return the shape of a view."""
        if self.flat:
            return (batch, rows, heads * self.head_dim)
        return (batch, heads, rows, self.head_dim)

    def view(self, x: jax.Array) -> jax.Array:
        """Return x (B, T, H, hd) in this layout."""
        return x.reshape(*x.shape[:2], -1) if self.flat else x.swapaxes(1, 2)

    def unview(self, x: jax.Array) -> jax.Array:
        """Return a view as (B, T, H, hd); the inverse of :meth:`view`."""
        return x.reshape(*x.shape[:2], -1, self.head_dim) if self.flat else x.swapaxes(1, 2)

    def spec(self, rows: int, index: Callable[..., tuple]) -> pl.BlockSpec:
        """Return the spec of blocks of `rows` of one head; `index(*grid)` gives (batch, head, block)."""
        if self.flat:

            def flat_index(*grid: jax.Array) -> tuple:
                b, h, t = index(*grid)
                return b, t, h

            return pl.BlockSpec((None, rows, self.head_dim), flat_index)
        return pl.BlockSpec((None, None, rows, self.head_dim), lambda *grid: (*index(*grid), 0))


def row_spec(size: int, index: Callable[..., tuple]) -> pl.BlockSpec:
    """Return the spec of (1, size) blocks of (B, H, 1, T) statistics; `index(*grid)` gives (batch, head, block)."""

    def row_index(*grid: jax.Array) -> tuple:
        b, h, t = index(*grid)
        return b, h, 0, t

    return pl.BlockSpec((None, None, 1, size), row_index)
