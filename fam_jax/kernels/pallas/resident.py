"""The forward kernel for training: the sequence has no past, and no branch depends on data.

A grid step takes one block of queries of one head and holds all keys that they see in fast memory: m blocks, the extra
keys, the block itself. The code of a step has no loops, so the compiler overlaps the exponentials of one tile with the
products of another. Only visible scores are computed: the block itself is cut into tiles along its diagonal, and only
these are masked. The block's number says how many past blocks exist at the start of a sequence.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from fam_jax.kernels.pallas.blocks import KV, as_row, product, row_spec
from fam_jax.kernels.pallas.call import KernelCall, Results, Views
from fam_jax.kernels.pallas.geometry import HIDDEN, Geometry, Span, extra_mask, sight, token_mask


class Window(NamedTuple):
    """The keys and values that a block of queries sees: arrays, block specs, or references."""

    # Tuples of m + 1 blocks (C, hd), oldest first, the queries' own last
    tokens: KV
    # (S, hd); None if there are no extra keys
    extra: KV | None

    def keys(self, span: Span | None, block_size: int) -> jax.Array:
        """Return (R, hd) keys of a span within one block, or the extra keys if `span` is None."""
        return self._read("k", span, block_size)

    def values(self, span: Span | None, block_size: int) -> jax.Array:
        """Return (R, hd) values, like :meth:`keys`."""
        return self._read("v", span, block_size)

    def _read(self, which: str, span: Span | None, block_size: int) -> jax.Array:
        if span is None:
            return getattr(self.extra, which)[...]
        blocks = getattr(self.tokens, which)
        block, start = divmod(span.start, block_size)
        return blocks[len(blocks) - 1 + block][pl.ds(start, span.size), :]

    @classmethod
    def of(cls, views: Views, geometry: Geometry) -> "Window":
        """Return the arrays from which the blocks of a window come."""
        count = geometry.segments + 1
        return cls(KV((views.tokens.k,) * count, (views.tokens.v,) * count), views.extra)

    @classmethod
    def specs(cls, call: KernelCall, block: Callable[[Any], Any] = lambda n: n) -> "Window":
        """Return block specs for a grid (b, k, n, g); `block(n)` is the number of the queries' block."""
        geometry, layout = call.geometry, call.layout
        size, past = geometry.block_size, geometry.segments

        def slot(j: int) -> pl.BlockSpec:
            return layout.spec(size, lambda b, k, n, g: (b, k, jnp.maximum(block(n) + (j - past), 0)))

        slots = tuple(slot(j) for j in range(past + 1))
        extra = layout.spec(geometry.extra_slots, lambda b, k, n, g: (b, k, block(n)))
        return cls(KV(slots, slots), KV(extra, extra) if geometry.extra_slots else None)


def forward(call: KernelCall, views: Views) -> Results:
    """Compute attention of whole blocks of queries; the last may lack `geometry.missing` tokens."""
    geometry, size, group = call.geometry, call.geometry.block_size, call.geometry.group
    batch = views.q.shape[0]
    queries = call.layout.spec(size, lambda b, k, n, g: (b, k * group + g, n))
    stats = row_spec(size, lambda b, k, n, g: (b, k * group + g, n))
    grid = pl.GridSpec(
        # The query heads of a group vary fastest: their keys are fetched once for all of them.
        grid=(batch, geometry.kv_heads, geometry.blocks, group),
        in_specs=[queries, Window.specs(call)],
        out_specs=[Results(queries, stats)],
    )
    shapes = Results(
        jax.ShapeDtypeStruct(views.q.shape, views.q.dtype),
        jax.ShapeDtypeStruct((batch, geometry.heads, 1, geometry.tokens), jnp.float32),
    )
    kernel = call.kernel(_kernel, "block_attention_forward", 3, grid, [shapes])
    (results,) = kernel(views.q, Window.of(views, geometry))
    return results


def _kernel(q: Any, window: Window, results: Results, *, call: KernelCall) -> None:
    def body(past: int, tokens: int) -> None:
        for queries in Span(0, tokens).split(call.tiles.rows):
            spans = list(_seen(queries, past, call))
            rows = pl.ds(queries.start, queries.size)
            out, logsum = _softmax(q[rows, :], queries, spans, window, call.geometry)
            results.out[rows, :] = out.astype(results.out.dtype)
            results.logsum[:, rows] = as_row(logsum)

    _by_past(pl.program_id(2), call.geometry, body)


def _by_past(block: jax.Array, geometry: Geometry, body: Callable[[int, int], None]) -> None:
    """Call `body` with the number of past blocks that block number `block` sees and the number of its tokens.

    The body is compiled once per number of past blocks. It is compiled once more for an incomplete last block, because
    nothing beyond the end of the sequence may be read.
    """
    size, segments, whole = geometry.block_size, geometry.segments, geometry.whole_blocks
    for past in range(min(segments, whole)):
        pl.when(block == past)(functools.partial(body, past, size))
    if whole > segments:
        pl.when((block >= segments) & (block < whole))(functools.partial(body, segments, size))
    if geometry.missing:
        pl.when(block == whole)(functools.partial(body, min(whole, segments), size - geometry.missing))


def _seen(queries: Span, past: int, call: KernelCall) -> Iterator[Span | None]:
    """Yield the tiles of keys that `queries` see: extra keys (None), past, own block before the queries, diagonal."""
    geometry, size = call.geometry, call.geometry.block_size
    if geometry.extra_slots:
        yield None
    spans = [Span(-j * size, size) for j in range(past, 0, -1)] + [Span(0, queries.start), queries]
    for span in spans:
        for keys in span.split(call.tiles.keys):
            if sight(queries, keys, geometry.window) != "none":
                yield keys


def _softmax(
    q: jax.Array, queries: Span, spans: list[Span | None], window: Window, geometry: Geometry
) -> tuple[jax.Array, jax.Array]:
    """Return (R, hd) float32 attention over the spans and (R, 1) log2 of the sum of exponentials.

    All scores are computed before the exponentials, which share one maximum.
    """
    size, factor = geometry.block_size, geometry.factor

    def scores(span: Span | None) -> jax.Array:
        s = product(q, window.keys(span, size), "nt")
        if span is None:
            if geometry.extra_keys < geometry.extra_slots:
                seen = extra_mask(geometry.extra_keys, geometry.extra_slots, queries.size, 0)
                s = jnp.where(seen, s, HIDDEN)
        elif sight(queries, span, geometry.window) == "some":
            s = jnp.where(token_mask(queries, span, geometry.window, 0), s, HIDDEN)
        return s

    all_scores = [scores(span) for span in spans]
    top = functools.reduce(jnp.maximum, [s.max(axis=1, keepdims=True) for s in all_scores])
    total = jnp.zeros_like(top)
    out = jnp.zeros(q.shape, jnp.float32)
    for s, span in zip(all_scores, spans, strict=True):
        p = jnp.exp2((s - top) * factor)
        total += p.sum(axis=1, keepdims=True)
        v = window.values(span, size)
        out += product(p.astype(v.dtype), v, "nn")
    return out / total, top * factor + jnp.log2(total)
