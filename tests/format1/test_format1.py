"""Runs, memory files and LoRA runs of version 0.1 still resume, evaluate and generate.

Version 0.1 made the files in `data/`: three runs of two layers (text with FAM and random state passing; LoRA of it;
PassKey with one initial FAM per layer), each truncated to its first half, the metrics of the whole runs, the answers
that the models gave, their evaluations, and a memory of heldout.txt.
"""

import json
import pathlib
import shutil
import subprocess
import sys
import tarfile
from typing import Any

import numpy as np
import pytest

from tests.launch.running import environment

ROOT = pathlib.Path(__file__).resolve().parents[2]
DATA = pathlib.Path(__file__).resolve().parent / "data"
RUNS = {"text": 4, "lora": 2, "passkey": 4}
COMPARED = (
    "loss",
    "objective",
    "gradient_norm",
    "update_norm",
    "learning_rate",
    "exact_match",
    "answer_accuracy",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("format1")
    for run in RUNS:
        with tarfile.open(DATA / f"{run}.tar.gz") as archive:
            archive.extractall(path, filter="data")
    for name in ("train.txt", "heldout.txt", "heldout.memory"):
        shutil.copy(DATA / name, path)
    return path


def metrics(folder: pathlib.Path, run: str) -> dict[int, dict[str, Any]]:
    lines = (folder / run / "metrics.jsonl").read_text().splitlines()
    return {line["step"]: line for line in map(json.loads, lines)}


@pytest.fixture(scope="module")
def recorded(folder: pathlib.Path) -> dict[str, dict[int, dict[str, Any]]]:
    """Return the metrics of version 0.1, read before the runs are resumed."""
    return {run: metrics(folder, run) for run in RUNS}


@pytest.fixture(scope="module")
def replayed(folder: pathlib.Path, recorded: Any) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.format1.replay"],
        cwd=folder,
        env=environment() | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("run", RUNS)
def test_a_run_goes_on_as_it_did(run: str, recorded: Any, replayed: Any) -> None:
    """Equal losses in every step show that batches, random draws, parameters and optimizer state are the same."""
    last = max(recorded[run])
    assert last == 2 * RUNS[run]
    for step in range(RUNS[run] + 1, last + 1):
        before, now = recorded[run][step], replayed["metrics"][run][str(step)]
        for name in COMPARED:
            if name in now:
                np.testing.assert_allclose(now[name], before[name], rtol=2e-5, err_msg=f"step {step}: {name}")


@pytest.mark.parametrize(
    ("answer", "file"), [("text", "text_step4"), ("lora", "lora_step2"), ("memory", "text_step4")]
)
def test_a_model_and_a_memory_file_answer_as_they_did(answer: str, file: str, replayed: Any) -> None:
    written = (DATA / f"{file}_answer.txt").read_bytes().decode()
    assert replayed["answers"][answer] == written.removesuffix("\n")


def test_text_evaluates_as_it_did(replayed: Any) -> None:
    written = json.loads((DATA / "text_step4_evaluation.json").read_text())
    scalars = replayed["scalars"]["text"]
    for name in ("loss", "bits_per_byte", "perplexity", "loss_after_first_block"):
        assert scalars[name] == pytest.approx(written[name], rel=1e-5), name
    assert scalars["next_token_accuracy"] == pytest.approx(written["accuracy"], rel=1e-6)
    for how, ablated in written["ablations"].items():
        assert scalars[f"{how}/loss"] == pytest.approx(ablated["loss"], rel=1e-5), how
    for bucket in written["by_position"]:
        assert scalars[f"loss_by_position/{bucket['end']}"] == pytest.approx(bucket["loss"], rel=1e-5)


def test_passkey_evaluates_as_it_did(replayed: Any) -> None:
    written = json.loads((DATA / "passkey_step4_evaluation.json").read_text())
    for blocks, found in written["lengths"].items():
        for name, value in found.items():
            if name in ("exact_match", "teacher_forced_exact_match", "answer_token_accuracy"):
                known = replayed["scalars"]["passkey"][f"{name}/{blocks}_blocks"]
                assert known == pytest.approx(value, abs=1e-6), f"{name} at {blocks} blocks"
