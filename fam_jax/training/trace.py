"""Profiler trace of a few training steps, for XProf or TensorBoard's profile tab."""

import contextlib
import os
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import jax
from etils import epath

from fam_jax.config import UserError
from fam_jax.training.bucket_sync import Mirror


class StepTrace:
    """Trace steps `first` to `last` into the folder `profile` of a run; a context manager.

    Each process traces its own devices into a file named after its host.
    """

    def __init__(self, workdir: epath.Path, steps: tuple[int, int] | None, *, remaining: range):
        """Prepare a trace.

        Args:
          workdir: folder of the run.
          steps: first and last step of the trace, or None for no trace. A resumed run that is past the first step is
            not traced.
          remaining: steps that the run will take.

        Raises:
          UserError: the run does not have these steps.
        """
        if steps is not None and not 1 <= steps[0] <= steps[1] < remaining.stop:
            raise UserError(
                f"--profile_steps={steps[0]},{steps[1]}: expected FIRST,LAST, from 1 to the {remaining.stop - 1} "
                "steps of the run"
            )
        self._steps = steps
        self._mirror: Mirror | None = None
        self._folder = workdir / "profile"

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Enclose the call that dispatches a step."""
        if self._steps is not None and number == self._steps[0]:
            self._mirror = Mirror(self._folder)
            jax.profiler.start_trace(os.fspath(self._mirror.local))
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def end(self, number: int, metrics: Any) -> None:
        """End a step; after the last step of the trace, wait for its results and stop tracing."""
        if self._mirror is not None and self._steps is not None and number == self._steps[1]:
            jax.block_until_ready(metrics)
            self._stop()

    def _stop(self) -> None:
        if self._mirror is not None:
            jax.profiler.stop_trace()
            self._mirror.close()
            self._mirror = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
