"""Evaluate a checkpoint from streamed states.

    python -m launch.evaluate --checkpoint=runs/passkey --lengths=4,9,18,36
    python -m launch.evaluate --checkpoint=runs/text --files=books/ --ablations=zeroed,shuffled,frozen
    python -m launch.evaluate --checkpoint=runs/passkey --probe=memory
    python -m launch.evaluate --checkpoint=runs/text --suite=gpt3 --data=data/,tfds --limit=200

The default task is that of the run; --list shows all tasks. Prints tables, and writes the results with what made them
to CHECKPOINT/evaluations/STEP/TASK.json and, if the task has a plot, TASK.png. --probe=memory adds its figures to the
JSON file and draws TASK.memory.png. --tasks and --suite run several tasks;
the same command goes on where a killed one stopped. docs/evaluation.md has the details, and the same in Python. On the
hosts of a TPU slice, run the same command on all of them.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from fam_jax.config import UserError

from . import cli, processes

# Flags that set a field of config.evaluate, and the field.
FIELDS = {
    "lengths": "filler_blocks",
    "before": "before_blocks",
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
    cli.add_imports(parser)
    cli.add_mesh(parser)
    add = parser.add_argument
    add("--list", action=_ListTasks, help="list the tasks, and with --data where their data is, and exit")
    add("--task", metavar="NAME", help="default: that of the run, which is text for seqio tasks")
    add("--batch_size", type=cli.at_least(1), metavar="N", help="examples read together")
    add("--out", metavar="FILE.json", help="default: CHECKPOINT/evaluations/STEP/TASK.json")
    probe = (
        "also find out whether, where and how far back the model uses its memory: figures and a page of plots"
    )
    add("--probe", type=cli.words, default=(), metavar="memory", help=probe)
    _add_flags_of_several_tasks(parser)
    add = parser.add_argument_group("the tasks passkey and algorithmic").add_argument
    lengths = (
        "lengths of the filler, the pairs or the list in blocks; with --tasks or --suite, of synthetic prompts in "
        "tokens, as in 4k,1m"
    )
    add("--lengths", type=_lengths, metavar="N,N,...", help=lengths)
    before = (
        "lengths of the filler in front of the key in blocks; each goes with each of --lengths; default: 0"
    )
    add("--before", type=_lengths, metavar="N,N,...", help=before)
    add("--keys", type=cli.at_least(1), metavar="N", help="examples per length")
    add = parser.add_argument_group("the task text").add_argument
    heldout = "files, folders or patterns; default: config.data.heldout_files"
    add("--files", type=cli.paths, default=(), metavar="PATH,...", help=heldout)
    suffixes = "endings of the files that count in a folder; default: config.data.file_suffixes"
    add("--suffixes", type=cli.words, default=(), metavar=".txt,...", help=suffixes)
    add("--documents", type=cli.at_least(0), metavar="N", help="number of documents, drawn at random; 0: all")
    add("--min_tokens", type=cli.at_least(0), metavar="N", help="leave out shorter documents")
    ablations = "read again with the memory zeroed, shuffled or frozen after every block"
    add("--ablations", type=cli.words, metavar="HOW,...", help=ablations)
    return parser.parse_args(argv)


def _add_flags_of_several_tasks(parser: cli.Parser) -> None:
    add = parser.add_argument_group("several tasks").add_argument
    add(
        "--tasks", type=cli.words, default=(), metavar="NAME,...", help="tasks to run, such as boolq,xlsum:ja"
    )
    add(
        "--suite", type=cli.words, default=(), metavar="NAME,...", help="groups of tasks to run, such as gpt3"
    )
    data = "folders with data, and tfds for prepared TFDS datasets; default: tfds"
    add("--data", type=cli.paths, default=(), metavar="DIR,...", help=data)
    shots = (
        "solved examples to show before a question; gpt3: as many as GPT-3 saw; default: 0, or the task's own"
    )
    add("--shots", type=cli.words, default=(), metavar="N,...", help=shots)
    add(
        "--limit",
        type=cli.at_least(0),
        default=0,
        metavar="N",
        help="items, or documents with their questions, drawn by seed; 0: all",
    )
    longest = "leave out documents with more tokens, and say how many; 0: read all"
    add("--limit_tokens", "--limit-tokens", type=cli.at_least(0), default=0, metavar="N", help=longest)
    place = "where questions on documents stand; before: before the document as well as after it"
    add("--question", choices=("after", "before"), default="after", help=place)
    add(
        "--items", type=cli.at_least(1), default=50, metavar="N", help="synthetic tasks: items of each length"
    )
    seeds = "synthetic tasks: number of seeds; each has its own items"
    add("--seeds", type=cli.at_least(1), default=1, metavar="N", help=seeds)
    add(
        "--fresh", action="store_true", help="forget the answers of a run of the same command that was killed"
    )
    often = (
        "save the memory of a document that takes longer to read as often; 0: never (default: %(default)s)"
    )
    add("--save_minutes", type=cli.at_least(0), default=10, metavar="N", help=often)
    add = parser.add_argument_group("tasks of lm-evaluation-harness, as lm_eval:TASK").add_argument
    folders = "folders with task files (YAML), besides those of the harness"
    add("--lm_eval_tasks", type=cli.paths, default=(), metavar="DIR,...", help=folders)
    add("--lm_eval_chat", action="store_true", help="ask by the tokenizer's chat template")


# Flags that only the other way of evaluating reads.
OF_SEVERAL = (
    "data", "shots", "limit", "limit_tokens", "question", "items", "seeds", "fresh", "save_minutes",
    "lm_eval_tasks", "lm_eval_chat",
)  # fmt: skip
OF_ONE = ("before", "keys", "files", "suffixes", "documents", "min_tokens", "ablations")


def _check_meaning(arguments: argparse.Namespace, defaults: argparse.Namespace) -> None:
    """Raise :class:`UserError` if a flag would be ignored."""
    several = is_several(arguments)
    for name in OF_ONE if several else OF_SEVERAL:
        if getattr(arguments, name) != getattr(defaults, name):
            kind = "the tasks passkey, algorithmic and text" if several else "--tasks and --suite"
            raise UserError(f"--{name}: has no meaning here, only for {kind}; leave it out")


def is_several(arguments: argparse.Namespace) -> bool:
    """Return whether the command asks for tasks that `evaluate_tasks` runs."""
    return bool(arguments.tasks or arguments.suite) or _is_item_task(arguments.task)


def _lengths(text: str) -> tuple[int, ...]:
    """Argument type: whole numbers with commas between them, in which k stands for 1024 and m for 1024 * 1024."""
    factors = {"k": 1 << 10, "m": 1 << 20}

    def number(part: str) -> str:
        digits, factor = part.strip()[:-1], factors.get(part.strip()[-1:].lower())
        return str(int(digits) * factor) if factor and digits.isdecimal() else part

    try:
        return cli.integers(",".join(map(number, text.split(","))))
    except argparse.ArgumentTypeError as error:
        if "at most" in str(error):
            raise
        raise argparse.ArgumentTypeError(f"expected numbers with commas between them, got {text!r}") from None


class _ListTasks(argparse.Action):
    """Ask for the list of tasks, which needs no checkpoint."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any):
        super().__init__(option_strings, dest, nargs=0, default=False, **options)

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: Any) -> None:
        setattr(namespace, self.dest, True)
        for action in parser._actions:
            action.required = False


def list_tasks(arguments: argparse.Namespace) -> None:
    """Print the tasks, and where their data is if --data says where to look."""
    from fam_jax.evaluation.harness_tasks import PREFIX
    from fam_jax.evaluation.item_tasks import ITEM_TASKS
    from fam_jax.evaluation.planning import DOCUMENTS, availability, find_tasks
    from fam_jax.evaluation.rows import Data, how_to_prepare
    from fam_jax.evaluation.tasks import TASKS

    names = (*arguments.tasks, *arguments.suite) or (*TASKS, *DOCUMENTS, *ITEM_TASKS)
    if arguments.data:
        for name, doc, place in availability(find_tasks(names), Data(arguments.data)):
            print(f"{name:34}{doc}; {place}")
        return
    for name in find_tasks(names):
        if name.startswith(PREFIX):
            print(f"{name:34}task of lm-evaluation-harness, which finds its data itself")
            continue
        if name in TASKS or name in DOCUMENTS:
            print(f"{name:34}{TASKS[name].doc if name in TASKS else DOCUMENTS[name][-1]}")
            continue
        task = ITEM_TASKS[name]
        ways = "makes its own text" if task.synthetic else how_to_prepare(next(iter(task.sources.values())))
        print(f"{name:34}{task.doc}; {ways}")


def _is_item_task(name: str | None) -> bool:
    """Return whether --task names a task that only `evaluate_tasks` runs."""
    from fam_jax.evaluation.harness_tasks import PREFIX
    from fam_jax.evaluation.item_tasks import ITEM_TASKS
    from fam_jax.evaluation.planning import DOCUMENTS

    return name in ITEM_TASKS or name in DOCUMENTS or (name or "").startswith(PREFIX)


def run_tasks(arguments: argparse.Namespace, command: str) -> None:
    """Run --tasks and --suite, print a table, and name what was skipped.

    Raises:
      UserError: flags contradict each other, or as `evaluate_tasks`.
    """
    import rich.console

    from fam_jax.evaluation import HowToRun, evaluate_tasks

    names = (*arguments.tasks, *arguments.suite)
    if arguments.task and names:
        raise UserError("--task: has no meaning beside --tasks or --suite; give only one of them")
    if arguments.probe:
        raise UserError(
            "--probe: measures a model on the task passkey or text; give --task=text, without --tasks or --suite"
        )
    how = HowToRun(
        data=arguments.data or ("tfds",),
        shots=arguments.shots,
        limit=arguments.limit,
        limit_tokens=arguments.limit_tokens,
        question=arguments.question,
        count=arguments.items,
        seeds=arguments.seeds,
        save_minutes=arguments.save_minutes,
        lm_eval_tasks=arguments.lm_eval_tasks,
        lm_eval_chat=arguments.lm_eval_chat,
        **({} if arguments.lengths is None else {"lengths": arguments.lengths}),
    )
    settings = {} if arguments.batch_size is None else {"batch_size": arguments.batch_size}
    with cli.progress_bars() as show:
        found = evaluate_tasks(
            arguments.checkpoint,
            names or (arguments.task,),
            how=how,
            step=arguments.step,
            mesh=arguments.mesh,
            out=arguments.out,
            fresh=arguments.fresh,
            imports=arguments.imports,
            command=command,
            on_progress=show,
            **settings,
        )
    console = rich.console.Console(width=None if sys.stdout.isatty() else 120)
    console.print(found.table(arguments.checkpoint))
    for name, result in found.suites.items():
        if result.get("documents_over_limit"):
            left_out = (
                f"{result['documents_over_limit']:,} documents of more than {result['limit_tokens']:,} tokens"
            )
            print(f"{name}: left out {left_out}")
    for name, reason in found.skipped.items():
        print(f"skipped {name}: {reason}")
    print(f"written to {found.path}")


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate, and return the exit code.

    Raises:
      UserError: the command line, the checkpoint or the data has a mistake.
    """
    arguments = parse_arguments(argv)
    if arguments.list:
        list_tasks(arguments)
        return 0
    _check_meaning(arguments, parse_arguments([f"--checkpoint={arguments.checkpoint}"]))
    processes.join(arguments, stop_together=False)
    import jax
    import rich.console

    from fam_jax.evaluation import evaluate

    typed = sys.argv[1:] if argv is None else argv
    command = cli.as_typed("python -m launch.evaluate ") + shlex.join(typed)
    if is_several(arguments):
        run_tasks(arguments, command)
        return 0
    given = {field: getattr(arguments, flag) for flag, field in FIELDS.items()}
    with cli.progress_bars() as show:
        found = evaluate(
            arguments.checkpoint,
            task=arguments.task,
            step=arguments.step,
            mesh=arguments.mesh,
            files=arguments.files,
            suffixes=arguments.suffixes,
            probes=arguments.probe,
            out=arguments.out,
            imports=arguments.imports,
            command=command,
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
