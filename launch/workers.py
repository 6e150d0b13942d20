"""Programs that run side by side, each on its own share of the cores."""

import os
import queue
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence

from fam_jax.config import UserError

# Seconds between two lines of a training's progress.
REPORT_SECONDS = 10.0
# XLA_FLAGS of a program that has one core: no thread per core.
ONE_CORE = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
# Lines of a command's output that are shown if it fails.
TAIL_LINES = 20


class Workers:
    """Runs commands side by side, each on its own share of the cores, and prints their progress."""

    def __init__(self, count: int, environment: Mapping[str, str] | None = None):
        """Divide the cores among `count` workers.

        Args:
          count: of commands that run at a time.
          environment: variables of the commands, beside those of this process.
        """
        self._environment = {"JAX_PLATFORMS": "cpu", **os.environ, **(environment or {})}
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self._shares: queue.Queue[list[int]] = queue.Queue()
        for index in range(count):
            self._shares.put(cores[index::count])
        self._running: list[subprocess.Popen[str]] = []
        self._printing = threading.Lock()
        self._stopped = False

    def run(self, name: str, commands: Sequence[Sequence[str]]) -> None:
        """Run commands one after the other on the next free share of the cores.

        Args:
          name: printed before each line of progress.
          commands: what to run.

        Raises:
          UserError: a command failed.
        """
        share = self._shares.get()
        try:
            for command in commands:
                self._run_one(name, command, share)
        finally:
            self._shares.put(share)

    def stop(self) -> None:
        """Ask all running commands to save and end, and wait for them."""
        self._stopped = True
        running = list(self._running)
        for process in running:
            process.terminate()
        for process in running:
            process.wait()

    def _run_one(self, name: str, command: Sequence[str], share: list[int]) -> None:
        if self._stopped:
            return
        process = subprocess.Popen(
            command,
            env=self._environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=(lambda: os.sched_setaffinity(0, share)) if share else None,
            # Ctrl-C then reaches this process alone, and stop() passes it on.
            start_new_session=True,
        )
        self._running.append(process)
        assert process.stderr is not None
        tail: list[str] = []
        printed = 0.0
        for line in process.stderr:
            tail = [*tail[1 - TAIL_LINES :], line]
            if line.startswith("step ") and time.perf_counter() - printed < REPORT_SECONDS:
                continue
            printed = time.perf_counter()
            with self._printing:
                print(f"{name:>12}  {line.rstrip()}", flush=True)
        code = process.wait()
        self._running.remove(process)
        if code and not self._stopped:
            raise UserError(f"{' '.join(command[1:])} failed with exit code {code}:\n{''.join(tail)}")
