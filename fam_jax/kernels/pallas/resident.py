"""The forward kernel for training: all extra keys exist, and no branch depends on data.

A grid step takes one block of queries of one head and holds all keys that they see in fast memory: m blocks, the extra
keys, the block itself. The code of a step has no loops, so the compiler overlaps the exponentials of one tile with the
products of another. Only visible scores are computed: the block itself is cut into tiles along its diagonal, and only
these are masked. At the start of a sequence, the block's number says how many past blocks exist.

A sequence may also go on behind m cached blocks, which are arrays of their own. Then every block of queries reads m
blocks, and those that do not exist in its row of the batch are hidden by the statistics of the softmax, which costs
next to nothing.
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
    past: KV | None
    # (B,) int32, filled past slots, in scalar memory; None if there are no cached blocks
    past_length: Any

    def exists(self, tile: "Tile", geometry: Geometry) -> jax.Array | None:
        """Return whether the block of a tile exists, for the current step of a grid (b, k, n, g); None: it does."""
        if not tile.cached:
            return None
        missing = (tile.back(geometry.block_size) - pl.program_id(2)) * geometry.block_size
        return missing <= self.past_length[pl.program_id(0)]

    def keys(self, tile: "Tile", block_size: int) -> jax.Array:
        """Return the (R, hd) keys of a tile."""
        return self._read("k", tile, block_size)

    def values(self, tile: "Tile", block_size: int) -> jax.Array:
        """Return the (R, hd) values of a tile."""
        return self._read("v", tile, block_size)

    def _read(self, which: str, tile: "Tile", block_size: int) -> jax.Array:
        if tile.span is None:
            return getattr(self.extra, which)[...]
        blocks = getattr(self.past if tile.cached else self.tokens, which)
        start = tile.span.start % block_size
        return blocks[len(self.tokens.k) - 1 - tile.back(block_size)][pl.ds(start, tile.span.size), :]

    @classmethod
    def of(cls, views: Views, past_length: jax.Array, geometry: Geometry) -> "Window":
        """Return the arrays from which the blocks of a window come."""
        tokens = KV(*((x,) * (geometry.segments + 1) for x in views.tokens))
        if not (geometry.cached and views.past):
            return cls(tokens, views.extra, None, None)
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

        tokens, past = (
            [of(j) for j in range(count)] for of, count in ((own, segments + 1), (cached, segments))
        )
        extra = layout.spec(geometry.extra_slots, lambda b, k, n, g: (b, k, block(n)))
        extras = KV(extra, extra) if geometry.extra_slots else None
        if not geometry.cached:
            return cls(KV(tuple(tokens), tuple(tokens)), extras, None, None)
        scalars = pl.BlockSpec(memory_space=pltpu.SMEM)
        return cls(KV(tuple(tokens), tuple(tokens)), extras, KV(tuple(past), tuple(past)), scalars)


class Tile(NamedTuple):
    """Some keys that a block of queries sees."""

    # Within one block; None: the extra keys.
    span: Span | None
    # Whether the block is a cached one.
    cached: bool = False

    def back(self, block_size: int) -> int:
        """Return how many blocks before the queries' own the tile's block lies."""
        return 0 if self.span is None else -(self.span.start // block_size)


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
    )
    shapes = Results(
        jax.ShapeDtypeStruct(views.q.shape, views.q.dtype),
        jax.ShapeDtypeStruct((batch, geometry.heads, 1, geometry.tokens), jnp.float32),
    )
    kernel = call.kernel(_kernel, "block_attention_forward", 3, grid, [shapes])
    (results,) = kernel(views.q, Window.of(views, past_length, geometry))
    return results


def _kernel(q: Any, window: Window, results: Results, *, call: KernelCall) -> None:
    def body(before: int, tokens: int) -> None:
        for queries in Span(0, tokens).split(call.tiles.rows):
            tiles = list(_seen(queries, before, call))
            rows = pl.ds(queries.start, queries.size)
            out, logsum = _softmax(q[rows, :], queries, tiles, window, call.geometry)
            results.out[rows, :] = out.astype(results.out.dtype)
            results.logsum[:, rows] = as_row(logsum)

    _by_number(pl.program_id(2), call.geometry, body)


def _by_number(block: jax.Array, geometry: Geometry, body: Callable[[int, int], None]) -> None:
    """Call `body` with the number of blocks of the call before block number `block`, at most m, and its tokens.

    The body is compiled once per number. It is compiled once more for an incomplete last block, because nothing beyond
    the end of the sequence may be read.
    """
    size, segments, whole = geometry.block_size, geometry.segments, geometry.whole_blocks
    for before in range(min(segments, whole)):
        pl.when(block == before)(functools.partial(body, before, size))
    if whole > segments:
        pl.when((block >= segments) & (block < whole))(functools.partial(body, segments, size))
    if geometry.missing:
        pl.when(block == whole)(functools.partial(body, min(whole, segments), size - geometry.missing))


def _seen(queries: Span, before: int, call: KernelCall) -> Iterator[Tile]:
    """Yield the tiles that `queries` see: extra keys, past blocks, own block before the queries, diagonal.

    Args:
      queries: a tile of queries.
      before: blocks of the call before the queries' own, at most m. Those further back are cached ones.
      call: static settings.
    """
    geometry, size = call.geometry, call.geometry.block_size
    if geometry.extra_slots:
        yield Tile(None)
    farthest = geometry.segments if geometry.cached else before
    blocks = [(Span(-back * size, size), back > before) for back in range(farthest, 0, -1)]
    for span, cached in [*blocks, (Span(0, queries.start), False), (queries, False)]:
        for keys in span.split(call.tiles.keys):
            if sight(queries, keys, geometry.window) != "none":
                yield Tile(keys, cached)


def _softmax(
    q: jax.Array, queries: Span, tiles: list[Tile], window: Window, geometry: Geometry
) -> tuple[jax.Array, jax.Array]:
    """Return (R, hd) float32 attention over the tiles and (R, 1) log2 of the sum of exponentials.

    All scores are computed before the exponentials, which share one maximum. The exponentials of a block that does not
    exist are 0 because a very large number is subtracted from its scores.
    """
    size, factor = geometry.block_size, geometry.factor

    def scores(tile: Tile) -> jax.Array:
        s, span = product(q, window.keys(tile, size), "nt"), tile.span
        if span is None:
            if geometry.extra_keys < geometry.extra_slots:
                seen = extra_mask(geometry.extra_keys, geometry.extra_slots, queries.size, 0)
                s = jnp.where(seen, s, HIDDEN)
        elif sight(queries, span, geometry.window) == "some":
            s = jnp.where(token_mask(queries, span, geometry.window, 0), s, HIDDEN)
        return s

    all_scores = [scores(tile) for tile in tiles]
    exist = [window.exists(tile, geometry) for tile in tiles]
    tops = [s.max(axis=1, keepdims=True) for s in all_scores]
    tops = [t if seen is None else jnp.where(seen, t, HIDDEN) for t, seen in zip(tops, exist, strict=True)]
    top = functools.reduce(jnp.maximum, tops)
    total = jnp.zeros_like(top)
    out = jnp.zeros(q.shape, jnp.float32)
    for s, tile, seen in zip(all_scores, tiles, exist, strict=True):
        p = jnp.exp2((s - (top if seen is None else jnp.where(seen, top, -HIDDEN))) * factor)
        total += p.sum(axis=1, keepdims=True)
        v = window.values(tile, size)
        out += product(p.astype(v.dtype), v, "nn")
    return out / total, top * factor + jnp.log2(total)
