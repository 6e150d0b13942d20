"""How a program ends: one line on stderr for a user's mistake, and the exit code."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator

from fam_jax.config import UserError

USER_ERROR = UserError.exit_code
# What shells report for a program that wrote to a closed pipe, and for one that Ctrl-C ended.
PIPE_CLOSED = 141
INTERRUPTED = 130
# What is wrong with a path, by the number of the error.
PATHS = {
    errno.ENAMETOOLONG: "no file can have such a long name",
    errno.ELOOP: "is a link that leads to itself",
}


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turn a UserError into one line on stderr and its exit code, and so memory that ran out, and impossible paths.

    Exit as shells expect after Ctrl-C or a closed pipe.

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
    except (MemoryError, RuntimeError, OSError) as error:
        line = _line_about(error)
        if not line:
            raise
        print(f"error: {line}", file=sys.stderr)
        sys.exit(USER_ERROR)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _line_about(error: BaseException) -> str:
    """Return a line about an impossible path, or about memory that ran out, in Python or on a device; else nothing."""
    if isinstance(error, OSError):
        path = f"{error.filename!r}"
        shown = path if len(path) <= 80 else f"{path[:80]}..."
        return f"{shown}: {PATHS[error.errno]}" if error.errno in PATHS else ""
    if str(error).startswith("Symlink loop from "):  # of pathlib
        return f"{str(error).removeprefix('Symlink loop from ')}: {PATHS[errno.ELOOP]}"
    # By name: importing JAX takes seconds, and an error of JAX can be raised only where it was imported.
    of_device = type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(error)
    if not of_device and not isinstance(error, MemoryError):
        return ""
    what = (str(error).splitlines() or [""])[0][:200]
    return (
        f"out of memory ({what}); raise config.train.accumulation or config.mesh.fsdp, set config.model.remat=full, or "
        "use shorter rows"
    )
