"""Faults under a run: damaged and missing checkpoints, failed saves, files that change, memories that freeze."""

import dataclasses
import pathlib
import shutil
from typing import Any

import numpy as np
import pytest
from orbax.checkpoint._src.metadata.array_metadata_store import Store

from fam_jax.checkpoint import load_params
from fam_jax.config import Config, UserError
from fam_jax.data.packing import PackedBatches
from fam_jax.model.memory_health import MemoryHealth
from fam_jax.training import loop
from fam_jax.training.loop import train
from tests.training import test_loop
from tests.training.test_loop import RUN, STEPS, assert_same_run, evaluate, lines, run, saved, trainer_of
from tests.training.tiny import changed

# Fixtures.
one_device, uninterrupted, finished, text = (
    test_loop.one_device,
    test_loop.uninterrupted,
    test_loop.finished,
    test_loop.text,
)


def test_a_damaged_checkpoint_is_set_aside_and_the_run_goes_on(
    uninterrupted: pathlib.Path, finished: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [
        path for path in (finished / "8" / "params").rglob("*") if path.is_file() and path.stat().st_size > 0
    ]
    for path in sorted(files, key=lambda path: path.stat().st_size)[-3:]:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=r"step 8 is damaged .*\(--restore_step=4\)") as caught:
        run(finished, restore_step=8)  # a step that is named is not replaced by another
    assert "\n" not in str(caught.value)
    train(RUN, str(finished), evaluate=evaluate)
    told = capsys.readouterr().err.splitlines()
    (note,) = [line for line in told if line.startswith("step 8 is damaged (")]
    assert note.endswith("and the run goes on from step 4")
    assert (finished / "8.damaged").is_dir()
    load_params(finished, 8)
    assert_same_run(finished, uninterrupted)


def test_a_checkpoint_that_was_removed_is_noticed(
    uninterrupted: pathlib.Path, finished: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(finished / "8")
    train(RUN, str(finished), evaluate=evaluate)
    assert (
        "step 8 was saved here, but its folder is gone; the latest now is step 4" in capsys.readouterr().err
    )
    assert_same_run(finished, uninterrupted)
    shutil.rmtree(finished / "8")
    shutil.rmtree(finished / "4")
    train(RUN, str(finished), evaluate=evaluate)
    assert "step 8 was saved here, but its folder is gone; there is no step left" in capsys.readouterr().err
    assert_same_run(finished, uninterrupted)


def test_a_save_that_fails_in_the_background_is_made_again(
    uninterrupted: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The failure shows while training goes on. The step after that is saved instead."""
    write, calls = Store.write, [0]

    def fail(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] in (3, 4):  # two parts of the second save
            raise OSError(28, "No space left on device")
        return write(*args, **options)

    monkeypatch.setattr(Store, "write", fail)
    config = changed(RUN, train__checkpoint_every=2, train__keep_checkpoints=9)
    run(tmp_path / "run", config)
    found = {path.name for path in (tmp_path / "run").iterdir() if path.name.isdigit()}
    assert "4" not in found and {"2", "6", "8"} <= found
    assert_same_run(tmp_path / "run", uninterrupted)


def test_files_that_change_under_a_run_end_it_with_a_checkpoint(
    text: Config, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "whole", text)
    (file,) = map(pathlib.Path, text.data.train_files)
    content, begin_group = file.read_bytes(), PackedBatches._begin_group

    def change_then_begin(batches: PackedBatches) -> None:
        if batches._step == 6:
            file.write_bytes(bytes(len(content)))
            batches.start(6, batches._group_end)  # nothing is read ahead
        begin_group(batches)

    with monkeypatch.context() as patch:
        patch.setattr(PackedBatches, "_begin_group", change_then_begin)
        with pytest.raises(
            UserError, match="has changed since this program began; put the old file back"
        ) as caught:
            run(tmp_path / "run", text)
    assert caught.value.exit_code == 2
    assert load_params(tmp_path / "run")[2] == 6
    with pytest.raises(UserError):  # the file is still another
        run(tmp_path / "run", text)
    file.write_bytes(content)
    run(tmp_path / "run", text)
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")


def test_watching_the_memory_changes_no_bit(
    uninterrupted: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert all(
        {"memory_rms", "memory_unchanged", "memory_spread"} <= line.keys()
        for line in lines(uninterrupted)[::3]
    )
    monkeypatch.setattr(
        loop, "make_trainer", lambda config: dataclasses.replace(trainer_of(config), look=None)
    )
    run(tmp_path / "run")
    (arrays, _), (wanted, _) = saved(tmp_path / "run", STEPS), saved(uninterrupted, STEPS)
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, wanted[name], err_msg=name)


def test_an_alarm_of_the_memory_is_said_once(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    frozen = MemoryHealth(np.ones(1), np.ones(1), np.ones(1))
    monkeypatch.setattr(
        loop, "make_trainer", lambda config: dataclasses.replace(trainer_of(config), look=lambda *_: frozen)
    )
    train(RUN, str(tmp_path / "run"), evaluate=evaluate)
    said = [line for line in capsys.readouterr().err.splitlines() if "ALARM" in line]
    assert said == [
        "ALARM: the memory of layer 0 is frozen: a block leaves 100.00% of its entries unchanged, after step 2"
    ]
