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


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turn a UserError into one line on stderr and its exit code, and an allocation that failed as well.

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
    """Return a line about an allocation that failed, in Python or on a device, or a name too long; else nothing."""
    if isinstance(error, OSError):
        return (
            f"{error.filename!r:.80}...: no file can have such a long name"
            if error.errno == errno.ENAMETOOLONG
            else ""
        )
    # By name: importing JAX takes seconds, and an error of JAX can be raised only where it was imported.
    of_device = type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(error)
    if not of_device and not isinstance(error, MemoryError):
        return ""
    what = (str(error).splitlines() or [""])[0][:200]
    return (
        f"out of memory ({what}); raise config.train.accumulation or config.mesh.fsdp, set config.model.remat=full, or "
        "use shorter rows"
    )
