"""Save checkpoints in the background, restore them on any mesh, detect damage, and load parameters alone.

The folder of a run holds

    config.json          the resolved config of the run, and the history of its changes
    500/, 1000/, ...     one folder per saved step, written by Orbax
    500.damaged/         a step that was set aside
    newest_step.json     the number of the step that was saved last
    huggingface/         of an imported model, or of the run's base: config.json and tokenizer
    vocabulary/          the vocabulary's file, if it is not in huggingface/

Each step has three parts: `params` (nested dict of arrays), `training` (the rest of the training state) and `contents`
(JSON: the position in the data; shape, dtype and checksum of every array; digests of the vocabulary and the base). A
step appears under its final name only when all parts are complete, so a killed job leaves the earlier steps intact.

Orbax does not detect flipped or zeroed bytes, so this package adds its own checksums. They are computed on the devices
that hold the arrays (see `manifest.py`), saved with the step, and compared after every restore.
"""

from fam_jax.checkpoint.folder import (
    CheckpointError,
    DamagedStepError,
    ReadError,
    SaveError,
    absolute,
    check_name,
    locate,
    read_config,
    read_config_file,
    saved_steps,
)
from fam_jax.checkpoint.hf_files import (
    COMPANIONS,
    SOURCE,
    companion_folders,
    end_ids,
    is_trained,
    named_end_ids,
)
from fam_jax.checkpoint.loading import choose_step, load_params, load_state
from fam_jax.checkpoint.origin import (
    VOCABULARY,
    check_task_vocabulary,
    find_vocabulary,
    settle_origin,
    vocabulary_digest,
)
from fam_jax.checkpoint.run_config import (
    MAY_CHANGE,
    changeable_fields,
    changed_fields,
    changes_of_result,
    check_changes,
)
from fam_jax.checkpoint.steps import Checkpoints

__all__ = [
    "COMPANIONS",
    "MAY_CHANGE",
    "SOURCE",
    "VOCABULARY",
    "CheckpointError",
    "Checkpoints",
    "DamagedStepError",
    "ReadError",
    "SaveError",
    "absolute",
    "changeable_fields",
    "changed_fields",
    "changes_of_result",
    "check_changes",
    "check_name",
    "check_task_vocabulary",
    "choose_step",
    "companion_folders",
    "end_ids",
    "find_vocabulary",
    "is_trained",
    "load_params",
    "load_state",
    "locate",
    "named_end_ids",
    "read_config",
    "read_config_file",
    "saved_steps",
    "settle_origin",
    "vocabulary_digest",
]
