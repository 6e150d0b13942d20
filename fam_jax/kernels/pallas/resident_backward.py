"""The backward kernel for training: all five gradients in one pass over the scores.

As in the forward kernel, a grid step takes one block of queries with all keys that they see. Scores have their keys
along the rows, which makes statistics of queries row vectors. The gradients of a block of keys are complete when its
last reader, m blocks later, is done; until then they wait in a ring of m + 1 blocks of fast memory. After the last
block of queries, m further steps empty the ring. Cached blocks pass through the ring like the others if they get
gradients; if not, as in training, where no gradient leaves the step, that saves two of five products.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from fam_jax.kernels.pallas.blocks import KV, as_row, product, row_spec, rows_from, scratch
from fam_jax.kernels.pallas.call import (
    KernelCall,
    QuerySide,
    Results,
    Views,
    score_gradients,
    shapes_like,
    write_gradients,
)
from fam_jax.kernels.pallas.geometry import HIDDEN, Geometry, Span, extra_mask, sight, token_mask
from fam_jax.kernels.pallas.resident import Window


class _Scratch(NamedTuple):
    """Sums that a step keeps in fast memory for the next ones, in float32."""

    # (C, hd) gradient of the queries
    q: Any
    # (1, C) sums of d_out * out over hd
    delta: Any
    # Blocks (C, hd), one for each block of keys that still has readers
    ring: KV
    # (S, hd)
    extra: KV | None

    def begin_keys(self, rows: Any) -> None:
        """Begin the gradients of the extra keys, and of the block of keys whose rows of the ring these are."""
        if self.extra:
            self.extra.reset()
        self.ring.reset(rows)

    def begin_queries(self, d_out: Any, out: Any) -> None:
        """Begin the gradient of the queries, and compute their delta."""
        self.q[...] = jnp.zeros_like(self.q)
        products = d_out[...].astype(jnp.float32) * out[...].astype(jnp.float32)
        self.delta[...] = as_row(products.sum(axis=1, keepdims=True))


def backward(
    call: KernelCall, past_length: jax.Array, views: Views, results: Results, d_out: jax.Array
) -> Views:
    """Return the gradients of `views`, from the results of the forward kernel and the cotangent of its output."""
    geometry, layout = call.geometry, call.layout
    size, group, blocks, waiting = geometry.block_size, geometry.group, geometry.blocks, _waiting(geometry)

    # The steps that only empty the ring repeat the last indices: no block is fetched or written back for them.
    def block(n: Any) -> Any:
        return jnp.minimum(n, blocks - 1) if waiting else n

    def query_index(b: Any, k: Any, n: Any, g: Any) -> tuple:
        head = jnp.where(n < blocks, g, group - 1) if waiting and group > 1 else g
        return b, k * group + head, block(n)

    queries, stats = layout.spec(size, query_index), row_spec(size, query_index)
    window = Window.specs(call, block)
    finished = layout.spec(size, lambda b, k, n, g: (b, k, jnp.maximum(n - waiting, 0)))
    finished_past = layout.spec(size, lambda b, k, n, g: (b, k, jnp.minimum(n, waiting - 1)))
    past = KV(finished_past, finished_past) if geometry.past_gradient else None
    ring = scratch((waiting + 1) * size, geometry.head_dim)
    extra = scratch(geometry.extra_slots, geometry.head_dim)
    grid = pl.GridSpec(
        grid=(d_out.shape[0], geometry.kv_heads, blocks + waiting, group),
        in_specs=[queries, queries, Results(queries, stats), window],
        out_specs=[Views(queries, KV(finished, finished), window.extra, past)],
        scratch_shapes=[
            _Scratch(
                q=scratch(size, geometry.head_dim),
                delta=scratch(1, size),
                ring=KV(ring, ring),
                extra=KV(extra, extra) if geometry.extra_slots else None,
            )
        ],
    )
    shapes = shapes_like(views if geometry.past_gradient else views._replace(past=None))
    kernel = call.kernel(_kernel, "block_attention_backward", 2, grid, [shapes])
    (gradients,) = kernel(views.q, d_out, results, Window.of(views, past_length, geometry))
    return gradients


def _waiting(geometry: Geometry) -> int:
    """Return how many blocks of queries pass until the gradients of a block of keys are complete."""
    return 0 if geometry.stop_gradient else geometry.segments


def _kernel(
    q: Any,
    d_out: Any,
    results: Results,
    window: Window,
    gradients: Views,
    sums: _Scratch,
    *,
    call: KernelCall,
) -> None:
    geometry = call.geometry
    blocks, size, last = geometry.blocks, geometry.block_size, geometry.group - 1
    n, g = pl.program_id(2), pl.program_id(3)
    waiting, side = _waiting(geometry), QuerySide(q, d_out, results.logsum, sums.delta)

    def ring(block: jax.Array) -> Any:
        """Return the first row of the ring that belongs to a block of keys."""
        return (block % (waiting + 1)) * size if waiting else 0

    pl.when(g == 0)(lambda: sums.begin_keys(rows_from(ring(n), size)))
    if geometry.past_gradient:
        # The first step begins the gradients of all cached blocks.
        pl.when((n == 0) & (g == 0))(sums.ring.reset)

    @pl.when(n < blocks)
    def _() -> None:
        sums.begin_queries(d_out, results.out)

    def read_extra(tokens: int) -> None:
        keys = KV(window.keys(None, size), window.values(None, size))
        _accumulate(sums.extra, ..., _tile(keys, side, sums.q, _all_queries(tokens, call), geometry))

    def read_block(back: int, cached: bool, tokens: int) -> None:
        wanted = geometry.past_gradient if cached else back == 0 or not geometry.stop_gradient
        seen = window.of_past if cached else window._replace(past_length=None)
        for span in Span(-back * size, size if back else tokens).split(call.tiles.back_keys):
            keys = KV(seen.keys(span, size), seen.values(span, size))
            readers, exists = _readers(span, tokens, call), seen.exists(span, geometry)
            found = _tile(keys, side, sums.q, readers, geometry, wanted=wanted, exists=exists)
            if wanted:
                start = ring(n + (waiting + 1 - back)) + (span.start + back * size)
                _accumulate(sums.ring, rows_from(start, span.size), found)

    _by_block(n, geometry, read_extra if sums.extra else None, read_block)

    @pl.when(n < blocks)
    def _() -> None:
        gradients.q[...] = (sums.q[...] * geometry.scale).astype(gradients.q.dtype)

    if gradients.extra and sums.extra:
        write_extra = functools.partial(write_gradients, gradients.extra, sums.extra, ..., geometry.scale)
        pl.when((n < blocks) & (g == last))(write_extra)

    # Block n - m of the keys is complete; its rows in the ring are those of block n + 1.
    complete = (sums.ring, rows_from(ring(n + 1), size), geometry.scale)
    pl.when((n >= waiting) & (g == last))(functools.partial(write_gradients, gradients.tokens, *complete))
    if gradients.past:
        pl.when((n < waiting) & (g == last))(functools.partial(write_gradients, gradients.past, *complete))


def _by_block(
    n: jax.Array,
    geometry: Geometry,
    read_extra: Callable[[int], None] | None,
    read_block: Callable[[int, bool, int], None],
) -> None:
    """Read all keys that the queries of block number `n` see.

    The code is compiled once for whole blocks and once more for an incomplete last block, because nothing beyond the
    end of the sequence may be read.

    Args:
      n: number of the block of queries.
      geometry: sizes of the call.
      read_extra: called with the number of queries; None if there are no extra keys.
      read_block: called with the distance in blocks from a block of keys to the queries, whether the block is a cached
        one, and the number of queries.
    """
    size, whole = geometry.block_size, geometry.whole_blocks
    for first, end, tokens in ((0, whole, size), (whole, geometry.blocks, size - geometry.missing)):
        if first < end and read_extra:
            pl.when((n >= first) & (n < end))(functools.partial(read_extra, tokens))
        for back in range(geometry.segments + 1):
            split = min(max(first, back), end)
            for begin, stop, cached in ((first, split, True), (split, end, False)):
                if begin < stop and (geometry.cached or not cached):
                    pl.when((n >= begin) & (n < stop))(functools.partial(read_block, back, cached, tokens))


def _accumulate(sums: Any, rows: Any, gradients: KV) -> None:
    for total, gradient in zip(sums, gradients, strict=True):
        total[rows] += gradient


# Returns the mask (keys, queries) of a tile; None if all of it is visible.
_Mask = Callable[[], jax.Array] | None


def _all_queries(tokens: int, call: KernelCall) -> Iterator[tuple[Span, _Mask]]:
    """Yield the tiles of the block's queries, which all see the extra keys, with masks that hide the padding."""
    geometry = call.geometry
    padded = geometry.extra_keys < geometry.extra_slots
    for queries in Span(0, tokens).split(call.tiles.back_rows):
        mask = functools.partial(extra_mask, geometry.extra_keys, geometry.extra_slots, queries.size, 1)
        yield queries, mask if padded else None


def _readers(keys: Span, tokens: int, call: KernelCall) -> Iterator[tuple[Span, _Mask]]:
    """Yield the tiles of the block's queries that see some of `keys`, with masks; the diagonal has its own tile."""
    window = call.geometry.window
    after = max(keys.start + keys.size, 0)
    diagonal = [keys] if keys.start >= 0 else []
    for queries in [*diagonal, *Span(after, tokens - after).split(call.tiles.back_rows)]:
        if (seen := sight(queries, keys, window)) != "none":
            yield queries, functools.partial(token_mask, queries, keys, window, 1) if seen == "some" else None


def _tile(
    keys: KV,
    side: QuerySide,
    d_q: Any,
    readers: Iterator[tuple[Span, _Mask]],
    geometry: Geometry,
    *,
    wanted: bool = True,
    exists: jax.Array | None = None,
) -> KV:
    """Add the contribution of a tile of keys to its readers' gradient; return the gradients of keys and values.

    Args:
      keys: keys and values (R, hd), loaded.
      side: references to the block of queries.
      d_q: reference to the sum of the queries' gradient.
      readers: tiles of queries with their masks.
      geometry: sizes of the call.
      wanted: whether gradients of keys and values are needed; if not, they are zeros.
      exists: whether the keys exist; None: they do. If not, all contributions are 0, because the statistics say that
        the sums of exponentials are very large.

    Returns:
      (R, hd) float32 gradients; those of the keys still lack the factor of the scores.
    """
    d_k = d_v = jnp.zeros(keys.k.shape, jnp.float32)
    for queries, mask in readers:
        rows = pl.ds(queries.start, queries.size)
        here = side.rows(rows)
        if exists is not None:
            here = here._replace(logsum=jnp.where(exists, here.logsum, -HIDDEN))
        p, d_s = score_gradients(keys, here, geometry.factor, mask() if mask else None)
        d_q[rows, :] += product(d_s, keys.k, "tn")
        if wanted:
            d_v += product(p, here.d_out, "nn")
            d_k += product(d_s, here.q, "nn")
    return KV(d_k, d_v)
