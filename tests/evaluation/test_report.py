"""Reports compare results of the same items, and refuse others."""

import json
import pathlib
from typing import Any

import pytest

from fam_jax.config import UserError
from fam_jax.evaluation.item import Answered
from fam_jax.evaluation.item_tasks import ITEM_TASKS, gpt3
from fam_jax.evaluation.item_tasks.gpt3 import MEANS
from fam_jax.evaluation.summary import fingerprint, summarize
from launch import report
from tests.evaluation.fake import joiner, request_for


def results_of(folder: pathlib.Path, name: str, right: int, version: int = 1) -> str:
    """Write the results of a model that finds `right` of the needles at each of two lengths."""
    task = ITEM_TASKS["needle"]
    items = [*task.items(request_for(joiner=joiner(), lengths=(800, 1600), count=6, block_size=64))]
    answered = [
        Answered(item, text=item.references[0] if n % 6 < right else "none", tokens_read=9, tokens_expected=9)
        for n, item in enumerate(items)
    ]
    part: dict[str, Any] = {**summarize(task, answered), "version": version, "shots": 0}
    suites = {"needle": part | {"fingerprint": fingerprint(items)}}
    suites["needle"]["published_of_other_models"] = {"Somebody's": 0.5}
    path = folder / f"{name}.json"
    made = {"checkpoint": f"runs/{name}", "devices": "1 x cpu"}
    path.write_text(json.dumps({"step": 7, "provenance": made, "suites": suites, "skipped": {}}))
    return str(path)


def test_a_report_of_two_runs(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [results_of(tmp_path, "a", 2), results_of(tmp_path, "b", 4)]
    assert report.main([*paths, f"--out={tmp_path}/out"]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| a | runs/a | 7 | 1 x cpu |" in text
    row = next(line for line in text.splitlines() if line.startswith("| needle | recall |"))
    assert "| 0.3333 (" in row and "| 0.6667 (" in row and row.endswith("|  | 12 | 108 |")
    assert "b less a, item by item:" in text
    assert "Other models, as published" in text and "| needle | recall | Somebody's | 0.5000 |" in text
    assert "| needle | +0.3333 | " in text and " | 4 | 0 | 12 |" in text
    for fact in ("length", "depth", "blocks_back"):
        picture = tmp_path / "out" / f"needle-by-{fact}.png"
        assert picture.read_bytes().startswith(b"\x89PNG") and f"({picture.name})" in text
        assert f"written to {picture}" in capsys.readouterr().out or fact != "length"


def test_means_over_the_papers_tasks_stand_beside_its_own(tmp_path: pathlib.Path) -> None:
    """Only where a file has all tasks of a mean."""
    assert {*MEANS["ranked"], *MEANS["generated"]} == {task.name for task in gpt3.TASKS}
    paths = []
    for name, left_out in (("a", ""), ("b", "boolq")):
        suites = {
            task: {"headline": "acc", "value": 0.25 if kind == "ranked" else 0.5}
            for kind, tasks in MEANS.items()
            for task in tasks
            if task != left_out
        }
        suites["arc_easy"]["value"] = 0.46
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps({"step": 7, "suites": suites, "skipped": {}}))
    assert report.main([*map(str, paths), f"--out={tmp_path}/out"]) == 0
    lines = (tmp_path / "out" / "report.md").read_text().splitlines()
    assert "| results | ranked (21 tasks) | generated (5 tasks) |" in lines
    assert "| a | 0.2600 | 0.5000 |" in lines and "| b |  | 0.5000 |" in lines
    assert "| paper's FAM 24B | 0.7850 | 0.6340 |" in lines
    report.main([results_of(tmp_path, "c", 2), f"--out={tmp_path}/none"])
    assert "Means over tasks" not in (tmp_path / "none" / "report.md").read_text()


def test_other_versions_are_refused_or_marked(tmp_path: pathlib.Path) -> None:
    paths = [results_of(tmp_path, "a", 2), results_of(tmp_path, "b", 4, version=2)]
    with pytest.raises(
        UserError, match="needle: version is 1 in a and 2 in b, so the results do not compare"
    ):
        report.main([*paths, f"--out={tmp_path}/out"])
    assert not (tmp_path / "out").exists()
    assert report.main([*paths, f"--out={tmp_path}/out", "--force"]) == 0
    marked = "| needle (does not compare: version is 1 in a and 2 in b) |"
    assert marked in (tmp_path / "out" / "report.md").read_text()


def test_files_without_results(tmp_path: pathlib.Path) -> None:
    for content, message in (("{", "has no results of tasks"), ('{"suites": []}', "has no results of tasks")):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(UserError, match=message):
            report.main([str(tmp_path / "x.json"), f"--out={tmp_path}"])
    with pytest.raises(UserError, match=r"missing.json: cannot be read \(No such file"):
        report.main([f"{tmp_path}/missing.json", f"--out={tmp_path}"])
    with pytest.raises(UserError, match="missing --out"):
        report.main(["x.json"])
