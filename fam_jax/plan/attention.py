"""Time of the attention kernels in training, by the static profile of the TPU compiler.

Its figure is linear in heads, so it is taken of as few as keep every core busy. `python -m fam_jax.plan.attention JSON`
compiles one kernel: the simulator dies of a program that holds both.
"""

import dataclasses
import functools
import json
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp

from fam_jax.config import MeshConfig, ModelConfig
from fam_jax.kernels.pallas import resident, resident_backward
from fam_jax.kernels.pallas.parts import Geometry, Layout
from fam_jax.kernels.pallas.tiles import Tiles, choose_tiles
from fam_jax.plan.chips import chip_of
from fam_jax.plan.compile import compile_on, topology_devices
from fam_jax.plan.profile import ProfileError, check_floor, static_profile
from fam_jax.sharding import make_mesh, replicated

LIMIT_S = 240
GROUP = 4  # query heads of a group that are profiled

# Where there is no figure: the share of the matrix units' peak that the kernels reach, at best and at worst.
UNKNOWN_SHARE = (0.8, 0.4)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A training call at bfloat16, one head per core."""

    topology: str
    block_size: int  # C
    segments: int  # m
    fam: int  # M
    head_dim: int  # hd
    blocks: int = 8  # N
    group: int = 1  # G, query heads per key head
    missing: int = 0  # tokens that the last block lacks

    @property
    def cores(self) -> int:
        """Of a chip."""
        return chip_of(self.topology).cores

    def geometry(self) -> Geometry:
        """Of the call."""
        return Geometry(
            block_size=self.block_size,
            blocks=self.blocks,
            segments=min(self.segments, self.blocks - 1),
            window=0,
            fam_slots=-(-self.fam // 16) * 16,
            fam_keys=self.fam,
            heads=self.cores * self.group,
            kv_heads=self.cores,
            head_dim=self.head_dim,
            stop_gradient=False,
            missing=self.missing,
        )

    def tiles(self) -> Tiles:
        """What the kernels would choose."""
        return choose_tiles(device_kind(self.topology), self.geometry(), jnp.bfloat16, static=True)

    def macs(self, which: str) -> float:
        """Multiplications that the visible scores of a group of heads take at least, on the core that has it."""
        size, keys = self.block_size, 0.0  # keys that each query sees, summed
        for block in range(self.blocks):
            rows = size - (self.missing if block == self.blocks - 1 else 0)
            keys += rows * (min(block, self.segments) * size + self.fam + rows / 2)
        products = {"forward": 2, "backward": 5}[which]
        return products * self.group * keys * self.head_dim


@functools.cache
def kernel_seconds(
    topology: str, model: ModelConfig, rows: int, tokens: int, heads: int, kv_heads: int
) -> dict[str, tuple[float, float]]:
    """Time of one run of each kernel on one chip, low and high, in a training step at bfloat16.

    The two are the same where the compiler gives a figure. It gives none for v4, nor for kernels whose work depends on
    data, as those for long windows: then they come from the matrix units' peak, by `UNKNOWN_SHARE`.

    Args:
      topology: such as v5p:2x2x1.
      model: block size and memory.
      rows: of the batch on a chip.
      tokens: T.
      heads: query heads on a chip.
      kv_heads: key heads on a chip.

    Raises:
      UserError: the TPU compiler is not installed.
    """
    chip, group = chip_of(topology), heads // kv_heads
    problem = Problem(
        topology,
        model.block_size,
        model.memory_segments,
        model.fam_length * model.fam_previous_blocks,
        model.head_dim,
        -(-tokens // model.block_size),
        min(group, GROUP),
    )
    tile = problem.tiles().rows
    problem = dataclasses.replace(
        problem, missing=problem.blocks * model.block_size - -(-tokens // tile) * tile
    )
    found = {}
    for which in ("forward", "backward"):
        count = cycles(problem, which, problem.tiles())
        whole = rows * heads / (problem.cores * problem.group)  # times the problem
        if count is not None and not model.window:
            low = high = whole * count / chip.clock
        else:
            peak = whole * problem.macs(which) / chip.macs_per_cycle / chip.clock
            low, high = (peak / share for share in UNKNOWN_SHARE)
        found[f"fam_attention_{which}"] = (low, high)
    return found


def device_kind(topology: str) -> str:
    """As JAX names the chips of a slice."""
    return topology_devices(topology)[0].device_kind


def cycles(problem: Problem, which: str, tiles: Tiles) -> int | None:
    """Cycles per core of the "forward" or "backward" kernel for one group of heads; None if it does not compile.

    Raises:
      UserError: the TPU compiler is not installed, or its figure is below what the matrix units alone need.
    """
    task = {"problem": dataclasses.asdict(problem), "which": which, "tiles": dataclasses.asdict(tiles)}
    name = f"fam_attention_{which}"
    try:
        found = static_profile("fam_jax.plan.attention", [json.dumps(task)], (name,), timeout=LIMIT_S)
    except (ProfileError, subprocess.TimeoutExpired):
        return None
    if name not in found:
        return None
    check_floor(name, found[name], problem.macs(which), chip_of(problem.topology))
    return found[name]


def compile_kernel(problem: Problem, which: str, tiles: Tiles) -> Any:
    """The executable, for the first chip of the slice."""
    mesh = make_mesh(MeshConfig(), topology_devices(problem.topology)[:1])
    geometry, layout = problem.geometry(), Layout(problem.head_dim)
    tokens = geometry.tokens

    def array(rows: int, heads: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(layout.shape(1, rows, heads), jnp.bfloat16, sharding=replicated(mesh))

    q, k = array(tokens, geometry.heads), array(tokens, geometry.kv_heads)
    fam = [array(problem.blocks * geometry.fam_slots, geometry.kv_heads)] * 2 if problem.fam else []
    logsum = jax.ShapeDtypeStruct((1, geometry.heads, 1, tokens), jnp.float32, sharding=replicated(mesh))

    def forward(*views: jax.Array) -> Any:
        return resident.forward(views, geometry, tiles, interpret=False)

    def backward(out: jax.Array, logsum: jax.Array, d_out: jax.Array, *views: jax.Array) -> Any:
        return resident_backward.backward(views, out, logsum, d_out, geometry, tiles, interpret=False)

    call, extra = (forward, ()) if which == "forward" else (backward, (q, logsum, q))
    return compile_on(mesh, call, *extra, q, k, k, *fam)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    compile_kernel(Problem(**given["problem"]), given["which"], Tiles(**given["tiles"]))
