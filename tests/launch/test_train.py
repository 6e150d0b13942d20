"""`python -m launch.train`: train, stop at Ctrl-C, resume; and a mistake that only the data shows."""

import json
import os
import pathlib
import signal
import subprocess

import pytest

from tests.launch.running import ROOT, TINY, command, environment

STEPS = 400


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_resumes(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "run"
    train = command(
        "launch.train", "--config=configs/passkey.py:smoke", *TINY, f"--config.train.steps={STEPS}",
        "--config.train.log_every=5", "--config.train.checkpoint_every=1000", f"--workdir={folder}",
    )  # fmt: skip
    process = subprocess.Popen(
        train, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    before = []
    for line in process.stderr:
        before.append(line)
        if line.startswith("step 5/"):
            os.kill(process.pid, signal.SIGINT)
            break
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130, "".join(before) + errors
    assert output == ""
    last = errors.splitlines()[-1]
    steps = [int(path.name) for path in folder.iterdir() if path.name.isdigit()]
    assert len(steps) == 1 and 5 <= steps[0] < STEPS
    assert last == f"stopped at step {steps[0]}; everything is saved, run the same command to resume"
    assert "Traceback" not in "".join(before) + errors

    again = subprocess.run(train, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    reports = [line.partition("/")[0] for line in again.stderr.splitlines() if line.startswith("step ")]
    assert reports == [f"step {step}" for step in range(steps[0] // 5 * 5 + 5, STEPS + 1, 5)]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(5, STEPS + 1, 5))
    assert (folder / str(STEPS)).is_dir()
    assert lines[-1]["loss"] < lines[0]["loss"]


@pytest.mark.slow
def test_a_missing_vocabulary_is_one_line(tmp_path: pathlib.Path) -> None:
    train = command(
        "launch.train", "--config=configs/passkey.py:smoke", *TINY, "--config.data.vocabulary=missing.model",
        f"--workdir={tmp_path / 'run'}", "--quiet",
    )  # fmt: skip
    done = subprocess.run(train, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: vocabulary 'missing.model': no such file")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
