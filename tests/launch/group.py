"""Start a job of two processes with four simulated devices each, as a user does."""

import contextlib
import pathlib
import socket
import subprocess
import time
from collections.abc import Iterator

from tests.launch.running import ROOT, command, environment

COUNT, DEVICES = 2, 4
# Seconds to wait, on a busy machine.
PATIENCE = 300.0
SETTINGS = {"JAX_DEFAULT_MATMUL_PRECISION": "highest", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


class Group:
    """The processes of a job and their output."""

    def __init__(self, folder: pathlib.Path, *arguments: str, last: str = ""):
        """Start `python -m ARGUMENTS` twice, the second time with the argument `last` too."""
        folder.mkdir(parents=True, exist_ok=True)
        address = f"localhost:{free_port()}"
        self.logs = [folder / f"stderr{index}" for index in range(COUNT)]
        self.outputs = [folder / f"stdout{index}" for index in range(COUNT)]
        self.processes = []
        for index in range(COUNT):
            placed = [
                f"--coordinator={address}", f"--num_processes={COUNT}", f"--process_id={index}",
                f"--cpu_devices={DEVICES}", *([last] if last and index == COUNT - 1 else []),
            ]  # fmt: skip
            with self.logs[index].open("w") as log, self.outputs[index].open("w") as output:
                process = subprocess.Popen(
                    command(*arguments, *placed), cwd=ROOT, stdout=output, stderr=log,
                    env={**environment(), **SETTINGS},
                )  # fmt: skip
            self.processes.append(process)

    def wait(self) -> list[int]:
        """Return the exit codes."""
        return [process.wait(PATIENCE) for process in self.processes]

    def errors(self, index: int) -> str:
        return self.logs[index].read_text()

    def printed(self, index: int) -> str:
        """Return standard output."""
        return self.outputs[index].read_text()

    def await_line(self, beginning: str) -> None:
        """Wait until process 0 prints a line that begins so."""
        deadline = time.monotonic() + PATIENCE
        while not any(line.startswith(beginning) for line in self.errors(0).splitlines()):
            assert all(process.poll() is None for process in self.processes), self.everything()
            assert time.monotonic() < deadline, self.everything()
            time.sleep(0.1)

    def everything(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in (*self.logs, *self.outputs))


@contextlib.contextmanager
def group(folder: pathlib.Path, *arguments: str, last: str = "") -> Iterator[Group]:
    started = Group(folder, *arguments, last=last)
    try:
        yield started
    finally:
        for process in started.processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def finish(folder: pathlib.Path, *arguments: str) -> Group:
    """Run a job that must succeed."""
    with group(folder, *arguments) as started:
        assert started.wait() == [0, 0], started.everything()
    return started
