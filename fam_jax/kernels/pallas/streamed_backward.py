"""The general backward kernels: gradients of queries, of tokens' keys and values, and of feedback keys and values.

Three passes that each form the scores anew, so that none holds more than a block of anything in fast memory.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fam_jax.kernels.pallas.geometry import (
    LOG2_E,
    Geometry,
    Layout,
    Span,
    distances,
    product,
    row_spec,
    visible,
)
from fam_jax.kernels.pallas.streamed import exists, near, rows_at
from fam_jax.kernels.pallas.tiles import Tiles


def backward(
    views: tuple[jax.Array, ...],
    past_length: jax.Array,
    fam_count: jax.Array,
    out: jax.Array,
    logsum: jax.Array,
    d_out: jax.Array,
    geometry: Geometry,
    sizes: Tiles,
    interpret: Any,
) -> tuple[jax.Array, ...]:
    """Gradients of `views`, from what :func:`fam_jax.kernels.pallas.streamed.forward` took and returned."""
    delta = _delta(out, d_out, geometry)
    given = (past_length, fam_count, views, d_out, logsum, delta, geometry, sizes, interpret)
    return (_queries(*given), *_tokens(*given), *(_fam(*given) if geometry.fam_slots else ()))


def _delta(out: jax.Array, d_out: jax.Array, geometry: Geometry) -> jax.Array:
    """(B, H, 1, T) sum over hd of out * d_out."""
    layout = Layout(geometry.head_dim)
    products = layout.unview(out).astype(jnp.float32) * layout.unview(d_out).astype(jnp.float32)
    return products.sum(axis=-1).swapaxes(1, 2)[:, :, None]


def _gradients(
    k: jax.Array, v: jax.Array, q: jax.Array, d_out: jax.Array, logsum: jax.Array, delta: jax.Array,
    factor: float, seen: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """(keys, queries) probabilities and the gradients of scores, in the dtype of the keys."""
    p = jnp.exp2(product(k, q, "nt") * factor - logsum)
    if seen is not None:
        p = jnp.where(seen, p, 0)
    d_s = p * (product(v, d_out, "nt") - delta)
    return p.astype(k.dtype), d_s.astype(k.dtype)


def _seen_fam(count: jax.Array, slots: int, queries: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, (slots, queries), 0) < count


def _params(arbitrary: int, parallel: int, sizes: Tiles) -> pltpu.CompilerParams:
    semantics = ((pltpu.PARALLEL,) * parallel) + ((pltpu.ARBITRARY,) * arbitrary)
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=sizes.vmem_bytes)


def _queries(
    past_length: jax.Array, fam_count: jax.Array, views: tuple[jax.Array, ...], d_out: jax.Array, logsum: jax.Array,
    delta: jax.Array, geometry: Geometry, sizes: Tiles, interpret: Any,
) -> jax.Array:  # fmt: skip
    layout, size, group = Layout(geometry.head_dim), geometry.block_size, geometry.group
    q, k, v, *fam_views = views
    queries = layout.spec(size, lambda b, h, n, j, *_: (b, h, n))
    stats = row_spec(size, lambda b, h, n, j, *_: (b, h, n))
    keys = layout.spec(size, lambda b, h, n, j, *_: (b, h // group, n + j))
    fam = layout.spec(geometry.fam_slots, lambda b, h, n, j, *_: (b, h // group, n))
    return pl.pallas_call(
        functools.partial(_queries_kernel, geometry=geometry, sizes=sizes),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(q.shape[0], geometry.heads, geometry.blocks, geometry.segments + 1),
            in_specs=[queries, queries, stats, stats, keys, keys, *[fam] * len(fam_views)],
            out_specs=queries,
            scratch_shapes=[pltpu.VMEM((size, geometry.head_dim), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=_params(1, 3, sizes),
        interpret=interpret,
        name="fam_attention_streamed_dq",
    )(past_length, fam_count, q, d_out, logsum, delta, k, v, *fam_views)


def _queries_kernel(
    past_length: Any, fam_count: Any, q: Any, d_out: Any, logsum: Any, delta: Any, k: Any, v: Any, *refs: Any,
    geometry: Geometry, sizes: Tiles,
) -> None:  # fmt: skip
    *fam, dq, summed = refs
    b, n, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    own, size, factor = geometry.segments, sizes.streamed, geometry.scale * LOG2_E
    count = geometry.block_size // size

    def add(rows: Any, keys: jax.Array, values: jax.Array, seen: jax.Array | None) -> None:
        side = q[rows, :], d_out[rows, :], logsum[:, rows], delta[:, rows]
        _, d_s = _gradients(keys, values, *side, factor, seen)
        summed[rows, :] += product(d_s, keys, "tn")

    @pl.when(j == 0)
    def _() -> None:
        summed[...] = jnp.zeros(summed.shape, jnp.float32)

    if fam:

        @pl.when((j == 0) & (fam_count[b, n] > 0))
        def _() -> None:
            @pl.loop(0, count)
            def _(i: jax.Array) -> None:
                seen = _seen_fam(fam_count[b, n], geometry.fam_slots, size)
                add(rows_at(i, size), fam[0][...], fam[1][...], seen)

    def read(last: Callable[[jax.Array], Any], masked: bool) -> None:
        @pl.loop(0, count)
        def _(i: jax.Array) -> None:
            @pl.loop(0, last(i))
            def _(t: jax.Array) -> None:
                back = (own - j) * geometry.block_size
                distance = distances(Span(i * size + back, size), Span(t * size, size), 1)
                seen = visible(distance, geometry.window) if masked else None
                add(rows_at(i, size), k[rows_at(t, size), :], v[rows_at(t, size), :], seen)

    @pl.when((j < own) & exists(n + j, past_length[b], geometry) & near(own - j, geometry))
    def _() -> None:
        read(lambda i: count, masked=geometry.window > 0)

    @pl.when(j == own)
    def _() -> None:
        read(lambda i: i + 1, masked=True)
        dq[...] = (summed[...] * geometry.scale).astype(dq.dtype)


def _tokens(
    past_length: jax.Array, fam_count: jax.Array, views: tuple[jax.Array, ...], d_out: jax.Array, logsum: jax.Array,
    delta: jax.Array, geometry: Geometry, sizes: Tiles, interpret: Any,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """dk, dv. Key block c is read by query blocks c - m (its own: block numbers of keys count the past) to c."""
    layout, size, group = Layout(geometry.head_dim), geometry.block_size, geometry.group
    q, k, v = views[:3]
    past = geometry.segments
    readers = 1 if geometry.stop_gradient else past + 1

    def query_index(b: Any, h: Any, c: Any, i: Any, g: Any, *_: Any) -> tuple:
        return b, h * group + g, jnp.clip(c - past + i, 0, geometry.blocks - 1)

    queries, stats = layout.spec(size, query_index), row_spec(size, query_index)
    keys = layout.spec(size, lambda b, h, c, i, g, *_: (b, h, c))
    sums = pltpu.VMEM((size, geometry.head_dim), jnp.float32)
    return pl.pallas_call(
        functools.partial(_tokens_kernel, geometry=geometry, sizes=sizes),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(q.shape[0], geometry.kv_heads, past + geometry.blocks, readers, group),
            in_specs=[queries, queries, stats, stats, keys, keys],
            out_specs=[keys, keys],
            scratch_shapes=[sums, sums],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
        compiler_params=_params(2, 3, sizes),
        interpret=interpret,
        name="fam_attention_streamed_dkv",
    )(past_length, fam_count, q, d_out, logsum, delta, k, v)


def _tokens_kernel(
    past_length: Any, fam_count: Any, q: Any, d_out: Any, logsum: Any, delta: Any, k: Any, v: Any, dk: Any, dv: Any,
    dk_sum: Any, dv_sum: Any, *, geometry: Geometry, sizes: Tiles,
) -> None:  # fmt: skip
    b, c, i, g = (pl.program_id(axis) for axis in (0, 2, 3, 4))
    size, factor = sizes.streamed, geometry.scale * LOG2_E
    count, reader = geometry.block_size // size, c - geometry.segments + i

    @pl.when((i == 0) & (g == 0))
    def _() -> None:
        dk_sum[...] = jnp.zeros(dk_sum.shape, jnp.float32)
        dv_sum[...] = jnp.zeros(dv_sum.shape, jnp.float32)

    def read(first: Callable[[jax.Array], Any], masked: bool) -> None:
        @pl.loop(0, count)
        def _(t: jax.Array) -> None:
            keys = rows_at(t, size)

            @pl.loop(first(t), count)
            def _(r: jax.Array) -> None:
                rows = rows_at(r, size)
                distance = distances(Span(r * size + i * geometry.block_size, size), Span(t * size, size), 1)
                seen = visible(distance, geometry.window) if masked else None
                side = q[rows, :], d_out[rows, :], logsum[:, rows], delta[:, rows]
                p, d_s = _gradients(k[keys, :], v[keys, :], *side, factor, seen)
                dv_sum[keys, :] += product(p, side[1], "nn")
                dk_sum[keys, :] += product(d_s, side[0], "nn")

    there = (reader >= 0) & (reader < geometry.blocks)

    @pl.when(there & (i == 0))
    def _() -> None:
        read(lambda t: t, masked=True)

    @pl.when(there & (i > 0) & exists(c, past_length[b], geometry) & near(i, geometry))
    def _() -> None:
        read(lambda t: 0, masked=geometry.window > 0)

    @pl.when((i == pl.num_programs(3) - 1) & (g == pl.num_programs(4) - 1))
    def _() -> None:
        dk[...] = (dk_sum[...] * geometry.scale).astype(dk.dtype)
        dv[...] = dv_sum[...].astype(dv.dtype)


def _fam(
    past_length: jax.Array, fam_count: jax.Array, views: tuple[jax.Array, ...], d_out: jax.Array, logsum: jax.Array,
    delta: jax.Array, geometry: Geometry, sizes: Tiles, interpret: Any,
) -> tuple[jax.Array, ...]:  # fmt: skip
    layout, size, group, slots = (
        Layout(geometry.head_dim),
        geometry.block_size,
        geometry.group,
        geometry.fam_slots,
    )
    q, _, _, fam_k, fam_v = views

    def query_index(b: Any, h: Any, n: Any, g: Any, *_: Any) -> tuple:
        return b, h * group + g, n

    queries, stats = layout.spec(size, query_index), row_spec(size, query_index)
    fam = layout.spec(slots, lambda b, h, n, g, *_: (b, h, n))
    sums = pltpu.VMEM((slots, geometry.head_dim), jnp.float32)
    return pl.pallas_call(
        functools.partial(_fam_kernel, geometry=geometry, sizes=sizes),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(q.shape[0], geometry.kv_heads, geometry.blocks, group),
            in_specs=[queries, queries, stats, stats, fam, fam],
            out_specs=[fam, fam],
            scratch_shapes=[sums, sums],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (fam_k, fam_v)],
        compiler_params=_params(1, 3, sizes),
        interpret=interpret,
        name="fam_attention_streamed_dfam",
    )(past_length, fam_count, q, d_out, logsum, delta, fam_k, fam_v)


def _fam_kernel(
    past_length: Any, fam_count: Any, q: Any, d_out: Any, logsum: Any, delta: Any, k: Any, v: Any, dk: Any, dv: Any,
    dk_sum: Any, dv_sum: Any, *, geometry: Geometry, sizes: Tiles,
) -> None:  # fmt: skip
    b, n, g = (pl.program_id(axis) for axis in (0, 2, 3))
    size, factor = sizes.streamed, geometry.scale * LOG2_E

    @pl.when(g == 0)
    def _() -> None:
        dk_sum[...] = jnp.zeros(dk_sum.shape, jnp.float32)
        dv_sum[...] = jnp.zeros(dv_sum.shape, jnp.float32)

    @pl.loop(0, geometry.block_size // size)
    def _(r: jax.Array) -> None:
        rows = rows_at(r, size)
        seen = _seen_fam(fam_count[b, n], geometry.fam_slots, size)
        side = q[rows, :], d_out[rows, :], logsum[:, rows], delta[:, rows]
        p, d_s = _gradients(k[...], v[...], *side, factor, seen)
        dv_sum[...] += product(p, side[1], "nn")
        dk_sum[...] += product(d_s, side[0], "nn")

    @pl.when(g == pl.num_programs(3) - 1)
    def _() -> None:
        dk[...] = (dk_sum[...] * geometry.scale).astype(dk.dtype)
        dv[...] = dv_sum[...].astype(dv.dtype)
