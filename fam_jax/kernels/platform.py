"""What a program is being compiled for."""

import jax


def asks_for_kernels(implementation: str) -> bool:
    """Whether what is asked for, by a name as of `block_attention`, is a kernel where there is one that can run."""
    return implementation.startswith("pallas") or (implementation == "auto" and bool(target_chip()))


def target_chip() -> str:
    """Kind of TPU that the program at hand is traced for, as "TPU v5p"; empty if it is not a TPU.

    That of the mesh in use, if there is one (a program may be compiled for chips that this machine lacks), else that of
    the default device.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return device.device_kind if device.platform == "tpu" else ""
    first = jax.devices()[0]
    return first.device_kind if first.platform == "tpu" else ""
