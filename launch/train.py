"""Trains a model: `python -m launch.train --config=configs/passkey.py --workdir=runs/passkey`.

Any field of the config can be set behind it: `--config.model.num_layers=4`. The same command again resumes. Ctrl-C
stops after the current step and saves. `--restore_step=N` goes back to an earlier checkpoint.

On the hosts of a TPU slice, type it on all of them. `--profile_steps=10,15` traces these steps for XProf;
`--compilation_cache=DIR` keeps compiled programs. Jobs of several processes elsewhere: see launch/processes.py.
"""

import sys

import jax
from absl import app, flags, logging

from fam_jax.config import UserError
from launch.errors import user_errors
from launch.processes import join, leaving_together
from launch.read_config import define_config_flag, parse_flags, resolved_config

define_config_flag("config")
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run, local or gs://...: checkpoints, metrics, evaluations.", required=True
)
RESTORE_STEP = flags.DEFINE_integer("restore_step", None, "Checkpoint to go back to, in place of the latest.")
PROFILE_STEPS = flags.DEFINE_string(
    "profile_steps", None, "FIRST,LAST step of a trace below WORKDIR/profile."
)
QUIET = flags.DEFINE_bool("quiet", False, "No progress on the terminal.")


def profile_steps() -> tuple[int, int] | None:
    """Of the flag.

    Raises:
      UserError: it is not two numbers.
    """
    if PROFILE_STEPS.value is None:
        return None
    try:
        first, last = map(int, PROFILE_STEPS.value.split(","))
    except ValueError:
        raise UserError(
            f"--profile_steps={PROFILE_STEPS.value}: expected FIRST,LAST, such as 10,15"
        ) from None
    return first, last


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
        train(
            config, WORKDIR.value, evaluate=evaluate, restore_step=RESTORE_STEP.value,
            profile_steps=profile_steps(), quiet=QUIET.value,
        )  # fmt: skip
    except Interrupted as stopped:
        if jax.process_index() == 0:
            print(stopped, file=sys.stderr)
        sys.exit(stopped.exit_code)


if __name__ == "__main__":
    with leaving_together(), user_errors():
        sys.argv = join(sys.argv, stop_together=True)  # in place: config_flags looks there for overrides
        app.run(main, flags_parser=parse_flags)
