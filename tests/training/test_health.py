"""Batches that would break a run are skipped; too many of them end it, and jumps of the loss are reported."""

import json
import pathlib
import re
from typing import Any

import jax
import numpy as np
import pytest

from fam_jax.config import UserError
from fam_jax.data.passkey_curriculum import PasskeyCurriculum
from fam_jax.training.health import FIRST_LOSSES, Health
from fam_jax.training.loop import train
from tests.training.test_loop import RUN, one_device  # noqa: F401 (a fixture)
from tests.training.tiny import TINY, changed, compiled_step, some_batch, start

CARRIED = changed(TINY, train__random_state_passing=0.5)


@pytest.mark.parametrize("where", ["loss", "update"])
def test_a_batch_that_is_not_finite_changes_the_step_alone(where: str) -> None:
    """It is NaN in the loss, or finite up to the update: a learning rate of 1e38 makes that infinite."""
    config = CARRIED if where == "loss" else changed(CARRIED, optimizer__learning_rate=1e38)
    step, state, batch = compiled_step(config), start(config), some_batch(1)
    if where == "loss":
        state, metrics = step(state, some_batch(0))
        assert metrics["skipped"] == 0
        batch["weights"] = batch["weights"] * np.nan
    taken, has_carried = int(state.step), bool(state.has_carried)
    before = jax.tree.map(np.asarray, (state.params, state.optimizer, state.carried))
    after, metrics = step(state, batch)
    assert metrics["skipped"] == 1
    assert (int(after.step), bool(after.has_carried)) == (taken + 1, has_carried)
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.optimizer, after.carried), before)


def poisoned(patch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Make the batches of these steps useless."""
    good = PasskeyCurriculum.next

    def next_batch(self: PasskeyCurriculum) -> Any:
        batch = good(self)
        if self._position.step in steps:
            batch = batch | {"weights": np.full_like(batch["weights"], np.nan)}
        return batch

    patch.setattr(PasskeyCurriculum, "next", next_batch)


def lines(folder: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_goes_on_after_bad_batches(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poisoned(monkeypatch, {2, 5, 6})
    config = changed(RUN, train__skip_batches=2, evaluate__every=0)
    last = train(config, str(tmp_path / "run"))
    assert last["skipped"] == 3 and np.isfinite(last["loss"])
    assert [(line["step"], line["skipped"], line["loss"] is None) for line in lines(tmp_path / "run")] == [
        (2, 1, True),
        (4, 1, False),
        (6, 3, True),
        (8, 3, False),
    ]
    shown = capsys.readouterr()
    told = [
        step for step in range(1, 9) if f"step {step}: the loss, the gradient or" in shown.out + shown.err
    ]
    assert told == [2, 5, 6]


def test_too_many_bad_batches_in_a_row_end_the_run(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch and the norms are kept. The same command goes on from the checkpoint, once the batches are good."""
    poisoned(monkeypatch, {5, 6, 7, 8})
    config = changed(RUN, train__skip_batches=1, evaluate__every=0)
    with pytest.raises(UserError) as caught:
        train(config, str(tmp_path / "run"))
    message = str(caught.value)
    assert message.startswith("the loss is nan at step 6, and batches are skipped for 2 steps: lower config.")
    assert "to go on from step 4" in message and "\n" not in message
    kept = tmp_path / "run" / "not_finite" / "6"
    assert str(kept) in message
    with np.load(kept / "batch_0.npz") as batch:
        assert np.isnan(batch["weights"]).all() and batch["inputs"].shape == batch["targets"].shape
    norms = json.loads((kept / "norms.json").read_text())
    assert norms["metrics"]["loss"] is None and norms["step"] == 6
    assert all(value > 0 for value in norms["parameter_norms"].values())
    assert "layers/query/kernel" in norms["parameter_norms"]
    monkeypatch.undo()
    last = train(config, str(tmp_path / "run"))
    assert last["skipped"] == 0 and [line["step"] for line in lines(tmp_path / "run")] == [2, 4, 6, 8]


def health(allowed: int = 1) -> Health:
    return Health(allowed, pathlib.Path("unused"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("allowed", "skipped", "ends"),
    [(0, "0001", True), (1, "0101", False), (1, "0110", True), (2, "11011", False), (2, "0111000", True)],
)
def test_only_batches_in_a_row_end_a_run(allowed: int, skipped: str, ends: bool) -> None:
    for every in (1, 3, 10):  # how often the metrics are looked at
        one, told = health(allowed), []
        for step, flag in enumerate(skipped):
            one.add(step, {"skipped": jax.numpy.float32(int(flag))})
            if step % every == 0:
                told += one.check()
        told += one.check()
        assert one.must_end == ends
        assert told == [step for step, flag in enumerate(skipped) if flag == "1"]
        assert one.skipped == len(told)


def test_a_jump_of_the_loss_is_reported() -> None:
    one, rng = health(), np.random.default_rng(0)
    usual = [one.jump(2.0 + 0.1 * noise, {"epoch": 0}) for noise in rng.normal(size=200)]
    assert not any(usual)
    assert re.fullmatch(r"the loss jumped from about (1\.9\d?|2(\.0\d?)?) to 9", one.jump(9.0, {"epoch": 0}))
    assert not one.jump(9.0, {"epoch": 1}), "another kind of data has its own loss"
    assert not one.jump(float("nan"), {"epoch": 0}), "skipped batches are reported separately"


def test_the_first_losses_fall_without_an_alarm() -> None:
    one = health()
    assert not any(one.jump(10 / (1 + step), {}) for step in range(5 * FIRST_LOSSES))
    assert not any(health().jump(loss, {}) for loss in (0.1, 5.0, 0.1)), "too few to say what is usual"
