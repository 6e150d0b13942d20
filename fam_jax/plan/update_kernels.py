"""Estimate the time of the update attention kernels, from the TPU compiler's static profile where it gives a figure.

`python -m fam_jax.plan.update_kernels JSON` compiles one kernel. Rotary embedding needs no profile: its computation
takes 0.7 to 0.8 of the time of its traffic (v5p, v5e).
"""

import dataclasses
import functools
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp

from fam_jax.config import MeshConfig, ModelConfig
from fam_jax.kernels.pallas.blocks import KV
from fam_jax.kernels.update_attention import UpdateInputs, kernel_backward, kernel_forward
from fam_jax.plan.attention import PRODUCTS, UNKNOWN_SHARE, LocalShare
from fam_jax.plan.chips import chip_of
from fam_jax.plan.compile import compile_on, topology_devices
from fam_jax.plan.profile import kernel_cycles
from fam_jax.sharding import make_mesh, replicated

# Bytes of a bfloat16.
BYTES = 2


@dataclasses.dataclass(frozen=True)
class UpdateProblem:
    """An update in bfloat16, with one row of the batch per core of a chip."""

    topology: str
    # C
    block_size: int
    # M, memory rows
    rows: int
    # H
    heads: int
    # K
    kv_heads: int
    # hd
    head_dim: int

    @property
    def batch(self) -> int:
        """B."""
        return chip_of(self.topology).cores

    def macs(self, which: str) -> float:
        """Return the multiply-adds of one row of the batch."""
        return PRODUCTS[which] * self.heads * self.rows * (self.rows + self.block_size) * self.head_dim

    def traffic(self, which: str) -> int:
        """Return the bytes that one row of the batch moves through HBM.

        The backward pass also reads a cotangent, and writes the gradients of its other inputs.
        """
        queries, keys = self.rows * self.heads, 2 * (self.rows + self.block_size) * self.kv_heads
        vectors = 3 * queries + 2 * keys if which == "backward" else 2 * queries + keys
        return vectors * self.head_dim * BYTES


@functools.cache
def update_seconds(model: ModelConfig, share: LocalShare) -> dict[str, tuple[float, float]]:
    """Return low and high seconds of one run of each kernel on one chip, traffic included.

    Both are the same where the compiler gives a figure; otherwise they come from the matrix units' peak.

    Args:
      model: config of one layer type, which gives block size, memory and head width.
      share: what the chip computes.

    Raises:
      UserError: the TPU compiler is not installed, or its figure is less than the matrix units alone need.
    """
    chip = share.chip
    problem = UpdateProblem(
        share.topology,
        model.block_size,
        model.memory.chained_rows,
        share.heads,
        share.kv_heads,
        model.head_dim,
    )
    found = {}
    for which in share.passes:
        name = f"update_attention_{which}"
        task = {"problem": dataclasses.asdict(problem), "which": which}
        count = kernel_cycles("fam_jax.plan.update_kernels", task, name, problem.macs(which), chip)
        if count is None:
            peak = problem.macs(which) / chip.macs_per_cycle
            cycles = [peak / share for share in UNKNOWN_SHARE]
        else:
            cycles = [count, count]
        by_traffic = problem.traffic(which) / chip.hbm_bandwidth
        low, high = (share.rows * max(each / chip.clock / problem.batch, by_traffic) for each in cycles)
        found[name] = (low, high)
    return found


def compile_kernel(problem: UpdateProblem, which: str) -> Any:
    """Return the executable of one kernel, compiled for the first chip of the slice."""
    mesh = make_mesh(MeshConfig(), topology_devices(problem.topology)[:1])

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(mesh))

    q = array(problem.batch, problem.rows, problem.heads, problem.head_dim)
    own = array(problem.batch, problem.rows, problem.kv_heads, problem.head_dim)
    block = array(problem.batch, problem.block_size, problem.kv_heads * problem.head_dim)
    tokens = KV(block, block)
    inputs = UpdateInputs(q, KV(own, own), tokens, array(1, dtype=jnp.int32), tokens)
    if which == "forward":
        return compile_on(mesh, lambda inputs: kernel_forward(False, inputs)[0], inputs)
    return compile_on(mesh, functools.partial(kernel_backward, False), inputs, q)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    compile_kernel(UpdateProblem(**given["problem"]), given["which"])
