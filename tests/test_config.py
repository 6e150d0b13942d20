"""Mistakes on the command line of a program that takes a config."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


# Runs each command line in a fork of one process, which has imported everything and rejects TensorFlow.
FORKS = """
import contextlib, io, json, os, runpy, sys, warnings
warnings.simplefilter("ignore")
import fam_jax.memories.fam, launch.cli
class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("tensorflow", "seqio"):
            raise AssertionError(f"{name} is imported before the flags are known to be right")
sys.meta_path.insert(0, Forbidden())
results = []
for argv in json.load(sys.stdin):
    reader, writer = os.pipe()
    if not os.fork():
        os.dup2(writer, 1), os.dup2(writer, 2), os.close(writer), os.close(reader)
        sys.argv = ["launch/train.py", *argv]
        code = 1
        try:
            runpy.run_module("launch.train", run_name="__main__")
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException as error:
            print(f"Traceback {type(error).__name__}: {error}", flush=True)
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code or 0)
    os.close(writer)
    with open(reader) as pipe:
        text = pipe.read()
    results.append((os.waitstatus_to_exitcode(os.wait()[1]), text))
json.dump(results, sys.stdout)
"""
FILE = "--config=configs/passkey.py"
WORKDIR = "--workdir=never-made"
MISTAKES = {
    "typo": ([FILE, "--config.model.num_layer=2", WORKDIR], "config.model.num_layer:", "did you mean num_layers?"),
    "group": ([FILE, "--config.modle.num_layers=2", WORKDIR], "config.modle", "did you mean model?"),
    "whole group": ([FILE, "--config.model=2", WORKDIR], "config.model: is a group of fields", ""),
    "type": ([FILE, "--config.model.num_layers=two", WORKDIR], "config.model.num_layers", "two"),
    "fraction": ([FILE, "--config.model.num_layers=2.5", WORKDIR], "config.model.num_layers", "2.5"),
    "value": ([FILE, "--config.model.norm=batch", WORKDIR], "config.model.norm: expected one of rmsnorm", ""),
    "combination": ([FILE, "--config.model.head_dim=7", WORKDIR], "config.model.head_dim: must be even", ""),
    "order": (["--config.model.head_dim=7", FILE, WORKDIR], "config.model.head_dim: must be even", ""),
    "no file": (["--config=configs/pass.py", WORKDIR], "configs/pass.py: there is no such file", ""),
    "no config": ([WORKDIR], "missing --config", "--help lists the flags"),
    "argument": ([f"{FILE}:bswa_m2", WORKDIR], "bswa_m2: expected one of fam", ""),
    "flag": ([FILE, WORKDIR, "--worker=3"], "worker", ""),
    "no workdir": ([FILE], "workdir", ""),
    "restore": ([FILE, WORKDIR, "--restore_step=last"], "restore_step", "last"),
    "two words": (["--config", "configs/passkey.py", "--config.model.head_dim", "7", WORKDIR], "head_dim", "even"),
    "left over": ([FILE, WORKDIR, "model.head_dim=8"], "model.head_dim=8", ""),
}  # fmt: skip


@pytest.fixture(scope="module")
def outcomes() -> dict[str, tuple[int, str]]:
    """Return exit code and output of `python -m launch.train` with each of MISTAKES."""
    result = subprocess.run(
        [sys.executable, "-c", FORKS],
        input=json.dumps([argv for argv, *_ in MISTAKES.values()]),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return dict(zip(MISTAKES, json.loads(result.stdout), strict=True))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_on_the_command_line_are_told_in_a_line(
    mistake: str, outcomes: dict[str, tuple[int, str]]
) -> None:
    _, names, says = MISTAKES[mistake]
    code, text = outcomes[mistake]
    assert code == 2, text
    assert text.startswith("error: ") and text.count("\n") == 1 and text.endswith("\n"), text
    assert names in text and says in text
    assert not (ROOT / "never-made").exists()
