"""Signals that ask a training to stop."""

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from fam_jax.training.interruption import stop_requests
from tests.launch.running import ROOT


@pytest.fixture(autouse=True)
def handled() -> Iterator[None]:
    """Undo what nohup does: the tests may run below it, and it ignores SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_asks_to_stop(number: signal.Signals) -> None:
    with stop_requests() as stop:
        assert stop(1) == 0
        signal.raise_signal(number)
        assert stop(2) == number


def test_what_is_ignored_stays_ignored() -> None:
    """As below nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stop_requests() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert stop(1) == 0
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


WRITES = """
import sys, time
from fam_jax.training.interruption import stop_requests
with stop_requests() as stop:
    print("ready", flush=True)
    while not stop(1):
        time.sleep(0.01)
    print("saving", flush=True)
    print("saved", file=sys.stderr, flush=True)
"""


def test_a_terminal_that_is_gone_is_no_error() -> None:
    """The program writes to its terminal after the other end was closed."""
    terminal, end = pty.openpty()
    program = subprocess.Popen([sys.executable, "-c", WRITES], cwd=ROOT, stdout=end, stderr=end)
    assert os.read(terminal, 5) == b"ready"
    os.close(end)
    os.close(terminal)
    program.send_signal(signal.SIGHUP)
    try:
        assert program.wait(timeout=60) == 0
    finally:
        program.kill()
