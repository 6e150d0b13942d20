"""Training and evaluating on text, as a user does."""

import json
import pathlib
import subprocess

import pytest

from fam_jax.config import UserError
from launch import evaluate
from tests.launch.running import ROOT, command, environment

SMALL = [
    "--config.model.num_layers=1", "--config.train.steps=2", "--config.evaluate.every=2",
    "--config.evaluate.documents=2", "--config.evaluate.ablations=", "--config.evaluate.chunk_blocks=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Train configs/text.py:smoke with some config fields on the command line."""
    folder = tmp_path_factory.mktemp("text")
    for name, text in {"a.txt": "alpha " * 90, "b.txt": "beta " * 90, "held.md": "gamma " * 40}.items():
        (folder / name).write_text(text)
    done = subprocess.run(
        command(
            "launch.train", "--config=configs/text.py:smoke", *SMALL, f"--workdir={folder}/run",
            f"--config.data.train_files={folder}/a.txt,{folder}/b.txt",
            "--config.data.heldout_files", f"('{folder}/held.md',)", "--config.model.memory.kind=fam",
        ),
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (
        "step 2/2  loss " in done.stderr and "  accuracy 0." in done.stderr and "  epoch 0  " in done.stderr
    )
    return folder


@pytest.mark.slow
def test_evaluation_while_training(workdir: pathlib.Path) -> None:
    found = json.loads((workdir / "run" / "evaluations" / "2" / "text.json").read_text())
    assert found["step"] == 2
    assert found["details"]["documents"] == 1 and found["details"]["tokens_read"] == 241
    config = json.loads((workdir / "run" / "config.json").read_text())
    assert config["data"]["train_files"] == [f"{workdir}/a.txt", f"{workdir}/b.txt"]
    lines = [json.loads(line) for line in (workdir / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["evaluation"] == {"text": found["scalars"]}


def run(*arguments: str) -> None:
    assert evaluate.main(["--batch_size=2", *arguments]) == 0


def test_evaluation_of_a_checkpoint(workdir: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = workdir / "out.json"
    run(
        f"--checkpoint={workdir}/run", f"--files={workdir}/a.txt,{workdir}/b.txt",
        "--ablations=shuffled,frozen", f"--out={out}",
    )  # fmt: skip
    found = json.loads(out.read_text())
    details = found["details"]
    assert found["task"] == "text" and details["documents"] == 2 and details["tokens_read"] == 541 + 451
    assert found["step"] == 2 and found["config"]["evaluate"]["ablations"] == ["shuffled", "frozen"]
    assert details["text_bytes"] == 990
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for says in (
        f"{details['loss']:.4f}",
        "loss (nats per token)",
        "992 of 992",
        "memory shuffled",
        "memory frozen",
        "out.png",
    ):
        assert says in printed

    before = json.loads((workdir / "run" / "evaluations" / "2" / "text.json").read_text())
    run(f"--checkpoint={workdir}/run")
    run(f"--checkpoint={workdir}/run", f"--files={workdir}", "--suffixes=b.txt", f"--out={out}")
    assert json.loads(out.read_text())["details"]["tokens_read"] == 451
    default = json.loads((workdir / "run" / "evaluations" / "2" / "text.json").read_text())
    assert default["scalars"] == pytest.approx(before["scalars"], rel=1e-6)
    assert default["details"]["ablations"] == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--files=missing"], "--files: missing: no such file or folder"),
        (["--files=configs", "--suffixes=.cfg"], "has no files that end in .cfg; set --suffixes"),
        (["--ablations=zero"], "config.evaluate.ablations: expected one of zeroed, shuffled, frozen"),
        (["--min_tokens=1000"], "no held-out document has 1000 tokens"),
        (["--documents=-1"], "argument --documents: must be at least 0, got -1"),
        (
            ["--task=texts"],
            "task 'texts': is unknown; did you mean text? choose one of passkey, algorithmic, text, ",
        ),
        (["--ablations=shuffled"], "shuffled needs two documents in a batch"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str, workdir: pathlib.Path) -> None:
    with pytest.raises(UserError) as caught:
        run(f"--checkpoint={workdir}/run", *arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)
