"""Trains a model: `python -m launch.train --config=configs/passkey.py --workdir=runs/passkey`.

Any field of the config can be set behind it: `--config.model.num_layers=4`. The same command again resumes. Ctrl-C
stops after the current step and saves. `--restore_step=N` goes back to an earlier checkpoint.
"""

import sys

from absl import app, flags, logging

from fam_jax.config import UserError
from launch.errors import user_errors
from launch.read_config import define_config_flag, parse_flags, resolved_config

define_config_flag("config")
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run: checkpoints, metrics, evaluations.", required=True
)
RESTORE_STEP = flags.DEFINE_integer("restore_step", None, "Checkpoint to go back to, in place of the latest.")
QUIET = flags.DEFINE_bool("quiet", False, "No progress on the terminal.")


def main(argv: list[str]) -> None:
    """Resolves the config and trains."""
    if argv[1:]:
        raise UserError(f"{argv[1]}: not a flag; fields of the config are set as --config.group.field=value")
    config = resolved_config("config")
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every checkpoint

    # After the config: it takes seconds, for TensorFlow.
    from fam_jax.train.loop import Interrupted, train
    from launch.evaluation import in_training

    evaluate = in_training(config) if config.evaluate.every else None
    try:
        train(config, WORKDIR.value, evaluate=evaluate, restore_step=RESTORE_STEP.value, quiet=QUIET.value)
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(stopped.exit_code)


if __name__ == "__main__":
    with user_errors():
        app.run(main, flags_parser=parse_flags)
