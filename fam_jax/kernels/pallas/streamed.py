"""The general forward kernel: any past, any number of feedback keys, rows of the batch at different positions.

A grid step takes one block of queries and one of the m + 1 blocks of keys that they may see; the softmax is carried
from step to step. Which of the keys exist is read from scalar memory, so hidden blocks cost no arithmetic. Loops
within a step keep the program small for every block size and every m.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fam_jax.kernels.pallas.geometry import (
    HIDDEN,
    LOG2_E,
    Geometry,
    Layout,
    Span,
    as_row,
    distances,
    product,
    row_spec,
    rows_from,
    visible,
)
from fam_jax.kernels.pallas.tiles import Tiles


def rows_at(index: jax.Array | int, size: int) -> Any:
    """The `index`-th `size` rows."""
    return rows_from(index * size, size)


def exists(block: jax.Array, past_length: jax.Array, geometry: Geometry) -> jax.Array:
    """Whether key block `block` holds keys: the first m are the past, whose last `past_length` slots are filled."""
    return (geometry.segments - block) * geometry.block_size <= past_length


def near(back: jax.Array, geometry: Geometry) -> jax.Array | bool:
    """Whether the window reaches the `back`-th block before the queries' own."""
    return (back - 1) * geometry.block_size + 1 < geometry.window if geometry.window else True


def forward(
    views: tuple[jax.Array, ...],
    past_length: jax.Array,
    fam_count: jax.Array,
    geometry: Geometry,
    sizes: Tiles,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """Attention of whole blocks over [m * C past slots ; tokens] and feedback keys.

    Args:
      views: q, k, v and, if there are feedback keys, fam_k and fam_v (see :class:`Layout`).
      past_length: (B,) int32.
      fam_count: (B, N) int32.
      geometry: of the call.
      sizes: of tiles.
      interpret: as of `pallas_call`.

    Returns:
      The output, a view like q, and (B, H, 1, T) float32: log2 of each query's sum of exponentials.
    """
    layout, size, group = Layout(geometry.head_dim), geometry.block_size, geometry.group
    q, k, v, *fam_views = views
    queries = layout.spec(size, lambda b, h, n, j, *_: (b, h, n))
    keys = layout.spec(size, lambda b, h, n, j, *_: (b, h // group, n + j))
    fam = layout.spec(geometry.fam_slots, lambda b, h, n, j, *_: (b, h // group, n))
    column = pltpu.VMEM((size, 1), jnp.float32)
    call = pl.pallas_call(
        functools.partial(_kernel, geometry=geometry, sizes=sizes),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(q.shape[0], geometry.heads, geometry.blocks, geometry.segments + 1),
            in_specs=[queries, keys, keys, *[fam] * len(fam_views)],
            out_specs=[queries, row_spec(size, lambda b, h, n, j, *_: (b, h, n))],
            scratch_shapes=[column, column, pltpu.VMEM((size, geometry.head_dim), jnp.float32)],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((q.shape[0], geometry.heads, 1, geometry.blocks * size), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=sizes.vmem_bytes,
        ),
        interpret=interpret,
        name="fam_attention_streamed_forward",
    )
    return call(past_length, fam_count, q, k, v, *fam_views)


def _add(rows: Any, scores: jax.Array, values: jax.Array, softmax: tuple[Any, ...], factor: float) -> None:
    """One more group of keys in the softmax of some rows: online, as in flash attention."""
    top, total, summed = softmax
    new = jnp.maximum(top[rows, :], scores.max(axis=1, keepdims=True))
    shrink = jnp.exp2((top[rows, :] - new) * factor)
    p = jnp.exp2((scores - new) * factor)
    top[rows, :] = new
    total[rows, :] = total[rows, :] * shrink + p.sum(axis=1, keepdims=True)
    summed[rows, :] = summed[rows, :] * shrink + product(p.astype(values.dtype), values, "nn")


def _kernel(
    past_length: Any, fam_count: Any, q: Any, k: Any, v: Any, *refs: Any, geometry: Geometry, sizes: Tiles
) -> None:
    *fam, out, logsum, top, total, summed = refs
    b, n, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    own, size, factor = geometry.segments, sizes.streamed, geometry.scale * LOG2_E
    count = geometry.block_size // size

    def add(rows: Any, scores: jax.Array, values: jax.Array) -> None:
        _add(rows, scores, values, refs[-3:], factor)

    @pl.when(j == 0)
    def _() -> None:
        top[...] = jnp.full(top.shape, HIDDEN, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        summed[...] = jnp.zeros(summed.shape, jnp.float32)

    if fam:

        @pl.when((j == 0) & (fam_count[b, n] > 0))
        def _() -> None:
            @pl.loop(0, count)
            def _(i: jax.Array) -> None:
                s = product(q[rows_at(i, size), :], fam[0][...], "nt")
                column = jax.lax.broadcasted_iota(jnp.int32, s.shape, 1)
                add(rows_at(i, size), jnp.where(column < fam_count[b, n], s, HIDDEN), fam[1][...])

    def read(first: int, last: Any, masked: bool) -> None:
        """The block of keys at hand, of which row tile i sees tiles `first` to `last(i)`."""

        @pl.loop(0, count)
        def _(i: jax.Array) -> None:
            rows = rows_at(i, size)

            @pl.loop(first, last(i))
            def _(t: jax.Array) -> None:
                s = product(q[rows, :], k[rows_at(t, size), :], "nt")
                if masked:
                    back = (own - j) * geometry.block_size
                    distance = distances(Span(i * size + back, size), Span(t * size, size), 0)
                    s = jnp.where(visible(distance, geometry.window), s, HIDDEN)
                add(rows, s, v[rows_at(t, size), :])

    @pl.when((j < own) & exists(n + j, past_length[b], geometry) & near(own - j, geometry))
    def _() -> None:
        read(0, lambda i: count, masked=geometry.window > 0)

    @pl.when(j == own)
    def _() -> None:
        read(0, lambda i: i + 1, masked=True)

        @pl.loop(0, count)
        def _(i: jax.Array) -> None:
            rows = rows_at(i, size)
            out[rows, :] = (summed[rows, :] / total[rows, :]).astype(out.dtype)
            logsum[:, rows] = as_row(top[rows, :] * factor + jnp.log2(total[rows, :]))
