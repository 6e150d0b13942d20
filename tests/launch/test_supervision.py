"""The parent of a process of a job: how it passes on the output of its child, and its flags."""

import argparse
import io
import pathlib
import subprocess
import sys

import jax
import pytest

from fam_jax.config import UserError
from launch import cli, processes
from launch.processes import ChildLog
from tests.launch.running import ROOT

# What JAX's runtime (0.10) prints when it ends a process, shortened.
SILENT = """\
E1121 08:46:00.046219    9157 coordination_service.cc:1549] Use error polling to propagate the following error to all \
tasks: UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):
1
The tasks have crashed. Check the task logs for an earlier error
F1121 08:46:00.046907    9174 client.h:80] Terminating process because the JAX distributed service detected fatal \
errors. absl::Status: UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):
1
The tasks have crashed.
*** Check failure stack trace: ***
    @     0x7f53b3a40634  absl::lts_20260107::log_internal::LogMessage::SendToLog()
"""
LEADER = """\
W1121 08:45:42.985876    9281 preemption_sync_manager.cc:147] Failed to retrieve preemption notice: Socket closed
F1121 08:45:42.986025    9281 client.h:80] Terminating process because the JAX distributed service detected fatal \
errors. absl::Status: UNAVAILABLE: Failed to send RPC to coordination service. Either the leader task was \
preempted/died/restarted unexpectedly or this task is experiencing network issues.
"""
JOINING = """\
F1121 08:59:33.929586   15684 client.h:80] Terminating process because the JAX distributed service detected fatal \
errors. absl::Status: DEADLINE_EXCEEDED: Deadline Exceeded
"""
RESTART = "; its own log may say why; start all processes again to resume from the latest checkpoint"


def passed_on(text: str) -> tuple[ChildLog, str]:
    out = io.StringIO()
    log = ChildLog(io.StringIO(text), out)
    log.pass_on()
    return log, out.getvalue()


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (SILENT, f"process 1 died or cannot be reached{RESTART}"),
        (SILENT.replace("\n1\n", "\n1,\n13\n"), f"process 1, 13 died or cannot be reached{RESTART}"),
        (LEADER, f"process 0, the coordinator, died or cannot be reached{RESTART}"),
        (JOINING, f"another process died or cannot be reached{RESTART}"),
        ("", ""),
    ],
)
def test_why_the_runtime_ended_a_process(end: str, reason: str) -> None:
    log, written = passed_on(f"fam_jax-process 0/2\nstep 1/9\n{end}")
    assert written == "step 1/9\n"
    assert log.reason() == reason


def test_just_after_joining_the_runtime_ends_a_process_without_a_word() -> None:
    lost = f"another process died or cannot be reached{RESTART}"
    note = "W1121 08:44:38.8 8803 some_file.cc:90] a note of the runtime\n"
    assert passed_on("starting\nfam_jax-process 1/2\n")[0].reason() == lost
    assert passed_on(f"fam_jax-process 1/2\n{note}")[0].reason() == lost
    assert passed_on("fam_jax-process 1/2\ndevices: 2 x cpu\n")[0].reason() == ""


def test_a_process_that_never_joined() -> None:
    assert passed_on(JOINING)[0].reason().startswith("this process could not join its job; check that every")


def test_other_processes_are_marked_and_only_their_errors_are_shown() -> None:
    minor = (
        "W1121 08:44:38.8 8803 preemption_notifier.cc:90] SIGTERM caught\n"
        "WARNING:absl:[process=3] Reached preemption sync point, step=3\n"
    )
    text = f"fam_jax-process 3/16\n{minor}Traceback\n  line\n"
    assert passed_on(text)[1] == "[3/16] Traceback\n[3/16]   line\n"
    assert passed_on(text.replace("3/16", "0/16"))[1] == f"{minor}Traceback\n  line\n"


def test_notes_on_connections_are_not_shown() -> None:
    expected = "Expected number of connected peer ranks is : "
    note = f"[Gloo] Rank 0 is connected to 1 peer ranks. {expected}1\n"
    # Two threads at once.
    mixed = f"[Gloo] Rank [Gloo] Rank 01 is connected to 1 peer ranks. {expected}{expected}1\n1\n\n"
    for process in ("0/2", "1/2"):
        log = f"fam_jax-process {process}\n\nstep 1\n{note}{note}step 2\n{mixed}7\nTraceback\n\n  line\n12\n"
        kept = ("", "step 1", "step 2", "Traceback", "", "  line", "12")
        prefix = "" if process == "0/2" else f"[{process}] "
        assert passed_on(log)[1] == "".join(f"{prefix}{line}\n" for line in kept)


def test_lines_that_were_held_back_are_shown_if_the_process_goes_on() -> None:
    log, written = passed_on(f"{SILENT}Traceback\n")
    assert written == ""
    log.release()
    assert log._out.getvalue() == f"{SILENT}Traceback\n"  # type: ignore[attr-defined]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)


def parse(*arguments: str) -> argparse.Namespace:
    return cli.Parser("something", "Do something.", job=True).parse_args(arguments)


def test_flags_come_from_the_command_line_and_the_environment(
    alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = parse("--coordinator=h:1", "--num_processes=4", "--process_id=3")
    assert (found.coordinator, found.num_processes, found.process_id) == ("h:1", 4, 3)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "h:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    found = parse()
    assert (found.coordinator, found.num_processes, found.process_id) == ("h:1", 2, 1)
    assert parse("--process_id=0").process_id == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--coordinator=h:1", "--num_processes=2"], "--coordinator, --num_processes and --process_id: give all three"),
        (["--process_id=0"], "--coordinator, --num_processes and --process_id: give all three"),
        (["--cpu_devices=100000"], "--cpu_devices=100000: must be from 0 to 4096"),
        (["--heartbeat_timeout=0"], "--heartbeat_timeout=0: must be from 1 to 1000000"),
        (["--coordinator=h:1", "--num_processes=2", "--process_id=2"], "--process_id=2: must be from 0 to 1"),
        (["--coordinator=h", "--num_processes=2", "--process_id=0"], "--coordinator=h: expected HOST:PORT"),
        (["--num_processes=two"], "argument --num_processes"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(arguments: list[str], says: str, alone: None) -> None:
    with pytest.raises(UserError) as caught:
        processes.join(parse(*arguments), stop_together=False)
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


def test_a_child_dies_with_its_parent(tmp_path: pathlib.Path) -> None:
    """A parent that is killed cannot pass the signal on, and its child must not keep the accelerators."""
    child = (
        "import time; from launch.processes import _die_with_parent; _die_with_parent(); "
        "print(1, flush=True); time.sleep(60)"
    )
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "1\n"
    process.kill()
    assert process.stdout.read() == ""  # returns once the child, which holds the pipe too, is gone
    process.wait()


def test_a_script_may_call_several_programs(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second call must not start another child, which would run the whole script again, and so on."""
    calls: list[tuple] = []
    monkeypatch.setenv(processes.CHILD, "1")
    monkeypatch.setattr(processes, "_joined", [])
    monkeypatch.setattr(processes, "_die_with_parent", lambda: None)
    monkeypatch.setattr(processes, "supervise", lambda: 77)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *place, **_: calls.append(place))
    flags = parse("--coordinator=localhost:1", "--num_processes=1", "--process_id=0")
    for _ in range(2):
        processes.join(flags, stop_together=False)
    assert calls == [("localhost:1", 1, 0)]
    monkeypatch.setattr(processes, "_joined", [])
    with pytest.raises(SystemExit, match="77"):
        processes.join(flags, stop_together=False)
