"""Runs, memory files and LoRA runs of version 0.1 still resume, evaluate and generate.

`data/` was made by version 0.1: three runs of two layers (text with FAM and random state passing; LoRA of it; PassKey
with one initial FAM per layer), each cut back to the middle, with the metrics that they went on to have, the answers
that they gave, and a memory of heldout.txt.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
from typing import Any

import numpy as np
import pytest

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
    """Return the metrics of version 0.1, before the runs are resumed."""
    return {run: metrics(folder, run) for run in RUNS}


@pytest.fixture(scope="module")
def replayed(folder: pathlib.Path, recorded: Any) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.format1.replay"],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("run", RUNS)
def test_a_run_goes_on_as_it_did(run: str, recorded: Any, replayed: Any) -> None:
    """Batches, random draws, parameters and optimizer state are those of the run: the losses of every step say so."""
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
