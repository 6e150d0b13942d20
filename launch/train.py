"""Train a model.

    python -m launch.train --config=configs/passkey.py --workdir=runs/passkey

Ctrl-C stops after the current step and saves; run the same command again to resume. A workdir without a checkpoint
takes any config. Later, fields that do not change the result may differ; others only if --allow_change names them.
--fork=RUN/STEP starts a new run from the state of another. On the hosts of a TPU slice, run the same command on all of
them. For jobs of several processes elsewhere, see launch/processes.py.
"""

import argparse
import sys
from collections.abc import Sequence

from absl import logging

from . import cli, processes


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Raises:
      UserError: an argument is unknown, missing or malformed.
    """
    parser = cli.Parser("train", __doc__, config=True, job=True)
    add = parser.add_argument
    add(
        "--workdir",
        required=True,
        metavar="DIR",
        help="folder of the run, local or gs://...: checkpoints, metrics, evaluations",
    )
    add(
        "--restore_step",
        type=cli.at_least(0),
        metavar="N",
        help="go back to this checkpoint; later ones are deleted",
    )
    add(
        "--profile_steps",
        type=first_and_last,
        metavar="FIRST,LAST",
        help="trace these steps for XProf, to WORKDIR/profile",
    )
    add(
        "--allow_change",
        type=cli.words,
        default=(),
        metavar="FIELD,...",
        help="fields that may differ from the run so far, such as optimizer.learning_rate",
    )
    add(
        "--fork",
        default="",
        metavar="RUN[/STEP]",
        help="start a new run from the state of another: parameters, optimizer, step and data",
    )
    add("--quiet", action="store_true", help="print no progress")
    return parser.parse_args(argv)


def first_and_last(text: str) -> tuple[int, int]:
    """Argument type: the first and the last step of a range."""
    try:
        first, last = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected FIRST,LAST, such as 10,15, got {text!r}") from None
    return first, last


def main(argv: Sequence[str] | None = None) -> int:
    """Train, and return the exit code.

    Raises:
      UserError: the command line, the config or the data has a mistake.
    """
    arguments = parse_arguments(argv)
    processes.join(arguments, stop_together=True)
    config = cli.load_config(arguments.config, arguments.overrides)
    logging.set_verbosity(logging.WARNING)  # Orbax logs every checkpoint

    # Imported once the config is known to be right, as TensorFlow takes seconds.
    import jax

    from fam_jax.training.loop import Interrupted, train

    try:
        train(
            config,
            arguments.workdir,
            restore_step=arguments.restore_step,
            profile_steps=arguments.profile_steps,
            allow_change=arguments.allow_change,
            fork=arguments.fork,
            quiet=arguments.quiet,
        )
    except Interrupted as stopped:
        if jax.process_index() == 0:
            print(stopped, file=sys.stderr)
        return stopped.exit_code
    return 0


if __name__ == "__main__":
    cli.run(main)
