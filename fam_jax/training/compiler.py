"""Options of the TPU compiler for the train step."""

import jax
from jax.sharding import Mesh

from fam_jax.kernels.pallas.tiles import SMALLEST_VMEM_MIB, VMEM_MIB

# Found by compiling for slices of v5p (docs/results/plans.md).
TPU_OPTIONS = {
    # By default, a gather and the product after it become a ring of small products. That costs more than it hides.
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
    # Overlap the gather of a layer's weights with products.
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
}
# Fast memory that one operation may use. The default is half of it, which is too little for good tiles of products
# whose weights are not prefetched. More takes space from prefetched weights.
VMEM_LIMIT = "xla_tpu_scoped_vmem_limit_kib"
VMEM_LIMIT_MIB = 32


def compiler_options(mesh: Mesh) -> dict[str, str] | None:
    """Return compiler options for `jax.jit`; None for a single device or devices that are not TPUs."""
    device: jax.Device = mesh.devices.flat[0]
    if device.platform != "tpu" or mesh.size == 1:
        return None
    if VMEM_MIB.get(device.device_kind, SMALLEST_VMEM_MIB) < 2 * VMEM_LIMIT_MIB:
        return TPU_OPTIONS
    return {**TPU_OPTIONS, VMEM_LIMIT: str(VMEM_LIMIT_MIB << 10)}
