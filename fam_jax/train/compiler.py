"""What the TPU compiler is told beyond its defaults, when it compiles the train step."""

import jax
from jax.sharding import Mesh

# Found by compiling for slices of v5p (docs/results/plans.md).
TPU_OPTIONS = {
    # By default a gather and the product behind it become a ring of small products, which costs more than it hides.
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
    # The gather of a layer's weights runs beside products.
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
}


def compiler_options(mesh: Mesh) -> dict[str, str] | None:
    """For `jax.jit`; None where the devices are no TPUs, or where there is a single one."""
    device: jax.Device = mesh.devices.flat[0]
    return TPU_OPTIONS if device.platform == "tpu" and mesh.size > 1 else None
