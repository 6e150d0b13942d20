"""The training kernels: no past before the sequence, and nothing about the work depends on data.

A grid step takes one block of queries of one head, with all keys that they see in fast memory: m blocks, the FAM keys,
the block itself. Everything within a step is straight-line code, so the compiler overlaps the exponentials of one
tile with the products of another. Only what is visible is computed: the block itself is cut into sub-tiles along its
diagonal, and a mask is applied on these alone. How many blocks of the past exist, at the start of a sequence,
follows from the block's number.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

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
    sight,
    tiles,
    visible,
)
from fam_jax.kernels.pallas.tiles import Tiles


class Window(NamedTuple):
    """References to the keys, or values, that a block of queries sees."""

    blocks: tuple[Any, ...]  # m + 1 times (C, hd), oldest first, the queries' own last
    fam: Any  # (S, hd), or None

    def read(self, keys: Span, block_size: int) -> jax.Array:
        """(R, hd), of keys within one block."""
        block, start = divmod(keys.start, block_size)
        return self.blocks[len(self.blocks) - 1 + block][pl.ds(start, keys.size), :]


def by_past(block: jax.Array, geometry: Geometry, body: Callable[[int, int], None]) -> None:
    """Calls `body` with the number of past blocks that block number `block` sees, and its tokens.

    It is compiled once for each number, and once more for a last block that is not full: what lies beyond its end is
    never read.
    """
    size, segments, whole = geometry.block_size, geometry.segments, geometry.whole_blocks
    for past in range(min(segments, whole)):
        pl.when(block == past)(functools.partial(body, past, size))
    if whole > segments:
        pl.when((block >= segments) & (block < whole))(functools.partial(body, segments, size))
    if geometry.missing:
        pl.when(block == whole)(functools.partial(body, min(whole, segments), size - geometry.missing))


def forward(
    views: tuple[jax.Array, ...], geometry: Geometry, sizes: Tiles, interpret: Any
) -> tuple[jax.Array, jax.Array]:
    """Attention of whole blocks; `views` are q, k, v and, if there are any, feedback keys and values.

    Returns:
      The output, a view like `q`, and (B, H, 1, T) float32: log2 of each query's sum of exponentials.
    """
    layout, size, past = Layout(geometry.head_dim), geometry.block_size, geometry.segments
    q, k, v, *fam_views = views
    batch, group = q.shape[0], geometry.group
    queries = layout.spec(size, lambda b, k, n, g: (b, k * group + g, n))
    stats = row_spec(size, lambda b, k, n, g: (b, k * group + g, n))

    def slot(j: int) -> pl.BlockSpec:
        return layout.spec(size, lambda b, k, n, g: (b, k, jnp.maximum(n + (j - past), 0)))

    fam = layout.spec(geometry.fam_slots, lambda b, k, n, g: (b, k, n))
    slots = [slot(j) for j in range(past + 1)]
    call = pl.pallas_call(
        functools.partial(_forward_kernel, geometry=geometry, sizes=sizes),
        # Query heads of a group come one after the other, so that their keys are fetched once.
        grid=(batch, geometry.kv_heads, geometry.blocks, group),
        in_specs=[queries, *slots, *slots, *[fam] * len(fam_views)],
        out_specs=[queries, stats],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, geometry.heads, 1, geometry.tokens), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=sizes.vmem_bytes,
        ),
        interpret=interpret,
        name="fam_attention_forward",
    )
    return call(q, *[k] * (past + 1), *[v] * (past + 1), *fam_views)


def _forward_kernel(q: Any, *refs: Any, geometry: Geometry, sizes: Tiles) -> None:
    count = geometry.segments + 1
    out, logsum = refs[-2:]
    fam_k, fam_v = refs[2 * count : -2] or (None, None)
    keys, values = Window(refs[:count], fam_k), Window(refs[count : 2 * count], fam_v)

    def body(past: int, tokens: int) -> None:
        for queries in tiles(Span(0, tokens), sizes.rows):
            spans = list(_seen(queries, past, geometry, sizes))
            rows = pl.ds(queries.start, queries.size)
            o, stats = _softmax(q[rows, :], queries, spans, keys, values, geometry)
            out[rows, :] = o.astype(out.dtype)
            logsum[:, rows] = as_row(stats)

    by_past(pl.program_id(2), geometry, body)


def _seen(queries: Span, past: int, geometry: Geometry, sizes: Tiles) -> Iterator[Span | None]:
    """Tiles of keys for `queries`: FAM, past, own block up to the queries, and the diagonal."""
    if geometry.fam_slots:
        yield None
    size = geometry.block_size
    spans = [Span(-j * size, size) for j in range(past, 0, -1)] + [Span(0, queries.start), queries]
    for span in spans:
        for keys in tiles(span, sizes.keys):
            if sight(queries, keys, geometry.window) != "none":
                yield keys


def _softmax(
    q: jax.Array, queries: Span, spans: list[Span | None], keys: Window, values: Window, geometry: Geometry
) -> tuple[jax.Array, jax.Array]:
    """(R, hd) float32 attention over the spans, and (R, 1) log2 of the sum. All scores first, then one maximum."""
    size, factor = geometry.block_size, geometry.scale * LOG2_E

    def read(window: Window, span: Span | None) -> jax.Array:
        return window.fam[...] if span is None else window.read(span, size)

    def scores(span: Span | None) -> jax.Array:
        s = product(q, read(keys, span), "nt")
        if span is None:
            if geometry.fam_keys < geometry.fam_slots:
                column = jax.lax.broadcasted_iota(jnp.int32, s.shape, 1)
                s = jnp.where(column < geometry.fam_keys, s, HIDDEN)
        elif sight(queries, span, geometry.window) == "some":
            s = jnp.where(visible(distances(queries, span, 0), geometry.window), s, HIDDEN)
        return s

    all_scores = [scores(span) for span in spans]
    top = functools.reduce(jnp.maximum, [s.max(axis=1, keepdims=True) for s in all_scores])
    total = jnp.zeros_like(top)
    out = jnp.zeros(q.shape, jnp.float32)
    for s, span in zip(all_scores, spans, strict=True):
        p = jnp.exp2((s - top) * factor)
        total += p.sum(axis=1, keepdims=True)
        v = read(values, span)
        out += product(p.astype(v.dtype), v, "nn")
    return out / total, top * factor + jnp.log2(total)
