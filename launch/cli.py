"""What all programs share: flags, configs, errors, exit codes and progress bars."""

import argparse
import contextlib
import importlib.util
import inspect
import os
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import rich.console
import rich.progress

from fam_jax.config import Config, ConfigError, MeshConfig, UserError, resolve
from fam_jax.config.fields import constraint_of
from fam_jax.config.memory import memory_config_type
from fam_jax.config.overrides import Override, apply_overrides
from launch import processes
from launch.errors import user_errors

PREFIX = "--config."


class ArgumentParser(argparse.ArgumentParser):
    """An argument parser whose mistakes are :class:`UserError`; it takes --some-flag and --some_flag alike."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse arguments; called by `parse_args` too."""
        given = [*(sys.argv[1:] if args is None else args)]
        spelled = {option.replace("_", "-"): option for option in self._option_string_actions}

        def respell(argument: str) -> str:
            name, equals, value = argument.partition("=")
            return spelled.get(name.replace("_", "-"), name) + equals + value

        return super().parse_known_args([respell(argument) for argument in given], namespace)

    def error(self, message: str) -> NoReturn:
        """Raise :class:`UserError`; called by argparse."""
        raise UserError(f"{message}; --help lists the flags")


class Parser(ArgumentParser):
    """The parser of a program of this folder."""

    def __init__(
        self, program: str, doc: str | None, *, config: bool = False, fields: bool = False, job: bool = False
    ):
        """Create the parser of `python -m launch.PROGRAM`.

        Args:
          program: its name.
          doc: docstring of its module: a summary line, and details that --help shows at the end.
          config: whether it takes --config=FILE and config fields.
          fields: whether it takes config fields, --config.GROUP.FIELD=VALUE, of a config of its own.
          job: whether it can run as one of several processes.
        """
        summary, _, details = (doc or "").partition("\n")
        super().__init__(
            prog=f"python -m launch.{program}",
            description=summary,
            epilog=details.strip() or None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self._takes_fields = config or fields
        if self._takes_fields:
            group = self.add_argument_group("config")
            if config:
                group.add_argument(
                    "--config",
                    required=True,
                    metavar="FILE[:ARG]",
                    help="config file, such as configs/passkey.py:fam",
                )
            group.add_argument(
                "--config.GROUP.FIELD",
                dest="config_field",
                metavar="VALUE",
                help="set a field, such as --config.model.num_layers=4; --help-config lists all fields",
            )
            group.add_argument(
                "--help-config", action=_HelpConfig, help="list all fields of a config and exit"
            )
        if job:
            processes.add_arguments(self)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse arguments; called by `parse_args` too. Sets `overrides` for programs with config fields."""
        given = [*(sys.argv[1:] if args is None else args)]
        overrides: list[Override] = []
        if self._takes_fields:
            given, overrides = _take_overrides(given)
        found, rest = super().parse_known_args(given, namespace)
        found.overrides = overrides
        return found, rest


def _take_overrides(arguments: list[str]) -> tuple[list[str], list[Override]]:
    """Divide arguments into those for argparse and the config fields, given as one word or as two."""
    rest, overrides = [], []
    words = iter(arguments)
    for word in words:
        if not word.startswith(PREFIX):
            rest.append(word)
            continue
        name, equals, value = word.partition("=")
        if not equals:
            following = next(words, None)
            if following is None:
                raise ConfigError(f"{name}: has no value; write {name}=VALUE")
            value = following
        overrides.append(Override(name.removeprefix("--"), value))
    return rest, overrides


def run(main: Callable[[Sequence[str] | None], int]) -> NoReturn:
    """Run a program and exit with its exit code; a user's mistake is one line and exit code 2."""
    with processes.leaving_together(), user_errors():
        sys.exit(main(None))


def load_config(name: str, overrides: Sequence[Override] = ()) -> Config:
    """Load a config file, set fields, and check the result.

    Args:
      name: FILE, or FILE:ARG to call its `get_config` with ARG.
      overrides: fields to set.

    Raises:
      ConfigError: the file cannot be loaded (the message names file and line), or the config is not valid.
    """
    path, colon, argument = name.partition(":")
    if not Path(path).is_file():
        raise ConfigError(f"--config={name}: there is no such file")
    with errors_of_file(path):
        module = _load(path)
        get_config = getattr(module, "get_config", None)
        if not callable(get_config):
            raise ConfigError(f"--config={name}: {path} defines no function get_config")
        if colon and not inspect.signature(get_config).parameters:
            raise ConfigError(
                f"--config={name}: get_config of {path} takes no argument, but there is {argument!r}"
            )
        values = get_config(argument) if colon else get_config()
    values = values.to_dict() if hasattr(values, "to_dict") else values
    apply_overrides(values, overrides)
    return resolve(values)


def _load(path: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"config_{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def errors_of_file(path: str) -> Iterator[None]:
    """Turn an error inside a user's file into one line with the place in that file."""
    try:
        yield
    except UserError:
        raise
    except SyntaxError as error:
        where = f"{error.filename or path}, line {error.lineno}"
        raise ConfigError(f"{where}: {error.msg}; correct the file") from error
    except Exception as error:
        own = os.path.realpath(path)
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if os.path.realpath(frame.filename) == own]
        where = f"{path}, line {lines[-1]}" if lines else path
        what = " ".join(str(error).split()) or "no message"
        raise ConfigError(f"{where}: {type(error).__name__}: {what}; correct the file") from error


class _HelpConfig(argparse.Action):
    """Print the meaning of every config field."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any):
        super().__init__(option_strings, dest, nargs=0, **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(describe_fields())
        parser.exit()


def describe_fields() -> str:
    """Return the meaning of every config field, by group."""
    from fam_jax.memories.registry import memory_kinds

    groups: list[tuple[str, Any]] = [
        (f"config.{name}", type(getattr(Config(), name))) for name in Config.__dataclass_fields__
    ]
    groups += [(f"config.model.memory, kind {kind}", memory_config_type(kind)) for kind in memory_kinds()]
    lines = []
    for title, group in groups:
        lines.append(title)
        for name, field in group.__dataclass_fields__.items():
            limits = constraint_of(field)
            choices = f" One of {', '.join(limits.choices)}." if limits.choices else ""
            lines.append(
                f"  {name} ({field.default!r}): {limits.doc}{choices}" if limits.doc else f"  {name}: a group"
            )
        lines.append("")
    return "\n".join(lines)


def words(text: str) -> tuple[str, ...]:
    """Argument type: words with commas between them."""
    return tuple(part for part in text.split(",") if part)


def integers(text: str) -> tuple[int, ...]:
    """Argument type: whole numbers with commas between them."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers with commas between them, got {text!r}") from None


def mesh(text: str) -> MeshConfig:
    """Argument type: devices along each mesh axis, such as data=2,fsdp=4, or DATA,FSDP,TENSOR."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    try:
        if all("=" in part for part in parts) and parts:
            given = dict(part.split("=", 1) for part in parts)
            unknown = given.keys() - MeshConfig.__dataclass_fields__.keys()
            if unknown:
                raise ValueError
            return MeshConfig(**{name: int(size) for name, size in given.items()})
        data, fsdp, tensor = map(int, parts)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected axes and their devices, such as data=2,fsdp=4,tensor=1 (data=0 takes the rest), got {text!r}"
        ) from None
    return MeshConfig(data=data, fsdp=fsdp, tensor=tensor)


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add --checkpoint and --step."""
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="workdir of a training run")
    parser.add_argument("--step", type=int, metavar="N", help="saved step; default: the latest")


def add_mesh(parser: argparse.ArgumentParser) -> None:
    """Add --mesh."""
    parser.add_argument(
        "--mesh",
        type=mesh,
        default=MeshConfig(),
        metavar="AXIS=N,...",
        help="devices along each mesh axis, such as data=2,fsdp=4; default: all along data",
    )


@contextlib.contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int | None], None]]:
    """Show a bar on stderr for each name, if that is a terminal.

    Yields:
      A function to call with (name, done, total).
    """
    console = rich.console.Console(stderr=True)
    with rich.progress.Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        bars: dict[str, rich.progress.TaskID] = {}

        def show(name: str, done: int, total: int | None) -> None:
            if name not in bars:
                bars[name] = progress.add_task(name)
            progress.update(bars[name], completed=done, total=total)

        yield show


@contextlib.contextmanager
def progress_bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """Show one bar on stderr, if that is a terminal.

    Yields:
      A function to call with (done, total).
    """
    with progress_bars() as show:
        yield lambda done, total: show(name, done, total)
