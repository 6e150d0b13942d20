"""The general forward kernel: any past, any number of extra keys, rows of the batch at different positions.

A grid step takes one block of queries and one of the m + 1 blocks of keys that they may see, and carries the softmax to
the next step. Scalar memory says which keys exist, so hidden blocks cost no arithmetic. Loops within a step keep the
program small for every block size and every m.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fam_jax.kernels.pallas.blocks import KV, as_row, product, row_spec, rows_at, scratch
from fam_jax.kernels.pallas.call import KernelCall, Results, Views
from fam_jax.kernels.pallas.geometry import HIDDEN, Geometry, Span, extra_mask, token_mask


class Counts(NamedTuple):
    """Which keys exist: int32 arrays, or references to scalar memory."""

    # (B,) filled past slots, the last ones
    past_length: Any
    # (B, N) extra keys of a block, the first ones
    extra_count: Any


class Softmax(NamedTuple):
    """References to an online softmax (as in flash attention) over the keys of a block of queries."""

    # (C, 1) largest score
    top: Any
    # (C, 1) sum of exponentials
    total: Any
    # (C, hd) sum of values, weighted by exponentials
    summed: Any

    def reset(self) -> None:
        """Reset to no keys."""
        self.top[...] = jnp.full(self.top.shape, HIDDEN, jnp.float32)
        self.total[...] = jnp.zeros(self.total.shape, jnp.float32)
        self.summed[...] = jnp.zeros(self.summed.shape, jnp.float32)

    def add(self, rows: Any, scores: jax.Array, values: jax.Array, factor: float) -> None:
        """Add a group of keys to the softmax of some rows."""
        top, total, summed = self
        new = jnp.maximum(top[rows, :], scores.max(axis=1, keepdims=True))
        shrink = jnp.exp2((top[rows, :] - new) * factor)
        p = jnp.exp2((scores - new) * factor)
        top[rows, :] = new
        total[rows, :] = total[rows, :] * shrink + p.sum(axis=1, keepdims=True)
        summed[rows, :] = summed[rows, :] * shrink + product(p.astype(values.dtype), values, "nn")

    def write(self, rows: Any, results: Results, factor: float) -> None:
        """Write attention and statistics of some rows."""
        results.out[rows, :] = (self.summed[rows, :] / self.total[rows, :]).astype(results.out.dtype)
        results.logsum[:, rows] = as_row(self.top[rows, :] * factor + jnp.log2(self.total[rows, :]))


# Returns the mask of a tile for the axis of its queries.
Mask = Callable[[int], jax.Array]


def forward(call: KernelCall, counts: Counts, views: Views) -> Results:
    """Compute attention of whole blocks of queries; `views.tokens` start with all m * C past slots."""
    geometry, size = call.geometry, call.geometry.block_size
    batch = views.q.shape[0]
    column = scratch(size, 1)
    grid = query_grid(
        call,
        batch,
        inputs=(call.layout.spec(size, query_index),),
        outputs=Results(call.layout.spec(size, query_index), row_spec(size, query_index)),
        sums=Softmax(column, column, scratch(size, geometry.head_dim)),
    )
    shapes = Results(
        jax.ShapeDtypeStruct(views.q.shape, views.q.dtype),
        jax.ShapeDtypeStruct((batch, geometry.heads, 1, geometry.blocks * size), jnp.float32),
    )
    kernel = call.kernel(_kernel, "block_attention_streamed_forward", 3, grid, [shapes])
    (results,) = kernel(counts, views.q, views.tokens, views.extra)
    return results


def _kernel(
    counts: Counts,
    q: Any,
    tokens: KV,
    extra: KV | None,
    results: Results,
    softmax: Softmax,
    *,
    call: KernelCall,
) -> None:
    factor, size = call.geometry.factor, call.tiles.streamed
    pl.when(pl.program_id(3) == 0)(softmax.reset)

    def add(rows: Any, keys: KV, mask: Mask | None) -> None:
        s = product(q[rows, :], keys.k[...], "nt")
        if mask:
            s = jnp.where(mask(0), s, HIDDEN)
        softmax.add(rows, s, keys.v[...], factor)

    def finish() -> None:
        @pl.loop(0, call.geometry.block_size // size)
        def _(i: jax.Array) -> None:
            softmax.write(rows_at(i, size), results, factor)

    visit_keys(call, counts, Views(q, tokens, extra), add, finish)


def query_index(b: Any, h: Any, n: Any, j: Any, *_: Any) -> tuple:
    """Return (batch, head, block) of the queries at a step of :func:`query_grid`."""
    return b, h, n


def query_grid(call: KernelCall, batch: int, inputs: tuple, outputs: Any, sums: Any) -> pl.GridSpec:
    """Return the grid (b, h, n, j) of kernels that visit, for each block of queries, its m + 1 blocks of keys.

    Args:
      call: static settings.
      batch: B.
      inputs: specs of the queries' inputs; those of tokens' keys and extra keys follow them.
      outputs: specs of the kernel's results.
      sums: shapes of the fast memory that the kernel carries from step to step.
    """
    geometry, layout, group = call.geometry, call.layout, call.geometry.group
    keys = layout.spec(geometry.block_size, lambda b, h, n, j, *_: (b, h // group, n + j))
    extra = layout.spec(geometry.extra_slots, lambda b, h, n, j, *_: (b, h // group, n))
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(batch, geometry.heads, geometry.blocks, geometry.segments + 1),
        in_specs=[*inputs, KV(keys, keys), KV(extra, extra) if geometry.extra_slots else None],
        out_specs=[outputs],
        scratch_shapes=[sums],
    )


def visit_keys(
    call: KernelCall,
    counts: Counts,
    views: Views,
    add: Callable[[Any, KV, Mask | None], None],
    finish: Callable[[], None],
) -> None:
    """Visit the keys that a step of :func:`query_grid` sees, tile by tile.

    Args:
      call: static settings.
      counts: references.
      views: references to the step's blocks.
      add: called with rows of queries, references to a tile of keys and values, and the tile's mask (None if all of it
        is visible).
      finish: called after the last tile of the last step of a block of queries.
    """
    geometry, size = call.geometry, call.tiles.streamed
    b, n, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    own, count = geometry.segments, geometry.block_size // size

    if (extra := views.extra) is not None:

        @pl.when((j == 0) & (counts.extra_count[b, n] > 0))
        def _() -> None:
            @pl.loop(0, count)
            def _(i: jax.Array) -> None:
                mask = functools.partial(extra_mask, counts.extra_count[b, n], geometry.extra_slots, size)
                add(rows_at(i, size), extra, mask)

    def read(last: Callable[[jax.Array], Any], masked: bool) -> None:
        """Visit the step's block of keys; row tile i sees its tiles 0 to last(i) - 1."""

        @pl.loop(0, count)
        def _(i: jax.Array) -> None:
            @pl.loop(0, last(i))
            def _(t: jax.Array) -> None:
                back = (own - j) * geometry.block_size
                queries, keys = Span(i * size + back, size), Span(t * size, size)
                mask = functools.partial(token_mask, queries, keys, geometry.window)
                add(rows_at(i, size), views.tokens.at(rows_at(t, size)), mask if masked else None)

    @pl.when((j < own) & exists(n + j, counts.past_length[b], geometry) & near(own - j, geometry))
    def _() -> None:
        read(lambda i: count, masked=geometry.window > 0)

    @pl.when(j == own)
    def _() -> None:
        read(lambda i: i + 1, masked=True)
        finish()


def exists(block: jax.Array, past_length: jax.Array, geometry: Geometry) -> jax.Array:
    """Return whether key block `block` holds keys: the first m blocks are past slots, filled from the end."""
    return (geometry.segments - block) * geometry.block_size <= past_length


def near(back: jax.Array, geometry: Geometry) -> jax.Array | bool:
    """Return whether the window reaches the block that lies `back` blocks before the queries' own."""
    return (back - 1) * geometry.block_size + 1 < geometry.window if geometry.window else True
