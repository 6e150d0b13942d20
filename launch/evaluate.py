"""Evaluate a checkpoint from streamed states.

    python -m launch.evaluate --checkpoint=runs/passkey --lengths=4,9,18,36
    python -m launch.evaluate --checkpoint=runs/text --files=books/ --ablations=zeroed,shuffled,frozen

The default task is that of the run; --list shows all tasks. Prints tables, and writes the results with what made them
to CHECKPOINT/evaluations/STEP/TASK.json and, if the task has a plot, TASK.png. docs/evaluation.md has the details, and
the same in Python. On the hosts of a TPU slice, run the same command on all of them.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from . import cli, processes

# Flags that set a field of config.evaluate, and the field.
FIELDS = {
    "lengths": "filler_blocks",
    "keys": "keys",
    "documents": "documents",
    "min_tokens": "min_tokens",
    "ablations": "ablations",
    "batch_size": "batch_size",
}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Raises:
      UserError: an argument is unknown, missing or malformed.
    """
    parser = cli.Parser("evaluate", __doc__, job=True)
    cli.add_checkpoint(parser)
    cli.add_mesh(parser)
    add = parser.add_argument
    add("--list", action=_ListTasks, help="list the tasks and exit")
    add("--task", metavar="NAME", help="default: that of the run, which is text for seqio tasks")
    add("--batch_size", type=int, metavar="N", help="examples read together")
    add("--out", metavar="FILE.json", help="default: CHECKPOINT/evaluations/STEP/TASK.json")
    add = parser.add_argument_group("the task passkey").add_argument
    add("--lengths", type=cli.integers, metavar="N,N,...", help="lengths of the filler, in blocks")
    add("--keys", type=int, metavar="N", help="examples per length")
    add = parser.add_argument_group("the task text").add_argument
    heldout = "files, folders or patterns; default: config.data.heldout_files"
    add("--files", type=cli.paths, default=(), metavar="PATH,...", help=heldout)
    suffixes = "endings of the files that count in a folder; default: config.data.file_suffixes"
    add("--suffixes", type=cli.words, default=(), metavar=".txt,...", help=suffixes)
    add("--documents", type=int, metavar="N", help="number of documents, drawn at random; 0: all")
    add("--min_tokens", type=int, metavar="N", help="leave out shorter documents")
    ablations = "read again with the memory zeroed, shuffled or frozen after every block"
    add("--ablations", type=cli.words, metavar="HOW,...", help=ablations)
    return parser.parse_args(argv)


class _ListTasks(argparse.Action):
    """Print the tasks."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any):
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from fam_jax.evaluation import TASKS

        for name, task in TASKS.items():
            print(f"{name:12}{task.doc}")
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate, and return the exit code.

    Raises:
      UserError: the command line, the checkpoint or the data has a mistake.
    """
    arguments = parse_arguments(argv)
    processes.join(arguments, stop_together=False)
    import jax
    import rich.console

    from fam_jax.evaluation import evaluate

    given = {field: getattr(arguments, flag) for flag, field in FIELDS.items()}
    with cli.progress_bars() as show:
        found = evaluate(
            arguments.checkpoint,
            task=arguments.task,
            step=arguments.step,
            mesh=arguments.mesh,
            files=arguments.files,
            suffixes=arguments.suffixes,
            out=arguments.out,
            command=cli.as_typed("python -m launch.evaluate ")
            + shlex.join(sys.argv[1:] if argv is None else argv),
            on_progress=show,
            **{field: value for field, value in given.items() if value is not None},
        )
    if jax.process_index() == 0:
        console = rich.console.Console(width=None if sys.stdout.isatty() else 100)
        for table in found.tables(arguments.checkpoint):
            console.print(table)
        for path in found.files:
            print(f"written to {path}")
    return 0


if __name__ == "__main__":
    cli.run(main)
