"""Simulated cycles of one attention kernel with given tiles, by the static profile of the TPU compiler.

The profile is that of the scheduled program, walked over the grid. It does not know the bandwidth to HBM, which these
kernels do not come near. It is linear in heads, so it is taken of as few as keep every core busy. Predicates must
hang on the grid alone, as those of the resident kernels do.
"""

import dataclasses
import json
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp

from fam_jax.config import MeshConfig
from fam_jax.kernels.pallas import resident, resident_backward
from fam_jax.kernels.pallas.parts import Geometry, Layout
from fam_jax.kernels.pallas.tiles import Tiles, choose_tiles
from fam_jax.plan import ProfileError, check_floor, chip_of, compile_on, static_profile, topology_devices
from fam_jax.sharding import make_mesh, replicated

LIMIT_S = 240


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
        )

    def tiles(self) -> Tiles:
        """What the kernels would choose."""
        return choose_tiles(device_kind(self.topology), self.geometry(), jnp.bfloat16, static=True)

    def macs(self, which: str) -> float:
        """Multiplications that the visible scores of a group of heads take at least, on the core that has it."""
        size, keys = self.block_size, 0.0
        for block in range(self.blocks):
            keys += min(block, self.segments) * size + self.fam + size / 2
        products = {"forward": 2, "backward": 5}[which]
        return products * self.group * size * keys * self.head_dim


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
        found = static_profile("benchmarks.profile_attention", [json.dumps(task)], timeout=LIMIT_S)
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
    tokens = problem.blocks * problem.block_size

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
