"""Train a model: `python -m launch.train --config=configs/passkey.py --workdir=runs/passkey`.

Any config field can be set on the command line: `--config.model.num_layers=4`. Run the same command again to resume.
Ctrl-C stops after the current step and saves. `--restore_step=N` goes back to an earlier checkpoint.

On the hosts of a TPU slice, run the same command on all of them. `--profile_steps=10,15` traces these steps for XProf.
"""

import argparse
import sys
from collections.abc import Sequence

import jax
from absl import logging

from fam_jax.config import UserError
from launch import cli, processes


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line.

    Raises:
      UserError: an argument is unknown, missing or malformed.
    """
    parser = cli.Parser("train", __doc__, config=True, job=True)
    add = parser.add_argument
    add("--workdir", required=True, metavar="DIR", help="folder of the run, local or gs://...")
    add("--restore_step", type=int, metavar="N", help="checkpoint to go back to, in place of the latest")
    add("--profile_steps", metavar="FIRST,LAST", help="steps of a trace below WORKDIR/profile")
    add("--quiet", action="store_true", help="no progress on the terminal")
    return parser.parse_args(arguments)


def profile_steps(text: str | None) -> tuple[int, int] | None:
    """Return the first and last step to trace.

    Raises:
      UserError: the text is not two numbers.
    """
    if text is None:
        return None
    try:
        first, last = map(int, text.split(","))
    except ValueError:
        raise UserError(f"--profile_steps={text}: expected FIRST,LAST, such as 10,15") from None
    return first, last


def main(argv: Sequence[str] | None = None) -> int:
    """Train; return the exit code."""
    given = [sys.argv[0], *(sys.argv[1:] if argv is None else argv)]
    arguments = parse_arguments(processes.join(given, stop_together=True)[1:])
    steps = profile_steps(arguments.profile_steps)
    config = cli.load_config(arguments.config, arguments.overrides)
    logging.set_verbosity(logging.WARNING)  # Orbax logs every checkpoint

    # After the config is known to be right: importing TensorFlow takes seconds.
    from fam_jax.evaluate import evaluate_in_training
    from fam_jax.train.loop import Interrupted, train

    evaluate = evaluate_in_training(config, arguments.workdir) if config.evaluate.every else None
    try:
        train(
            config,
            arguments.workdir,
            evaluate=evaluate,
            restore_step=arguments.restore_step,
            profile_steps=steps,
            quiet=arguments.quiet,
        )
    except Interrupted as stopped:
        if jax.process_index() == 0:
            print(stopped, file=sys.stderr)
        return stopped.exit_code
    return 0


if __name__ == "__main__":
    cli.run(main)
