"""A job of two processes answers the tasks of `launch.evaluate --tasks` as one process does."""

import json
import pathlib
from typing import Any

import pytest

from fam_jax.config import Config, changed
from fam_jax.evaluation import HowToRun, evaluate_tasks
from tests.evaluation.conftest import config as config  # a fixture
from tests.evaluation.fixtures import GPT3, write_rows
from tests.evaluation.runs import save_run
from tests.launch.group import finish, group

TASKS = ("copa", "web_questions", "needle", "text")
MESH = "--mesh=data=2,fsdp=4"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, config: Config) -> pathlib.Path:
    """Return a folder with a run, and data of tasks in two folders that differ in one row."""
    folder = tmp_path_factory.mktemp("tasks")
    text = folder / "text.txt"
    text.write_text("The cat sat on the mat, and said nothing. " * 12)
    own = changed(
        config,
        model={"vocab_size": 259, "block_size": 64, "attention": "xla"},
        data={
            "task": "text",
            "vocabulary": "bytes",
            "train_files": ("x",),
            "heldout_files": (str(text),),
            "sequence_length": 64,
        },
    )
    save_run(folder / "run", own)
    for name, rows in (("data", GPT3["copa"][:5]), ("other", GPT3["copa"][1:6])):
        write_rows(folder / name, "copa", "validation", rows)
        write_rows(folder / name, "web_questions", "test", GPT3["web_questions"][:3])
    return folder


def arguments(place: pathlib.Path, out: pathlib.Path) -> list[str]:
    return [
        "launch.evaluate", f"--checkpoint={place / 'run'}", f"--tasks={','.join(TASKS)}", "--lengths=512", "--items=2",
        f"--data={place / 'data'}", "--batch_size=8", MESH, f"--out={out}",
    ]  # fmt: skip


def results(path: pathlib.Path) -> dict[str, Any]:
    return json.loads(path.read_text())["suites"]


def said(path: pathlib.Path) -> dict[tuple[str, str], tuple[Any, ...]]:
    """Return what was chosen or written for every item, by task and item, of a journal."""
    found = {}
    for line in path.read_text().splitlines()[1:]:
        answer = json.loads(line)
        if "result" in answer:
            continue
        sums = [total for total, *_ in answer.get("likelihoods", ())]
        chosen = sums.index(max(sums)) if sums else None
        counts = (answer["tokens_read"], answer["tokens_generated"])
        found[answer["task"], answer["id"]] = (chosen, answer.get("text"), *counts)
    return found


@pytest.mark.slow
def test_two_processes_answer_as_one_and_go_on(place: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """And so do two that go on where one was stopped: the second process learns what the journal of the first holds."""
    two = tmp_path / "two.json"
    started = finish(tmp_path / "logs", *arguments(place, two))
    assert f"written to {two}" in started.printed(0)
    assert started.errors(1) == started.outputs[1].read_text() == ""

    one = tmp_path / "one.json"
    how = HowToRun(data=(str(place / "data"),), lengths=(512,), count=2)
    evaluate_tasks(place / "run", TASKS, how=how, out=one, batch_size=8)
    answers = said(one.with_suffix(".items.jsonl"))
    assert said(two.with_suffix(".items.jsonl")) == answers and len(answers) >= 10
    for name, result in results(one).items():
        found = results(two)[name]
        assert found["value"] == pytest.approx(result["value"], rel=1e-5)
        assert found.get("tokens_read") == result.get("tokens_read")
        assert found["metrics"].keys() == result["metrics"].keys()

    half = tmp_path / "half.json"
    lines = two.with_suffix(".items.jsonl").read_bytes().splitlines(keepends=True)
    journal = half.with_suffix(".items.jsonl")
    journal.write_bytes(b"".join(lines[:5]) + lines[5][:9])
    finish(tmp_path / "again", *arguments(place, half))
    assert said(journal) == answers
    assert journal.read_bytes().splitlines(keepends=True)[:5] == lines[:5]


@pytest.mark.slow
def test_different_data_is_an_error_in_all_processes(place: pathlib.Path, tmp_path: pathlib.Path) -> None:
    other = f"--data={place / 'other'}"
    with group(tmp_path, *arguments(place, tmp_path / "out.json"), last=other) as started:
        assert started.wait() == [2, 2], started.everything()
    wanted = "error: --tasks, --suite: the processes have different items or models (tasks); give all hosts the same"
    for index in range(2):
        assert wanted in started.errors(index), started.everything()
    assert not (tmp_path / "out.json").exists() and not (tmp_path / "out.items.jsonl").exists()


@pytest.mark.slow
def test_a_file_that_cannot_be_written_is_an_error_in_all_processes(
    place: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    journal = tmp_path / "out.items.jsonl"
    journal.write_text("no journal\n")
    with group(tmp_path / "logs", *arguments(place, tmp_path / "out.json")) as started:
        assert started.wait() == [2, 2], started.everything()
    for index in range(2):
        assert "is not a journal of answers" in started.errors(index), started.everything()
    assert journal.read_text() == "no journal\n"
