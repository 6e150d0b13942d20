"""Time of the attention kernels, by the static profile of the TPU compiler where it has a figure.

Its figure is linear in heads, so it is taken of as few as keep every core busy. `python -m fam_jax.plan.attention JSON`
compiles one kernel: the simulator dies of a program that holds both.
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fam_jax.config import MeshConfig, ModelConfig, ceil_div
from fam_jax.kernels.pallas import resident, resident_backward
from fam_jax.kernels.pallas.blocks import KV
from fam_jax.kernels.pallas.call import KernelCall, Results, Views
from fam_jax.kernels.pallas.geometry import Geometry
from fam_jax.kernels.pallas.tiles import SUBLANES, Tiles, choose_tiles
from fam_jax.plan.chips import Chip, chip_of
from fam_jax.plan.compile import compile_on, topology_devices
from fam_jax.plan.profile import kernel_cycles
from fam_jax.sharding import make_mesh, replicated

GROUP = 4  # query heads of a group that are profiled

# Where there is no figure: the share of the matrix units' peak that the kernels reach, at best and at worst.
UNKNOWN_SHARE = (0.8, 0.4)

# Matrix products per score: of the resident kernels and of update attention, and of each streamed kernel. The last one
# sees extra keys only.
PRODUCTS = {"forward": 2, "backward": 5}
STREAMED = {
    "forward": {"streamed_forward": 2},
    "backward": {"streamed_dq": 3, "streamed_dkv": 4, "streamed_dextra": 4},
}


def visible_keys(
    tokens: int,
    *,
    block_size: int,
    segments: int,
    extra: Callable[[int], int] = lambda _: 0,
    window: int = 0,
    past: int = 0,
) -> float:
    """Sum over `tokens` queries of the keys that each sees.

    Args:
      tokens: T, from a block border on.
      block_size: C.
      segments: m.
      extra: from the number of a block to that of the extra keys which its tokens see.
      window: 0 = no further limit.
      past: blocks that were read before.
    """
    total = 0.0
    for block in range(ceil_div(tokens, block_size)):
        count = min(block_size, tokens - block * block_size)
        before = min(past + block, segments) * block_size
        if window:
            total += sum(min(window, before + place) for place in range(1, count + 1))
        else:
            total += count * (before + (count + 1) / 2)
        total += count * extra(past + block)
    return total


@dataclasses.dataclass(frozen=True)
class Problem:
    """A training call in bfloat16, with one group of heads per core."""

    topology: str
    # C
    block_size: int
    # m
    segments: int
    # S, extra keys of a block
    extra: int
    # hd
    head_dim: int
    # N
    blocks: int = 8
    # G, query heads per key head
    group: int = 1
    # Tokens that the last block lacks
    missing: int = 0
    # Distance in tokens from which keys are hidden; 0 sets no limit.
    window: int = 0

    @property
    def cores(self) -> int:
        """Number of cores of a chip."""
        return chip_of(self.topology).cores

    def geometry(self) -> Geometry:
        """Return the sizes of the call."""
        return Geometry(
            block_size=self.block_size,
            blocks=self.blocks,
            segments=min(self.segments, self.blocks - 1),
            window=self.window,
            extra_slots=ceil_div(self.extra, SUBLANES) * SUBLANES,
            extra_keys=self.extra,
            heads=self.cores * self.group,
            kv_heads=self.cores,
            head_dim=self.head_dim,
            stop_gradient=False,
            missing=self.missing,
        )

    def tiles(self) -> Tiles:
        """Return the tiles that the kernels choose."""
        return choose_tiles(device_kind(self.topology), self.geometry(), jnp.bfloat16, static=True)

    def macs(self, which: str) -> float:
        """Multiplications that the visible scores of a group of heads take at least, on the core that has it."""
        keys = visible_keys(
            self.blocks * self.block_size - self.missing,
            block_size=self.block_size,
            segments=self.segments,
            extra=lambda _: self.extra,
            window=self.window,
        )
        return PRODUCTS[which] * self.group * keys * self.head_dim


@functools.cache
def kernel_seconds(
    topology: str,
    model: ModelConfig,
    rows: int,
    tokens: int,
    heads: int,
    kv_heads: int,
    *,
    past: int = 0,
    gradient: bool = True,
) -> dict[str, tuple[float, float]]:
    """Time of one run of each kernel on one chip, low and high, at bfloat16.

    The two are the same where the compiler gives a figure. It gives none for v4, nor for the streamed kernels, whose
    work depends on data: then they come from the matrix units' peak, by `UNKNOWN_SHARE`.

    Args:
      topology: such as v5p:2x2x1.
      model: of one kind of layer: block size, memory and window.
      rows: of the batch on a chip.
      tokens: T.
      heads: query heads on a chip.
      kv_heads: key heads on a chip.
      past: blocks that memory has room for; 0 in training.
      gradient: the backward pass too.

    Raises:
      UserError: the TPU compiler is not installed.
    """
    chip, group = chip_of(topology), heads // kv_heads
    problem = Problem(
        topology,
        model.block_size,
        model.memory_segments,
        model.memory.extra_keys,
        model.head_dim,
        ceil_div(tokens, model.block_size),
        min(group, GROUP),
        window=model.memory.window,
    )
    tiles = problem.tiles()
    padded = ceil_div(tokens, tiles.rows) * tiles.rows
    problem = dataclasses.replace(problem, missing=problem.blocks * model.block_size - padded)
    whole = rows * heads / (problem.cores * problem.group)  # times the problem
    static = past == 0 and model.memory.extra_keys_of_block(0) == model.memory.extra_keys
    resident = {"forward": tiles.resident_forward, "backward": tiles.resident_backward}
    found = {}
    for which in ("forward", "backward") if gradient else ("forward",):
        if static and resident[which]:
            seconds = {which: whole * problem.macs(which) / chip.macs_per_cycle / chip.clock}
            count = cycles(problem, which, tiles)
            if count is not None:
                found[f"block_attention_{which}"] = (whole * count / chip.clock,) * 2
                continue
        else:
            seconds = streamed_seconds(chip, model, rows * heads, tokens, past, which)
        for name, peak in seconds.items():
            found[f"block_attention_{name}"] = (peak / UNKNOWN_SHARE[0], peak / UNKNOWN_SHARE[1])
    return found


def streamed_seconds(
    chip: Chip, model: ModelConfig, heads: int, tokens: int, past: int, which: str
) -> dict[str, float]:
    """Least time of the streamed kernels of a pass at the matrix units' peak; `heads` are those of all rows."""
    extra = model.memory.extra_keys
    keys = visible_keys(
        tokens,
        block_size=model.block_size,
        segments=model.memory_segments,
        window=model.memory.window,
        past=past,
    )
    extra_keys = tokens * extra
    return {
        name: products
        * heads
        * model.head_dim
        * (extra_keys if name == "streamed_dextra" else keys if name == "streamed_dkv" else keys + extra_keys)
        / (chip.cores * chip.macs_per_cycle * chip.clock)
        for name, products in STREAMED[which].items()
    }


def device_kind(topology: str) -> str:
    """As JAX names the chips of a slice."""
    return topology_devices(topology)[0].device_kind


def cycles(problem: Problem, which: str, tiles: Tiles) -> int | None:
    """Cycles per core of the "forward" or "backward" kernel for one group of heads; None if it does not compile.

    Raises:
      UserError: the TPU compiler is not installed, or its figure is below what the matrix units alone need.
    """
    task = {"problem": dataclasses.asdict(problem), "which": which, "tiles": dataclasses.asdict(tiles)}
    macs, chip = problem.macs(which), chip_of(problem.topology)
    return kernel_cycles("fam_jax.plan.attention", task, f"block_attention_{which}", macs, chip)


def compile_kernel(problem: Problem, which: str, tiles: Tiles) -> Any:
    """Return the executable of one kernel, compiled for the first chip of the slice."""
    mesh = make_mesh(MeshConfig(), topology_devices(problem.topology)[:1])
    geometry = problem.geometry()
    call, tokens = KernelCall(geometry, tiles), geometry.tokens

    def array(rows: int, heads: int) -> jax.ShapeDtypeStruct:
        shape = call.layout.shape(1, rows, heads)
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=replicated(mesh))

    q, k = array(tokens, geometry.heads), array(tokens, geometry.kv_heads)
    extra = array(problem.blocks * geometry.extra_slots, geometry.kv_heads)
    views = Views(q, KV(k, k), KV(extra, extra) if problem.extra else None)
    if which == "forward":
        return compile_on(mesh, functools.partial(resident.forward, call), views)
    logsum = jax.ShapeDtypeStruct((1, geometry.heads, 1, tokens), jnp.float32, sharding=replicated(mesh))
    backward = functools.partial(resident_backward.backward, call)
    return compile_on(mesh, backward, views, Results(q, logsum), q)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    compile_kernel(Problem(**given["problem"]), given["which"], Tiles(**given["tiles"]))
