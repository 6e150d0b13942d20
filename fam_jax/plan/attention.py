"""Estimate the time of the block attention kernels, from the TPU compiler's static profile where it gives a figure.

The cycles are linear in heads, so the profile has only as many heads as keep every core busy. `python -m
fam_jax.plan.attention JSON` compiles one kernel, because the simulator crashes on a program with both.
"""

import dataclasses
import functools
import json
import sys
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
from fam_jax.training.flops import visible_keys

# Query heads per key head that are profiled.
GROUP = 4

# Share of the matrix units' peak that kernels without a figure reach, at best and at worst.
UNKNOWN_SHARE = (0.8, 0.4)

# Matrix products per score, of the resident kernels and update attention, then of each streamed kernel. The kernel
# streamed_dextra sees extra keys only.
PRODUCTS = {"forward": 2, "backward": 5}
STREAMED = {
    "forward": {"streamed_forward": 2},
    "backward": {"streamed_dq": 3, "streamed_dkv": 4, "streamed_dextra": 4},
}


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
    # Blocks of past slots: 0 or m. They get no gradient, as in training
    cached: int = 0

    @property
    def cores(self) -> int:
        """Number of cores of a chip."""
        return chip_of(self.topology).cores

    def geometry(self) -> Geometry:
        """Return the sizes of the call."""
        return Geometry(
            block_size=self.block_size,
            blocks=self.blocks,
            segments=self.segments if self.cached else min(self.segments, self.blocks - 1),
            window=self.window,
            extra_slots=ceil_div(self.extra, SUBLANES) * SUBLANES,
            extra_keys=self.extra,
            heads=self.cores * self.group,
            kv_heads=self.cores,
            head_dim=self.head_dim,
            stop_gradient=False,
            missing=self.missing,
            cached=self.cached,
        )

    def tiles(self) -> Tiles:
        """Return the tiles that the kernels choose."""
        return choose_tiles(device_kind(self.topology), self.geometry(), jnp.bfloat16, static=True)

    def macs(self, which: str) -> float:
        """Return the multiply-adds of the visible scores of one group of heads."""
        keys = visible_keys(
            self.blocks * self.block_size - self.missing,
            block_size=self.block_size,
            segments=self.segments,
            extra=lambda _: self.extra,
            window=self.window,
            past=self.cached,
        )
        return PRODUCTS[which] * self.group * keys * self.head_dim


@dataclasses.dataclass(frozen=True)
class LocalShare:
    """The part of an attention layer that one chip computes."""

    # Such as v5p:2x2x1.
    topology: str
    # B, rows of the batch.
    rows: int
    # T
    tokens: int
    # H, query heads.
    heads: int
    # K, key heads.
    kv_heads: int
    # Past blocks that the state has room for; 0 in training, unless rows go on from the step before.
    past: int = 0
    # Whether there is a backward pass.
    gradient: bool = True

    @property
    def chip(self) -> Chip:
        """The chip."""
        return chip_of(self.topology)

    @property
    def passes(self) -> tuple[str, ...]:
        """Names of the passes, as in PRODUCTS."""
        return ("forward", "backward") if self.gradient else ("forward",)


@functools.cache
def kernel_seconds(model: ModelConfig, share: LocalShare) -> dict[str, tuple[float, float]]:
    """Return low and high seconds of one run of each kernel on one chip, in bfloat16.

    Both are the same where the compiler gives a figure. It gives none for v4 or for the streamed kernels, whose work
    depends on data; their times follow from the matrix units' peak and `UNKNOWN_SHARE`.

    Args:
      model: config of one layer type, which gives block size, memory and window.
      share: what the chip computes.

    Raises:
      UserError: the TPU compiler is not installed, or its figure is less than the matrix units alone need.
    """
    chip = share.chip
    problem = Problem(
        share.topology,
        model.block_size,
        model.memory_segments,
        model.memory.extra_keys,
        model.head_dim,
        ceil_div(share.tokens, model.block_size),
        min(share.heads // share.kv_heads, GROUP),
        window=model.memory.window,
        cached=share.past,
    )
    tiles = problem.tiles()
    padded = ceil_div(share.tokens, tiles.rows) * tiles.rows
    problem = dataclasses.replace(problem, missing=problem.blocks * model.block_size - padded)
    # The chip's work as a multiple of the problem's.
    scale = share.rows * share.heads / (problem.cores * problem.group)
    static = (
        share.past in (0, model.memory_segments)
        and model.memory.extra_keys_of_block(0) == model.memory.extra_keys
    )
    resident = {"forward": tiles.resident_forward, "backward": tiles.resident_backward}
    found = {}
    for which in share.passes:
        if static and resident[which]:
            seconds = {which: scale * problem.macs(which) / chip.macs_per_cycle / chip.clock}
            count = cycles(problem, which, tiles)
            if count is not None:
                found[f"block_attention_{which}"] = (scale * count / chip.clock,) * 2
                continue
        else:
            seconds = streamed_seconds(model, share, which)
        for name, peak in seconds.items():
            found[f"block_attention_{name}"] = (peak / UNKNOWN_SHARE[0], peak / UNKNOWN_SHARE[1])
    return found


def streamed_seconds(model: ModelConfig, share: LocalShare, which: str) -> dict[str, float]:
    """Return the seconds of each streamed kernel of a pass at the matrix units' peak."""
    keys = visible_keys(
        share.tokens,
        block_size=model.block_size,
        segments=model.memory_segments,
        window=model.memory.window,
        past=share.past,
    )
    extra_keys = share.tokens * model.memory.extra_keys
    of_kernel = {"streamed_dextra": extra_keys, "streamed_dkv": keys}
    return {
        name: share.chip.matrix_seconds(
            products * share.rows * share.heads * model.head_dim * of_kernel.get(name, keys + extra_keys)
        )
        for name, products in STREAMED[which].items()
    }


def device_kind(topology: str) -> str:
    """Return JAX's name for the chips of a slice."""
    return topology_devices(topology)[0].device_kind


def cycles(problem: Problem, which: str, tiles: Tiles) -> int | None:
    """Return the cycles per core of the "forward" or "backward" kernel for one group of heads; None without a figure.

    Raises:
      UserError: the TPU compiler is not installed, or its figure is less than the matrix units alone need.
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
    past = array(geometry.cached * geometry.block_size, geometry.kv_heads)
    past_length = jax.ShapeDtypeStruct((1,), jnp.int32, sharding=replicated(mesh))
    extra = array(problem.blocks * geometry.extra_slots, geometry.kv_heads)
    extras = KV(extra, extra) if problem.extra else None
    views = Views(q, KV(k, k), extras, KV(past, past) if geometry.cached else None)
    if which == "forward":
        return compile_on(mesh, functools.partial(resident.forward, call), past_length, views)
    logsum = jax.ShapeDtypeStruct((1, geometry.heads, 1, tokens), jnp.float32, sharding=replicated(mesh))
    backward = functools.partial(resident_backward.backward, call)
    return compile_on(mesh, backward, past_length, views, Results(q, logsum), q)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    compile_kernel(Problem(**given["problem"]), given["which"], Tiles(**given["tiles"]))
