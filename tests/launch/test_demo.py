"""`python -m launch.demo` with models that are too small to learn, and short lengths."""

import json
import pathlib
import subprocess
import time
from typing import Any

import pytest

from fam_jax.config import ConfigError, UserError
from fam_jax.config.overrides import Override
from fam_jax.evaluation import Evaluation
from launch import demo
from tests.launch.running import ROOT, TINY, command, environment


def run(folder: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command("launch.demo", f"--workdir={folder}", *arguments),
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900,
    )  # fmt: skip


@pytest.mark.slow
def test_the_demo_from_end_to_end_and_again(tmp_path: pathlib.Path) -> None:
    small = [
        "--lengths=2,4", "--keys=8", "--workers=1", *TINY, "--config.train.accumulation=1",
        "--config.train.steps=4", "--config.evaluate.chunk_blocks=2",
    ]  # fmt: skip
    first = run(tmp_path, *small)
    assert first.returncode == 0, first.stdout + first.stderr
    result = json.loads((tmp_path / "passkey.json").read_text())
    assert set(result) == {"models", "keys", "seconds", "seed"}
    assert result["keys"] == 8 and result["seed"] == 0 and result["seconds"] > 1
    assert set(result["models"]) == {"fam_bounded", "fam", "bswa_m1"}
    for accuracies in result["models"].values():
        assert set(accuracies) == {"2", "4"}
        assert all(0 <= value <= 1 and (8 * value).is_integer() for value in accuracies.values())
    assert (tmp_path / "passkey.png").read_bytes().startswith(b"\x89PNG")
    configs = {
        name: json.loads((tmp_path / name / "config.json").read_text())["model"] for name in result["models"]
    }
    memories = {name: config["memory"] for name, config in configs.items()}
    assert {name: (memory["kind"], memory.get("bound")) for name, memory in memories.items()} == {
        "fam_bounded": ("fam", 4.0),
        "fam": ("fam", None),
        "bswa_m1": ("bswa", None),
    }

    began = time.perf_counter()
    again = run(tmp_path, *small)
    assert again.returncode == 0, again.stdout + again.stderr
    assert time.perf_counter() - began < result["seconds"] / 3
    assert json.loads((tmp_path / "passkey.json").read_text())["models"] == result["models"]


SETTINGS = {"lengths": (2, 4), "keys": 8, "overrides": (Override("config.train.steps", "4"),)}


def settings(workdir: pathlib.Path, **changes: Any) -> demo.Demo:
    return demo.Demo(workdir, **(SETTINGS | changes))


@pytest.mark.parametrize(
    "other",
    [
        {"lengths": (2, 4, 6)},
        {"keys": 16},
        {"seed": 1},
        {"overrides": (Override("config.train.steps", "5"),)},
        {"overrides": (*SETTINGS["overrides"], Override("config.model.num_layers", "2"))},
    ],
)
def test_results_for_other_settings_are_not_reused(other: dict[str, Any], tmp_path: pathlib.Path) -> None:
    config = demo.wanted_config(settings(tmp_path), "fam")
    rows = {"2": {"exact_match": 0.5}, "4": {"exact_match": 0.5}}
    path = str(tmp_path / "fam" / "result.json")
    Evaluation("passkey", 4, "", config, {}, "", {}, {}, {"groups": rows}, path).write()
    assert demo.commands(settings(tmp_path), "fam") == []
    assert demo.commands(settings(tmp_path, lengths=(2,)), "fam") == []
    train, evaluate = demo.commands(settings(tmp_path, **other), "fam")
    assert "launch.train" in train and "launch.evaluate" in evaluate


def test_results_of_another_version_are_not_reused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "fam").mkdir()
    (tmp_path / "fam" / "result.json").write_text('{"lengths": {}}')
    assert len(demo.commands(settings(tmp_path), "fam")) == 2


def test_the_command_line(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[demo.Demo] = []
    monkeypatch.setattr(
        demo,
        "run_demo",
        lambda given: found.append(given) or {"models": {"fam": {}}, "keys": 8, "seconds": 1},
    )
    arguments = [
        "--lengths=2,4",
        "--keys=8",
        "--config.train.steps=4",
        "--seed",
        "3",
        f"--workdir={tmp_path}",
    ]
    assert demo.main(arguments) == 0
    assert found == [settings(tmp_path, seed=3)]


def test_a_mistake_deletes_nothing(tmp_path: pathlib.Path) -> None:
    (tmp_path / "kept").touch()
    with pytest.raises(
        ConfigError, match=r"^config\.model\.num_layer: no such field; did you mean num_layers"
    ):
        demo.main([f"--workdir={tmp_path}", "--clean", "--config.model.num_layer=4"])
    assert (tmp_path / "kept").exists()


def test_clean_deletes_no_folder_of_somebody_else(tmp_path: pathlib.Path) -> None:
    (tmp_path / "thesis.tex").touch()
    for place in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(UserError, match=r"--clean: .* holds thesis\.tex, which is not of a demo"):
            demo.main([f"--workdir={place}", "--clean"])
    assert (tmp_path / "thesis.tex").exists()


def test_a_place_that_cannot_be_a_folder(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(UserError, match=r"--workdir=.*: cannot be created \(.*\); give another"):
            demo.main([f"--workdir={place}"])


@pytest.mark.parametrize("content", ["", "{", "[]", '"x"'])
def test_a_damaged_clock_is_no_reason_to_fail(content: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "seconds.json").write_text(content)
    assert demo._seconds(tmp_path / "seconds.json") == 0.0
    (tmp_path / "seconds.json").write_text("2.5")
    assert demo._seconds(tmp_path / "seconds.json") == 2.5


@pytest.mark.parametrize(
    ("argument", "says"),
    [("--lenghts=2", "--lenghts"), ("--lengths=2,four", "--lengths"), ("--keys=x", "--keys")],
)
def test_a_mistake_is_one_line(argument: str, says: str, tmp_path: pathlib.Path) -> None:
    result = run(tmp_path, argument)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert says in result.stderr
