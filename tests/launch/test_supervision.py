"""What the parent of a process of a job makes of its child's output, and which options it takes."""

import io
import pathlib
import subprocess
import sys
import threading

import jax
import pytest

from fam_jax.config import UserError
from launch import processes
from launch.processes import ChildLog, parse
from tests.launch.running import ROOT

# How JAX's runtime (0.10) ends a process: shortened.
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
def test_the_reason_of_an_end(end: str, reason: str) -> None:
    log, written = passed_on(f"fam_jax-process 0/2\nstep 1/9\n{end}")
    assert written == "step 1/9\n"
    assert log.reason() == reason


def test_a_process_that_never_joined() -> None:
    assert passed_on(JOINING)[0].reason().startswith("this process could not join its job; is every process")


def test_other_processes_are_marked_and_only_their_errors_are_shown() -> None:
    text = "fam_jax-process 3/16\nW1121 08:44:38.8 8803 preemption_notifier.cc:90] SIGTERM caught\nTraceback\n  line\n"
    assert passed_on(text)[1] == "[3/16] Traceback\n[3/16]   line\n"


def test_what_was_held_back_is_shown_if_it_was_not_the_end() -> None:
    log, written = passed_on(f"{SILENT}Traceback\n")
    assert written == ""
    log.release()
    assert log._out.getvalue() == f"{SILENT}Traceback\n"  # type: ignore[attr-defined]


def test_options_are_taken_from_the_command_line_and_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    argv = [
        "train",
        "--config=c.py",
        "--coordinator=h:1",
        "--config.train.steps=3",
        "--num_processes=4",
        "--process_id=3",
    ]
    found, rest = parse(argv)
    assert (found.coordinator, found.num_processes, found.process_id) == ("h:1", 4, 3)
    assert rest == ["train", "--config=c.py", "--config.train.steps=3"]
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "h:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    found, rest = parse(["train"])
    assert (found.coordinator, found.num_processes, found.process_id) == ("h:1", 2, 1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--coordinator=h:1", "--num_processes=2"], "--coordinator, --num_processes and --process_id: give all three"),
        (["--process_id=0"], "--coordinator, --num_processes and --process_id: give all three"),
        (["--coordinator=h:1", "--num_processes=2", "--process_id=2"], "--process_id=2: must be from 0 to 1"),
        (["--coordinator=h", "--num_processes=2", "--process_id=0"], "--coordinator=h: expected HOST:PORT"),
        (["--num_processes=two"], "argument --num_processes"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_a_line(
    arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError) as caught:
        parse(["train", *arguments])
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


def test_a_child_dies_with_its_parent(tmp_path: pathlib.Path) -> None:
    """Killed outright, a parent can pass nothing on; its child must not keep the accelerators."""
    child = (
        "import time; from launch.processes import _die_with_parent; _die_with_parent(); "
        "print(1, flush=True); time.sleep(60)"
    )
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "1\n"
    process.kill()
    assert process.stdout.read() == ""  # ends when the child, which holds the pipe too, is gone
    process.wait()


def test_a_script_may_call_several_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second must not make a child of its own, which would run the whole script once more, and so on."""
    joined: list[tuple] = []
    monkeypatch.setenv(processes.CHILD, "1")
    monkeypatch.setattr(processes, "_JOINED", threading.Event())
    monkeypatch.setattr(processes, "_die_with_parent", lambda: None)
    monkeypatch.setattr(processes, "supervise", lambda: 77)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *place, **_: joined.append(place))
    argv = ["import_hf", "--coordinator=localhost:1", "--num_processes=1", "--process_id=0", "--out=x"]
    for _ in range(2):
        assert processes.join(argv, stop_together=False) == ["import_hf", "--out=x"]
    assert joined == [("localhost:1", 1, 0)]
    monkeypatch.setattr(processes, "_JOINED", threading.Event())
    with pytest.raises(SystemExit, match="77"):
        processes.join(argv, stop_together=False)
