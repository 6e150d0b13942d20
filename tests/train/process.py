"""One process of a group that trains together: `python -m tests.train.process INDEX COUNT ADDRESS OUT.npz`."""

import sys

import jax

if __name__ == "__main__":
    index, count = int(sys.argv[1]), int(sys.argv[2])
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(sys.argv[3], count, index)

import numpy as np
from jax.experimental import multihost_utils

from fam_jax import sharding
from fam_jax.checkpoint.contents import by_name
from fam_jax.config import Config
from fam_jax.train.loop import make_trainer
from tests.train.tiny import changed, some_batch

STEPS = 2
CONFIG = changed(
    train__random_state_passing=1.0, train__accumulation=2, mesh__data=2, mesh__fsdp=2, mesh__tensor=2
)


def train_rows(config: Config, first: int, rows: int) -> dict[str, np.ndarray]:
    """Parameters and loss after some steps, by a process that makes `rows` rows of each batch."""
    trainer = make_trainer(config)
    state = trainer.create()
    where = sharding.batch_sharding(trainer.mesh)
    for step in range(STEPS):
        own = {name: array[first : first + rows] for name, array in some_batch(step).items()}
        batch = {name: jax.make_array_from_process_local_data(where, array) for name, array in own.items()}
        state, metrics = trainer.step(state, batch)
    arrays = by_name(state.params) | {"loss": metrics["loss"], "saved_fam": state.saved_fam}
    return {name: multihost_utils.process_allgather(array, tiled=True) for name, array in arrays.items()}


if __name__ == "__main__":
    rows = CONFIG.train.batch_size // count
    found = train_rows(CONFIG, index * rows, rows)
    if index == 0:
        np.savez(sys.argv[4], **found)
    multihost_utils.sync_global_devices("written")
