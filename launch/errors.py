"""How a program ends: one line on stderr for a user's mistake, and the exit code."""

import contextlib
import os
import sys
from collections.abc import Iterator

from fam_jax.config import UserError

USER_ERROR = UserError.exit_code
# What shells report for a program that wrote to a closed pipe, and for one that Ctrl-C ended.
PIPE_CLOSED = 141
INTERRUPTED = 130


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turn a UserError into one line on stderr and its exit code; exit as shells expect after Ctrl-C or a closed pipe.

    All other errors are bugs of the program and keep their tracebacks.
    """
    try:
        yield
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # the reader of standard output has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it at the end
        sys.exit(PIPE_CLOSED)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
