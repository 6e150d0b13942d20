"""The runner: what evaluations write and return, for checkpoints and in training, and how tasks are registered."""

import dataclasses
import functools
import json
import pathlib
import re
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from fam_jax.checkpoint import read_config
from fam_jax.config import Config, ConfigError, DataConfig, MeshConfig, UserError, changed, resolve
from fam_jax.data.vocabulary import load_vocabulary
from fam_jax.evaluation import TASKS, answers, evaluate, evaluate_in_training, read_evaluation, run, tasks
from fam_jax.evaluation.answers import Questions, answer_tables, measure_answers
from fam_jax.evaluation.task import Setting, Task
from fam_jax.model import lora, to_dict
from tests.evaluation.runs import save_run


@pytest.fixture(scope="module")
def passkey_run(tmp_path_factory: pytest.TempPathFactory, config: Config, parrot: dict) -> pathlib.Path:
    """Return the folder of a run of the task "passkey" with two steps."""
    return save_run(tmp_path_factory.mktemp("runs") / "parrot", config, parrot)


@pytest.fixture(scope="module")
def text_run(tmp_path_factory: pytest.TempPathFactory, config: Config) -> pathlib.Path:
    """Return the folder of a run of the task "text", with held-out files beside it."""
    folder = tmp_path_factory.mktemp("text")
    for name, text in {"train.txt": "abc", "a.txt": "alpha " * 20, "b.txt": "beta " * 30}.items():
        (folder / name).write_text(text)
    data = {"task": "text", "vocabulary": "bytes", "train_files": (f"{folder}/train.txt",)}
    heldout = (f"{folder}/a.txt", f"{folder}/b.txt")
    config = changed(
        config,
        model={"vocab_size": 259},
        data={**data, "heldout_files": heldout, "sequence_length": 32},
    )
    return save_run(folder / "run", config)


def test_an_evaluation_of_a_run(passkey_run: pathlib.Path, config: Config, parrot_accuracy: float) -> None:
    told: list[str] = []
    found = evaluate(
        passkey_run, filler_blocks=[1], batch_size=4, on_progress=lambda name, *_: told.append(name)
    )
    assert (found.task, found.step, found.command) == ("passkey", 10, "fam_jax.evaluate")
    assert found.metrics == {
        "exact_match": 0,
        "teacher_forced_exact_match": 0,
        "answer_token_accuracy": parrot_accuracy,
    }
    assert found.scalars["answer_token_accuracy/1_blocks"] == parrot_accuracy
    assert set(told) == {"1 blocks"}
    assert found.versions.keys() == {"python", "fam-jax", "jax", "flax", "numpy"}
    assert found.devices == "8 x cpu"
    used = resolve(found.config)
    assert used.model == config.model
    assert (used.evaluate.filler_blocks, used.evaluate.batch_size) == ((1,), 4)
    folder = passkey_run / "evaluations" / "10"
    assert [path.name for path in folder.iterdir()] == ["passkey.json"]
    assert read_evaluation(folder / "passkey.json") == found
    assert found.files == [folder / "passkey.json"]
    written = json.loads((folder / "passkey.json").read_text())
    assert {**written, "path": str(folder / "passkey.json")} == dataclasses.asdict(found)
    assert found.line() == (
        "passkey: exact match 0.0%, teacher-forced exact match 0.0%, "
        f"answer-token accuracy {parrot_accuracy:.1%}"
    )


def test_step_mesh_and_place_can_be_chosen(
    passkey_run: pathlib.Path, tmp_path: pathlib.Path, parrot_accuracy: float
) -> None:
    out = tmp_path / "new" / "out.json"
    mesh = MeshConfig(data=2, fsdp=4)
    found = evaluate(passkey_run, step=5, mesh=mesh, filler_blocks=(1,), out=out, command="a program")
    assert (found.step, found.command, found.config["mesh"]["fsdp"]) == (5, "a program", 4)
    assert found.metrics["answer_token_accuracy"] == parrot_accuracy
    assert read_evaluation(out) == found
    assert not (passkey_run / "evaluations" / "5").exists()


@pytest.mark.slow  # tests/launch/test_text.py does the same from the command line
def test_text_has_a_plot(text_run: pathlib.Path) -> None:
    found = evaluate(text_run, ablations=("zeroed", "shuffled"), batch_size=2)
    folder = text_run / "evaluations" / "10"
    assert sorted(path.name for path in folder.iterdir()) == ["text.json", "text.png"]
    assert found.files == [folder / "text.json", folder / "text.png"]
    assert (folder / "text.png").read_bytes().startswith(b"\x89PNG")
    assert found.details["documents"] == 2 and found.details["tokens_read"] == 121 + 151
    assert found.details["trained_tokens"] == 32
    assert found.metrics.keys() == {
        "loss",
        "perplexity",
        "bits_per_byte",
        "next_token_accuracy",
        "loss_after_first_block",
    }
    assert (
        "exact_match" not in found.scalars and {"zeroed/loss", "loss_by_position/16"} <= found.scalars.keys()
    )
    assert "next-token accuracy" in found.line()
    titles = [table.title for table in found.tables(str(text_run))]
    assert titles[0] == f"Held-out text, step 10 of {text_run}"


def test_other_texts(text_run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """A run can be evaluated on any text, whatever it was trained on."""
    (tmp_path / "c.md").write_text("gamma")
    (tmp_path / "d.txt").write_text("delta")
    out = tmp_path / "out.json"
    found = evaluate(text_run, files=[str(tmp_path)], suffixes=[".md"], out=out)
    assert found.details["documents"] == 1 and found.details["text_bytes"] == 5


def test_training_evaluates_as_a_checkpoint_does(text_run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = resolve(read_config(text_run))
    alone = evaluate(text_run, step=5, out=tmp_path / "out.json")
    params = run.load_model(text_run, 5)[1]
    figures = evaluate_in_training(config, tmp_path / "run")(params, 3)
    written = read_evaluation(tmp_path / "run" / "evaluations" / "3" / "text.json")
    assert (written.step, written.command) == (3, "training")
    assert figures == {"text": written.scalars}
    assert written.scalars == pytest.approx(alone.scalars, rel=1e-6)
    assert written.details.keys() == alone.details.keys()
    assert (tmp_path / "run" / "evaluations" / "3" / "text.png").exists()


@pytest.mark.slow
def test_training_with_lora_evaluates_merged_weights(text_run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = resolve(read_config(text_run))
    adapted = changed(config, lora={"rank": 2, "random_base": True})
    model = lora.create_model(adapted, rngs=nnx.Rngs(0))
    params = jax.tree.map(lambda x: x + 0.1, to_dict(nnx.state(model)))
    found, expected, base = (
        evaluate_in_training(which, tmp_path)(given, 1)["text"]["loss"]
        for which, given in (
            (adapted, params),
            (config, lora.merge(params, adapted.lora)),
            (config, lora.merge(params, changed(adapted, lora={"alpha": 1e-9}).lora)),
        )
    )
    assert found == pytest.approx(expected, rel=1e-6)
    assert abs(found - base) > 1e-4


def test_a_task_is_a_function_and_a_line(
    passkey_run: pathlib.Path, monkeypatch: pytest.MonkeyPatch, config: Config
) -> None:
    """No other code has to know the task."""

    def copies(setting: Setting) -> Questions:
        vocabulary = load_vocabulary("passkey")
        prompt = np.full(9, 7, np.int32)
        return Questions({"9": lambda: [(prompt, prompt[:2])]}, "tokens", vocabulary, {"symbol": 7})

    copy = Task("copy", "Copying", "copy a token", copies, measure_answers, answers.METRICS, answer_tables)
    monkeypatch.setitem(TASKS, "copy", copy)
    found = evaluate(passkey_run, task="copy")
    assert found.metrics == {
        "exact_match": 1,
        "teacher_forced_exact_match": 1,
        "answer_token_accuracy": 1,
    }
    assert read_evaluation(passkey_run / "evaluations" / "10" / "copy.json").details["symbol"] == 7
    assert found.line().startswith("copy: exact match 100.0%") and len(found.tables()) == 1


def test_the_task_of_the_guide(passkey_run: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code in docs/evaluation.md runs as it is printed there."""
    guide = (pathlib.Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    function, entry = re.findall(r"```python\n(.*?)```", guide.partition("## Add a task")[2], re.DOTALL)
    names = {"np": np, "functools": functools, **vars(tasks)}
    exec(function, names)
    monkeypatch.setitem(TASKS, "recall", eval(entry, names))
    found = evaluate(passkey_run, task="recall", keys=2)
    assert list(found.details["groups"]) == ["4", "16", "64"]
    size = found.config["model"]["block_size"]
    assert found.details["groups"]["16"]["tokens_read"] == 16 * size + 2
    assert "exact_match/64_blocks" in found.scalars and found.line().startswith("recall: exact match")


def test_the_task_of_a_run_is_that_of_its_data() -> None:
    assert tasks.default_task(DataConfig()) == "passkey"
    for name in ("text", "text+passkey"):
        data = DataConfig(task=name, train_files=("a",), vocabulary="bytes")
        assert tasks.default_task(data) == "text"
    assert tasks.default_task(DataConfig(task="seqio:some")) == "text"
    for name, task in TASKS.items():
        assert task.name == name and task.doc and "\n" not in task.doc and task.metrics


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            {"task": "texts"},
            r"task 'texts': is unknown; did you mean text\? choose one of passkey, algorithmic",
        ),
        ({"task": "boolq"}, "task 'boolq': is a task of items; run it with --tasks=boolq"),
        ({"step": 7}, "has no step 7; saved are 5, 10"),
        ({"batchsize": 3}, r"config.evaluate.batchsize: no such field; did you mean batch_size\?"),
        ({"batch_size": 0}, "config.evaluate.batch_size: must be at least 1, got 0"),
        ({"batch_size": "3"}, "config.evaluate.batch_size: expected int, got '3'"),
        (
            {"min_tokens": 3},
            "config.evaluate.min_tokens: has no meaning for the task passkey, only for text; leave",
        ),
        (
            {"task": "algorithmic", "before_blocks": (1,)},
            "has no meaning for the task algorithmic, only for passkey",
        ),
        (
            {"suffixes": [".md"]},
            "suffixes: have no meaning for the task passkey, only for text; leave them out",
        ),
        ({"task": "text"}, "config.data.heldout_files: names no files"),
        ({"task": "text", "files": ["missing"]}, "missing: no such file or folder"),
    ],
)
def test_mistakes(passkey_run: pathlib.Path, how: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluate(passkey_run, **how)


def test_the_vocabulary_must_fit_the_model(config: Config) -> None:
    large = changed(config, data={"vocabulary": "bytes"})
    with pytest.raises(
        ConfigError, match=r"vocab_size: 51 is smaller than the vocabulary 'bytes', which has 259"
    ):
        evaluate_in_training(large, "nowhere")


def test_a_place_that_cannot_be_written_is_found_before_the_checkpoint_is_loaded(
    passkey_run: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "load_model", None)
    (tmp_path / "file").touch()
    for out in (tmp_path / "file" / "out.json", tmp_path):
        with pytest.raises(
            UserError, match=rf"{re.escape(str(out))}: cannot be written .*give another --out"
        ):
            evaluate(passkey_run, out=out)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_record_is_whole_or_not_there(
    passkey_run: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.json"
    before = evaluate(passkey_run, filler_blocks=(1,), keys=2, out=out)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    task = dataclasses.replace(TASKS["passkey"], plot=full)
    monkeypatch.setitem(TASKS, "passkey", task)
    with pytest.raises(UserError, match=r"out.png: cannot be written \(No space left on device\)"):
        before.write()
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    assert read_evaluation(out) == before


def test_files_that_are_no_records(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"missing.json: cannot be read .*evaluate the run first"):
        read_evaluation(tmp_path / "missing.json")
    for text in ("{", "[]", '{"task": "passkey"}'):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(UserError, match="not the record of an evaluation"):
            read_evaluation(tmp_path / "other.json")
