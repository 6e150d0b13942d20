"""JAX's splash attention with the mask of Block Sliding Window Attention, for comparison.

Its grid skips tiles according to tables that are prefetched as data. The TPU compiler's static profile assumes that a
branch on data is never taken. For profiles, the tables therefore become predicates: ranges of the grid.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks


@dataclasses.dataclass(frozen=True)
class SplashTiles:
    """Sizes of the tiles of splash attention: queries, keys, and keys per product."""

    queries: int
    keys: int
    keys_at_once: int
    back_queries: int
    back_keys: int
    back_keys_at_once: int
    fused_backward: bool

    def block_sizes(self) -> splash.BlockSizes:
        """Return the sizes in the form of the library."""
        fused = self.fused_backward
        return splash.BlockSizes(
            block_q=self.queries,
            block_kv=self.keys,
            block_kv_compute=self.keys_at_once,
            block_q_dkv=self.back_queries,
            block_kv_dkv=self.back_keys,
            block_kv_dkv_compute=self.back_keys_at_once,
            block_q_dq=None if fused else self.back_queries,
            block_kv_dq=None if fused else self.back_keys,
            use_fused_bwd_kernel=fused,
        )


class BlockWindowMask(masks._ComputableMask):
    """Causal mask that reaches back to the m blocks before a token's own."""

    def __init__(self, length: int, block_size: int, segments: int):
        self.block_size, self.segments = block_size, segments
        shift = block_size.bit_length() - 1
        assert block_size == 1 << shift, f"block_size: {block_size} is not a power of two"

        def visible(q: Any, k: Any) -> Any:
            return (q >= k) & ((q >> shift) - (k >> shift) <= segments)

        super().__init__((length, length), visible, shard_count=1)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self)) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[Any, ...]:
        return (self.shape, self.block_size, self.segments)


def make_splash(
    length: int, heads: int, block_size: int, segments: int, tiles: SplashTiles, *, mqa: bool
) -> tuple[Callable[..., jax.Array], splash.SplashAttentionKernel]:
    """Return a function of q (B, H, T, hd), k and v (B, H, T, hd), or (B, T, hd) with `mqa`; and its kernel."""
    mask = masks.MultiHeadMask([BlockWindowMask(length, block_size, segments)] * heads)
    make = splash.make_splash_mqa if mqa else splash.make_splash_mha
    kernel = make(mask, block_sizes=tiles.block_sizes(), head_shards=1, q_seq_shards=1)
    return jax.vmap(kernel), kernel


@contextlib.contextmanager
def static_schedule(kernel: splash.SplashAttentionKernel) -> Iterator[None]:
    """Within this context, trace `kernel` with its schedule in predicates instead of prefetched tables."""
    tables: dict[tuple[bool, tuple[int, ...]], tuple[np.ndarray, np.ndarray]] = {}
    for info, by_columns in (
        (kernel.fwd_mask_info, False),
        (kernel.dq_mask_info, False),
        (kernel.dkv_mask_info, True),
    ):
        if info is not None:
            visits = np.asarray(info.block_mask)
            assert info.mask_next is None and visits.shape[0] == 1
            found = visits[0] > 0, np.asarray(info.data_next)[0]
            key = (by_columns, visits.shape)
            if key in tables:
                np.testing.assert_array_equal(tables[key][0], found[0])
            tables[key] = found

    def scheduled(
        h: Any, i: Any, j: Any, data_next: Any, block_mask: Any, mask_next: Any, next_i: bool = False
    ) -> Any:
        runs, fetched = tables[next_i, tuple(block_mask.shape)]
        # Each line of the grid covers one range: of columns in the forward and dq kernels, of rows in the dkv kernel.
        line, place = (j, i) if next_i else (i, j)
        runs, fetched = (runs.T, fetched.T) if next_i else (runs, fetched)
        ranges = [_one_range(row) for row in runs]
        predicate = functools.reduce(
            jnp.logical_or,
            [
                (line >= first) & (line <= last) & (place >= low) & (place < high)
                for first, last, low, high in _merge(ranges)
            ],
        )
        source = jnp.int32(0)
        for number, (row, (low, _)) in enumerate(zip(fetched, ranges, strict=True)):
            source = jnp.where(line == number, int(row[low]) + place - low, source)
        return source, None, predicate, True

    original = splash._next_nonzero
    splash._next_nonzero = scheduled
    try:
        yield
    finally:
        splash._next_nonzero = original


def _one_range(row: np.ndarray) -> tuple[int, int]:
    (places,) = np.nonzero(row)
    low, high = int(places[0]), int(places[-1]) + 1
    assert high - low == len(places), "a line of the grid is not one range"
    return low, high


def _merge(ranges: list[tuple[int, int]]) -> Iterator[tuple[int, int, int, int]]:
    """Yield runs of lines with the same range: first line, last line, start and end of the range."""
    first = 0
    for number, current in enumerate(ranges):
        if number + 1 == len(ranges) or ranges[number + 1] != current:
            yield first, number, *current
            first = number + 1
