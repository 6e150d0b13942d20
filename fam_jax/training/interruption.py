"""Stop training after a step when a signal arrives; all processes stop after the same step."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils


class Interrupted(Exception):
    """Training was asked to stop (Ctrl-C, SIGTERM on preemption, or a closed terminal) and saved everything."""

    def __init__(self, step: int, signal_number: int):
        super().__init__(f"stopped at step {step}; everything is saved: run the same command to resume")
        self.exit_code = 128 + signal_number


class EvaluationStopped(Exception):
    """An evaluation was left because training was asked to stop."""


# The signal that asks the training of this process to stop, if one came; empty in jobs of several processes.
_received: list[int] = []


def leave_if_asked_to_stop(*_: Any) -> None:
    """Raise :class:`EvaluationStopped` if training was asked to stop; evaluations call this as they go on.

    In a job of several processes it does nothing: all of them would have to leave at the same place.
    """
    if _received:
        raise EvaluationStopped


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[int], int]]:
    """Catch the first SIGINT, SIGTERM or SIGHUP (a closed terminal). A second one has its usual effect.

    A SIGHUP that is ignored already stays ignored, as below `nohup`.

    Yields:
      A function to call after each step with its number. It returns the signal to stop for, or 0. In a job of several
      processes, a signal to any of them stops all after the same step: JAX's coordination service forwards the SIGTERM
      in the background and picks a step that no process has reached. So the call needs no communication.
    """
    if jax.process_count() == 1:
        _received.clear()
        try:
            with _handling((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), _received.append):
                yield lambda _: _received[0] if _received else 0
        finally:
            _received.clear()
    else:
        # The coordination service handles SIGTERM, outside Python.
        with _handling((signal.SIGINT, signal.SIGHUP), lambda _: signal.raise_signal(signal.SIGTERM)):
            yield lambda step: signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else 0


@contextlib.contextmanager
def _handling(numbers: tuple[int, ...], act: Callable[[int], Any]) -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in numbers}
    if before.get(signal.SIGHUP) == signal.SIG_IGN:
        del before[signal.SIGHUP]

    terminals = [stream for stream in (1, 2) if os.isatty(stream)]

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, _: Any) -> None:
        act(number)
        if number == signal.SIGHUP:
            # Writing to a terminal that is gone would be an error, and end the program before it has saved.
            for stream in terminals:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        restore()

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        restore()
