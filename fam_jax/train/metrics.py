"""Where the numbers of a run go: a JSONL file, TensorBoard, and the terminal."""

import json
import math
import sys
import time
from types import TracebackType
from typing import Any, Self

from etils import epath
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from tensorboardX import SummaryWriter

from fam_jax.train.bucket_sync import Mirror

UPLOAD_SECONDS = 60.0  # between uploads of a run's metrics to its bucket, beside those at checkpoints


class MetricsWriter:
    """Writes `metrics.jsonl` and TensorBoard event files below a run's folder; a context manager."""

    def __init__(self, workdir: epath.Path, *, resume_step: int):
        """Opens the files; lines of steps after `resume_step`, from before an interruption, are dropped."""
        self._mirror = Mirror(workdir)
        self._uploaded_at = time.monotonic()
        path = self._mirror.fetch("metrics.jsonl")
        kept = []
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= resume_step]
        path.write_text("".join(line + "\n" for line in kept))
        self._file = path.open("a", buffering=1)
        self._events = SummaryWriter(str(self._mirror.local / "tensorboard"), purge_step=resume_step + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Appends a line; numbers, nested ones too, also go to TensorBoard. What is not finite becomes null."""
        self._file.write(json.dumps(_without_nan({"step": step, **values}), allow_nan=False) + "\n")
        for name, value in _scalars(values):
            if math.isfinite(value):
                self._events.add_scalar(name, value, step)
        if time.monotonic() - self._uploaded_at > UPLOAD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Makes sure that all is where it is to stay, should the process die now."""
        self._events.flush()
        self._mirror.upload()
        self._uploaded_at = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._events.close()
        self._mirror.close()


def _without_nan(value: Any) -> Any:
    """JSON has no word for what is not finite."""
    if isinstance(value, dict):
        return {name: _without_nan(each) for name, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line cut short


def _scalars(values: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            found += _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            found.append((prefix + name, float(value)))
    return found


class ProgressReport:
    """A bar on a terminal; elsewhere a line per report."""

    def __init__(self, total: int, start: int, *, quiet: bool = False):
        self._total = total
        self._quiet = quiet
        self._console = Console(stderr=True)
        self._began = (time.perf_counter(), start)
        self._bar: Progress | None = None
        if self._console.is_terminal and not quiet:
            self._bar = Progress(
                TextColumn("train"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=self._console,
            )  # fmt: skip
            self._task = self._bar.add_task("train", total=total, completed=start, note="compiling")

    def advance(self, step: int) -> None:
        """Called after every step."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def note(self, step: int, text: str) -> None:
        """Called with what is worth reading, now and then."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, note=text)
        elif not self._quiet:
            seconds, first = time.perf_counter() - self._began[0], self._began[1]
            left = (self._total - step) * seconds / max(1, step - first)
            print(f"step {step}/{self._total}  {text}  {left:.0f} s left", file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
