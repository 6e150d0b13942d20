"""Sizes of the kernels' tiles: checks, the choice by chip and shape, and a record of better sizes found by search.

The search is `python -m benchmarks.tune_attention`; it records its choices in `tiles.json` beside this file.
"""

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from fam_jax.config.strict_json import dump_json
from fam_jax.kernels.pallas.geometry import Geometry

# Lanes of a vector register, and the side of a matrix unit.
LANES = 128
# Rows of a whole tile of bfloat16.
SUBLANES = 16


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Which kernels run, and the sizes of their tiles.

    The resident kernels hold all keys that a block sees in fast memory and need a static call (see
    :func:`choose_tiles`). The streamed kernels take one block of keys at a time and support every call. Each kind has
    modules of its name.
    """

    resident_forward: bool
    resident_backward: bool
    # Queries of a tile, resident forward
    rows: int = 256
    # Keys of a tile, resident forward
    keys: int = 1024
    # Queries of a tile, resident backward
    back_rows: int = 1024
    # Keys of a tile, resident backward
    back_keys: int = 512
    # Side of a tile of the streamed kernels
    streamed: int = 256
    # Fast memory that a kernel may use
    vmem_bytes: int = 16 * 2**20

    def check(self, block_size: int) -> None:
        """Raise ValueError if a size is not a multiple of the lanes, or does not divide the block where it must."""
        for name in ("rows", "keys", "back_rows", "back_keys", "streamed"):
            value = getattr(self, name)
            if value <= 0 or value % LANES:
                raise ValueError(f"tile size {name} is {value}; use a positive multiple of {LANES}")
        for name in ("rows", "back_keys", "streamed"):
            value = getattr(self, name)
            if block_size % value:
                raise ValueError(f"tile size {name} is {value}; use a divisor of the block size {block_size}")


# Fast memory per core, MiB.
VMEM_MIB = {
    "TPU v4": 16,
    "TPU v5 lite": 128,
    "TPU v5e": 128,
    "TPU v5": 64,
    "TPU v5p": 64,
    "TPU v6 lite": 128,
    "TPU v6e": 128,
}
SMALLEST_VMEM_MIB = 16


def choose_tiles(chip: str, geometry: Geometry, dtype: jnp.dtype, static: bool) -> Tiles:
    """Return the tiles for a call.

    Args:
      chip: kind of device, such as "TPU v5p".
      geometry: sizes of the call.
      dtype: dtype of queries and keys.
      static: True if all extra keys exist and past slots are none or all of m blocks, as in training.
    """
    capacity = VMEM_MIB.get(chip, SMALLEST_VMEM_MIB) * 2**20
    size = geometry.block_size

    streamed = Tiles(
        resident_forward=False,
        resident_backward=False,
        rows=math.gcd(size, 128),
        back_keys=math.gcd(size, 128),
        streamed=math.gcd(size, 256),
        vmem_bytes=capacity,
    )
    if not static or not _short(geometry):
        return streamed
    backward = next(
        (
            (rows, keys)
            for rows, keys in ((1024, 512), (512, 512), (512, 256), (256, 256), (128, 128))
            if size % keys == 0 and backward_bytes(geometry, rows, keys, dtype) <= capacity
        ),
        None,
    )
    tiles = streamed
    if forward_bytes(geometry, dtype) <= capacity:
        tiles = dataclasses.replace(tiles, resident_forward=True, rows=math.gcd(size, 256))
    if backward:
        tiles = dataclasses.replace(
            tiles, resident_backward=True, back_rows=backward[0], back_keys=backward[1]
        )
    found: dict[str, Any] = dict(_recorded().get(_key(chip, geometry, dtype), {}))
    return dataclasses.replace(tiles, **found)


RECORD = Path(__file__).with_name("tiles.json")


def record(chip: str, geometry: Geometry, dtype: Any, choice: dict[str, int]) -> None:
    """Add the best fields of :class:`Tiles` for a call to `RECORD`."""
    recorded = dict(_recorded())
    recorded[_key(chip, geometry, dtype)] = dict(sorted(choice.items()))
    RECORD.write_text(dump_json(dict(sorted(recorded.items())), indent=1) + "\n")
    _recorded.cache_clear()


@functools.cache
def _recorded() -> dict[str, dict[str, int]]:
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def _key(chip: str, geometry: Geometry, dtype: Any) -> str:
    """Return the key of a record: all that the best tiles depend on. The number of heads does not matter."""
    generation = {"TPU v5e": "TPU v5 lite", "TPU v5": "TPU v5p", "TPU v6e": "TPU v6 lite"}.get(chip, chip)
    return (
        f"{generation}, {jnp.dtype(dtype).name}, C {geometry.block_size}, m {geometry.segments}, "
        f"extra {geometry.extra_slots > 0}, hd {geometry.head_dim}"
    )


def _short(geometry: Geometry) -> bool:
    """Return whether the window is short enough for resident kernels, whose code and compile time grow with it."""
    return geometry.segments <= 4 and geometry.block_size <= 2048


def forward_bytes(geometry: Geometry, dtype: jnp.dtype) -> int:
    """Estimate the fast memory of the resident forward kernel.

    It holds every block twice, because the next one is being fetched, and the scores of all tiles at once. The compiler
    needs 2.8 bytes per score, as measured.
    """
    keys = (geometry.segments + 1) * geometry.block_size + geometry.extra_slots
    held = geometry.block_size * geometry.cached
    blocks = 2 * (geometry.block_size + keys + 2 * held) * geometry.head_dim * jnp.dtype(dtype).itemsize
    return 2 * blocks + 3 * geometry.block_size * keys


def backward_bytes(geometry: Geometry, rows: int, keys: int, dtype: jnp.dtype) -> int:
    """Estimate the fast memory of the resident backward kernel: blocks twice, float32 sums, scores of one tile."""
    size, hd = geometry.block_size, geometry.head_dim
    window = geometry.segments + 1
    past = 2 * geometry.cached  # with their gradients
    blocks = (4 * size + 2 * (window + past) * size + 2 * size + 4 * geometry.extra_slots) * hd
    ring = 1 if geometry.stop_gradient else window
    sums = 4 * hd * (size + 2 * ring * size + 2 * geometry.extra_slots)
    return 2 * blocks * jnp.dtype(dtype).itemsize + sums + 16 * rows * keys
