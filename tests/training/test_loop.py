"""The loop: a run that is stopped and resumed equals an uninterrupted one, bit for bit; its folder and its files."""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
import signal
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from fam_jax import sharding
from fam_jax.checkpoint import CheckpointError, Checkpoints
from fam_jax.config import Config, ConfigError, DataConfig, UserError
from fam_jax.config.format1 import FORMAT
from fam_jax.config.strict_json import dump_json
from fam_jax.data import build
from fam_jax.data.passkey_curriculum import PasskeyCurriculum
from fam_jax.training import interruption, loop
from fam_jax.training.loop import Interrupted, train
from tests.training.tiny import changed

STEPS = 8
# The second stage begins after step 3; steps that are checkpoints, reports and evaluations do not coincide.
RUN = changed(
    model__vocab_size=64,
    model__block_size=8,
    model__num_layers=1,
    data__digits=1,
    data__stage_blocks=(2, 3),
    data__max_stage_steps=3,
    train__steps=STEPS,
    train__batch_size=4,
    train__random_state_passing=0.5,
    train__random_position_offset=True,
    train__log_every=2,
    train__checkpoint_every=4,
    train__keep_checkpoints=3,
    evaluate__every=3,
)

make_mesh, make_trainer = sharding.make_mesh, loop.make_trainer  # both are replaced below


@functools.cache
def shared_trainer(config: Config) -> loop.Trainer:
    return make_trainer(config)


def trainer_of(config: Config) -> loop.Trainer:
    """Make a trainer, compiled once for all configs that compute the same."""
    same = changed(
        config, train__log_every=1, train__checkpoint_every=1, train__keep_checkpoints=1, train__skip_batches=3,
        evaluate__every=0,
        data__vocabulary="bytes" if config.data.vocabulary == "bytes" else "passkey",
    )  # fmt: skip
    return dataclasses.replace(shared_trainer(same), config=config)


@pytest.fixture(scope="module", autouse=True)
def one_device() -> Iterator[None]:
    """Run everything on the first of the simulated devices, with shared compilations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda mesh, _=None: make_mesh(mesh, jax.devices()[:1]))
        patch.setattr(loop, "make_trainer", trainer_of)
        yield


def evaluate(params: Any, step: int) -> dict[str, Any]:
    return {"some": {"step": step, "sum": float(sum(leaf.sum() for leaf in jax.tree.leaves(params)))}}


def stopping_at(step: int, number: int) -> type[PasskeyCurriculum]:
    """Return a curriculum that sends the process a signal while it makes the batch of `step`."""

    class Stopping(PasskeyCurriculum):
        def next(self) -> Any:
            batch = super().next()
            if self.state()["step"] == step:
                os.kill(os.getpid(), number)
            return batch

    return Stopping


def run(folder: pathlib.Path, config: Config = RUN, **how: Any) -> dict[str, Any]:
    return train(config, str(folder), evaluate=evaluate, quiet=True, **how)


def run_until(folder: pathlib.Path, step: int, number: int, monkeypatch: pytest.MonkeyPatch) -> Interrupted:
    with monkeypatch.context() as patch:
        patch.setattr(build, "PasskeyCurriculum", stopping_at(step, number))
        with pytest.raises(Interrupted) as caught:
            run(folder)
    return caught.value


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    run(folder)
    return folder


@pytest.fixture
def finished(uninterrupted: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """Return a copy of the uninterrupted run, for a test to change."""
    return pathlib.Path(shutil.copytree(uninterrupted, tmp_path / "copy"))


def saved(
    folder: pathlib.Path, step: int, config: Config = RUN
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the contents of a checkpoint: arrays by name, and the position in the data."""
    shapes = loop._as_dict(trainer_of(config).state_shapes)
    with Checkpoints(folder, config=dataclasses.asdict(config), keep=3) as checkpoints:
        state, position = checkpoints.restore(step, shapes)
    state["key"] = jax.random.key_data(state["key"])
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}, position


def lines(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without times; check that every line is standard JSON."""

    def no_json(text: str) -> Any:
        raise AssertionError(f"{text} is not JSON")

    text = (folder / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    found = [json.loads(line, parse_constant=no_json) for line in text.splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in found]


def assert_same_run(folder: pathlib.Path, other: pathlib.Path) -> None:
    (arrays, position), (wanted, wanted_position) = saved(folder, STEPS), saved(other, STEPS)
    assert arrays.keys() == wanted.keys()
    assert any("['carried']['fam']" in name for name in arrays) and any(
        "optimizer" in name for name in arrays
    )
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, wanted[name], err_msg=name)
    assert position == wanted_position
    assert lines(folder) == lines(other)


def test_what_a_run_writes(uninterrupted: pathlib.Path) -> None:
    found = lines(uninterrupted)
    metrics = [line for line in found if "evaluation" not in line]
    assert [line["step"] for line in found] == [2, 3, 4, 6, 6, 8]
    assert [line["step"] for line in metrics] == [2, 4, 6, 8]
    assert [line["stage_blocks"] for line in metrics] == [2, 3, 3, 3]
    for line in metrics:
        assert all(isinstance(value, int | float) for value in line.values())
        assert {
            "loss",
            "objective",
            "exact_match",
            "answer_accuracy",
            "learning_rate",
            "gradient_norm",
        } <= line.keys()
    config = json.loads((uninterrupted / "config.json").read_text())
    assert config.pop("sha256")
    assert config == {"format": FORMAT, **json.loads(json.dumps(dataclasses.asdict(RUN)))}
    assert list((uninterrupted / "tensorboard").iterdir())
    assert {path.name for path in uninterrupted.iterdir() if path.name.isdigit()} == {"4", "8"}


def test_evaluation_is_called_with_the_parameters_of_its_step(uninterrupted: pathlib.Path) -> None:
    written = {line["step"]: line["evaluation"] for line in lines(uninterrupted) if "evaluation" in line}
    assert {step: result["some"]["step"] for step, result in written.items()} == {3: 3, 6: 6}
    assert written[3]["some"]["sum"] != written[6]["some"]["sum"]


def test_a_run_stopped_again_and_again_is_the_uninterrupted_one(
    uninterrupted: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stops come before, at and after the change of the curriculum's stage."""
    for step, number in [(2, signal.SIGINT), (4, signal.SIGTERM), (5, signal.SIGINT)]:
        handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
        stopped = run_until(tmp_path / "run", step, number, monkeypatch)
        assert stopped.exit_code == 128 + number
        assert f"stopped at step {step};" in str(stopped) and "run the same command to resume" in str(stopped)
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
        assert (tmp_path / "run" / str(step)).is_dir()
    run(tmp_path / "run")
    assert_same_run(tmp_path / "run", uninterrupted)


def test_a_run_stopped_when_an_evaluation_is_due_makes_it_all_the_same(
    uninterrupted: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_until(tmp_path / "run", 3, signal.SIGINT, monkeypatch)
    run(tmp_path / "run")
    assert_same_run(tmp_path / "run", uninterrupted)
    assert 3 in [line["step"] for line in lines(tmp_path / "run") if "evaluation" in line]


def test_the_line_that_a_killed_job_left_unfinished_is_dropped(
    uninterrupted: pathlib.Path, finished: pathlib.Path
) -> None:
    """After a kill between steps 4 and 8, the lines of the steps after 4 are written again."""
    shutil.rmtree(finished / "8")
    with (finished / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    run(finished)
    assert_same_run(finished, uninterrupted)


def test_a_finished_run_stays_as_it_is(uninterrupted: pathlib.Path, finished: pathlib.Path) -> None:
    result = run(finished)
    assert result["parameters"] == sum(
        array.size for name, array in saved(finished, 8)[0].items() if "params" in name
    )
    assert lines(finished) == lines(uninterrupted)


def test_restore_step_goes_back(uninterrupted: pathlib.Path, finished: pathlib.Path) -> None:
    before = (finished / "8" / "_CHECKPOINT_METADATA").stat().st_mtime_ns
    run(finished, restore_step=4)
    assert_same_run(finished, uninterrupted)
    assert (finished / "8" / "_CHECKPOINT_METADATA").stat().st_mtime_ns > before, "step 8 is the old one"
    with pytest.raises(CheckpointError, match="has no step 5; saved are 4, 8"):
        run(finished, restore_step=5)


def test_a_signal_ends_an_evaluation_and_the_resumed_run_makes_it(
    uninterrupted: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Otherwise the signal would wait for the end of the evaluation, and the grace would be over."""
    folder = tmp_path / "run"

    def stopped(params: Any, step: int) -> dict[str, Any]:
        signal.raise_signal(signal.SIGTERM)
        interruption.leave_if_asked_to_stop("loss", 1, 2)
        raise AssertionError("the evaluation went on")

    with pytest.raises(Interrupted) as caught:
        train(RUN, str(folder), evaluate=stopped, quiet=True)
    assert caught.value.exit_code == 128 + signal.SIGTERM
    assert "evaluation" not in (folder / "metrics.jsonl").read_text()
    with pytest.raises(Interrupted):
        train(RUN, str(folder), evaluate=stopped, quiet=True)  # once more, in what is made up for
    interruption.leave_if_asked_to_stop()
    run(folder)
    assert_same_run(folder, uninterrupted)


@pytest.mark.parametrize("step", [4, 8])
def test_an_evaluation_that_a_kill_prevented_is_made_up_for(step: int, finished: pathlib.Path) -> None:
    """The step was saved already when the job was killed."""
    config = changed(RUN, evaluate__every=4)
    shutil.rmtree(finished / "8")
    run(finished, config)
    whole = lines(finished)
    evaluations = [line for line in whole if "evaluation" in line]
    assert [line["step"] for line in evaluations if line["step"] % 4 == 0] == [4, 8]
    (lost,) = [line for line in evaluations if line["step"] == step]
    if step == 4:
        shutil.rmtree(finished / "8")
    kept = [line for line in whole if line is not lost and line["step"] <= step]
    (finished / "metrics.jsonl").write_text("".join(f"{dump_json(line)}\n" for line in kept))
    run(finished, config)
    found = [line for line in lines(finished) if "evaluation" in line and line["step"] in (4, 8)]
    assert found == [line for line in evaluations if line["step"] % 4 == 0]
    run(finished, config)
    assert [line for line in lines(finished) if "evaluation" in line and line["step"] in (4, 8)] == found


def test_a_repeated_command_goes_back_once(
    uninterrupted: pathlib.Path, finished: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A supervisor repeats the command after an interruption; what was made since must not be deleted."""
    run(finished, restore_step=4)
    made = (finished / "8" / "_CHECKPOINT_METADATA").stat().st_mtime_ns
    train(RUN, str(finished), evaluate=evaluate, restore_step=4)
    told = " ".join(capsys.readouterr().err.split())
    assert "went back to step 4 before, and goes on from step 8; to go back again, remove" in told
    assert (finished / "8" / "_CHECKPOINT_METADATA").stat().st_mtime_ns == made
    assert_same_run(finished, uninterrupted)
    run(finished)  # another command: the next one goes back again
    run(finished, restore_step=4)
    assert (finished / "8" / "_CHECKPOINT_METADATA").stat().st_mtime_ns > made


def test_the_folder_of_another_config_is_refused(finished: pathlib.Path) -> None:
    other = changed(RUN, optimizer__beta1=0.5, data__prompt_weight=0.5, train__log_every=3)
    with pytest.raises(UserError) as caught:
        run(finished, other)
    message = str(caught.value)
    assert "optimizer.beta1 was 0.9, is 0.5" in message and "data.prompt_weight was 0.01, is 0.5" in message
    assert "log_every" not in message and "\n" not in message


def test_a_vocabulary_larger_than_the_model_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match=r"^config\.model\.vocab_size: 40 is smaller than the vocabulary"):
        run(tmp_path / "run", changed(RUN, model__vocab_size=40))
    assert not (tmp_path / "run").exists()


def test_a_missing_vocabulary_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"missing\.model'?: no such file"):
        run(tmp_path / "run", changed(RUN, data__vocabulary="missing.model"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("log_every", "checkpoint_every"), [(2, 4), (4, 1)])
def test_a_loss_that_is_not_finite_stops_the_run(
    log_every: int, checkpoint_every: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is one line, and no checkpoint is written of the broken state."""
    config = changed(
        RUN, train__log_every=log_every, train__checkpoint_every=checkpoint_every, train__skip_batches=0
    )
    trainer = trainer_of(config)

    def broken() -> Any:
        state = trainer.create()
        return dataclasses.replace(state, params=jax.tree.map(lambda x: x * np.nan, state.params))

    monkeypatch.setattr(loop, "make_trainer", lambda _: dataclasses.replace(trainer, create=broken))
    with pytest.raises(UserError) as caught:
        run(tmp_path / "run", config)
    assert str(caught.value).startswith("the loss is nan at step ")
    assert "config.optimizer.learning_rate" in str(caught.value) and "\n" not in str(caught.value)
    assert not [path.name for path in (tmp_path / "run").iterdir() if path.name.isdigit()]
    assert [line["loss"] for line in lines(tmp_path / "run")] == [None]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Return the config of the same run on text; a row ends with a short block and repeats a segment."""
    file = tmp_path_factory.mktemp("text") / "x.txt"
    file.write_text("".join(f"line {i}, and a few words more\n" for i in range(300)))
    data = DataConfig(
        task="text",
        vocabulary="bytes",
        train_files=(str(file),),
        sequence_length=52,
        shuffle_batches=3,
        repeat_segment=6,
    )
    return changed(dataclasses.replace(RUN, data=data), model__vocab_size=264)


def test_a_run_on_text_resumes_exactly(text: Config, tmp_path: pathlib.Path) -> None:
    run(tmp_path / "whole", text)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "8")
    run(tmp_path / "again", text)
    found, expected = (lines(tmp_path / name) for name in ("again", "whole"))
    assert found == expected
    assert [line["step"] for line in found if "evaluation" not in line] == [2, 4, 6, 8]
    last = found[-1]
    assert last["epoch"] == 0 and 0 <= last["accuracy"] <= 1 and "stage_blocks" not in last
    assert last["loss"] < found[0]["loss"]


def test_a_run_whose_rows_go_on_from_step_to_step_resumes_exactly(tmp_path: pathlib.Path) -> None:
    """It saves what its rows go on with."""
    (tmp_path / "x.jsonl").write_text(
        "".join(json.dumps({"text": f"{i} " * (10 + 7 * i % 60)}) + "\n" for i in range(40))
    )
    data = DataConfig(
        task="text",
        vocabulary="bytes",
        train_files=(f"{tmp_path}/x.jsonl",),
        layout="continuous",
        sequence_length=16,
    )
    config = changed(
        dataclasses.replace(
            RUN, data=data, train=dataclasses.replace(RUN.train, random_state_passing=0.0, carry="all")
        ),
        model__vocab_size=264,
    )
    run(tmp_path / "whole", config)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "8")
    run(tmp_path / "again", config)
    (arrays, position), (wanted, wanted_position) = (
        saved(tmp_path / name, STEPS, config) for name in ("again", "whole")
    )
    assert arrays.keys() == wanted.keys() and any("['carried']['layers']['keys']" in name for name in arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, wanted[name], err_msg=name)
    assert position == wanted_position
    assert lines(tmp_path / "again") == lines(tmp_path / "whole")
    assert 0 < lines(tmp_path / "whole")[-1]["from_saved_state"] <= 1


@pytest.mark.slow
def test_a_run_on_text_tells_of_other_text(text: Config, tmp_path: pathlib.Path) -> None:
    """Moved files count as the same text; changed files do not."""
    run(tmp_path / "run", text)
    shutil.rmtree(tmp_path / "run" / "8")
    old = pathlib.Path(text.data.train_files[0])
    moved = tmp_path / "moved.txt"
    moved.write_text(old.read_text())
    run(tmp_path / "run", changed(text, data__train_files=(str(moved),)))
    moved.write_text(old.read_text() + ".")
    with pytest.raises(UserError, match=r"data state: contents was .* when it was saved and is "):
        run(tmp_path / "run", changed(text, data__train_files=(str(moved),)), restore_step=4)
    with pytest.raises(
        ConfigError, match=r"vocab_size: 64 is smaller than the vocabulary 'bytes', which has 259"
    ):
        run(tmp_path / "run", changed(text, model__vocab_size=64))
