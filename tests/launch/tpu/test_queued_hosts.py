"""What the script for TPU VMs does on the hosts: stand-ins for gcloud, sudo and systemctl run it in a folder."""

import configparser
import json
import os
import pathlib
import shutil
import stat
import subprocess
import sys

import pytest

from tests.launch.running import ROOT

UNIT = ROOT / "launch" / "tpu" / "fam-jax.service"

GCLOUD = """#!/usr/bin/env bash
# Run the command of `ssh` in the home folder of a host.
for word in "$@"; do [[ $word != --command=* ]] || command=${word#--command=}; done
[[ $4 == ssh ]] || exit 0
cd "$HOST_ROOT/home" && HOME=$HOST_ROOT/home exec bash -c "$command"
"""
SUDO = """#!/usr/bin/env bash
# Files of root lie in the folder of the host.
words=()
for word in "$@"; do if [[ $word == /etc/* ]]; then word=$HOST_ROOT$word; fi; words+=("$word"); done
exec "${words[@]}"
"""
SYSTEMCTL = """#!{python}
import configparser, json, os, pathlib, shlex, subprocess, sys
root = pathlib.Path(os.environ["HOST_ROOT"])
file = root / "state.json"
state = json.loads(file.read_text()) if file.exists() else dict(known=[], enabled=[], active=[])
command, *rest = [word for word in sys.argv[1:] if not word.startswith("--")]
units = root / "etc/systemd/system"
def start(name):
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str
    unit.read(units / f"{{name}}.service")
    assert unit["Service"]["WorkingDirectory"] == "~" and unit["Service"]["User"] == os.environ["LOGNAME"]
    environment = dict(HOME=str(root / "home"), HOST_ROOT=str(root), PATH="/usr/bin:/bin")
    subprocess.run(shlex.split(unit["Service"]["ExecStart"]), cwd=root / "home", env=environment, check=True)
    state["active"].append(name)
def known(name):
    if name not in state["known"]:
        sys.exit(f"Unit {{name}}.service does not exist")
code = 0
if command == "daemon-reload":
    state["known"] = [path.stem for path in units.glob("*.service")]
elif command == "reboot":
    state["active"] = []
    for name in state["enabled"]:
        start(name)
elif command == "is-active":
    print("active" if rest[0] in state["active"] else "inactive")
    code = 0 if rest[0] in state["active"] else 3
elif command == "reset-failed":
    code = 1
else:
    known(rest[0])
    if command == "start":
        start(rest[0])
    elif command == "stop":
        state["active"] = [name for name in state["active"] if name != rest[0]]
    elif command == "enable":
        state["enabled"].append(rest[0])
    elif command == "disable":
        state["enabled"].remove(rest[0])
    elif command != "cat":
        sys.exit(f"unknown command {{command}}")
file.write_text(json.dumps(state))
sys.exit(code)
"""
# The program that the job runs: it records what reaches it.
PYTHON = """#!{python}
import json, os, pathlib, sys
with open(os.environ["HOST_ROOT"] + "/runs", "a") as file:
    print(json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]), file=file)
"""

NASTY = {
    "TFDS_DATA_DIR": "gs://bucket/tfds",
    "XLA_FLAGS": "--a=1 --b=2",
    "DOLLARS": "${HOME} $(date) $$ $X",
    "QUOTES": """it's "quoted" \\ and `run` %h %%""",
    "COMMAS": "a,b=c;d|e&f*?[x]~",
    "EMPTY": "",
    "LINES": "one\ntwo\n\tthree",
    "ACCENTS": "\u00e9\u00e8 \u2192",
}
TRAIN = ["--workdir", "gs://b/$X", *(f"--{name}={value}" for name, value in NASTY.items()), "(2, 3)", ""]


class Host:
    """A host, as a folder."""

    def __init__(self, root: pathlib.Path):
        """Make the folder, with an installed tree and the stand-ins."""
        self.root = root
        (root / "etc/systemd/system").mkdir(parents=True)
        installed = root / "home/fam_jax"
        (installed / "launch/tpu").mkdir(parents=True)
        shutil.copy(UNIT, installed / "launch/tpu")
        python = sys.executable
        for path, text in {
            root / "bin/gcloud": GCLOUD,
            root / "bin/sudo": SUDO,
            root / "bin/systemctl": SYSTEMCTL.format(python=python),
            installed / ".venv/bin/python": PYTHON.format(python=python),
        }.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            path.chmod(0o755)
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        path = f"{root}/bin:{os.environ['PATH']}"
        self.environment = {
            **os.environ,
            "PATH": path,
            "HOST_ROOT": str(root),
            "LOGNAME": user,
            "PYTHON": python,
        }

    def queued(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", "launch/tpu/queued.sh", "--name=fam", "--zone=z", *arguments]
        return subprocess.run(
            command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=60
        )

    def reboot(self) -> None:
        subprocess.run([self.root / "bin/systemctl", "reboot"], env=self.environment, check=True)

    def runs(self) -> list[tuple[list[str], dict[str, str], str]]:
        """Return arguments, environment and folder of every start of the job."""
        file = self.root / "runs"
        return [tuple(json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []

    @property
    def state(self) -> dict[str, list[str]]:
        return json.loads((self.root / "state.json").read_text())

    @property
    def unit(self) -> pathlib.Path:
        return self.root / "etc/systemd/system/fam-jax.service"


@pytest.fixture
def host(tmp_path: pathlib.Path) -> Host:
    return Host(tmp_path / "host")


def test_environment_and_arguments_arrive_as_they_are_typed_also_after_a_reboot(host: Host) -> None:
    options = [part for name, value in NASTY.items() for part in ("--env", f"{name}={value}")]
    done = host.queued("--env=EMPTY=first", *options, "run", "--", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert host.state == {"known": ["fam-jax"], "enabled": ["fam-jax"], "active": ["fam-jax"]}
    host.reboot()
    assert len(host.runs()) == 2 and host.state["active"] == ["fam-jax"]
    for arguments, environment, folder in host.runs():
        assert arguments == ["-m", "launch.train", *TRAIN]
        assert {name: environment.get(name) for name in NASTY} == NASTY
        assert folder == str(host.root / "home/fam_jax")
    script = host.root / "home/fam-jax.sh"
    assert stat.S_IMODE(script.stat().st_mode) == 0o600  # a variable may be a secret


def test_stop_removes_the_job_for_good(host: Host) -> None:
    assert host.queued("run", "--", *TRAIN).returncode == 0
    done = host.queued("stop")
    assert done.returncode == 0, done.stderr
    assert host.state == {"known": [], "enabled": [], "active": []}
    assert not host.unit.exists() and not (host.root / "home/fam-jax.sh").exists()
    host.reboot()
    assert len(host.runs()) == 1

    again = host.queued("stop")
    assert again.returncode == 0 and "there is no job" in again.stdout
    assert host.queued("run", "--", *TRAIN).returncode == 0 and len(host.runs()) == 2


def test_a_running_job_is_not_replaced(host: Host) -> None:
    assert host.queued("run", "--", "--workdir=gs://b/first").returncode == 0
    done = host.queued("run", "--", "--workdir=gs://b/second")
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert done.stderr.endswith(": the job runs already; stop it first\n") and done.stderr.count("\n") == 1
    host.reboot()
    assert [arguments[2] for arguments, _, _ in host.runs()] == ["--workdir=gs://b/first"] * 2


def test_run_before_install(host: Host) -> None:
    shutil.rmtree(host.root / "home/fam_jax")
    done = host.queued("run", "--", *TRAIN)
    assert done.returncode == 2 and done.stderr.endswith(": fam_jax is not installed; run install first\n")
    assert not host.unit.exists()


def test_the_unit(tmp_path: pathlib.Path) -> None:
    unit = configparser.RawConfigParser()
    unit.optionxform = str  # type: ignore[assignment]
    unit.read(UNIT)
    assert unit["Install"]["WantedBy"] == "multi-user.target"
    wanted = {
        "Restart": "on-failure",
        "RestartPreventExitStatus": "2",
        "KillMode": "mixed",
        "TimeoutStopSec": "300",
    }
    assert wanted.items() <= dict(unit["Service"]).items()
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd")
    path = tmp_path / UNIT.name
    path.write_text(UNIT.read_text().replace("@USER@", "root"))
    done = subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
