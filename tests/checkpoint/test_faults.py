"""Damaged steps, steps that are gone, and saves that fail: the run goes on, and says what it does."""

import errno
import os
import pathlib
import shutil
import subprocess
import threading
import time
import types
from typing import Any

import jax.numpy as jnp
import pytest
from orbax.checkpoint._src.metadata.array_metadata_store import Store

from fam_jax.checkpoint import (
    CheckpointError,
    Checkpoints,
    ReadError,
    SaveError,
    load_params,
    manifest,
    read_config_file,
    steps,
)
from tests.checkpoint.states import CONFIG, assert_same, make_state, mesh_of, open_run, structs
from tests.launch.group import PATIENCE, free_port
from tests.launch.running import ROOT, command, environment

WRITE = "orbax.checkpoint._src.metadata.array_metadata_store.Store.write"


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]


def test_damage_of_a_value_names_its_file(run: pathlib.Path) -> None:
    file = max((run / "20" / "params" / "ocdbt.process_0" / "d").iterdir(), key=lambda f: f.stat().st_size)
    file.write_bytes(flipped(file.read_bytes()))
    with pytest.raises(CheckpointError, match="step 20 is damaged") as caught:
        load_params(run)
    assert str(file) in str(caught.value)


def test_harmless_damage_is_not_told(run: pathlib.Path, capfd: pytest.CaptureFixture[str]) -> None:
    (run / "20" / "_CHECKPOINT_METADATA").write_bytes(b"{")
    expected = make_state(mesh_of(1, 1))
    with open_run(run) as checkpoints:
        found, _ = checkpoints.restore(None, structs(expected))
        assert not checkpoints.notes
    assert_same(found, expected | {"step": jnp.int32(17)})
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("dtype", ["2f4", "01", "0\x1b", "\ud800", "nothing", "V", ""])
def test_a_record_with_a_text_that_is_no_dtype_is_damaged(dtype: str) -> None:
    entry = {"shape": [5], "dtype": dtype, "checksum": "0"}
    with pytest.raises(manifest.Damage, match="not as fam_jax writes it"):
        manifest.unseal(manifest.seal({"params": {"x": entry}}))


def test_a_damaged_step_is_set_aside(run: pathlib.Path, capfd: pytest.CaptureFixture[str]) -> None:
    expected = make_state(mesh_of(1, 1))
    for name in ("20.damaged", "20.damaged.2"):
        contents = run / "20" / "contents" / "data.json"
        contents.write_bytes(contents.read_bytes()[:-9])
        with pytest.raises(CheckpointError, match="step 20 is damaged"):
            load_params(run)
        assert (run / "20").is_dir(), "a reader renamed it"
        with open_run(run) as checkpoints:
            found, position = checkpoints.restore(None, structs(expected))
            (note,) = checkpoints.notes
            assert f"it is kept as {run / name}, and the run goes on from step 10" in note
            assert f"step 20 is damaged ({contents.parent} cannot be read" in note
            assert (checkpoints.all_steps(), position) == ([10], {"examples": 10})
            checkpoints.save(20, found, {"examples": 20})
        assert (run / name / "params").is_dir()
    assert_same(found, expected)
    assert load_params(run)[2] == 20
    assert capfd.readouterr().err == ""


def test_nothing_is_set_aside_if_no_step_is_whole(run: pathlib.Path) -> None:
    for step in (10, 20):
        (run / str(step) / "contents" / "data.json").write_text("{}")
    with open_run(run) as checkpoints, pytest.raises(CheckpointError, match="step 10 is damaged"):
        checkpoints.restore(None, structs(make_state(mesh_of(1, 1))))
    assert {"10", "20"} <= {path.name for path in run.iterdir()}


def test_a_change_after_a_damaged_step_counts_from_the_one_before(run: pathlib.Path) -> None:
    (run / "20" / "contents" / "data.json").write_text("{}")
    changed = {"train": {"steps": 10, "seed": 3}}
    with Checkpoints(run, config=CONFIG | changed, keep=2, may_change=("train.seed",)) as checkpoints:
        checkpoints.restore(None, structs(make_state(mesh_of(1, 1))))
    _, history = read_config_file(run)
    assert history == [{"step": 10, "changed": {"train.seed": {"was": 0, "is": 3}}}]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.ESTALE])
def test_a_step_that_cannot_be_read_now_is_not_taken_for_damaged(
    number: int, run: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with open_run(run) as checkpoints:
        monkeypatch.setattr("orbax.checkpoint.v1.load_checkpointables", fail)
        with pytest.raises(ReadError, match=r"step 20 cannot be read now .*then try again") as caught:
            checkpoints.restore(None, structs(make_state(mesh_of(1, 1))))
    assert caught.value.exit_code == 75
    assert (run / "20").is_dir()


def test_a_step_whose_folder_is_gone_is_noticed(run: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.rmtree(run / "20")
    with open_run(run) as checkpoints:
        assert checkpoints.notes == [
            f"{run}: step 20 was saved here, but its folder is gone; the latest now is step 10"
        ]
        # Going back on purpose removes steps, too.
        state, _ = checkpoints.restore(10, structs(make_state(mesh_of(1, 1))))
        checkpoints.save(15, state, {})
    assert load_params(run)[2] == 15
    assert not caplog.records
    shutil.rmtree(run / "15")
    assert load_params(run)[2] == 10
    assert "step 15 was saved here" in caplog.text


def test_a_step_is_saved_even_if_nothing_can_record_that(
    run: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    (run / "newest_step.json").unlink()
    (run / "newest_step.json").mkdir()
    state = make_state(mesh_of(1, 1))
    with open_run(run) as checkpoints:
        checkpoints.save(30, state, {}, wait=True)
        checkpoints.save(40, state, {})
    assert load_params(run)[2] == 40
    told = [
        record.getMessage() for record in caplog.records if "cannot record that step" in record.getMessage()
    ]
    assert len(told) == 2 and "step 30 is the newest (" in told[0]


def failing(times: int, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Let the next saves fail; return the pauses that will be made between attempts."""
    pauses: list[float] = []
    left = [times]
    write = Store.write

    def fail(*args: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            return write(*args, **options)
        raise OSError(28, "No space left on device")

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        sleep(0.3)  # what Orbax still writes comes to an end

    sleep = time.sleep
    monkeypatch.setattr(WRITE, fail)
    monkeypatch.setattr(steps, "time", types.SimpleNamespace(sleep=pause))
    return pauses


def test_failed_save_is_reported(
    run: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    pauses = failing(100, monkeypatch)
    failed = pytest.raises(SaveError, match=r"saving step 30 failed .*No space left")
    with open_run(run) as checkpoints, failed as caught:
        checkpoints.save(30, make_state(mesh_of(1, 1)), {}, wait=True)
    assert caught.value.exit_code == 75, "a supervisor does not repeat a command that ends with 2"
    assert load_params(run)[2] == 20
    assert pauses == [*steps.PAUSES] and sorted(pauses) == pauses
    told = [record.getMessage() for record in caplog.records]
    assert [line.rpartition("; ")[2] for line in told] == [f"trying again in {p:.0f} s" for p in pauses]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("wait", [True, False])
def test_a_save_that_failed_is_made_again(
    wait: bool, run: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without `wait`, the failure shows later, and the step of the next save takes the place of the lost one."""
    state = make_state(mesh_of(1, 1))
    with open_run(run, keep=5) as checkpoints:
        checkpoints.save(30, state, {})  # the first save is waited for
        pauses = failing(3, monkeypatch)  # a save writes two parts
        checkpoints.save(40, state, {}, wait=wait)
        while not wait and not checkpoints.failed and not pauses:
            pass
        if not wait:
            checkpoints.save(41, state, {"examples": 41})
            assert not checkpoints.failed
    assert pauses
    with open_run(run, keep=5) as checkpoints:
        assert checkpoints.all_steps() == [10, 20, 30, 40 if wait else 41]
        assert_same(checkpoints.restore(None, structs(state))[0], state)
        assert not checkpoints.notes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("faults", "saved"),
    [((1, 1), [1, 3, 4]), ((1, 0), [1, 3, 4]), ((0, 1), [1, 3, 4]), ((99, 99), [1]), ((0, 99), [1])],
    ids=["both", "first", "second", "both for good", "second for good"],
)
def test_two_processes_save_again_together(
    faults: tuple[int, int], saved: list[int], tmp_path: pathlib.Path
) -> None:
    """Whichever process fails, all of them try again, or all of them end."""
    port = free_port()
    started = [
        subprocess.Popen(
            [*command("tests.checkpoint.two_savers"), str(index), str(port), str(tmp_path / "run"), str(count)],
            cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True,
        )
        for index, count in enumerate(faults)
    ]  # fmt: skip
    printed = [process.communicate(timeout=PATIENCE)[0].splitlines()[-1] for process in started]
    is_lost = 99 in faults
    assert printed == ["SaveError" if is_lost else str(saved)] * 2
    assert [process.returncode for process in started] == [75 if is_lost else 0] * 2
    for step in saved:
        assert load_params(tmp_path / "run", step=step)[0]["x"].tolist() == [step] * 8
    assert load_params(tmp_path / "run")[2] == saved[-1]


def test_saving_a_step_twice_makes_sure_of_it(run: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = make_state(mesh_of(1, 1))
    with open_run(run) as checkpoints:
        checkpoints.save(30, state, {})
        failing(1, monkeypatch)
        checkpoints.save(40, state, {})
        checkpoints.save(40, state, {}, wait=True)
        checkpoints.save(40, state, {}, wait=True)
    assert load_params(run)[2] == 40


def test_a_clock_that_jumps_does_not_end_a_run(run: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Orbax measures the time of a save by the clock of the wall."""
    jumped, real = [0.0], time.time
    write = Store.write

    def jump(*args: Any, **options: Any) -> Any:
        jumped[0] = 7200.0
        return write(*args, **options)

    state = make_state(mesh_of(1, 1))
    with open_run(run) as checkpoints:
        monkeypatch.setattr(WRITE, jump)
        monkeypatch.setattr(steps, "PAUSES", (0.1,))
        monkeypatch.setattr(time, "time", lambda: real() + jumped[0])
        checkpoints.save(30, state, {"examples": 30}, wait=True)
        monkeypatch.setattr(time, "time", real)
    with open_run(run) as checkpoints:
        assert_same(checkpoints.restore(None, structs(state))[0], state)
        assert checkpoints.latest_step() == 30


def test_checkpoints_leave_no_threads_and_handles(tmp_path: pathlib.Path) -> None:
    def in_use() -> tuple[int, int]:
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    state, found = {"params": {"x": jnp.ones(3)}}, list[tuple[int, int]]()
    with Checkpoints(tmp_path / "run", config={}, keep=2) as checkpoints:
        for step in range(1, 13):
            checkpoints.save(step, state, {})
            if step in (2, 12):
                checkpoints.wait()
                found.append(in_use())
    (threads, handles), (threads_later, handles_later) = found
    assert threads_later <= threads + 2 and handles_later <= handles + 4, found
