"""Arguments of the block attention kernels: static settings, and records of their arrays.

The records are pytrees. The same record holds the arrays of a call, their block specs, and the references that the
kernel gets, so all three stay in the same order.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fam_jax.kernels.pallas.blocks import KV, Layout, product, row_spec
from fam_jax.kernels.pallas.geometry import Geometry
from fam_jax.kernels.pallas.tiles import Tiles


class Views(NamedTuple):
    """Arrays of block attention in the layout of the kernels, or their gradients."""

    # Like (B, T, H, hd)
    q: Any
    # Like (B, T, K, hd)
    tokens: KV
    # Like (B, N * S, K, hd); None if there are no extra keys
    extra: KV | None
    # Like (B, P, K, hd); None if there are no past slots, and as the gradients of slots that get none
    past: KV | None = None


class Results(NamedTuple):
    """The results of the forward kernels."""

    # A view like q
    out: Any
    # (B, H, 1, T) float32: log2 of each query's sum of exponentials
    logsum: Any


class QuerySide(NamedTuple):
    """The inputs of the backward kernels that belong to a block of queries."""

    # (C, hd)
    q: Any
    d_out: Any
    # (1, C) log2 of the sums of exponentials
    logsum: Any
    # (1, C) sums of d_out * out over hd
    delta: Any

    def rows(self, rows: Any) -> "QuerySide":
        """Return the values of some queries, read from references."""
        return QuerySide(self.q[rows, :], self.d_out[rows, :], self.logsum[:, rows], self.delta[:, rows])

    @classmethod
    def specs(cls, layout: Layout, size: int, index: Callable[..., tuple]) -> "QuerySide":
        """Return the block specs of all four; `index(*grid)` gives (batch, head, block)."""
        queries, stats = layout.spec(size, index), row_spec(size, index)
        return cls(queries, queries, stats, stats)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class KernelCall:
    """Static settings of one call of block attention, for all its kernels."""

    geometry: Geometry
    tiles: Tiles
    # False, or the parameters of Pallas' TPU interpreter
    interpret: Any = False

    @property
    def layout(self) -> Layout:
        """Layout of the views."""
        return Layout(self.geometry.head_dim)

    def kernel(
        self, body: Callable[..., None], name: str, parallel: int, grid: pl.GridSpec, out_shape: Any
    ) -> Callable[..., Any]:
        """Return the Pallas kernel that runs `body(*references, call=self)` at every step of a grid.

        Args:
          body: the kernel's function.
          name: name of the kernel in compiled programs.
          parallel: how many of the first grid dimensions may run in any order, on several cores.
          grid: the grid, with the specs of what its steps read and write.
          out_shape: shapes of the results, in the structure of the grid's `out_specs`.
        """
        arbitrary = len(grid.grid) - parallel
        return pl.pallas_call(
            functools.partial(body, call=self),
            grid_spec=grid,
            out_shape=out_shape,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=(pltpu.PARALLEL,) * parallel + (pltpu.ARBITRARY,) * arbitrary,
                vmem_limit_bytes=self.tiles.vmem_bytes,
            ),
            interpret=self.interpret,
            name=name,
        )


def shapes_like(tree: Any) -> Any:
    """Return the shapes and dtypes of a pytree of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def score_gradients(
    keys: KV, side: QuerySide, factor: float, mask: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Return probabilities and gradients of scores, both (keys, queries) in the dtype of the keys.

    Args:
      keys: keys and values (S, hd), loaded.
      side: the queries' inputs, loaded.
      factor: factor of the base-2 exponents.
      mask: (keys, queries), True where a key is visible; None if all are.
    """
    p = jnp.exp2(product(keys.k, side.q, "nt") * factor - side.logsum)
    if mask is not None:
        p = jnp.where(mask, p, 0)
    d_s = p * (product(keys.v, side.d_out, "nt") - side.delta)
    return p.astype(keys.k.dtype), d_s.astype(keys.k.dtype)


def write_gradients(results: KV, sums: KV, rows: Any, scale: float) -> None:
    """Write rows of the sums to the gradients of keys and values; those of keys still need the factor `scale`."""
    results.k[...] = (sums.k[rows] * scale).astype(results.k.dtype)
    results.v[...] = sums.v[rows].astype(results.v.dtype)
