"""The command-line kit: flags, configs, errors, exit codes and progress bars, the same in every program.

A program is a function `main(argv=None) -> int`, which returns the exit code, over library functions that know nothing
of flags:

    def main(argv: Sequence[str] | None = None) -> int:
        parser = cli.Parser("example", __doc__, config=True, job=True)
        cli.add_mesh(parser)
        arguments = parser.parse_args(argv)
        processes.join(arguments, stop_together=False)
        config = cli.load_config(arguments.config, arguments.overrides)
        ...
        return 0

    if __name__ == "__main__":
        cli.run(main)

Mistakes of the user are raised as :class:`fam_jax.config.UserError`; :func:`run` prints them.
"""

import argparse
import contextlib
import functools
import inspect
import io
import itertools
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import rich.console
import rich.progress

from fam_jax.config import Config, ConfigError, MeshConfig, UserError
from fam_jax.config.fields import LARGEST_INT, field_types
from fam_jax.config.memory import memory_config_type
from fam_jax.config.overrides import Override, parse_value
from fam_jax.config.training import LARGEST_SEED

from . import processes
from .config_file import load_config
from .errors import user_errors

__all__ = [
    "PROGRAMS",
    "ArgumentParser",
    "Parser",
    "add_checkpoint",
    "add_imports",
    "add_mesh",
    "as_typed",
    "at_least",
    "integers",
    "load_config",
    "mesh",
    "paths",
    "progress_bar",
    "progress_bars",
    "run",
    "seed",
    "words",
]

FIELD = "--config."
# The metavars of flags whose value is a file or a folder.
PLACE = re.compile(r"(DIR|FILE|PATH|CKPT|RUN)\b")

# Command of `fam-jax` -> module of this package.
PROGRAMS = {
    "train": "train",
    "evaluate": "evaluate",
    "report": "report",
    "generate": "generate",
    "plan": "plan",
    "import": "import_hf",
    "export": "export_hf",
    "demo": "demo",
    "demo-data": "demo_data",
    "train-vocabulary": "train_vocabulary",
    "jobset": "tpu.jobset",
}


def as_typed(text: str) -> str:
    """Return a text with every `python -m launch.PROGRAM` in the form that a user of this package types.

    In a clone, this package is `launch`. An installed fam_jax has it as `fam_jax_launch`, behind the command `fam-jax`.
    """
    if __package__ == "launch":
        return text
    commands = {module: f"fam-jax {command}" for command, module in PROGRAMS.items()}

    def typed(found: re.Match[str]) -> str:
        return commands.get(found[1], f"python -m {__package__}.{found[1]}")

    return re.sub(r"python -m launch\.(\w+(?:\.\w+)*)", typed, text)


class ArgumentParser(argparse.ArgumentParser):
    """An argument parser that raises :class:`UserError` for mistakes and takes --some-flag and --some_flag alike."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse arguments; argparse calls it for `parse_args` too.

        Raises:
          UserError: an argument is unknown, missing or malformed.
        """
        given = sys.argv[1:] if args is None else args
        spelled = {option.replace("_", "-"): option for option in self._option_string_actions}

        def respell(argument: str) -> str:
            name, equals, value = argument.partition("=")
            return spelled.get(name.replace("_", "-"), name) + equals + value

        arguments = [respell(argument) for argument in given]
        self._reject_empty_places(arguments)
        return super().parse_known_args(arguments, namespace)

    def _reject_empty_places(self, arguments: Sequence[str]) -> None:
        """Raise :class:`UserError` for a flag whose file or folder is an empty text, which Python takes for ".".

        A shell makes such a flag of `--workdir=$RUN` if RUN is not set.
        """
        for argument, following in itertools.zip_longest(arguments, arguments[1:]):
            name, equals, value = argument.partition("=")
            action = self._option_string_actions.get(name)
            if action is None or action.nargs == 0 or not PLACE.match(str(action.metavar)):
                continue
            if not (value if equals else following):
                raise UserError(f"{name}: is empty; give a path, or leave the flag out")

    def error(self, message: str) -> NoReturn:
        """Raise :class:`UserError`; argparse calls it."""
        missing = message.removeprefix("the following arguments are required: ")
        message = message if missing == message else f"missing {missing}"
        raise UserError(f"{message}; --help lists the flags")


class Parser(ArgumentParser):
    """The parser of a program of this folder."""

    def __init__(
        self, program: str, doc: str | None, *, config: bool = False, fields: bool = False, job: bool = False
    ):
        """Create the parser of `python -m launch.PROGRAM`.

        Args:
          program: name of its module, such as train.
          doc: docstring of its module. --help shows its first line at the top and the others at the end.
          config: whether to take --config=FILE and config fields, `--config.GROUP.FIELD=VALUE`. The namespace then has
            `config` and `overrides`, for :func:`load_config`.
          fields: whether to take config fields, for a program that has a config of its own. The namespace then has
            `overrides`.
          job: whether the program can be one of several processes; see :func:`launch.processes.join`.
        """
        summary, _, details = as_typed(doc or "").strip().partition("\n")
        super().__init__(
            prog=as_typed(f"python -m launch.{program}"),
            description=summary,
            epilog=details.strip("\n") or None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self._takes_fields = config or fields
        if self._takes_fields:
            add = self.add_argument_group("config").add_argument
            if config:
                add(
                    "--config",
                    required=True,
                    metavar="FILE[:ARG]",
                    help="a file, such as configs/passkey.py:fam, or a config of fam_jax by name, such as passkey:fam",
                )
            add(
                f"{FIELD}GROUP.FIELD",
                default=argparse.SUPPRESS,
                metavar="VALUE",
                help="set a field, as in --config.model.num_layers=4 or --config.model.memory.kind=bswa",
            )
            add("--help-config", action=_HelpConfig, help="list all config fields and exit")
        if job:
            processes.add_flags(self)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse arguments and take out the config fields; argparse calls it for `parse_args` too.

        Raises:
          UserError: an argument is unknown, missing or malformed.
        """
        given = [*(sys.argv[1:] if args is None else args)]
        if not self._takes_fields:
            return super().parse_known_args(given, namespace)
        given, overrides = _take_overrides(given)
        found, rest = super().parse_known_args(given, namespace)
        found.overrides = overrides
        return found, rest


def _take_overrides(arguments: Sequence[str]) -> tuple[list[str], list[Override]]:
    """Divide arguments into those for argparse and config fields, as `--config.x.y=1` or `--config.x.y 1`."""
    rest, overrides = [], []
    remaining = iter(arguments)
    for argument in remaining:
        if not argument.startswith(FIELD):
            rest.append(argument)
            continue
        name, equals, value = argument.partition("=")
        if not equals:
            value = next(remaining, "--")
            if value.startswith("--"):
                raise ConfigError(f"{name}: has no value; write {name}=VALUE")
        overrides.append(Override(name.removeprefix("--"), value))
    return rest, overrides


class _HelpConfig(argparse.Action):
    """Print all config fields."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any):
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(describe_config(), end="")
        parser.exit()


def describe_config() -> str:
    """Return the documentation of every config field, by group."""
    from fam_jax.memories.registry import memory_kinds

    groups: dict[str, Any] = {f"config.{name}": kind for name, kind in field_types(Config).items()}
    for kind in memory_kinds():
        groups[f"config.model.memory, if its kind is {kind}"] = memory_config_type(kind)
    sections = []
    for title, group in groups.items():
        documentation = inspect.cleandoc(group.__doc__ or "")
        sections.append(f"{title}\n{'=' * len(title)}\n{documentation}\n")
    return "\n".join(sections)


def words(text: str) -> tuple[str, ...]:
    """Argument type: words with commas between them."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def paths(text: str) -> tuple[str, ...]:
    """Argument type: paths with commas between them, or as in Python, ("a, b.txt", "c.txt"); see `parse_value`."""
    try:
        return parse_value(tuple[str, ...], text, "paths")
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("paths: ")) from None


def integers(text: str) -> tuple[int, ...]:
    """Argument type: whole numbers with commas between them."""
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers with commas between them, got {text!r}") from None
    if any(abs(number) > LARGEST_INT for number in numbers):
        raise argparse.ArgumentTypeError(f"numbers must be at most {LARGEST_INT}, got {text}")
    return numbers


def at_least(minimum: int, maximum: int = LARGEST_INT) -> Callable[[str], int]:
    """Return an argument type: a whole number from `minimum` to `maximum`."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
        if number < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {number}")
        if number > maximum:
            raise argparse.ArgumentTypeError(f"must be at most {maximum}, got {number}")
        return number

    return parse


def seed(text: str) -> int:
    """Argument type: the seed of random numbers."""
    return at_least(0, LARGEST_SEED)(text)


def mesh(text: str) -> MeshConfig:
    """Argument type: devices along each mesh axis, as in data=2,fsdp=4, or as three numbers, data, fsdp and tensor."""
    axes = list(field_types(MeshConfig))
    parts = text.split(",")
    if len(parts) == len(axes) and "=" not in text:
        parts = [f"{axis}={part}" for axis, part in zip(axes, parts, strict=True)]
    sizes: dict[str, int] = {}
    try:
        for part in parts:
            axis, _, size = part.partition("=")
            if axis not in axes or axis in sizes:
                raise ValueError
            sizes[axis] = int(size)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected the devices along some of {', '.join(axes)}, such as data=2,fsdp=4, got {text!r}"
        ) from None
    try:
        return MeshConfig(**sizes)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(f"{error}") from error


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add --checkpoint and --step, which choose what to load."""
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="workdir of a run, or an imported model"
    )
    parser.add_argument("--step", type=at_least(0), metavar="N", help="saved step; default: the latest")


def add_imports(parser: argparse.ArgumentParser) -> None:
    """Add --imports, the modules that a checkpoint's config may import."""
    parser.add_argument(
        "--imports",
        type=words,
        default=(),
        metavar="MODULE,...",
        help="modules that the run's config.data.imports names, and that may run; default: none",
    )


def add_mesh(parser: argparse.ArgumentParser) -> None:
    """Add --mesh, a MeshConfig."""
    parser.add_argument(
        "--mesh",
        type=mesh,
        default=MeshConfig(),
        metavar="AXIS=N,...",
        help="devices along each axis, such as data=2,fsdp=4; an axis of 0 takes the rest; default: data=0",
    )


def run(main: Callable[[], int]) -> NoReturn:
    """Run a program and exit with its exit code. A mistake of the user is one line on stderr and exit code 2.

    Characters that standard output cannot show, such as those of a path that is not UTF-8, are shown as escapes.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    with processes.leaving_together(), user_errors():
        sys.exit(main())


@contextlib.contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int | None], None]]:
    """Show a progress bar for each name while the context lasts, on stderr if that is a terminal.

    Yields:
      A function to call with (name, done, total); a total of None is unknown.
    """
    console = rich.console.Console(stderr=True)
    with rich.progress.Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        bars: dict[str, rich.progress.TaskID] = {}

        def show(name: str, done: int, total: int | None) -> None:
            if name not in bars:
                bars[name] = progress.add_task(name, total=total)
            progress.update(bars[name], completed=done, total=total)

        yield show


@contextlib.contextmanager
def progress_bar(name: str) -> Iterator[Callable[[int, int | None], None]]:
    """Show one progress bar while the context lasts, on stderr if that is a terminal.

    Yields:
      A function to call with (done, total).
    """
    with progress_bars() as show:
        yield functools.partial(show, name)
