"""Save checkpoints in the background, restore them on any mesh, detect damage, and load parameters alone.

The folder of a run holds

    config.json          the resolved config of the run
    500/, 1000/, ...     one folder per saved step, written by Orbax

Each step has three parts: `params` (nested dict of arrays), `training` (the rest of the training state) and `contents`
(JSON: the position in the data; shape, dtype and checksum of every array). A step appears under its final name only
when all parts are complete, so a killed job leaves the earlier steps intact.

Orbax does not detect flipped or zeroed bytes, so this package adds its own checksums. They are computed on the devices
that hold the arrays (see `manifest.py`), saved with the step, and compared after every restore.
"""

from fam_jax.checkpoint.folder import MAY_CHANGE, CheckpointError, absolute, read_config, saved_steps
from fam_jax.checkpoint.hf_files import COMPANIONS, companion_folders, with_vocabulary_found
from fam_jax.checkpoint.steps import Checkpoints, load_params

__all__ = [
    "COMPANIONS",
    "MAY_CHANGE",
    "CheckpointError",
    "Checkpoints",
    "absolute",
    "companion_folders",
    "load_params",
    "read_config",
    "saved_steps",
    "with_vocabulary_found",
]
