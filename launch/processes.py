"""One job of several processes: every host runs the same command, and this module joins them.

On TPU slices nothing has to be said: JAX finds the other hosts. Elsewhere each process is told its place by
`--coordinator=HOST:PORT --num_processes=N --process_id=I`, or by the variables JAX_COORDINATOR_ADDRESS,
JAX_NUM_PROCESSES and JAX_PROCESS_ID. `--distributed` asks JAX to find the others (Slurm, Open MPI).

JAX ends a process whose peers have died from a thread of its C++ runtime, with a stack trace, and leaves Python no say.
So the command runs as a child of itself: the parent passes signals on, marks the lines of stderr with the host that
they come from, and tells in one line why the job ended.
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
from typing import IO, Any, NoReturn

import jax

from fam_jax.config import UserError

WORKER_LOST = 3  # exit code: another process of the job died, or never came
GRACEFUL = (0, 128 + signal.SIGTERM)  # exit codes that all processes of a job leave with together

RESTART = "its own log may say why; start all processes again to resume from the latest checkpoint"
JOINING = "is every process started, with the same --coordinator and --num_processes, and is its port open?"

CHILD = "FAM_JAX_SUPERVISED"  # set in the child's environment
PLACE = "fam_jax-process "  # begins the line by which the child tells its parent INDEX/COUNT

_JOINED = threading.Event()  # a script that calls several entry points takes its place once


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the flags")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a job of several processes, which :func:`join` reads and removes."""
    group = parser.add_argument_group("jobs of several processes, and how programs are compiled")
    add = group.add_argument
    add("--distributed", action=argparse.BooleanOptionalAction, help="ask JAX to find the other processes")
    add(
        "--coordinator",
        metavar="HOST:PORT",
        default=os.environ.get("JAX_COORDINATOR_ADDRESS"),
        help="of process 0",
    )
    add(
        "--num_processes",
        type=int,
        metavar="N",
        default=os.environ.get("JAX_NUM_PROCESSES"),
        help="in the job",
    )
    add(
        "--process_id",
        type=int,
        metavar="I",
        default=os.environ.get("JAX_PROCESS_ID"),
        help="of this process",
    )
    add(
        "--join_timeout", type=int, metavar="SECONDS", default=300, help="to wait for the others at the start"
    )
    add(
        "--heartbeat_timeout",
        type=int,
        metavar="SECONDS",
        default=40,
        help="after which a silent process is lost",
    )
    add("--cpu_devices", type=int, metavar="N", help="run on N simulated CPU devices")
    add("--compilation_cache", metavar="DIR", help="keep compiled programs here")


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return this module's options, and the arguments that are not its own.

    Raises:
      UserError: an option is malformed, or some of those that place a process are missing.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    add_arguments(parser)
    options, rest = parser.parse_known_args(argv[1:])
    given = [value is not None for value in (options.coordinator, options.num_processes, options.process_id)]
    if any(given) and not all(given) and options.distributed is None:
        raise UserError("--coordinator, --num_processes and --process_id: give all three, or none of them")
    if options.num_processes is not None and not 0 <= (options.process_id or 0) < options.num_processes:
        raise UserError(
            f"--process_id={options.process_id}: must be from 0 to {options.num_processes - 1}, "
            "one below --num_processes"
        )
    if options.coordinator is not None and not re.fullmatch(r".+:\d+", options.coordinator):
        raise UserError(f"--coordinator={options.coordinator}: expected HOST:PORT, of process 0")
    return options, [argv[0], *rest]


def join(argv: list[str], *, stop_together: bool) -> list[str]:
    """Makes this process part of its job, if it has one; call it before anything asks JAX for devices.

    In the parent (see above) it does not return: it exits with the exit code of the child.

    Args:
      argv: Of the program.
      stop_together: A SIGTERM to one process is left to `jax.experimental.multihost_utils`, by which all agree on the
        step to stop at. Otherwise it ends the process, as ever.

    Returns:
      `argv` without the options of this module.

    Raises:
      UserError: an option is malformed, or JAX cannot find out who the others are.
    """
    options, rest = parse(argv)
    if options.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", options.compilation_cache)
    if options.cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", options.cpu_devices)
    explicit = options.coordinator is not None or options.distributed
    if options.distributed is False or not (explicit or _has_libtpu(options)):
        return rest
    if _JOINED.is_set():
        return rest
    if os.environ.pop(CHILD, None) is None:
        sys.exit(supervise())
    _JOINED.set()
    _die_with_parent()
    jax.config.update("jax_enable_preemption_service", stop_together)
    try:
        jax.distributed.initialize(
            options.coordinator,
            options.num_processes,
            options.process_id,
            initialization_timeout=options.join_timeout,
            heartbeat_timeout_seconds=options.heartbeat_timeout,
        )
    except ValueError as error:
        if not explicit:
            return rest  # a TPU that belongs to no slice that JAX knows
        raise UserError(f"--distributed: JAX finds no others here ({error}); give --coordinator") from error
    except RuntimeError as error:
        print(f"error: this process could not join its job ({error}); {JOINING}", file=sys.stderr)
        sys.exit(WORKER_LOST)
    index, count = jax.process_index(), jax.process_count()
    print(f"{PLACE}{index}/{count}", file=sys.stderr, flush=True)
    if index:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # process 0 speaks for the job
    return rest


@contextlib.contextmanager
def leaving_together() -> Iterator[None]:
    """Lets a process that fails alone end at once, so that the others notice.

    On an ordinary exit JAX would first wait for the others to exit too, while they wait for this process to go on.
    An error of JAX's own may be the first sign that another process died: its runtime is then given the time to find
    out which, and to end this process.
    """
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized() or jax.process_count() == 1:
            raise
        code = error.code if isinstance(error, SystemExit) else 1
        if code in GRACEFUL or code is None:
            raise
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            time.sleep(parse(sys.orig_argv)[0].heartbeat_timeout + 10)
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def supervise() -> int:
    """Runs this very command as a child until it ends, and returns the exit code to leave with."""
    environment = {"TF_CPP_MIN_LOG_LEVEL": "2", **os.environ, CHILD: "1"}
    # A session of its own: Ctrl-C in a terminal reaches the parent alone, which passes it on once.
    child = subprocess.Popen(
        [sys.executable, *sys.orig_argv[1:]], env=environment, stderr=subprocess.PIPE,
        start_new_session=True, text=True, errors="replace",
    )  # fmt: skip
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
    """Passes the lines of a child's stderr on, and holds back how JAX's runtime tells that a peer died.

    Of processes other than the first, messages that are no errors are dropped.
    """

    _MINOR = re.compile(r"[IW]\d{4} \d\d:")
    # Of the coordination service, in the form [severity][date] [time] [thread] [file]:[line]] [message].
    _LOST = re.compile(
        r"(E\d{4} .*coordination_service|[EW]\d{4} .*preemption_sync_manager|F\d{4} .*client)\w*\.(cc|h):"
    )
    _SILENT = re.compile(r"stopped sending heartbeats\):\s*([\d,\s]+?)\s*(?:[A-Z]|$)")

    def __init__(self, lines: IO[str], out: IO[str]):
        """Reads from `lines`, writes to `out`."""
        self._lines, self._out = lines, out
        self._prefix = ""
        self._joined = False
        self._held: list[str] = []

    def pass_on(self) -> None:
        """Reads until the child ends."""
        for line in self._lines:
            if line.startswith(PLACE):
                place = line.removeprefix(PLACE).strip()
                self._prefix = "" if place.startswith("0/") else f"[{place}] "
                self._joined = True
            elif self._held or self._LOST.match(line):
                self._held.append(line)
            elif not (self._prefix and self._MINOR.match(line)):
                self.write(line)

    def write(self, line: str) -> None:
        """A line, with the prefix of its host."""
        self._out.write(self._prefix + line)
        self._out.flush()

    def release(self) -> None:
        """Writes what was held back."""
        for line in self._held:
            self.write(line)

    def reason(self) -> str:
        """Why the job ended, if JAX's runtime ended it."""
        held = "".join(self._held)
        if held and not self._joined:
            return f"this process could not join its job; {JOINING}"
        silent = self._SILENT.search(held)
        if silent:
            who = ", ".join(re.findall(r"\d+", silent[1]))
            return f"process {who} died or cannot be reached; {RESTART}"
        if "leader task" in held:
            return f"process 0, the coordinator, died or cannot be reached; {RESTART}"
        return f"another process died or cannot be reached; {RESTART}" if "fatal errors" in held else ""


def _has_libtpu(options: argparse.Namespace) -> bool:
    """Whether JAX would take a TPU: that is, whether this host may belong to a slice."""
    platforms = os.environ.get("JAX_PLATFORMS", "") or "tpu"
    return not options.cpu_devices and "tpu" in platforms and importlib.util.find_spec("libtpu") is not None


def _die_with_parent() -> None:
    """Otherwise a parent that is killed would leave a child that keeps the accelerators."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
