"""One of two processes that save together: INDEX PORT FOLDER FAULTS. The first FAULTS writes of this process fail."""

import os
import sys

os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp
from orbax.checkpoint._src.metadata.array_metadata_store import Store

from fam_jax.checkpoint import Checkpoints, SaveError, steps
from fam_jax.checkpoint.orbax_io import orbax_context

WRITE = Store.write


def impatient(*arguments: int | None) -> ocp.Context:
    """Return the settings of Orbax, with which a process waits seconds and not minutes for another one."""
    context = orbax_context(*arguments)
    context.asynchronous.timeout_secs = 6
    return context


def main(index: int, port: str, folder: str, faults: int) -> None:
    """Save steps 1 to 4, and print which were saved; exit with the code of a save that failed for good."""
    jax.distributed.initialize(f"localhost:{port}", 2, index)
    steps.PAUSES, steps.orbax_context = (0.1, 0.2), impatient
    left = [faults]

    async def failing(*arguments: object, **options: object) -> object:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(28, "No space left on device")
        return await WRITE(*arguments, **options)

    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), PartitionSpec("x"))
    try:
        with Checkpoints(folder, config={}, keep=9) as checkpoints:
            for step in range(1, 5):
                if step == 2:
                    Store.write = failing
                values = jax.make_array_from_callback(
                    (8,), sharding, lambda _, step=step: np.full(2, step, np.int32)
                )
                checkpoints.save(step, {"params": {"x": values}}, {}, wait=step == 3)
            checkpoints.wait()
            print(checkpoints.all_steps(), flush=True)
    except SaveError as error:
        print(type(error).__name__, flush=True)
        os._exit(error.exit_code)  # as a program of launch/ does, without waiting for the other process


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
