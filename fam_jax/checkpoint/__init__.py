"""Checkpoints: saved in the background, restored on any mesh, checked for damage, parameters loadable alone.

A run's folder holds

    config.json          the resolved config of the run, to be read by people and by evaluation
    500/, 1000/, ...     one folder per saved step, written by Orbax

and each step three parts: `params` (nested dict of arrays), `training` (everything else that the next
step depends on) and `contents` (JSON: where the data stands; shape, dtype and checksum of every array). A
step appears under its own name only when all of them are complete, so a killed job leaves the steps before
it intact.

Orbax notices neither flipped nor zeroed bytes, so the checksums are this package's own. They are
computed where the arrays live (see `manifest.py`), go into the same atomic step and are compared after
every restore.
"""

from fam_jax.checkpoint.folder import MAY_CHANGE, CheckpointError, absolute, read_config, saved_steps
from fam_jax.checkpoint.hf_files import COMPANIONS, companion_folders, end_ids, with_vocabulary_found
from fam_jax.checkpoint.steps import Checkpoints, load_params

__all__ = [
    "COMPANIONS",
    "MAY_CHANGE",
    "CheckpointError",
    "Checkpoints",
    "absolute",
    "companion_folders",
    "end_ids",
    "load_params",
    "read_config",
    "saved_steps",
    "with_vocabulary_found",
]
