"""One process of a group that trains together: `python -m tests.training.process INDEX COUNT ADDRESS OUT.npz`."""

import sys

import jax

if __name__ == "__main__":
    index, count = int(sys.argv[1]), int(sys.argv[2])
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(sys.argv[3], count, index)

import numpy as np
from jax.experimental import multihost_utils

from fam_jax import sharding
from fam_jax.checkpoint.manifest import by_name
from fam_jax.config import Config
from fam_jax.training.loop import gather_rows, make_trainer
from tests.training.tiny import changed, some_batch

STEPS = 2
CONFIG = changed(
    train__random_state_passing=1.0, train__accumulation=2, mesh__data=2, mesh__fsdp=2, mesh__tensor=2
)


def train_rows(config: Config, first: int, rows: int) -> dict[str, np.ndarray]:
    """Return parameters and loss after some steps of a process that makes `rows` rows of each batch."""
    trainer = make_trainer(config)
    state = trainer.create()
    where = sharding.batch_sharding(trainer.mesh)
    for step in range(STEPS):
        own = {name: array[first : first + rows] for name, array in some_batch(step).items()}
        batch = {name: jax.make_array_from_process_local_data(where, array) for name, array in own.items()}
        state, metrics = trainer.step(state, batch)
    arrays = by_name(state.params) | {"loss": metrics["loss"], "carried": state.carried["fam"]}
    return {name: multihost_utils.process_allgather(array, tiled=True) for name, array in arrays.items()}


def check_batches() -> None:
    """Check that rows arrive in their places on every mesh, and that processes exchange what they know of theirs.

    Two meshes need rows from all processes: one whose order of devices mixes them, one whose tensor axis spans them.
    """
    rows, devices = np.arange(16).reshape(8, 2), np.array(jax.devices())
    own = np.split(rows, jax.process_count())[jax.process_index()]
    np.testing.assert_array_equal(gather_rows(own.astype(np.int32)), rows)
    for grid in (
        devices.reshape(8, 1, 1),
        devices[[0, 5, 1, 4, 7, 2, 6, 3]].reshape(8, 1, 1),
        devices.reshape(1, 1, 8),
    ):
        mesh = jax.sharding.Mesh(grid, sharding.MESH_AXES)
        batch = sharding.global_batch(sharding.batch_sharding(mesh), {"rows": own})["rows"]
        assert batch.sharding == sharding.batch_sharding(mesh)
        for shard in batch.addressable_shards:
            np.testing.assert_array_equal(shard.data, rows[shard.index])


if __name__ == "__main__":
    check_batches()
    rows = CONFIG.train.batch_size // count
    found = train_rows(CONFIG, index * rows, rows)
    if index == 0:
        np.savez(sys.argv[4], **found)
    multihost_utils.sync_global_devices("written")
