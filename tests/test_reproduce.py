"""The comparison of memories: equal batches and parameters, and results gathered from finished trainings."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import reproduce
from benchmarks.experiments import (
    ARMS,
    EXPERIMENTS,
    REFERENCE,
    ROWS,
    TASKS,
    TOLERANCE,
    config_fields,
    config_of,
    matched,
    parameters_of,
    state_floats,
)
from fam_jax.config import UserError, changed
from fam_jax.evaluation import Evaluation
from fam_jax.memories.registry import memory_kinds


def test_experiments_name_what_exists() -> None:
    for experiment in EXPERIMENTS.values():
        assert {*experiment.arms} <= {*ARMS} and {*experiment.tasks} <= {*TASKS}
        assert len({ARMS[name].label for name in experiment.arms}) == len(experiment.arms)
    assert {arm.memory["kind"] for arm in ARMS.values()} <= {*memory_kinds()}
    assert {*ARMS} == {name for experiment in EXPERIMENTS.values() for name in experiment.arms}


def test_every_training_has_a_valid_config() -> None:
    """Rows of memories are those of the task, whose blocks may be short."""
    for experiment in EXPERIMENTS.values():
        for task in experiment.tasks:
            for name in experiment.arms:
                memory = config_of(TASKS[task], config_fields(TASKS[task], ARMS[name], 0)).model.memory
                if ARMS[name].memory.get("length") == ROWS:
                    assert getattr(memory, "length") == TASKS[task].rows  # noqa: B009


def check_parameters(task: str, arms: tuple[str, ...]) -> None:
    goal = parameters_of(config_of(TASKS[task], config_fields(TASKS[task], ARMS[REFERENCE], 0)).model)
    for name in arms:
        width = matched(TASKS[task], ARMS[name])
        config = config_of(TASKS[task], config_fields(TASKS[task], ARMS[name], 0, ff_dim=width))
        assert config.model.ff_dim == width
        assert abs(parameters_of(config.model) / goal - 1) <= TOLERANCE, name


def test_models_have_equally_many_parameters() -> None:
    check_parameters("passkey", ("fam", "armt", "block_recurrent", "bswa_m1"))


@pytest.mark.slow
def test_all_models_have_equally_many_parameters() -> None:
    for experiment in EXPERIMENTS.values():
        for task in experiment.tasks:
            check_parameters(task, experiment.arms)


def test_models_of_a_task_see_the_same_batches() -> None:
    for name, task in TASKS.items():
        found = {}
        for arm in ("fam", "bswa_m1", "fam_bounded"):
            config = config_of(task, config_fields(task, ARMS[arm], 3))
            assert config.train.seed == 3 and config.data.advance_accuracy == 0
            assert max(config.data.stage_blocks) == task.trained
            found[arm] = changed(
                config, model={"memory": config_of(task, config_fields(task, ARMS["fam"], 3)).model.memory}
            )
        assert found["fam"] == found["bswa_m1"] == found["fam_bounded"], name


def test_the_state_is_what_a_stream_keeps() -> None:
    task = TASKS["passkey"]
    model = config_of(task, config_fields(task, ARMS["fam"], 0)).model
    # FAM, L M D, and the keys and values of the block that is read, L 2 C K hd.
    least = 3 * 8 * 64 + 3 * 2 * 32 * 64
    assert least <= state_floats(model) <= 1.5 * least
    window = config_of(task, config_fields(task, ARMS["bswa_m4"], 0)).model
    assert state_floats(window) > 4 * 3 * 2 * 32 * 64


def finish(place: Path, training: reproduce.Training, share: float, **model: Any) -> None:
    """Write the results of a training."""
    config = config_of(TASKS[training.task], training.fields)
    values = json.loads(json.dumps({"model": {"ff_dim": config.model.ff_dim, **model}}))
    groups = {str(length): {"exact_match": share} for length in TASKS[training.task].lengths}
    path = training.result(place)
    path.parent.mkdir(parents=True)
    Evaluation(
        "passkey", config.train.steps, "it", values, {}, "", {}, {}, {"groups": groups}, str(path)
    ).write()


def test_results_of_finished_trainings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = EXPERIMENTS["8"]
    trainings = reproduce.trainings_of(experiment, (0, 1), quick=False)
    assert [training.name for training in trainings] == [
        "bswa_m1_0", "transformer_xl_0", "bswa_m1_1", "transformer_xl_1"
    ]  # fmt: skip
    for training, share in zip(trainings[:3], (0.5, 0.25, 1.0), strict=True):
        finish(tmp_path, training, share)
    results = reproduce.collect(tmp_path, experiment, trainings)["passkey"]
    assert results["bswa_m1"]["mean"]["8"] == 0.75 and results["transformer_xl"]["mean"]["8"] == 0.25
    assert [*results["transformer_xl"]["seeds"]] == ["0"]
    assert results["bswa_m1"]["parameters"] > 300_000 and results["bswa_m1"]["ff_dim"] == 512

    reproduce.main(["--figure=8", "--finished", f"--workdir={tmp_path}", f"--out={tmp_path / 'out'}"])
    record = json.loads((tmp_path / "out" / "8.json").read_text())
    assert record["results"]["passkey"] == json.loads(json.dumps(results))
    assert record["settings"]["tasks"]["passkey"]["trained"] == 8
    assert (tmp_path / "out" / "8.png").read_bytes().startswith(b"\x89PNG")
    assert "Transformer-XL, m = 1" in capsys.readouterr().out


def test_recorded_results_count_as_finished_trainings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment, there = EXPERIMENTS["8"], tmp_path / "there"
    trainings = reproduce.trainings_of(experiment, (0, 1), quick=False)
    for training, share in zip(trainings[:2], (0.5, 0.25), strict=True):
        finish(there, training, share)
    reproduce.main(["--figure=8", "--finished", f"--workdir={there}"])
    (there / "other.json").write_text('{"benchmark": "speed"}')
    here, ran = tmp_path / "here", []
    finish(here, trainings[2], 1.0)
    monkeypatch.setattr(reproduce.Workers, "run", lambda self, name, commands: ran.append(name))
    recorded = f"--recorded={there}"
    reproduce.main(["--figure=8", "--seeds=0,1", f"--workdir={here}", recorded])
    assert ran == ["transformer_xl_1"]
    found = json.loads((here / "8.json").read_text())["results"]["passkey"]
    assert found["bswa_m1"]["mean"]["8"] == 0.75 and found["transformer_xl"]["mean"]["8"] == 0.25
    assert "launch.train" in found["transformer_xl"]["command"]

    # Of another model: it does not count.
    record = json.loads((there / "8.json").read_text())
    record["results"]["passkey"]["transformer_xl"]["ff_dim"] += 8
    (there / "8.json").write_text(json.dumps(record))
    assert reproduce.Recorded(there).find(trainings[0]) and not reproduce.Recorded(there).find(trainings[1])
    (there / "8.json").write_text("{")
    with pytest.raises(UserError, match=r"8\.json: is no file of results"):
        reproduce.Recorded(there)
    with pytest.raises(UserError, match="no such folder"):
        reproduce.Recorded(tmp_path / "none")


def test_results_of_other_settings_are_refused(tmp_path: Path) -> None:
    experiment = EXPERIMENTS["8"]
    trainings = reproduce.trainings_of(experiment, (0,), quick=False)
    finish(tmp_path, trainings[0], 0.5, ff_dim=64)
    with pytest.raises(UserError, match="was made with other settings; remove"):
        reproduce.collect(tmp_path, experiment, trainings)


def test_a_failed_training_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainings = reproduce.trainings_of(EXPERIMENTS["8"], (0, 1), quick=True)
    ran = []

    def run(self: Any, name: str, commands: list[list[str]]) -> None:
        ran.append(name)
        assert commands[0][1:3] == ["-m", "launch.train"]
        if name == "transformer_xl_0":
            raise UserError("it broke")

    monkeypatch.setattr(reproduce.Workers, "run", run)
    assert reproduce.run(tmp_path, trainings, 1) == ["passkey, transformer_xl_0: it broke"]
    assert sorted(ran) == sorted(training.name for training in trainings)


@pytest.mark.slow
def test_a_quick_run_from_end_to_end_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--figure=8", "--quick", "--seeds=0", f"--workdir={tmp_path}"]
    reproduce.main(arguments)
    record = json.loads((tmp_path / "quick" / "8.json").read_text())
    assert {*record["results"]["passkey"]["bswa_m1"]["mean"]} == {"1", "2"}
    monkeypatch.setattr(reproduce, "Workers", None)  # nothing is left to do
    reproduce.main(arguments)
