"""Options of the TPU compiler for the train step."""

import jax
from jax.sharding import Mesh

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


def compiler_options(mesh: Mesh) -> dict[str, str] | None:
    """Return compiler options for `jax.jit`; None for a single device or devices that are not TPUs."""
    device: jax.Device = mesh.devices.flat[0]
    return TPU_OPTIONS if device.platform == "tpu" and mesh.size > 1 else None
