"""The forward kernel for training: all extra keys exist, and no branch depends on data.

A grid step takes one block of queries of one head and holds all keys that they see in fast memory: m blocks, the extra
keys, the block itself. The code of a step has no loops, so the compiler overlaps the exponentials of one tile with the
products of another. Only visible scores are computed: the block itself is cut into tiles along its diagonal, and only
these are masked. At the start of a sequence, the block's number says how many past blocks exist.

A sequence may also go on behind m cached blocks, which are arrays of their own. Then every block of queries reads m
blocks, and those that do not exist in its row of the batch are hidden by the statistics of the softmax, which costs
next to nothing. The first m blocks of queries, which see cached blocks, copy what they see to one place first: so they
need only one program, and not one for each number of cached blocks, which took 20 % longer.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fam_jax.kernels.pallas.blocks import KV, as_row, product, row_spec
from fam_jax.kernels.pallas.call import KernelCall, Results, Views
from fam_jax.kernels.pallas.geometry import HIDDEN, Geometry, Span, extra_mask, sight, token_mask


class Window(NamedTuple):
    """The keys and values that a block of queries sees: arrays, block specs, or references."""

    # Tuples of m + 1 blocks (C, hd), oldest first, the queries' own last
    tokens: KV
    # (S, hd); None if there are no extra keys
    extra: KV | None
    # Tuples of m cached blocks (C, hd), each in the place that it has among `tokens`; None if there are none
    past: KV | None = None
    # (B,) int32, filled past slots, in scalar memory; None if there are no cached blocks
    past_length: Any = None

    @property
    def of_past(self) -> "Window":
        """The same window with the cached blocks in the place of the tokens before the queries' block."""
        assert self.past is not None
        return self._replace(
            tokens=KV(*((*x, own[-1]) for x, own in zip(self.past, self.tokens, strict=True)))
        )

    def exists(self, span: Span | None, geometry: Geometry) -> jax.Array | None:
        """Return whether the block of a span exists, for the current step of a grid (b, k, n, g); None: it does."""
        if self.past_length is None or span is None or span.start >= 0:
            return None
        back = (-span.start - 1) // geometry.block_size + 1
        return (back - pl.program_id(2)) * geometry.block_size <= self.past_length[pl.program_id(0)]

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
    def of(cls, views: Views, past_length: jax.Array, geometry: Geometry) -> "Window":
        """Return the arrays from which the blocks of a window come."""
        tokens = KV(*((x,) * (geometry.segments + 1) for x in views.tokens))
        if not (geometry.cached and views.past):
            return cls(tokens, views.extra)
        return cls(tokens, views.extra, KV(*((x,) * geometry.cached for x in views.past)), past_length)

    @classmethod
    def specs(cls, call: KernelCall, block: Callable[[Any], Any] = lambda n: n) -> "Window":
        """Return block specs for a grid (b, k, n, g); `block(n)` is the number of the queries' block."""
        geometry, layout = call.geometry, call.layout
        size, segments = geometry.block_size, geometry.segments

        def own(j: int) -> pl.BlockSpec:
            return layout.spec(size, lambda b, k, n, g: (b, k, jnp.maximum(block(n) + (j - segments), 0)))

        def cached(j: int) -> pl.BlockSpec:
            return layout.spec(size, lambda b, k, n, g: (b, k, jnp.minimum(block(n) + j, segments - 1)))

        tokens = tuple(own(j) for j in range(segments + 1))
        extra = layout.spec(geometry.extra_slots, lambda b, k, n, g: (b, k, block(n)))
        window = cls(KV(tokens, tokens), KV(extra, extra) if geometry.extra_slots else None)
        if not geometry.cached:
            return window
        past = tuple(cached(j) for j in range(segments))
        return window._replace(past=KV(past, past), past_length=pl.BlockSpec(memory_space=pltpu.SMEM))


def forward(call: KernelCall, past_length: jax.Array, views: Views) -> Results:
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
        scratch_shapes=[_held(geometry, views.tokens.k.dtype)],
    )
    shapes = Results(
        jax.ShapeDtypeStruct(views.q.shape, views.q.dtype),
        jax.ShapeDtypeStruct((batch, geometry.heads, 1, geometry.tokens), jnp.float32),
    )
    kernel = call.kernel(_kernel, "block_attention_forward", 3, grid, [shapes])
    (results,) = kernel(views.q, Window.of(views, past_length, geometry))
    return results


def _held(geometry: Geometry, dtype: Any) -> KV | None:
    """Return shapes of fast memory for the m blocks that a block of queries sees, if some may be cached ones."""
    if not geometry.cached:
        return None
    blocks = (pltpu.VMEM((geometry.block_size, geometry.head_dim), dtype),) * geometry.segments
    return KV(blocks, blocks)


def _kernel(q: Any, window: Window, results: Results, held: KV | None, *, call: KernelCall) -> None:
    if held:
        pl.when(pl.program_id(2) < call.geometry.segments)(functools.partial(_hold, held, window))

    def body(past: int, may_lack: bool, tokens: int) -> None:
        known = window._replace(past_length=None)
        if may_lack and held:
            blocks = (kept + own[-1:] for kept, own in zip(held, window.tokens, strict=True))
            known = window._replace(tokens=KV(*blocks))
        for queries in Span(0, tokens).split(call.tiles.rows):
            spans = list(_seen(queries, past, call))
            rows = pl.ds(queries.start, queries.size)
            out, logsum = _softmax(q[rows, :], queries, spans, known, call.geometry)
            results.out[rows, :] = out.astype(results.out.dtype)
            results.logsum[:, rows] = as_row(logsum)

    _by_past(pl.program_id(2), call.geometry, body)


def _hold(held: KV, window: Window) -> None:
    """Copy the blocks before the queries' block, cached ones or the call's own, to one place."""
    assert window.past is not None
    for kept, past, own in zip(held, window.past, window.tokens, strict=True):
        for j, target in enumerate(kept):
            is_cached = pl.program_id(2) + j < len(kept)
            pl.when(is_cached)(functools.partial(_copy, target, past[j]))
            pl.when(~is_cached)(functools.partial(_copy, target, own[j]))


def _copy(target: Any, source: Any) -> None:
    target[...] = source[...]


def _by_past(block: jax.Array, geometry: Geometry, body: Callable[[int, bool, int], None]) -> None:
    """Call `body` with the past blocks that block number `block` reads, whether some may lack, and its tokens.

    The body is compiled once per number of past blocks, or once for all blocks that may see cached ones. It is compiled
    once more for an incomplete last block, because nothing beyond the end of the sequence may be read.
    """
    size, segments, whole, cached = (
        geometry.block_size,
        geometry.segments,
        geometry.whole_blocks,
        geometry.cached,
    )
    if cached:
        pl.when(block < min(segments, whole))(functools.partial(body, segments, True, size))
    else:
        for past in range(min(segments, whole)):
            pl.when(block == past)(functools.partial(body, past, False, size))
    if whole > segments:
        pl.when((block >= segments) & (block < whole))(functools.partial(body, segments, False, size))
    if geometry.missing:
        past = segments if cached else min(whole, segments)
        pl.when(block == whole)(functools.partial(body, past, whole < segments, size - geometry.missing))


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

    All scores are computed before the exponentials, which share one maximum. The exponentials of a block that does not
    exist are 0 because a very large number is subtracted from its scores.
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
    exist = [window.exists(span, geometry) for span in spans]
    tops = [s.max(axis=1, keepdims=True) for s in all_scores]
    tops = [t if seen is None else jnp.where(seen, t, HIDDEN) for t, seen in zip(tops, exist, strict=True)]
    top = functools.reduce(jnp.maximum, tops)
    total = jnp.zeros_like(top)
    out = jnp.zeros(q.shape, jnp.float32)
    for s, span, seen in zip(all_scores, spans, exist, strict=True):
        p = jnp.exp2((s - (top if seen is None else jnp.where(seen, top, -HIDDEN))) * factor)
        total += p.sum(axis=1, keepdims=True)
        v = window.values(span, size)
        out += product(p.astype(v.dtype), v, "nn")
    return out / total, top * factor + jnp.log2(total)
