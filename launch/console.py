"""The command `fam-jax`: all programs under one name, for an installed fam_jax.

    fam-jax train --config=passkey --workdir=runs/passkey

In a clone, `python -m launch.train` is the same program.
"""

import ast
import importlib
import importlib.metadata
import importlib.util
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from fam_jax.config import UserError

from . import cli


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program that the first argument names, with the others; return its exit code.

    Raises:
      UserError: there is no such program, or its command line has a mistake.
    """
    given = [*(sys.argv[1:] if argv is None else argv)]
    if not given or given[0].startswith("-"):
        return _describe(given)
    command = given[0].replace("_", "-")
    if command not in cli.PROGRAMS:
        raise UserError(f"{given[0]}: unknown command; commands are {', '.join(cli.PROGRAMS)}")
    program = importlib.import_module(f".{cli.PROGRAMS[command]}", __package__)
    return program.main(given[1:])


def _describe(given: list[str]) -> int:
    """Print what --help or --version asks for."""
    width = max(map(len, cli.PROGRAMS))
    commands = [f"  {name:{width}}  {_summary(module)}" for name, module in cli.PROGRAMS.items()]
    parser = cli.ArgumentParser(
        prog="fam-jax",
        description="Train, evaluate and use transformers with feedback attention memory.",
        epilog="\n".join(
            ["commands:", *commands, "", "fam-jax COMMAND --help lists the flags of a command."]
        ),
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    version = f"fam-jax {importlib.metadata.version('fam-jax')}"
    parser.add_argument("--version", action="version", version=version)
    parser.add_argument("command", metavar="COMMAND", help="what to run; its own flags come behind it")
    parser.parse_args(given)
    return 0


def _summary(module: str) -> str:
    """Return the first line of a program's docstring, without the seconds that importing it would take."""
    spec = importlib.util.find_spec(f".{module}", __package__)
    assert spec is not None and spec.origin is not None
    doc = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    return doc.splitlines()[0]


def run() -> NoReturn:
    """Run the command line and exit."""
    cli.run(main)
