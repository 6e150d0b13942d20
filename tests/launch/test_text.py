"""Training and evaluating on text, as a user does."""

import json
import pathlib
import subprocess
import sys

import pytest

from launch import evaluate, read_config
from tests.launch.running import ROOT, command, environment

SMALL = [
    "--config.model.num_layers=1", "--config.train.steps=2", "--config.evaluate.every=2",
    "--config.evaluate.documents=2", "--config.evaluate.ablations=", "--config.evaluate.chunk_blocks=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run of configs/text.py:smoke, with some words more on the command line."""
    folder = tmp_path_factory.mktemp("text")
    for name, text in {"a.txt": "alpha " * 90, "b.txt": "beta " * 90, "held.md": "gamma " * 40}.items():
        (folder / name).write_text(text)
    done = subprocess.run(
        command(
            "launch.train", "--config=configs/text.py:smoke", *SMALL, f"--workdir={folder}/run",
            f"--config.data.train_files={folder}/a.txt,{folder}/b.txt",
            "--config.data.heldout_files", f"('{folder}/held.md',)",
        ),
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (
        "step 2/2  loss " in done.stderr and "  accuracy 0." in done.stderr and "  epoch 0  " in done.stderr
    )
    return folder


def test_evaluation_while_training(workdir: pathlib.Path) -> None:
    found = json.loads((workdir / "run" / "evaluation" / "2.json").read_text())
    assert found["step"] == 2 and found["documents"] == 1 and found["tokens_read"] == 241
    config = json.loads((workdir / "run" / "config.json").read_text())
    assert config["data"]["train_files"] == [f"{workdir}/a.txt", f"{workdir}/b.txt"]
    lines = [json.loads(line) for line in (workdir / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["evaluation"]["loss"] == found["loss"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", "--batch_size=2", *arguments])
    evaluate.main()


def test_evaluation_of_a_checkpoint(
    workdir: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = workdir / "out.json"
    run(
        monkeypatch, f"--checkpoint={workdir}/run", f"--files={workdir}/a.txt,{workdir}/b.txt",
        "--ablations=shuffled,frozen", f"--out={out}",
    )  # fmt: skip
    found = json.loads(out.read_text())
    assert found["task"] == "text" and found["documents"] == 2 and found["tokens_read"] == 541 + 451
    assert found["step"] == 2 and found["config"]["evaluate"]["ablations"] == ["shuffled", "frozen"]
    assert found["text_bytes"] == 990
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for says in (
        f"{found['loss']:.4f} nats per token",
        "992 of 992",
        "FAM shuffled",
        "FAM frozen",
        "out.png",
    ):
        assert says in printed

    before = json.loads((workdir / "run" / "evaluation" / "2.json").read_text())
    run(monkeypatch, f"--checkpoint={workdir}/run")
    run(monkeypatch, f"--checkpoint={workdir}/run", f"--files={workdir}", "--suffixes=b.txt", f"--out={out}")
    assert json.loads(out.read_text())["tokens_read"] == 451
    default = json.loads((workdir / "run" / "evaluation_2.json").read_text())
    assert default["loss"] == pytest.approx(before["loss"], rel=1e-6)
    assert default["ablations"] == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--files=missing"], "--files: missing: no such file or folder"),
        (["--files=configs", "--suffixes=.cfg"], "no files that end in .cfg; --suffixes says which count"),
        (["--ablations=zero"], "config.evaluate.ablations: expected some of zeroed, shuffled, frozen"),
        (["--min_tokens=1000"], "no held-out document has 1000 tokens"),
        (["--documents=-1"], "config.evaluate.documents: must be at least 0"),
        (["--task=texts"], "argument --task: invalid choice: 'texts'"),
        (["--ablations=shuffled"], "shuffled needs two documents in a batch"),
    ],
)
def test_mistakes(
    arguments: list[str],
    message: str,
    workdir: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, f"--checkpoint={workdir}/run", *arguments)
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1 and message in errors


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        (["--config.data.imports=a.b"], ["--config.data.imports=('a.b',)"]),
        (["--config.data.imports", "a,b", "-x"], ["--config.data.imports", "('a', 'b')", "-x"]),
        (["--config.data.imports="], ["--config.data.imports=()"]),
        (["--config.data.imports=('a',)", "a,b"], ["--config.data.imports=('a',)", "a,b"]),
        (["--config.data.stage_blocks=(2,)"], ["--config.data.stage_blocks=(2,)"]),
    ],
)
def test_lists_of_words_need_no_quotes(given: list[str], passed: list[str]) -> None:
    assert read_config._with_quoted_words(given) == passed
