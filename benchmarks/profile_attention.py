"""Simulated cycles of one attention kernel with given tiles, by the static profile of the TPU compiler.

The profile is that of the scheduled program, walked over the grid. It does not know the bandwidth to HBM, which these
kernels do not come near. It is linear in heads, so it is taken of as few as keep every core busy. Predicates must
hang on the grid alone, as those of the resident kernels do.
"""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from fam_jax.config import MeshConfig, UserError
from fam_jax.kernels.pallas import resident, resident_backward
from fam_jax.kernels.pallas.parts import Geometry, Layout
from fam_jax.kernels.pallas.tiles import Tiles, choose_tiles
from fam_jax.sharding import make_mesh, replicated, traced_for

LIBRARY = Path(sys.prefix) / "tpu-compiler"  # where `make test` puts libtpu
TWO_CORES = ("v4", "v5p")
MACS_PER_CYCLE = {"v6e": 262_144}  # of a core's matrix units; 65,536 before
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
        return 2 if self.topology.startswith(TWO_CORES) else 1

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

    def floor(self, which: str) -> float:
        """Cycles that the matrix units alone would take for the visible scores of a group of heads."""
        size, keys = self.block_size, 0.0
        for block in range(self.blocks):
            keys += min(block, self.segments) * size + self.fam + size / 2
        products = {"forward": 2, "backward": 5}[which]
        macs = products * self.group * size * keys * self.head_dim
        return macs / MACS_PER_CYCLE.get(self.topology.split(":")[0], 65_536)


def device_kind(topology: str) -> str:
    """As JAX names the chips of a slice."""
    generation = topology.split(":")[0]
    kinds = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5p", "v6e": "TPU v6 lite"}
    if generation not in kinds:
        raise UserError(f"unknown topology {topology!r}: there are {', '.join(kinds)}, as v5p:2x2x1")
    return kinds[generation]


def cycles(problem: Problem, which: str, tiles: Tiles) -> int | None:
    """Cycles per core of the "forward" or "backward" kernel for one group of heads; None if it does not compile.

    Raises:
      UserError: the TPU compiler is not installed, or its figure is below what the matrix units alone need.
    """
    if importlib.util.find_spec("libtpu") is None and not LIBRARY.is_dir():
        raise UserError("the TPU compiler is not installed: run `make test` once, or pip install libtpu")
    task = {"problem": dataclasses.asdict(problem), "which": which, "tiles": dataclasses.asdict(tiles)}
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "LIBTPU_INIT_ARGS": f"--xla_jf_dump_static_llo_profile_to={folder}",
            "TPU_SKIP_MDS_QUERY": "1",
            "JAX_PLATFORMS": "cpu",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(LIBRARY), os.environ.get("PYTHONPATH", "")])),
        }
        command = [sys.executable, "-m", "benchmarks.profile_attention", json.dumps(task)]
        try:
            subprocess.run(command, env=environment, capture_output=True, timeout=LIMIT_S, check=False)
        except subprocess.TimeoutExpired:
            return None
        # The compiler may stumble over its own dump after it has written the figure.
        found = [
            int(match.group(1))
            for path in Path(folder).iterdir()
            if "fam_attention" in path.name
            and (match := re.search(r"estimated_cycles: (\d+)", path.read_text()))
        ]
    if not found:
        return None
    if max(found) < problem.floor(which):
        raise UserError(
            f"{which}: {max(found)} cycles are fewer than the matrix units need: the profile is wrong"
        )
    return max(found)


def compile_kernel(problem: Problem, which: str, tiles: Tiles) -> Any:
    """The executable, for the first chip of the slice."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=problem.topology).devices
    mesh = make_mesh(MeshConfig(), devices[:1])
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
    traced = jax.jit(traced_for(mesh, call)).trace(*extra, q, k, k, *fam)
    return traced.lower(lowering_platforms=("tpu",)).compile()


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    compile_kernel(Problem(**given["problem"]), given["which"], Tiles(**given["tiles"]))
