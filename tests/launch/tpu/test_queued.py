"""The script for TPU VMs: the commands that it prints, and what it does with a stand-in for gcloud."""

import os
import pathlib
import subprocess
import sys

import pytest

from tests.launch.running import ROOT

SCRIPT = "launch/tpu/queued.sh"
SNAPSHOTS = pathlib.Path(__file__).parent / "snapshots"
COMMANDS = ("create", "wait", "install", "run", "logs", "status", "stop", "resume", "delete")
TRAIN = [
    "--",
    "--config=configs/passkey.py",
    "--workdir=gs://bucket/run",
    "--config.data.stage_blocks=(2, 3)",
]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {
        name: value for name, value in os.environ.items() if name not in ("NAME", "SLICE", "ZONE", "PROJECT")
    }
    return subprocess.run(
        ["bash", SCRIPT, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={**kept, "PYTHON": sys.executable, "TMPDIR": "/tmp", **environment},
    )  # fmt: skip


def test_shellcheck() -> None:
    shellcheck = pathlib.Path(sys.executable).parent / "shellcheck"
    result = subprocess.run([shellcheck, SCRIPT], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("name", "options"),
    [("v5p:4x4x8", ["--spot"]), ("v5e:4x8", ["--project=mine"]), ("v6e:2x4", []), ("v5p:4x4x16", [])],
)
def test_the_commands_that_a_dry_run_prints(name: str, options: list[str]) -> None:
    """Compare with the snapshots. To rewrite them, set UPDATE_SNAPSHOTS=1; then review the changes."""
    found = ""
    for command in COMMANDS:
        result = run(
            "--dry-run", "--name=fam", "--zone=us-east5-a", f"--slice={name}", *options, command, *TRAIN
        )
        assert result.returncode == 0, result.stderr
        found += f"# {command}\n{result.stdout}"
    snapshot = SNAPSHOTS / f"queued_{name.replace(':', '_')}.txt"
    if os.environ.get("UPDATE_SNAPSHOTS"):
        snapshot.write_text(found)
    assert found == snapshot.read_text()


def test_a_printed_command_is_the_command() -> None:
    """The arguments of training pass through two shells: this one and that of the hosts."""
    printed = run("--dry-run", "--name=fam", "--zone=z", "run", *TRAIN).stdout.removeprefix("+ ")
    words = subprocess.run(
        ["bash", "-c", f"gcloud() {{ printf '%s\\n' \"$@\"; }}; {printed}"], capture_output=True, text=True
    ).stdout.splitlines()
    remote = words[-1].removeprefix("--command=")
    words = subprocess.run(
        ["bash", "-c", f"sudo() {{ [[ $1 != systemd-run ]] || printf '%s\\n' \"$@\"; }}; {remote}"],
        capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    assert words[-5:] == ["-m", "launch.train", *TRAIN[1:]]


@pytest.fixture
def gcloud(tmp_path: pathlib.Path) -> pathlib.Path:
    """Make a stand-in that logs its calls and reports the states in the file `states`, of which the last one stays."""
    script = tmp_path / "gcloud"
    script.write_text(
        '#!/usr/bin/env bash\ncd "$(dirname "$0")"\necho "$@" >> calls\n'
        "if [[ $4 == describe ]]; then head -n 1 states; (($(wc -l < states) < 2)) || sed -i 1d states; fi\n"
    )
    script.chmod(0o755)
    return tmp_path


def calls(folder: pathlib.Path) -> list[str]:
    lines = [line.split() for line in (folder / "calls").read_text().splitlines()]
    return [words[3] for words in lines if words[3] != "describe"]


def real(folder: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(
        "--name=fam", "--zone=z", "--slice=v5e:4x4", *arguments,
        PATH=f"{folder}:{os.environ['PATH']}", POLL_SECONDS="0", TMPDIR=str(folder),
    )  # fmt: skip


def test_wait_returns_when_the_slice_is_ready(gcloud: pathlib.Path) -> None:
    (gcloud / "states").write_text("WAITING_FOR_RESOURCES\nWAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE\n")
    result = real(gcloud, "wait")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].endswith(" ACTIVE")


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_wait_gives_up_when_the_request_has_failed(state: str, gcloud: pathlib.Path) -> None:
    (gcloud / "states").write_text(f"PROVISIONING\nPROVISIONING\n{state}\n")
    result = real(gcloud, "wait")
    assert result.returncode == 2
    says = f"the request is {state}; check the quota or choose another zone, then delete and create it"
    assert result.stderr == f"error: {says}\n"


def test_resume_requests_the_slice_again_only_after_a_preemption(gcloud: pathlib.Path) -> None:
    (gcloud / "states").write_text("ACTIVE\n")
    assert real(gcloud, "resume", *TRAIN).returncode == 0
    assert calls(gcloud) == ["ssh"]
    (gcloud / "calls").unlink()
    (gcloud / "states").write_text("SUSPENDED\nSUSPENDED\nACTIVE\n")
    result = real(gcloud, "resume", *TRAIN)
    assert result.returncode == 0, result.stderr
    assert calls(gcloud) == ["delete", "create", "scp", "ssh", "ssh"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["create"], "missing --name=NAME"),
        (["--name=a", "create"], "missing --zone=ZONE"),
        (["--name=a", "--zone=z", "create"], "missing --slice=SLICE; give one such as v5p:4x4x8"),
        (["--name=a", "--zone=z", "--slice=v5p:4x4x9", "create"], "slice 'v5p:4x4x9': "),
        (["--name=a", "--zone=z", "crate"], "crate: unknown command; --help lists them"),
        (["--name=a", "--zone=z", "--spott", "create"], "--spott: unknown option; --help lists them"),
        (["--name=a", "--zone=z", "run"], "missing the arguments of launch.train; give them behind --"),
        (["--name=a", "--zone=z", "run", "--", "--workdir=x"], "missing --workdir=gs://... behind --"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], says: str) -> None:
    result = run("--dry-run", *arguments)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {says}") and result.stderr.count("\n") == 1
    assert "gcloud" not in result.stdout
