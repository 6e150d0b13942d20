"""Stopping at the end of a step, in all processes at the same one."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils


class Interrupted(Exception):
    """Training was asked to stop (Ctrl-C, or SIGTERM on preemption); everything is saved."""

    def __init__(self, step: int, signal_number: int):
        super().__init__(f"stopped at step {step}; all is saved: the same command resumes")
        self.exit_code = 128 + signal_number


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[int], int]]:
    """Catches a first SIGINT or SIGTERM; a second one acts as it would without this.

    Yields:
      A function to be called after each step with its number: the signal to stop for, or 0. In a job of several
      processes a signal to any one of them stops all after the same step: JAX's coordination service passes the
      SIGTERM on, in the background, and picks a step that none has reached. So asking costs no communication.
    """
    if jax.process_count() == 1:
        received: list[int] = []
        with _handling((signal.SIGINT, signal.SIGTERM), received.append):
            yield lambda _: received[0] if received else 0
    else:
        # SIGTERM is the coordination service's already, which handles it outside Python.
        with _handling((signal.SIGINT,), lambda _: signal.raise_signal(signal.SIGTERM)):
            yield lambda step: signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else 0


@contextlib.contextmanager
def _handling(numbers: tuple[int, ...], act: Callable[[int], Any]) -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in numbers}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, _: Any) -> None:
        act(number)
        restore()

    for number in numbers:
        signal.signal(number, handle)
    try:
        yield
    finally:
        restore()
