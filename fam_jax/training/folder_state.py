"""Files of a run's folder that concern its trainings: a lock against a second one, and the step one went back to."""

import contextlib
import datetime
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from typing import IO

from etils import epath

from fam_jax.checkpoint import saved_steps
from fam_jax.checkpoint.new_file import new_file
from fam_jax.config import UserError
from fam_jax.config.strict_json import dump_json

LOCK, GONE_BACK = "training.lock", "gone_back.json"
# A training that was told to end may take this long to leave its folder, in seconds.
PATIENCE = 5.0


@contextlib.contextmanager
def only_training(folder: epath.Path) -> Iterator[None]:
    """Keep other trainings out of a folder while the block runs.

    The operating system frees the lock when the process ends, however it ends. Folders in buckets, and file systems
    without locks, are not protected.

    Raises:
      UserError: another training writes to the folder.
    """
    file = _open_lock(folder)
    if file is None:
        yield
        return
    with file:
        locked = _try_lock(file.fileno())
        if locked is False:
            file.seek(0)
            raise UserError(
                f"{folder}: another training writes to it ({file.read().strip() or 'just begun'}); "
                "wait until it ends, or give another --workdir"
            )
        if locked:
            file.truncate(0)
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            print(f"process {os.getpid()} on {socket.gethostname()}, since {now}", file=file, flush=True)
        # The file stays: a lock on a file that somebody removes protects nothing.
        yield


def _open_lock(folder: epath.Path) -> IO[str] | None:
    """Return the file to lock; None in a bucket, or if it cannot be made: what is written next tells why."""
    if "://" in os.fspath(folder):
        return None
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        return open(folder / LOCK, "a+")
    return None


def _try_lock(descriptor: int) -> bool | None:
    """Lock a file; return False if another process holds the lock, and None if there are no locks here."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                return False
            time.sleep(0.1)
        except OSError:
            return None
        else:
            return True


def step_to_restore(folder: epath.Path, restore_step: int | None) -> tuple[int | None, list[str]]:
    """Return the step to go back to, and notes.

    A supervisor repeats the command of a run after every interruption. A run that went back to a step goes on from its
    latest step if the same command comes again. All processes get the same answer.
    """
    if restore_step is None or not (folder / GONE_BACK).exists():
        return restore_step, []
    try:
        known = json.loads((folder / GONE_BACK).read_text())["restore_step"]
    except (ValueError, KeyError, TypeError):
        known = None
    steps = saved_steps(folder)
    if known != restore_step or not steps or steps[-1] <= restore_step:
        return restore_step, []
    return None, [
        f"this run went back to step {restore_step} before, and goes on from step {steps[-1]}; "
        f"to go back again, remove {folder / GONE_BACK}"
    ]


def remember_restored(folder: epath.Path, restore_step: int | None, asked: int | None) -> None:
    """Record that the run went back to a step, for :func:`step_to_restore`; one process calls this.

    Args:
      folder: of the run.
      restore_step: the step that it went back to; None: it did not.
      asked: the step that the command named; None: none, which makes the folder forget.
    """
    if restore_step is not None:
        with new_file(folder / GONE_BACK) as file:
            file.write(dump_json({"restore_step": restore_step}).encode())
    elif asked is None:
        (folder / GONE_BACK).unlink(missing_ok=True)
