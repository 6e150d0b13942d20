"""The backward pass of the training kernels: all five gradients in one pass over the scores.

As in the forward kernel a grid step takes one block of queries with all keys that they see. Scores are held with keys
along the rows, so that what belongs to a query is a row vector. The gradients of a block of keys are complete when its
last reader, m blocks further, has been; until then they wait in a ring of m + 1 blocks of fast memory. After the last
block of queries m further steps empty the ring.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fam_jax.kernels.pallas.geometry import (
    LOG2_E,
    Geometry,
    Layout,
    Span,
    as_row,
    distances,
    product,
    row_spec,
    rows_from,
    sight,
    tiles,
    visible,
)
from fam_jax.kernels.pallas.resident import Window
from fam_jax.kernels.pallas.tiles import Tiles


def backward(
    views: tuple[jax.Array, ...],
    out: jax.Array,
    logsum: jax.Array,
    d_out: jax.Array,
    geometry: Geometry,
    sizes: Tiles,
    interpret: Any,
) -> tuple[jax.Array, ...]:
    """Gradients of the views (q, k, v[, fam_k, fam_v]) from the forward kernel's results and the cotangent."""
    layout, size, past = Layout(geometry.head_dim), geometry.block_size, geometry.segments
    batch, group, blocks = out.shape[0], geometry.group, geometry.blocks
    waiting = _waiting(geometry)

    def head(k: Any, n: Any, g: Any) -> Any:
        # In the steps that only empty the ring the index stays, so that nothing is read or written.
        return k * group + (jnp.where(n < blocks, g, group - 1) if waiting and group > 1 else g)

    def block(n: Any) -> Any:
        return jnp.minimum(n, blocks - 1) if waiting else n

    queries = layout.spec(size, lambda b, k, n, g: (b, head(k, n, g), block(n)))
    stats = row_spec(size, lambda b, k, n, g: (b, head(k, n, g), block(n)))

    def slot(j: int) -> pl.BlockSpec:
        return layout.spec(size, lambda b, k, n, g: (b, k, jnp.maximum(block(n) + (j - past), 0)))

    slots = [slot(j) for j in range(past + 1)]
    finished = layout.spec(size, lambda b, k, n, g: (b, k, jnp.maximum(n - waiting, 0)))
    fam = layout.spec(geometry.fam_slots, lambda b, k, n, g: (b, k, block(n)))
    has_fam = geometry.fam_slots > 0
    fams = [fam, fam] if has_fam else []
    q, k, v, *fam_views = views
    ring = pltpu.VMEM(((waiting + 1) * size, geometry.head_dim), jnp.float32)
    fam_sum = pltpu.VMEM((geometry.fam_slots, geometry.head_dim), jnp.float32)
    call = pl.pallas_call(
        functools.partial(_kernel, geometry=geometry, sizes=sizes),
        grid=(batch, geometry.kv_heads, blocks + waiting, group),
        in_specs=[queries, queries, queries, stats, *slots, *slots, *fams],
        out_specs=[queries, finished, finished, *fams],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in views],
        scratch_shapes=[
            pltpu.VMEM((size, geometry.head_dim), jnp.float32),
            pltpu.VMEM((1, size), jnp.float32),
            ring,
            ring,
            *([fam_sum, fam_sum] if has_fam else []),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=sizes.vmem_bytes,
        ),
        interpret=interpret,
        name="fam_attention_backward",
    )
    return call(q, d_out, out, logsum, *[k] * (past + 1), *[v] * (past + 1), *fam_views)


def _waiting(geometry: Geometry) -> int:
    """How many blocks it takes until the gradients of a block's keys are complete."""
    return 0 if geometry.stop_gradient else geometry.segments


class _Queries(NamedTuple):
    """References to what a block of queries brings, and to the sum of its gradient."""

    q: Any  # (C, hd)
    d_out: Any  # (C, hd)
    logsum: Any  # (1, C)
    delta: Any  # (1, C) sum of d_out * out
    d_q: Any  # (C, hd)


def _unpack(refs: tuple[Any, ...], geometry: Geometry) -> tuple[Window, Window, tuple, tuple]:
    """Keys, values, results and scratch of the kernel's remaining references."""
    count, fam = geometry.segments + 1, 2 if geometry.fam_slots else 0
    fam_k, fam_v = refs[2 * count : 2 * count + fam] or (None, None)
    rest = refs[2 * count + fam :]
    keys, values = Window(refs[:count], fam_k), Window(refs[count : 2 * count], fam_v)
    return keys, values, rest[: 3 + fam], rest[3 + fam :]


def _accumulate(sums: Sequence[Any], rows: Any, gradients: tuple[jax.Array, jax.Array]) -> None:
    for total, gradient in zip(sums, gradients, strict=True):
        total[rows] += gradient


def _kernel(q: Any, d_out: Any, out: Any, logsum: Any, *refs: Any, geometry: Geometry, sizes: Tiles) -> None:
    blocks, size, last = geometry.blocks, geometry.block_size, geometry.group - 1
    keys, values, (dq, dk, dv, *d_fam), scratch = _unpack(refs, geometry)
    dq_sum, delta, dk_ring, dv_ring, *fam_sums = scratch
    n, g = pl.program_id(2), pl.program_id(3)
    waiting, side = _waiting(geometry), _Queries(q, d_out, logsum, delta, dq_sum)

    def ring(block: jax.Array) -> Any:
        """First row of the ring that belongs to a block of keys."""
        return (block % (waiting + 1)) * size if waiting else 0

    def read(tokens: int, span: Span) -> None:
        block, start = divmod(span.start, size)
        wanted = block == 0 or not geometry.stop_gradient
        k, v, readers = (
            keys.read(span, size),
            values.read(span, size),
            _readers(span, tokens, geometry, sizes),
        )
        gradients = _tile(k, v, side, readers, wanted, geometry)
        if wanted:
            rows = rows_from(ring(n + (waiting + 1 + block)) + start, span.size)
            _accumulate((dk_ring, dv_ring), rows, gradients)

    @pl.when(g == 0)
    def _() -> None:
        fresh = rows_from(ring(n), size)
        for sums, rows in [*((sums, ...) for sums in fam_sums), (dk_ring, fresh), (dv_ring, fresh)]:
            sums[rows] = jnp.zeros_like(sums[rows])

    @pl.when(n < blocks)
    def _() -> None:
        dq_sum[...] = jnp.zeros_like(dq_sum)
        products = d_out[...].astype(jnp.float32) * out[...].astype(jnp.float32)
        delta[...] = as_row(products.sum(axis=1, keepdims=True))

    def read_fam(tokens: int) -> None:
        readers = _all_queries(tokens, geometry, sizes)
        _accumulate(fam_sums, ..., _tile(keys.fam[...], values.fam[...], side, readers, True, geometry))

    def read_block(back: int, tokens: int) -> None:
        for span in tiles(Span(-back * size, size if back else tokens), sizes.back_keys):
            read(tokens, span)

    # Once for whole blocks, and once more for a last one that is not: what lies beyond its end is never read.
    whole = geometry.whole_blocks
    for first, end, tokens in ((0, whole, size), (whole, blocks, size - geometry.missing)):
        if first < end and fam_sums:
            pl.when((n >= first) & (n < end))(functools.partial(read_fam, tokens))
        for back in range(geometry.segments + 1):
            if max(first, back) < end:
                pl.when((n >= max(first, back)) & (n < end))(functools.partial(read_block, back, tokens))

    write = functools.partial(_write, geometry)
    pl.when(n < blocks)(functools.partial(write, (dq,), (dq_sum,), ..., (True,)))
    pl.when((n < blocks) & (g == last))(functools.partial(write, d_fam, fam_sums, ..., (True, False)))

    @pl.when((n >= waiting) & (g == last))
    def _() -> None:
        write((dk, dv), (dk_ring, dv_ring), rows_from(ring(n - waiting), size), (True, False))


def _write(geometry: Geometry, results: Any, sums: Any, rows: Any, scaled: tuple[bool, ...]) -> None:
    """Rows of the sums to the results; the scores' scale, where it was left out, is put in."""
    for result, total, scale in zip(results, sums, scaled, strict=False):
        result[...] = (total[rows] * (geometry.scale if scale else 1.0)).astype(result.dtype)


_Mask = Callable[[tuple[int, ...]], jax.Array] | None


def _all_queries(tokens: int, geometry: Geometry, sizes: Tiles) -> Iterator[tuple[Span, _Mask]]:
    """Tiles of the block's queries, all of which see the feedback keys; and which of these are padding."""

    def mask(shape: tuple[int, ...]) -> jax.Array:
        return jax.lax.broadcasted_iota(jnp.int32, shape, 0) < geometry.fam_keys

    for queries in tiles(Span(0, tokens), sizes.back_rows):
        yield queries, mask if geometry.fam_keys < geometry.fam_slots else None


def _readers(keys: Span, tokens: int, geometry: Geometry, sizes: Tiles) -> Iterator[tuple[Span, _Mask]]:
    """Tiles of the block's queries that see some of `keys`, and which; the diagonal has one of its own."""
    window = geometry.window
    after = max(keys.start + keys.size, 0)
    for queries in [
        *([keys] if keys.start >= 0 else []),
        *tiles(Span(after, tokens - after), sizes.back_rows),
    ]:

        def mask(_: tuple[int, ...], queries: Span = queries) -> jax.Array:
            return visible(distances(queries, keys, 1), window)

        if (seen := sight(queries, keys, window)) != "none":
            yield queries, mask if seen == "some" else None


def _tile(
    k: jax.Array,
    v: jax.Array,
    side: _Queries,
    readers: Iterator[tuple[Span, _Mask]],
    wanted: bool,
    geometry: Geometry,
) -> tuple[jax.Array, jax.Array]:
    """Gradients (R, hd) of keys, the scores' scale left out, and of values, if `wanted`; adds to the queries'."""
    d_k = d_v = jnp.zeros(k.shape, jnp.float32)
    for queries, mask in readers:
        rows = pl.ds(queries.start, queries.size)
        q, d_out = side.q[rows, :], side.d_out[rows, :]
        s = product(k, q, "nt") * (geometry.scale * LOG2_E)  # (keys, queries)
        p = jnp.exp2(s - side.logsum[:, rows])
        if mask is not None:
            p = jnp.where(mask(p.shape), p, 0)
        d_s = (p * (product(v, d_out, "nt") - side.delta[:, rows])).astype(k.dtype)
        side.d_q[rows, :] += product(d_s, k, "tn")
        if wanted:
            d_v += product(p.astype(v.dtype), d_out, "nn")
            d_k += product(d_s, q, "nn")
    return d_k, d_v
