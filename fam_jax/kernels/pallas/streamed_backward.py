"""The general backward kernels: gradients of queries, of tokens' keys and values, and of extra keys and values.

Three passes recompute the scores. Each holds at most one block of every array in fast memory.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fam_jax.kernels.pallas.blocks import KV, product, rows_at, scratch
from fam_jax.kernels.pallas.call import (
    KernelCall,
    QuerySide,
    Results,
    Views,
    score_gradients,
    shapes_like,
    write_gradients,
)
from fam_jax.kernels.pallas.geometry import Span, extra_mask, token_mask
from fam_jax.kernels.pallas.streamed import Counts, Mask, exists, near, query_grid, query_index, visit_keys


def backward(call: KernelCall, counts: Counts, views: Views, results: Results, d_out: jax.Array) -> Views:
    """Return the gradients of `views`, from the results of the forward kernel and the cotangent of its output.

    As in the forward kernel, `views.tokens` start with all m * C past slots.
    """
    side = QuerySide(views.q, d_out, results.logsum, _delta(call, results.out, d_out))
    return Views(
        _queries(call, counts, side, views),
        _tokens(call, counts, side, views.tokens),
        _extra(call, counts, side, views.extra) if views.extra else None,
    )


def _delta(call: KernelCall, out: jax.Array, d_out: jax.Array) -> jax.Array:
    """Return (B, H, 1, T) sums of out * d_out over hd."""
    products = call.layout.unview(out).astype(jnp.float32) * call.layout.unview(d_out).astype(jnp.float32)
    return products.sum(axis=-1).swapaxes(1, 2)[:, :, None]


def _queries(call: KernelCall, counts: Counts, side: QuerySide, views: Views) -> jax.Array:
    size = call.geometry.block_size
    grid = query_grid(
        call,
        side.q.shape[0],
        inputs=(QuerySide.specs(call.layout, size, query_index),),
        outputs=call.layout.spec(size, query_index),
        sums=scratch(size, call.geometry.head_dim),
    )
    kernel = call.kernel(_queries_kernel, "block_attention_streamed_dq", 3, grid, [shapes_like(side.q)])
    (gradient,) = kernel(counts, side, views.tokens, views.extra)
    return gradient


def _queries_kernel(
    counts: Counts, side: QuerySide, tokens: KV, extra: KV | None, d_q: Any, summed: Any, *, call: KernelCall
) -> None:
    @pl.when(pl.program_id(3) == 0)
    def _() -> None:
        summed[...] = jnp.zeros(summed.shape, jnp.float32)

    def add(rows: Any, keys: KV, mask: Mask | None) -> None:
        seen = mask(1) if mask else None
        values = KV(keys.k[...], keys.v[...])
        _, d_s = score_gradients(values, side.rows(rows), call.geometry.factor, seen)
        summed[rows, :] += product(d_s, values.k, "tn")

    def finish() -> None:
        d_q[...] = (summed[...] * call.geometry.scale).astype(d_q.dtype)

    visit_keys(call, counts, Views(side.q, tokens, extra), add, finish)


def _tokens(call: KernelCall, counts: Counts, side: QuerySide, tokens: KV) -> KV:
    """Return the gradients of the tokens' keys and values.

    Blocks of keys are counted from the first past slot, so key block c is read by query blocks c - m to c.
    """
    geometry, group = call.geometry, call.geometry.group
    past, blocks = geometry.segments, geometry.blocks
    readers = 1 if geometry.stop_gradient else past + 1

    def reader(b: Any, h: Any, c: Any, i: Any, g: Any, *_: Any) -> tuple:
        return b, h * group + g, jnp.clip(c - past + i, 0, blocks - 1)

    grid = _key_grid(
        call,
        (side.q.shape[0], geometry.kv_heads, past + blocks, readers, group),
        reader,
        call.layout.spec(geometry.block_size, lambda b, h, c, i, g, *_: (b, h, c)),
        geometry.block_size,
    )
    kernel = call.kernel(_tokens_kernel, "block_attention_streamed_dkv", 3, grid, [shapes_like(tokens)])
    (gradients,) = kernel(counts, side, tokens)
    return gradients


def _extra(call: KernelCall, counts: Counts, side: QuerySide, extra: KV) -> KV:
    """Return the gradients of extra keys and values."""
    geometry, group = call.geometry, call.geometry.group

    def reader(b: Any, h: Any, n: Any, g: Any, *_: Any) -> tuple:
        return b, h * group + g, n

    grid = _key_grid(
        call,
        (side.q.shape[0], geometry.kv_heads, geometry.blocks, group),
        reader,
        call.layout.spec(geometry.extra_slots, lambda b, h, n, g, *_: (b, h, n)),
        geometry.extra_slots,
    )
    kernel = call.kernel(_extra_kernel, "block_attention_streamed_dextra", 3, grid, [shapes_like(extra)])
    (gradients,) = kernel(counts, side, extra)
    return gradients


def _key_grid(
    call: KernelCall, grid: tuple[int, ...], reader: Callable[..., tuple], keys: pl.BlockSpec, rows: int
) -> pl.GridSpec:
    """Return the grid of a kernel that sums the gradients of blocks of keys over their readers.

    Args:
      call: static settings.
      grid: sizes of the grid.
      reader: gives (batch, head, block) of the queries at a step.
      keys: spec of keys and of values.
      rows: number of rows in a block of keys.
    """
    sums = scratch(rows, call.geometry.head_dim)
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=grid,
        in_specs=[QuerySide.specs(call.layout, call.geometry.block_size, reader), KV(keys, keys)],
        out_specs=[KV(keys, keys)],
        scratch_shapes=[KV(sums, sums)],
    )


def _add_gradients(sums: KV, keys: KV, side: QuerySide, factor: float, seen: jax.Array | None) -> None:
    """Add the contribution of some queries to the gradients of some keys and values.

    Args:
      sums: references to (R, hd) sums; those of keys lack the factor of the scores.
      keys: references (R, hd).
      side: the queries' inputs, loaded.
      factor: factor of the base-2 exponents.
      seen: (R, queries) mask; None if all keys are visible.
    """
    p, d_s = score_gradients(KV(keys.k[...], keys.v[...]), side, factor, seen)
    sums.v[...] += product(p, side.d_out, "nn")
    sums.k[...] += product(d_s, side.q, "nn")


def _tokens_kernel(
    counts: Counts, side: QuerySide, tokens: KV, gradients: KV, sums: KV, *, call: KernelCall
) -> None:
    geometry, size = call.geometry, call.tiles.streamed
    b, c, i, g = (pl.program_id(axis) for axis in (0, 2, 3, 4))
    count, reader = geometry.block_size // size, c - geometry.segments + i

    pl.when((i == 0) & (g == 0))(sums.reset)

    def read(first: Callable[[jax.Array], Any], masked: bool) -> None:
        """Visit the step's block of queries; its tiles from first(t) on see key tile t."""

        @pl.loop(0, count)
        def _(t: jax.Array) -> None:
            keys = rows_at(t, size)

            @pl.loop(first(t), count)
            def _(r: jax.Array) -> None:
                queries = Span(r * size + i * geometry.block_size, size)
                seen = token_mask(queries, Span(t * size, size), geometry.window, 1) if masked else None
                here = side.rows(rows_at(r, size))
                _add_gradients(sums.at(keys), tokens.at(keys), here, geometry.factor, seen)

    is_block = (reader >= 0) & (reader < geometry.blocks)

    @pl.when(is_block & (i == 0))
    def _() -> None:
        read(lambda t: t, masked=True)

    @pl.when(is_block & (i > 0) & exists(c, counts.past_length[b], geometry) & near(i, geometry))
    def _() -> None:
        read(lambda t: 0, masked=geometry.window > 0)

    @pl.when((i == pl.num_programs(3) - 1) & (g == pl.num_programs(4) - 1))
    def _() -> None:
        write_gradients(gradients, sums, ..., geometry.scale)


def _extra_kernel(
    counts: Counts, side: QuerySide, extra: KV, gradients: KV, sums: KV, *, call: KernelCall
) -> None:
    geometry, size = call.geometry, call.tiles.streamed
    b, n, g = (pl.program_id(axis) for axis in (0, 2, 3))

    pl.when(g == 0)(sums.reset)

    @pl.loop(0, geometry.block_size // size)
    def _(r: jax.Array) -> None:
        here = side.rows(rows_at(r, size))
        seen = extra_mask(counts.extra_count[b, n], geometry.extra_slots, size, 1)
        _add_gradients(sums, extra, here, geometry.factor, seen)

    @pl.when(g == pl.num_programs(3) - 1)
    def _() -> None:
        write_gradients(gradients, sums, ..., geometry.scale)
