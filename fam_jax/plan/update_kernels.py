"""Time of the kernels of FAM's own attention, by the static profile of the TPU compiler where it has a figure.

`python -m fam_jax.plan.update_kernels JSON` compiles one of them. Rotary embedding needs no profile: it takes 0.7 to
0.8 of the time that its traffic does (v5p, v5e).
"""

import dataclasses
import functools
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp

from fam_jax.config import MeshConfig, ModelConfig
from fam_jax.kernels.pallas import update
from fam_jax.plan.attention import PRODUCTS, UNKNOWN_SHARE
from fam_jax.plan.chips import chip_of
from fam_jax.plan.compile import compile_on, topology_devices
from fam_jax.plan.profile import kernel_cycles
from fam_jax.sharding import make_mesh, replicated

BYTES = 2  # of bfloat16


@dataclasses.dataclass(frozen=True)
class UpdateProblem:
    """A FAM update at bfloat16, of as many rows as a chip has cores."""

    topology: str
    block_size: int  # C
    fam: int  # M
    heads: int  # H
    kv_heads: int  # K
    head_dim: int  # hd

    @property
    def rows(self) -> int:
        """B."""
        return chip_of(self.topology).cores

    def macs(self, which: str) -> float:
        """Multiplications of one row."""
        return PRODUCTS[which] * self.heads * self.fam * (self.fam + self.block_size) * self.head_dim

    def traffic(self, which: str) -> int:
        """Bytes of one row through HBM; the backward pass reads a cotangent and writes gradients of all but it."""
        queries, keys = self.fam * self.heads, 2 * (self.fam + self.block_size) * self.kv_heads
        vectors = 3 * queries + 2 * keys if which == "backward" else 2 * queries + keys
        return vectors * self.head_dim * BYTES


@functools.cache
def update_seconds(
    topology: str, model: ModelConfig, rows: int, heads: int, kv_heads: int, *, gradient: bool = True
) -> dict[str, tuple[float, float]]:
    """Time of one run of each kernel on one chip, low and high, traffic included.

    The two are the same where the compiler gives a figure; else they come from the matrix units' peak.

    Args:
      topology: such as v5p:2x2x1.
      model: block size, FAM and width of heads.
      rows: of the batch on a chip.
      heads: query heads on a chip.
      kv_heads: key heads on a chip.
      gradient: the backward pass too.

    Raises:
      UserError: the TPU compiler is not installed, or its figure is below what the matrix units alone need.
    """
    chip = chip_of(topology)
    problem = UpdateProblem(
        topology, model.block_size, model.memory.chained_rows, heads, kv_heads, model.head_dim
    )
    found = {}
    for which in PRODUCTS if gradient else ("forward",):
        name = f"fam_update_{which}"
        task = {"problem": dataclasses.asdict(problem), "which": which}
        count = kernel_cycles("fam_jax.plan.update_kernels", task, name, problem.macs(which), chip)
        if count is None:
            peak = problem.macs(which) / chip.macs_per_cycle
            cycles = [peak / share for share in UNKNOWN_SHARE]
        else:
            cycles = [count, count]
        by_traffic = problem.traffic(which) / chip.hbm_bandwidth
        low, high = (rows * max(each / chip.clock / problem.rows, by_traffic) for each in cycles)
        found[name] = (low, high)
    return found


def compile_kernel(problem: UpdateProblem, which: str) -> Any:
    """The executable, for the first chip of the slice."""
    mesh = make_mesh(MeshConfig(), topology_devices(problem.topology)[:1])

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(mesh))

    q = array(problem.rows, problem.fam, problem.heads, problem.head_dim)
    own = array(problem.rows, problem.fam, problem.kv_heads, problem.head_dim)
    block = array(problem.rows, problem.block_size, problem.kv_heads * problem.head_dim)
    arrays = (q, own, own, block, block, array(1, dtype=jnp.int32), block, block)
    if which == "forward":
        return compile_on(mesh, lambda *x: update.forward(False, *x)[0], *arrays)
    return compile_on(mesh, lambda d_out, *x: update.backward(False, x, d_out), q, *arrays)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    compile_kernel(UpdateProblem(**given["problem"]), given["which"])
