"""Run one job as several processes: every host runs the same command, and this module joins them.

On TPU slices no flags are needed: JAX finds the other hosts. Elsewhere, tell each process its place with
`--coordinator=HOST:PORT --num_processes=N --process_id=I`, or with the variables JAX_COORDINATOR_ADDRESS,
JAX_NUM_PROCESSES and JAX_PROCESS_ID. `--distributed` asks JAX to find the others (Slurm, Open MPI).

When peers of a process die, a thread of JAX's C++ runtime ends the process with a stack trace; Python has no say.
Therefore the command runs as a child of itself. The parent passes signals on, prefixes the lines of stderr with the
process that they come from, and says in one line why the job ended.
"""

import argparse
import contextlib
import ctypes
import importlib.util
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import IO, Any

from fam_jax.config import UserError

from .errors import INTERRUPTED

# Exit code if another process of the job died, or never came.
WORKER_LOST = 3
# Exit codes with which all processes of a job leave together.
GRACEFUL = (0, 128 + signal.SIGTERM)

RESTART = "its own log may say why; start all processes again to resume from the latest checkpoint"
# In errors of JAX because of another process, or of the network between them.
CONNECTION = re.compile(r"Gloo|DEADLINE_EXCEEDED|UNAVAILABLE|[Cc]onnection (closed|refused|reset)")
JOINING = (
    "check that every process is started, that all have the same --coordinator and --num_processes, and that the "
    "coordinator's port is open"
)

# Set in the environment of the child.
CHILD = "FAM_JAX_SUPERVISED"
# Lowest and highest values of flags. Every simulated device costs memory and threads.
RANGES = {
    "cpu_devices": (0, 4096), "num_processes": (1, 10**6), "join_timeout": (1, 10**6), "heartbeat_timeout": (1, 10**6),
}  # fmt: skip
# Begins the line with which the child tells its parent INDEX/COUNT.
PLACE = "fam_jax-process "

# The flags with which this process joined its job. A script that calls several programs joins once.
_joined: list[argparse.Namespace] = []


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that :func:`join` reads."""
    variables = os.environ.get
    add = parser.add_argument_group("devices and processes").add_argument
    add("--cpu_devices", type=int, metavar="N", help="run on N simulated CPU devices")
    add("--compilation_cache", metavar="DIR", help="folder that keeps compiled programs between runs")
    add(
        "--coordinator",
        metavar="HOST:PORT",
        default=variables("JAX_COORDINATOR_ADDRESS"),
        help="address of process 0; not needed on TPU slices",
    )
    add(
        "--num_processes",
        type=int,
        metavar="N",
        default=variables("JAX_NUM_PROCESSES"),
        help="number of processes in the job",
    )
    add(
        "--process_id",
        type=int,
        metavar="I",
        default=variables("JAX_PROCESS_ID"),
        help="number of this process, from 0",
    )
    add(
        "--distributed",
        action=argparse.BooleanOptionalAction,
        help="let JAX find the other processes, or stay alone",
    )
    add("--join_timeout", type=int, metavar="SECONDS", default=300, help="how long to wait for the others")
    add(
        "--heartbeat_timeout",
        type=int,
        metavar="SECONDS",
        default=40,
        help="how long another process may be silent before the job ends",
    )


def check_flags(flags: argparse.Namespace) -> None:
    """Raise :class:`UserError` if a flag is out of range, or those that place a process contradict each other."""
    for name, (low, high) in RANGES.items():
        value = getattr(flags, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{name}={value}: must be from {low} to {high}")
    given = [value is not None for value in (flags.coordinator, flags.num_processes, flags.process_id)]
    if any(given) and not all(given) and flags.distributed is None:
        raise UserError("--coordinator, --num_processes and --process_id: give all three, or none of them")
    if flags.num_processes is not None and not 0 <= (flags.process_id or 0) < flags.num_processes:
        raise UserError(
            f"--process_id={flags.process_id}: must be from 0 to {flags.num_processes - 1}, "
            "one below --num_processes"
        )
    if flags.coordinator is not None and not re.fullmatch(r".+:\d+", flags.coordinator):
        raise UserError(f"--coordinator={flags.coordinator}: expected HOST:PORT of process 0")


@contextlib.contextmanager
def _leaving_at_interrupt() -> Iterator[None]:
    """End the process at once if Ctrl-C comes during an import: extension modules turn it into other errors."""

    def leave(*_: Any) -> None:
        os.write(2, b"interrupted\n")
        os._exit(INTERRUPTED)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def join(flags: argparse.Namespace, *, stop_together: bool) -> None:
    """Make this process part of its job, if it has one. Call it before anything asks JAX for devices.

    In the parent (see above) it does not return: it exits with the exit code of the child.

    Args:
      flags: the parsed flags of :func:`add_flags`.
      stop_together: True to leave a SIGTERM to `jax.experimental.multihost_utils`, with which all processes agree on
        the step to stop at. Otherwise the signal ends the process, as usual.

    Raises:
      UserError: a flag is malformed, or JAX cannot find the other processes.
    """
    check_flags(flags)
    explicit = flags.coordinator is not None or flags.distributed
    shared = flags.distributed is not False and (explicit or _has_libtpu(flags)) and not _joined
    if shared and os.environ.pop(CHILD, None) is None:
        sys.exit(supervise())
    with _leaving_at_interrupt():
        import jax  # the parent does without

    if flags.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", flags.compilation_cache)
    if flags.cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", flags.cpu_devices)
    if not shared:
        return
    _joined.append(flags)
    _die_with_parent()
    jax.config.update("jax_enable_preemption_service", stop_together)
    try:
        jax.distributed.initialize(
            flags.coordinator,
            flags.num_processes,
            flags.process_id,
            initialization_timeout=flags.join_timeout,
            heartbeat_timeout_seconds=flags.heartbeat_timeout,
        )
    except ValueError as error:
        if not explicit:
            return  # a TPU that belongs to no slice that JAX knows
        raise UserError(
            f"--distributed: JAX finds no other processes ({error}); give --coordinator"
        ) from error
    except RuntimeError as error:
        print(f"error: this process could not join its job ({error}); {JOINING}", file=sys.stderr)
        sys.exit(WORKER_LOST)
    _divert_native_output()
    index, count = jax.process_index(), jax.process_count()
    print(f"{PLACE}{index}/{count}", file=sys.stderr, flush=True)
    if index:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # process 0 speaks for the job


@contextlib.contextmanager
def leaving_together() -> Iterator[None]:
    """Make a process that fails alone end at once, so that the others notice.

    On an ordinary exit JAX waits for the other processes to exit too, while they wait for this one to go on. An error
    of JAX's own may be the first sign that another process died: give its runtime the time to find out which one, and
    to end this process.
    """
    try:
        yield
    except BaseException as error:
        if not _joined:
            raise
        import jax

        if not jax.distributed.is_initialized() or jax.process_count() == 1:
            raise
        code = error.code if isinstance(error, SystemExit) else 1
        if code in GRACEFUL or code is None:
            raise
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            time.sleep(_joined[0].heartbeat_timeout + 10)
            if CONNECTION.search(str(error)):
                line = (str(error).splitlines() or [""])[0][:200]
                print(
                    f"error: another process does not answer or is too slow ({line}); {RESTART}",
                    file=sys.stderr,
                )
                code, error = WORKER_LOST, SystemExit(WORKER_LOST)
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def supervise() -> int:
    """Run this very command as a child until it ends, and return the exit code to leave with."""
    environment = {"TF_CPP_MIN_LOG_LEVEL": "2", **os.environ, CHILD: "1"}
    child = subprocess.Popen(
        [sys.executable, *sys.orig_argv[1:]],
        env=environment,
        stderr=subprocess.PIPE,
        # Ctrl-C in a terminal then reaches the parent alone, which passes it on once.
        start_new_session=True,
        text=True,
        errors="replace",
    )
    received: list[int] = []

    def pass_on(number: int, _: Any) -> None:
        received.append(number)
        if len(received) == 1:
            child.send_signal(number)
        else:
            child.kill()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    assert child.stderr is not None
    log = ChildLog(child.stderr, sys.stderr)
    reader = threading.Thread(target=log.pass_on)
    reader.start()
    code = child.wait()
    reader.join()
    if code == -signal.SIGABRT and log.reason():
        log.write(f"error: {log.reason()}\n")
        return WORKER_LOST
    log.release()
    if code < 0 and not received:
        log.write(f"error: ended by {signal.Signals(-code).name}\n")
    return 128 - code if code < 0 else code


class ChildLog:
    """Passes the lines of a child's stderr on, but holds back what JAX's runtime prints when a peer died.

    Of all processes but the first, it drops the runtime's warnings and notes. Of all, it drops those on connections.
    """

    # A note for every group of devices that Gloo connects.
    _CONNECTED = re.compile(r"\[Gloo\] |connected peer ranks is")
    # Several threads print it at once, piece by piece, so its last number and the end of the line may come late.
    _REMAINDER = re.compile(r"\d*\s*")
    # Warnings and notes of the runtime, and of Python's loggers.
    _MINOR = re.compile(r"[IW]\d{4} \d\d:|(INFO|WARNING):\w+:")
    # Lines of the coordination service, in the form [severity][date] [time] [thread] [file]:[line]] [message].
    _LOST = re.compile(
        r"(E\d{4} .*coordination_service|[EW]\d{4} .*preemption_sync_manager|F\d{4} .*client)\w*\.(cc|h):"
    )
    _SILENT = re.compile(r"stopped sending heartbeats\):\s*([\d,\s]+?)\s*(?:[A-Z]|$)")

    def __init__(self, lines: IO[str], out: IO[str]):
        """Read from `lines` and write to `out`."""
        self._lines, self._out = lines, out
        self._prefix = ""
        self._joined = False
        # Whether lines of the child were passed on since it joined.
        self._said = False
        self._held: list[str] = []
        self._connecting = False

    def pass_on(self) -> None:
        """Pass lines on until the child ends."""
        for line in self._lines:
            if line.startswith(PLACE):
                place = line.removeprefix(PLACE).strip()
                self._prefix = "" if place.startswith("0/") else f"[{place}] "
                self._joined, self._said = True, False
            elif self._held or self._LOST.match(line):
                self._held.append(line)
            elif not (self._connects(line) or (self._prefix and self._MINOR.match(line))):
                self._said = True
                self.write(line)

    def _connects(self, line: str) -> bool:
        """Return whether a line is a note of Gloo on connections, or what remains of one."""
        remainder = self._connecting and self._REMAINDER.fullmatch(line)
        self._connecting = bool(remainder or self._CONNECTED.search(line))
        return self._connecting

    def write(self, line: str) -> None:
        """Write a line with the prefix of its process."""
        self._out.write(self._prefix + line)
        self._out.flush()

    def release(self) -> None:
        """Write the lines that were held back."""
        for line in self._held:
            self.write(line)

    def reason(self) -> str:
        """Return why JAX's runtime ended the job, or an empty string if it did not."""
        held = "".join(self._held)
        if held and not self._joined:
            return f"this process could not join its job; {JOINING}"
        silent = self._SILENT.search(held)
        if silent:
            who = ", ".join(re.findall(r"\d+", silent[1]))
            return f"process {who} died or cannot be reached; {RESTART}"
        if "leader task" in held:
            return f"process 0, the coordinator, died or cannot be reached; {RESTART}"
        # Just after a process has joined, the runtime ends it without a word.
        wordless = self._joined and not (self._said or held)
        return (
            f"another process died or cannot be reached; {RESTART}"
            if "fatal errors" in held or wordless
            else ""
        )


def _has_libtpu(flags: argparse.Namespace) -> bool:
    """Return whether JAX would use a TPU, so that this host may belong to a slice."""
    platforms = os.environ.get("JAX_PLATFORMS", "") or "tpu"
    return not flags.cpu_devices and "tpu" in platforms and importlib.util.find_spec("libtpu") is not None


def _divert_native_output() -> None:
    """Send to stderr what C++ code prints to stdout, so that the parent sees it; Python's prints still go to stdout."""
    sys.stdout.flush()
    python = os.dup(1)
    os.dup2(2, 1)
    lines = 1 if os.isatty(python) else -1
    sys.stdout = open(python, "w", lines, encoding=sys.stdout.encoding, errors=sys.stdout.errors)  # noqa: SIM115


def _die_with_parent() -> None:
    """End this process when its parent is killed, as it would keep the accelerators."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
