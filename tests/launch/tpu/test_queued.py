"""The script for TPU VMs: the commands that it prints, and what it does with a stand-in for gcloud.

What it does on the hosts is in test_queued_hosts.py.
"""

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
    [
        ("v5p:4x4x8", ["--spot"]),
        ("v5e:4x8", ["--project=mine", "--tunnel-through-iap", "--connect-flag=--ssh-key-file=~/my key"]),
        ("v6e:2x4", ["--env=TFDS_DATA_DIR=gs://b/tfds", "--env", "XLA_FLAGS=--a --b"]),
        (
            "v5p:4x4x16",
            [
                "--reserved",
                "--network=net",
                "--subnetwork",
                "sub",
                "--internal-ips",
                "--service-account=me@x.com",
                "--create-flag=--labels=team=a,cost=b",
                "--create-flag",
                "--metadata=note=two words",
            ],
        ),
    ],
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
    flags = ["--description=two words, $X and 'quotes'", "--labels=a=b"]
    given = [part for flag in flags for part in ("--create-flag", flag)]
    printed = run("--dry-run", "--name=fam", "--zone=z", "--slice=v5e-16", *given, "create").stdout
    words = subprocess.run(
        ["bash", "-c", f"gcloud() {{ printf '%s\\n' \"$@\"; }}; {printed.removeprefix('+ ')}"],
        capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    assert words[-2:] == flags


@pytest.fixture
def gcloud(tmp_path: pathlib.Path) -> pathlib.Path:
    """Make a stand-in that logs its calls and reports the states in the file `states`, of which the last one stays.

    There is no request if the state is NONE, and gcloud itself fails if it is BROKEN.
    """
    script = tmp_path / "gcloud"
    script.write_text(
        '#!/usr/bin/env bash\ncd "$(dirname "$0")"\necho "$@" >> calls\n[[ $4 == describe ]] || exit 0\n'
        "now=$(head -n 1 states); (($(wc -l < states) < 2)) || sed -i 1d states\n"
        "case $now in\n"
        '  NONE) echo "ERROR: (gcloud.compute.tpus) NOT_FOUND: Resource was not found" >&2; exit 1 ;;\n'
        '  BROKEN) echo "ERROR: (gcloud.compute.tpus) cannot reach the network" >&2; exit 1 ;;\n'
        '  *) echo "WARNING: an update is there" >&2; echo "$now" ;;\n'
        "esac\n"
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


@pytest.mark.parametrize(
    ("states", "wanted"),
    [
        ("ACTIVE", ["ssh"]),
        ("SUSPENDED ACTIVE", ["delete", "create", "scp", "ssh", "ssh"]),
        ("SUSPENDING SUSPENDING SUSPENDED ACTIVE", ["delete", "create", "scp", "ssh", "ssh"]),
        ("FAILED ACTIVE", ["delete", "create", "scp", "ssh", "ssh"]),
        ("NONE ACTIVE", ["create", "scp", "ssh", "ssh"]),
        ("DELETING DELETING NONE ACTIVE", ["create", "scp", "ssh", "ssh"]),
        # It keeps its place in the queue.
        ("WAITING_FOR_RESOURCES WAITING_FOR_RESOURCES PROVISIONING ACTIVE", ["scp", "ssh", "ssh"]),
        ("PROVISIONING ACTIVE", ["scp", "ssh", "ssh"]),
        ("ACCEPTED PROVISIONING ACTIVE", ["scp", "ssh", "ssh"]),
        ("CREATING ACTIVE", ["scp", "ssh", "ssh"]),
        ("WAITING_FOR_RESOURCES BROKEN ACTIVE", ["scp", "ssh", "ssh"]),
    ],
)
def test_resume_requests_the_slice_again_only_after_a_preemption(
    states: str, wanted: list[str], gcloud: pathlib.Path
) -> None:
    (gcloud / "states").write_text(states.replace(" ", "\n") + "\n")
    result = real(gcloud, "resume", *TRAIN)
    assert result.returncode == 0, result.stderr
    assert calls(gcloud) == wanted


def test_resume_does_nothing_if_it_cannot_learn_the_state(gcloud: pathlib.Path) -> None:
    (gcloud / "states").write_text("BROKEN\n")
    result = real(gcloud, "resume", *TRAIN)
    assert result.returncode == 2 and calls(gcloud) == []
    assert result.stderr.splitlines() == [
        "ERROR: (gcloud.compute.tpus) cannot reach the network",
        "error: gcloud does not report the state of fam, for the reason above; try again",
    ]


@pytest.mark.parametrize("workdir", [["--workdir", "gs://b/x"], ["--workdir=/tmp/x", "--workdir=gs://b/x"]])
def test_workdirs(workdir: list[str]) -> None:
    result = run("--dry-run", "--name=a", "--zone=z", "run", "--", *workdir)
    assert result.returncode == 0 and " ".join(workdir) in result.stdout


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
        (["--name=a", "--zone=z", "run", "--", "--workdir", "x"], "missing --workdir=gs://... behind --"),
        (["--name=a", "--zone=z", "run", "--", "--workdir"], "missing --workdir=gs://... behind --"),
        (["--name=a", "--zone=z", "run", "--", "--x", "y --workdir=gs://b/x"], "missing --workdir=gs://..."),
        (
            ["--name=a", "--zone=z", "run", "--", "--workdir=gs://b", "--workdir=x"],
            "missing --workdir=gs://...",
        ),
        (["--spot", "--reserved", "create"], "--spot, --reserved: chips are either preemptible or reserved"),
        (["--reserved", "--spot", "create"], "--spot, --reserved: chips are either preemptible or reserved"),
        (
            ["--name=my_run", "create"],
            "--name=my_run: Google Cloud does not accept it; use up to 63 lower-case",
        ),
        (["--name=Fam", "create"], "--name=Fam: Google Cloud does not accept it"),
        (["--name=-fam", "create"], "--name=-fam: Google Cloud does not accept it"),
        (["--name=fam-", "create"], "--name=fam-: Google Cloud does not accept it"),
        (["--name=a b", "create"], "--name=a b: Google Cloud does not accept it"),
        (["--name=a\nb", "create"], "--name=a b: Google Cloud does not accept it"),
        ([f"--name={'a' * 64}", "create"], f"--name={'a' * 64}: Google Cloud does not accept it"),
        (["--env=A", "run"], "--env=A: expected --env=NAME=VALUE"),
        (["--env", "A-B=c", "run"], "--env=A-B=c: expected --env=NAME=VALUE"),
        (["--env"], "--env: has no value; write --env=VALUE"),
        (["--network=", "create"], "--network: has no value; write --network=VALUE"),
        (["--create-flag=", "create"], "--create-flag: has no value; write --create-flag=VALUE"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], says: str) -> None:
    result = run("--dry-run", *arguments)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {says}") and result.stderr.count("\n") == 1
    assert "gcloud" not in result.stdout
