"""What may change between two starts of a run, forks of a run, and what is said about both."""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import pytest

from fam_jax.checkpoint import CheckpointError, Checkpoints, read_config
from fam_jax.config import Config, ConfigError, UserError
from fam_jax.data.vocabulary import SHIPPED
from fam_jax.training.loop import train
from fam_jax.training.start import change_notes, check_allowed, restore_batches
from tests.training.test_loop import RUN, STEPS, finished, lines, one_device, run, saved, uninterrupted
from tests.training.tiny import changed

__all__ = ["finished", "one_device", "uninterrupted"]  # fixtures

RATE = changed(RUN, optimizer__learning_rate=0.007)


def history(folder: pathlib.Path) -> list[dict[str, Any]]:
    return json.loads((folder / "config.json").read_text()).get("history", [])


def stopped_at_4(folder: pathlib.Path) -> pathlib.Path:
    shutil.rmtree(folder / "8")
    return folder


def test_a_folder_without_a_checkpoint_takes_any_config(
    uninterrupted: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """As after an error before the first checkpoint."""
    Checkpoints(tmp_path, config=dataclasses.asdict(RATE), keep=1).close()
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "loss": null}\n')
    run(tmp_path)
    assert lines(tmp_path) == lines(uninterrupted)
    assert history(tmp_path) == []


def test_fields_that_change_no_result_may_change(uninterrupted: pathlib.Path, finished: pathlib.Path) -> None:
    other = changed(
        RUN, train__accumulation=2, train__loss_chunk=16, model__remat="dots", train__checkpoint_every=3
    )
    run(stopped_at_4(finished), other)
    assert history(finished) == []
    for found, expected in zip(lines(finished), lines(uninterrupted), strict=True):
        assert found["step"] == expected["step"]
        if "loss" in found:
            assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_a_change_has_to_be_allowed_and_keeps_the_state(
    uninterrupted: pathlib.Path,
    finished: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A fork from step 4 and a run that goes back to step 4 have the same state, so they go on alike."""
    with pytest.raises(
        UserError, match=r"learning_rate was .* or pass --allow_change=optimizer\.learning_rate"
    ):
        run(finished, RATE, restore_step=4)
    fork = tmp_path / "fork"
    train(RATE, str(fork), evaluate=None, fork=f"{finished}/4")
    said = capsys.readouterr().err
    assert f"forked from {finished}/4\n" in said
    assert "changed after step 4: optimizer.learning_rate from " in said and " to 0.007\n" in said
    train(RATE, str(finished), restore_step=4, allow_change=["config.optimizer.learning_rate"], quiet=True)
    before = {field: value for field, value in lines(uninterrupted)[-1].items() if field != "learning_rate"}
    forked, changed_run = lines(fork), [line for line in lines(finished) if line["step"] > 4]
    assert forked == changed_run and [line["step"] for line in forked] == [6, 8]
    assert [line["learning_rate"] for line in forked] == [pytest.approx(0.007)] * 2
    assert forked[-1]["loss"] != before["loss"]
    was = {"was": RUN.optimizer.learning_rate, "is": 0.007}
    assert history(finished) == [{"step": 4, "changed": {"optimizer.learning_rate": was}}]
    assert history(fork) == [{"forked_from": f"{finished}/4"}]
    assert {path.name for path in fork.iterdir() if path.name.isdigit()} == {"4", "8"}
    train(RATE, str(fork), fork=str(finished), quiet=True)  # the same command resumes
    with pytest.raises(CheckpointError, match="holds a run that was not forked from"):
        train(RATE, str(fork), fork=str(uninterrupted), quiet=True)


def test_a_fork_of_the_same_config_is_the_run(uninterrupted: pathlib.Path, tmp_path: pathlib.Path) -> None:
    run(tmp_path / "fork", fork=f"{uninterrupted}/4")
    assert lines(tmp_path / "fork") == [line for line in lines(uninterrupted) if line["step"] > 4]
    arrays, position = saved(tmp_path / "fork", STEPS)
    expected, expected_position = saved(uninterrupted, STEPS)
    assert position == expected_position
    assert all((array == expected[name]).all() for name, array in arrays.items())


def test_mistakes_with_forks(uninterrupted: pathlib.Path, tmp_path: pathlib.Path) -> None:
    def error(config: Config = RUN, **how: Any) -> str:
        with pytest.raises(UserError) as caught:
            run(tmp_path / "fork", config, **how)
        assert not (tmp_path / "fork").exists() and "\n" not in str(caught.value)
        return str(caught.value)

    assert "has no step 5; saved are 4, 8" in error(fork=f"{uninterrupted}/5")
    assert "no such folder" in error(fork=str(tmp_path / "missing"))
    assert "--restore_step=4" in error(fork=str(uninterrupted), restore_step=4)
    deeper = changed(RUN, model__num_layers=2)
    assert "model.num_layers was 1, is 2" in error(deeper, fork=str(uninterrupted))


def test_fields_that_can_be_allowed_to_change() -> None:
    names = ["optimizer.learning_rate", "config.train.batch_size", "model.memory.positions", "lora.alpha"]
    assert check_allowed(names, RUN) == [name.removeprefix("config.") for name in names]
    with pytest.raises(ConfigError, match=r"config\.optimizer\.rate: no such field"):
        check_allowed(["optimizer.rate"], RUN)
    for name in ("model.num_layers", "model.memory.length", "model.memory.kind", "train.init_from"):
        with pytest.raises(ConfigError, match="decides what the parameters are"):
            check_allowed([name], RUN)


def test_data_starts_over_only_if_it_may() -> None:
    class OtherData:
        def restore(self, _: Any) -> None:
            raise UserError("data state: seed was 1 when it was saved and is 2 now; resume with the config")

    batches, fresh = OtherData(), OtherData()
    with pytest.raises(UserError, match="seed was 1"):
        restore_batches(batches, {}, lambda: fresh, False)  # type: ignore[arg-type]
    found, notes = restore_batches(batches, {}, lambda: fresh, True)  # type: ignore[arg-type]
    assert found is fresh
    assert notes == ["the data starts over; data state: seed was 1 when it was saved and is 2 now"]


def test_steps_changed_under_a_schedule_are_said() -> None:
    cosine = changed(RUN, optimizer__schedule="cosine")
    (note,) = change_notes(dataclasses.asdict(cosine), changed(cosine, train__steps=16), 8)
    assert note.startswith("changed after step 8: train.steps from 8 to 16; the cosine schedule ends there")
    assert note.endswith("the next learning rate is 0.015 instead of 0")
    assert change_notes(dataclasses.asdict(RUN), changed(RUN, train__steps=16), 8) == []


@pytest.mark.parametrize(
    ("steps", "says"), [(8, "nothing to do: 8 steps are done"), (6, "and train.steps is 6;")]
)
def test_a_finished_run_says_so(
    steps: int, says: str, finished: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(changed(RUN, train__steps=steps), str(finished))
    assert says in capsys.readouterr().err


def test_a_workdir_that_looks_like_a_pattern_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(CheckpointError, match="for a pattern"):
        run(tmp_path / "exp [v1]" / "run")
    assert not [*tmp_path.iterdir()]


def test_a_run_knows_its_vocabulary(tmp_path: pathlib.Path) -> None:
    model, folder = tmp_path / "v.model", tmp_path / "run"
    original = SHIPPED["passkey"].read_bytes()
    model.write_bytes(original)
    config = changed(RUN, data__vocabulary=str(model), train__steps=4)
    run(folder, config)
    longer = changed(config, train__steps=6)
    model.write_bytes(original + b"\xc0\x0c\x01")  # an unknown field of the protocol buffer
    with pytest.raises(CheckpointError, match=r"v\.model': is not the one that the run in"):
        run(folder, longer)
    model.unlink()
    run(folder, longer)
    assert read_config(folder)["data"]["vocabulary"] == str(folder / "vocabulary" / "v.model")
    assert [line["step"] for line in lines(folder) if "evaluation" not in line] == [2, 4, 6]
