"""Write the metrics of a run to a JSONL file and to TensorBoard.

Metrics are not worth a run: if a write fails, as on a full disk, training goes on, and the lines wait in memory until
they can be written.
"""

import contextlib
import errno
import itertools
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, Self

from absl import logging
from etils import epath
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from fam_jax.checkpoint.new_file import new_file
from fam_jax.config import UserError
from fam_jax.config.strict_json import dump_json, parse_json
from fam_jax.training.bucket_sync import Mirror

# Seconds between uploads of a run's metrics to its bucket; every checkpoint uploads them too.
UPLOAD_SECONDS = 60.0
# Filesystems of buckets raise errors of their own.
ANY = Exception
# Lines that wait for a disk which is full. Later ones are lost.
MAX_WAITING = 10_000


# Numbers of errors that stay until the user does something.
MISTAKES = {
    errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP,
}  # fmt: skip


class MetricsError(UserError):
    """The metrics of a run cannot be written now. The same command may work later."""

    exit_code = 75


class MetricsWriter:
    """Write `metrics.jsonl` and TensorBoard event files to a run's folder; a context manager."""

    def __init__(self, workdir: epath.Path, *, resume_step: int):
        """Open the files, and drop the lines that an interrupted run wrote after `resume_step`.

        Raises:
          UserError: a file cannot be written.
        """
        try:
            self._begin(workdir, resume_step)
        except OSError as error:
            kind = UserError if error.errno in MISTAKES else MetricsError
            raise kind(
                f"{workdir}: metrics.jsonl or tensorboard cannot be written ({error.strerror or error}); remove what "
                "is in their place, check disk space and permissions, or give another workdir"
            ) from error

    def _begin(self, workdir: epath.Path, resume_step: int) -> None:
        self._mirror = Mirror(workdir)
        self._uploaded_at = time.monotonic()
        self._failing: set[str] = set()
        path = self._mirror.fetch("metrics.jsonl")
        # Whether the lines hold an evaluation of `resume_step`.
        self.evaluated = _has_evaluation(_drop_later_lines(path, resume_step), resume_step)
        self._lines = _Lines(path)
        self._events = _Events(self._mirror.local / "tensorboard", resume_step + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append a line of JSON; numbers also go to TensorBoard. Values that are not finite become null."""
        self._lines.add(dump_json({"step": step, **values}))
        self._attempt("metrics.jsonl", self._lines.write)
        self._attempt("tensorboard", lambda: self._events.write(step, _scalars(values)))
        if time.monotonic() - self._uploaded_at > UPLOAD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Make sure that everything written so far survives if the process is killed."""
        self._attempt("metrics.jsonl", self._lines.write)
        self._attempt("tensorboard", self._events.flush)
        self._attempt("the bucket", self._mirror.upload, ANY)
        self._uploaded_at = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()
        self._lines.close()
        self._events.close()
        self._attempt("the bucket", self._mirror.close, ANY)

    def _attempt(self, what: str, action: Callable[[], None], errors: type[Exception] = OSError) -> None:
        """Run an action that may fail with certain errors. Log its first failure, and its recovery."""
        try:
            action()
        except errors as error:
            if what not in self._failing:
                self._failing.add(what)
                logging.warning("metrics cannot be written to %s (%s); training goes on without", what, error)
        else:
            if what in self._failing:
                self._failing.remove(what)
                logging.warning("metrics are written to %s again", what)


class _Lines:
    """Appends lines to a file. What cannot be written waits for the next attempt."""

    def __init__(self, path: pathlib.Path):
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self._waiting: list[bytes] = []

    def add(self, line: str) -> None:
        if len(self._waiting) < MAX_WAITING:
            self._waiting.append(line.encode() + b"\n")

    def write(self) -> None:
        """Write the waiting lines.

        Raises:
          OSError: some of them are waiting still.
        """
        while self._waiting:
            left, size = self._waiting[0], os.fstat(self._file).st_size
            try:
                while left:
                    left = left[os.write(self._file, left) :]
            except OSError:
                # The disk may have had room for a part of the line.
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file, size)
                raise
            del self._waiting[0]

    def close(self) -> None:
        os.close(self._file)


class _Events:
    """Writes numbers to TensorBoard event files, without the thread of `SummaryWriter`, which hangs if it fails."""

    def __init__(self, folder: pathlib.Path, first_step: int):
        self._folder, self._first_step, self._begun = folder, first_step, False
        self._writer: EventsWriter | None = self._open()

    def write(self, step: int, scalars: list[tuple[str, float]]) -> None:
        """Write numbers of a step; those that are not finite are left out.

        Raises:
          OSError: they cannot be written. The next call begins a new file, as the rest of this one would not be read.
        """
        with self._or_begin_again() as writer:
            for name, value in scalars:
                if math.isfinite(value):
                    event = Event(wall_time=time.time(), step=step, summary=scalar(name, value))
                    writer.write_event(event)
            writer.flush()

    def flush(self) -> None:
        with self._or_begin_again() as writer:
            writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()

    @contextlib.contextmanager
    def _or_begin_again(self) -> Iterator[EventsWriter]:
        if self._writer is None:
            self._writer = self._open()
        try:
            yield self._writer
        except OSError:
            self.close()
            self._writer = None
            raise

    def _open(self) -> EventsWriter:
        """Begin a file. TensorBoard then hides what earlier files have from the first step on."""
        self._folder.mkdir(parents=True, exist_ok=True)
        # The name would be that of another file which began in the same second.
        writer = EventsWriter(str(self._folder / "events"), f".{time.time_ns()}")
        if not self._begun:
            self._begun = True
            start = SessionLog(status=SessionLog.START)
            writer.write_event(Event(wall_time=time.time(), step=self._first_step, session_log=start))
            writer.flush()
        return writer


def _drop_later_lines(path: pathlib.Path, last_step: int) -> list[bytes]:
    """Drop the lines of a file that are of later steps, or are no metrics. A kill at any time loses no other line.

    Returns:
      The lines that stay.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    keep = [line.endswith(b"\n") and _step_of(line) <= last_step for line in lines]
    kept = list(itertools.compress(lines, keep))
    if len(kept) == len(lines):
        return kept
    end = keep.index(False)
    if not any(keep[end:]):
        os.truncate(path, sum(map(len, kept)))
        return kept
    with new_file(path) as file:
        file.writelines(kept)
    return kept


def _has_evaluation(lines: list[bytes], step: int) -> bool:
    """Return whether lines, the last of which are of `step` or earlier, hold an evaluation of it."""
    last = itertools.takewhile(lambda line: _step_of(line) == step, reversed(lines))
    return any("evaluation" in parse_json(line) for line in last)


def _step_of(line: bytes) -> float:
    try:
        return float(parse_json(line)["step"])
    # OverflowError: a number beyond all bounds.
    except (ValueError, KeyError, TypeError, OverflowError):
        return float("inf")


def _scalars(values: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            found += _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            found.append((prefix + name, float(value)))
    return found
