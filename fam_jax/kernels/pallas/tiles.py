"""Sizes of the kernels' tiles: checked, chosen by chip and shape, and recorded where a search found better ones.

The search is `python -m benchmarks.tune_attention`; its choices are in `tiles.json` beside this file.
"""

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from fam_jax.kernels.pallas.geometry import Geometry

LANES = 128  # of a vector register; the side of a matrix unit
SUBLANES = 16  # rows of a whole tile of bfloat16


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Which kernels run, and how they cut their work.

    The resident kernels hold all keys that a block sees in fast memory and want everything static; the streamed ones
    take a block of keys at a time and take any call. See the modules of these names.
    """

    resident_forward: bool
    resident_backward: bool
    rows: int = 256  # queries of a tile of scores, resident forward
    keys: int = 1024  # keys of a tile, resident forward
    back_rows: int = 1024  # queries of a tile, resident backward
    back_keys: int = 512  # keys of a tile, resident backward
    streamed: int = 256  # side of a tile of the streamed kernels
    vmem_bytes: int = 16 * 2**20  # of fast memory that a kernel may use

    def check(self, block_size: int) -> None:
        """Raises ValueError if a tile is not made of whole registers, or does not divide the block."""
        for name in ("rows", "keys", "back_rows", "back_keys", "streamed"):
            value = getattr(self, name)
            if value <= 0 or value % LANES:
                raise ValueError(f"tile size {name} is {value}, which is not a multiple of {LANES}")
        for name in ("rows", "back_keys", "streamed"):
            if block_size % getattr(self, name):
                raise ValueError(
                    f"tile size {name} is {getattr(self, name)}, which does not divide the block of {block_size}"
                )


# Fast memory per core, in MiB.
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
    """The tiles for a call.

    Args:
      chip: kind of device, as "TPU v5p".
      geometry: of the call.
      dtype: of queries and keys.
      static: there is no past and all feedback keys exist, as in training.
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
    """Adds the best fields of :class:`Tiles` for a call to `RECORD`."""
    recorded = dict(_recorded())
    recorded[_key(chip, geometry, dtype)] = dict(sorted(choice.items()))
    RECORD.write_text(json.dumps(dict(sorted(recorded.items())), indent=1) + "\n")
    _recorded.cache_clear()


@functools.cache
def _recorded() -> dict[str, dict[str, int]]:
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def _key(chip: str, geometry: Geometry, dtype: Any) -> str:
    """What a choice depends on; the number of heads is not among it."""
    generation = {"TPU v5e": "TPU v5 lite", "TPU v5": "TPU v5p", "TPU v6e": "TPU v6 lite"}.get(chip, chip)
    return (
        f"{generation}, {jnp.dtype(dtype).name}, C {geometry.block_size}, m {geometry.segments}, "
        f"FAM {geometry.fam_slots > 0}, hd {geometry.head_dim}"
    )


def _short(geometry: Geometry) -> bool:
    """The resident kernels are straight-line code, whose length goes with the window; compilation takes ever longer."""
    return geometry.segments <= 4 and geometry.block_size <= 2048


def forward_bytes(geometry: Geometry, dtype: jnp.dtype) -> int:
    """About what the resident forward kernel needs of fast memory.

    Blocks twice, for one is being fetched; and the scores of all tiles, which do not share their place: 2.8 bytes for
    each, by what the compiler says.
    """
    keys = (geometry.segments + 1) * geometry.block_size + geometry.fam_slots
    blocks = 2 * (geometry.block_size + keys) * geometry.head_dim * jnp.dtype(dtype).itemsize
    return 2 * blocks + 3 * geometry.block_size * keys


def backward_bytes(geometry: Geometry, rows: int, keys: int, dtype: jnp.dtype) -> int:
    """Likewise for the resident backward kernel: blocks twice, sums in float32, scores of a tile."""
    size, hd = geometry.block_size, geometry.head_dim
    window = geometry.segments + 1
    blocks = (4 * size + 2 * window * size + 2 * size + 4 * geometry.fam_slots) * hd
    sums = 4 * hd * (size + 2 * (1 if geometry.stop_gradient else window) * size + 2 * geometry.fam_slots)
    return 2 * blocks * jnp.dtype(dtype).itemsize + sums + 16 * rows * keys
