"""What a user sees of an error: one line on stderr, and the exit code."""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

from fam_jax.config import UserError

USER_ERROR = 2
PIPE_CLOSED = 141  # what shells report of a program that wrote to a closed pipe
INTERRUPTED = 130  # what shells report of a program that Ctrl-C ended


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turns a UserError into `error: ...` on stderr and exit code 2, Ctrl-C and a closed pipe into what shells expect.

    A context manager, and as `@user_errors()` a decorator. All other errors are the program's own and keep
    their tracebacks.
    """
    try:
        yield
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(USER_ERROR)
    except BrokenPipeError:  # whoever read standard output has had enough of it, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it at the end
        sys.exit(PIPE_CLOSED)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


class ArgumentParser(argparse.ArgumentParser):
    """Raises :class:`UserError` for arguments that it cannot parse; takes --some-flag and --some_flag alike."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Called by argparse, also for `parse_args`."""
        given = sys.argv[1:] if args is None else [*args]
        spelled = {option.replace("_", "-"): option for option in self._option_string_actions}

        def respell(argument: str) -> str:
            name, equals, value = argument.partition("=")
            return spelled.get(name.replace("_", "-"), name) + equals + value

        return super().parse_known_args([respell(argument) for argument in given], namespace)

    def error(self, message: str) -> NoReturn:
        """Called by argparse."""
        raise UserError(f"{message}; --help lists the arguments")


def words(text: str) -> tuple[str, ...]:
    """Argument type: words with commas between them."""
    return tuple(part for part in text.split(",") if part)


def integers(text: str) -> tuple[int, ...]:
    """Argument type: whole numbers with commas between them."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers with commas between them, got {text!r}") from None
