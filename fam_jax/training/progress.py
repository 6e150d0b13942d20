"""The terminal output of training: a header, progress, events and a last line."""

import contextlib
import datetime
import sys
import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

BAR_WIDTH = 10


class ProgressReport:
    """A progress bar on a terminal, elsewhere a line per report. Writes to stderr. A context manager.

    A line that cannot be written, because the disk is full or nobody reads stderr, is lost, and training goes on.

    The time left is estimated from the steps of this process, without those that compiled a program.
    """

    def __init__(self, total: int, start: int, *, quiet: bool = False):
        """Create a report.

        Args:
          total: steps of the run.
          start: steps taken by earlier processes.
          quiet: report nothing.
        """
        self._total, self._start, self._quiet = total, start, quiet
        self._console = Console(stderr=True)
        self._busy, self._steps, self._since = 0.0, 0, time.perf_counter()
        self._bar: Progress | None = None
        if self._console.is_terminal and not quiet:
            note = Column(no_wrap=True, overflow="ellipsis", ratio=1)
            self._bar = Progress(
                BarColumn(bar_width=BAR_WIDTH),
                TextColumn("{task.completed}/{task.total}"),
                TextColumn("{task.fields[note]}", table_column=note),
                TextColumn("{task.fields[left]}"),
                console=self._console,
                expand=True,
            )
            self._task = self._bar.add_task("train", total=total, completed=start, note="compiling", left="")

    def advance(self, step: int, *, compiled: bool) -> None:
        """Count a step.

        Args:
          step: its number.
          compiled: the step compiled a program, so its time does not count.
        """
        now = time.perf_counter()
        if not compiled:
            self._busy, self._steps = self._busy + now - self._since, self._steps + 1
        self._since = now
        if self._bar is not None:
            self._bar.update(self._task, completed=step, left=self._left(step))

    def note(self, step: int, text: str) -> None:
        """Show the metrics of a step."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, note=text)
        else:
            left = self._left(step)
            self.say(f"step {step}/{self._total}  {text}{'  ' + left + ' left' if left else ''}")

    def say(self, text: str) -> None:
        """Show a line that stays on the terminal."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        elif not self._quiet:
            with contextlib.suppress(OSError):
                print(text, file=sys.stderr, flush=True)

    def _left(self, step: int) -> str:
        if not self._steps or step >= self._total:
            return ""
        seconds = (self._total - step) * self._busy / self._steps
        return f"{seconds:.0f} s" if seconds < 100 else str(datetime.timedelta(seconds=round(seconds)))

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
