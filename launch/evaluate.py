"""Evaluate a checkpoint: PassKey retrieval by generation, or the loss on held-out text.

    python -m launch.evaluate --checkpoint=runs/passkey --lengths=4,9,18,36
    python -m launch.evaluate --checkpoint=runs/text --files=books/ --ablations=zeroed,shuffled,frozen

Restores the parameters alone, on whatever devices there are, with the config of the run. Prints a table and writes the
results, with what made them, to CHECKPOINT/evaluations/STEP/TASK.json, and a picture beside them where there is one.

On the hosts of a TPU slice, run the same command on all of them.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import rich.console

from fam_jax.config import UserError
from launch import cli, processes


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line.

    Raises:
      UserError: an argument is unknown, missing or malformed.
    """
    parser = cli.Parser("evaluate", __doc__, job=True)
    cli.add_checkpoint(parser)
    cli.add_mesh(parser)
    add = parser.add_argument
    add("--list", action=_List, help="list the tasks and exit")
    add("--task", metavar="NAME", help="default: that of the run (text for seqio tasks)")
    add("--lengths", type=cli.integers, metavar="N,N,...", help="passkey: lengths of filler, in blocks")
    add("--keys", type=int, metavar="N", help="passkey: examples per length")
    add(
        "--files", type=cli.words, default=(), metavar="PATH,...",
        help="text: files, folders or patterns, in place of config.data.heldout_files",
    )  # fmt: skip
    add(
        "--suffixes", type=cli.words, default=(), metavar=".txt,...",
        help="text: endings of files that count in folders; default: config.data.file_suffixes",
    )  # fmt: skip
    add("--documents", type=int, metavar="N", help="text: number of documents, drawn at random; 0: all")
    add("--min_tokens", type=int, metavar="N", help="text: leave out shorter documents")
    add(
        "--ablations", type=cli.words, metavar="HOW,...",
        help="text: measure again with the memory zeroed, shuffled or frozen",
    )  # fmt: skip
    add("--batch_size", type=int, metavar="N", help="examples read together")
    add("--out", metavar="FILE.json", help="default: CHECKPOINT/evaluations/STEP/TASK.json")
    return parser.parse_args(arguments)


class _List(argparse.Action):
    """Print the tasks."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: str):
        super().__init__(option_strings, dest, nargs=0, help=kwargs.get("help"))

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from fam_jax.evaluate.tasks import TASKS

        print("\n".join(f"{name:10} {task.doc}" for name, task in TASKS.items()))
        parser.exit()


def check_out(out: str | None) -> None:
    """Raise :class:`UserError` if the results could not be written: evaluation may take hours."""
    if out is None or "://" in out:
        return
    path = Path(out).expanduser()
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UserError(f"--out={out}: cannot be written; give a file in a folder that exists")


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate; return the exit code."""
    arguments = parse_arguments(argv)
    processes.join(arguments, stop_together=False)
    check_out(arguments.out)
    changes = {
        "filler_blocks": arguments.lengths, "keys": arguments.keys, "batch_size": arguments.batch_size,
        "documents": arguments.documents, "min_tokens": arguments.min_tokens, "ablations": arguments.ablations,
    }  # fmt: skip
    from fam_jax.evaluate import run, tasks

    with cli.progress_bars() as show:
        record = run.evaluate(
            arguments.checkpoint,
            task=arguments.task,
            step=arguments.step,
            mesh=arguments.mesh,
            files=arguments.files,
            suffixes=arguments.suffixes,
            out=arguments.out,
            command=shlex.join(
                ["python", "-m", "launch.evaluate", *(sys.argv[1:] if argv is None else argv)]
            ),
            on_progress=show,
            **{name: value for name, value in changes.items() if value is not None},
        )
    if jax.process_index() > 0:
        return 0
    console = rich.console.Console(width=None if sys.stdout.isatty() else 100)
    task = tasks.task_of(record["task"])
    for table in task.tables(record, f"step {record['step']} of {arguments.checkpoint}"):
        console.print(table)
    path = arguments.out or run.results_file(Path(arguments.checkpoint), record["step"], record["task"])
    print(f"written to {path}")
    if task.draw is not None:
        print(f"drawn in {Path(path).with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    cli.run(main)
