"""Notice a run that cannot fit, before it allocates anything."""

import math
import os
from typing import Any

import jax

from fam_jax.config import Config, ConfigError

# Token ids, targets and weights of a batch, each of 4 bytes.
BYTES_PER_TOKEN = 12


def host_memory() -> int:
    """Return the memory of this machine in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def device_memory(device: jax.Device) -> int:
    """Return the memory in bytes that arrays on a device can have; simulated devices share that of the machine."""
    limit = (device.memory_stats() or {}).get("bytes_limit", 0)
    return limit or host_memory() // jax.local_device_count()


def check_state_fits(state: Any, device: jax.Device) -> None:
    """Raise :class:`ConfigError` if parameters and optimizer state exceed the memory of a device on their own.

    Args:
      state: `jax.ShapeDtypeStruct`s with shardings.
      device: one of the mesh, of this process.
    """
    needed = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(state)
    )
    room = device_memory(device)
    if needed > room:
        raise ConfigError(
            f"parameters and optimizer state take {needed / 2**30:,.1f} GiB on each device, which has "
            f"{room / 2**30:,.1f} GiB; use more devices (config.mesh.fsdp, config.mesh.tensor) or a smaller model "
            "(python -m launch.plan shows what fits)"
        )


def check_batch_fits(config: Config, longest_row: int, processes: int) -> None:
    """Raise :class:`ConfigError` if the rows that a process makes for a batch exceed its memory.

    Args:
      config: the experiment.
      longest_row: T, in tokens.
      processes: number of processes that share the batch.
    """
    rows = math.ceil(config.train.batch_size / processes)
    needed, room = rows * longest_row * BYTES_PER_TOKEN, host_memory()
    if needed > room:
        raise ConfigError(
            f"{rows:,} rows of {longest_row:,} tokens take {needed / 2**30:,.1f} GiB, and this machine has "
            f"{room / 2**30:,.1f} GiB; use a smaller config.train.batch_size or shorter rows"
        )
