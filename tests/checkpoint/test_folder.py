"""The folder of a run: its name, its lock, what is read back after the first save."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from fam_jax.checkpoint import CheckpointError, Checkpoints, load_params, locate, read_config, steps
from fam_jax.checkpoint.lock import LOCK, WriterLock
from fam_jax.checkpoint.new_file import check_output_file, new_file, output_file
from fam_jax.checkpoint.run_config import settle_config
from fam_jax.config import UserError, resolve
from tests.launch.running import ROOT

PATTERNS = ["exp [v1]", "a*b", "w?", "{x}", "**", "a]", "["]
STATE = {"params": {"x": jnp.arange(5.0)}, "more": jnp.ones((3, 2))}


def save(folder: pathlib.Path, number: int = 1) -> None:
    with Checkpoints(folder, config={}, keep=3) as checkpoints:
        checkpoints.save(number, STATE, {}, wait=True)


@pytest.mark.parametrize("name", PATTERNS)
def test_a_path_that_looks_like_a_pattern_is_refused(name: str, tmp_path: pathlib.Path) -> None:
    for folder in (tmp_path / name, tmp_path / name / "run"):
        with pytest.raises(CheckpointError, match=r"takes .* in a path for a pattern; give a") as caught:
            save(folder)
        assert "\n" not in str(caught.value)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", ["a\\b", "\\", "caf\udce9"])
def test_a_path_that_no_array_can_have_is_refused(name: str, tmp_path: pathlib.Path) -> None:
    """Before the work, and where a folder was moved there."""
    save(tmp_path / "run")
    for folder in (tmp_path / name, tmp_path / name / "run"):
        with pytest.raises(
            CheckpointError, match=r"its path has (a backslash|bytes that are not UTF-8); rename"
        ):
            save(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    moved = (tmp_path / "run").rename(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"no checkpoint can be saved or read here"):
        load_params(moved)


def test_a_run_is_read_wherever_it_is_moved(tmp_path: pathlib.Path) -> None:
    save(tmp_path / "run")
    for name in PATTERNS:
        moved = shutil.copytree(tmp_path / "run", tmp_path / name / "run")
        np.testing.assert_array_equal(load_params(moved)[0]["x"], np.arange(5.0))


def test_a_first_save_that_cannot_be_read_is_an_error(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Save where Orbax loses its manifest without an error."""
    monkeypatch.setattr(steps, "check_name", lambda _: None)
    with (
        Checkpoints(tmp_path / "exp [v1]", config={}, keep=1) as checkpoints,
        pytest.raises(CheckpointError, match=r"step 1 was saved but cannot be read back \("),
    ):
        checkpoints.save(1, STATE, {})


def test_later_saves_are_not_waited_for(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    monkeypatch.setattr(steps, "read_back", lambda _, step, *__: read.append(step))
    with Checkpoints(tmp_path, config={}, keep=3) as checkpoints:
        for number in (1, 2, 3):
            checkpoints.save(number, STATE, {})
    assert read == [1]


def test_one_writer_at_a_time(tmp_path: pathlib.Path) -> None:
    with Checkpoints(tmp_path, config={}, keep=1):
        with pytest.raises(CheckpointError, match="another process is writing to it"):
            Checkpoints(tmp_path, config={"train": {"steps": 5}}, keep=1)
        assert read_config(tmp_path) == {}
    save(tmp_path)
    assert not (tmp_path / LOCK).exists()


def test_a_refused_config_releases_the_lock(tmp_path: pathlib.Path) -> None:
    save(tmp_path)
    with pytest.raises(CheckpointError, match="another config"):
        Checkpoints(tmp_path, config={"train": {"seed": 5}}, keep=1)
    save(tmp_path, 2)


def test_a_killed_process_leaves_no_lock(tmp_path: pathlib.Path) -> None:
    code = (
        "import sys, time; from etils import epath; from fam_jax.checkpoint.lock import WriterLock\n"
        "lock = WriterLock(epath.Path(sys.argv[1])); print('locked', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    with pytest.raises(CheckpointError, match="another process"):
        WriterLock(tmp_path)  # type: ignore[arg-type]
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / LOCK).exists()
    with WriterLock(tmp_path):  # type: ignore[arg-type]
        pass
    assert not (tmp_path / LOCK).exists()


def test_a_folder_without_a_step_takes_any_config(tmp_path: pathlib.Path) -> None:
    Checkpoints(tmp_path, config={"train": {"seed": 1}}, keep=1).close()
    Checkpoints(tmp_path, config={"train": {"seed": 2}}, keep=1).close()
    assert read_config(tmp_path) == {"train": {"seed": 2}}


def test_an_allowed_change_is_recorded(tmp_path: pathlib.Path) -> None:
    save(tmp_path, 7)
    new = {"optimizer": {"learning_rate": 0.5}, "train": {"log_every": 3}}
    with pytest.raises(CheckpointError, match=r"or pass --allow_change=optimizer\.learning_rate"):
        Checkpoints(tmp_path, config=new, keep=1)
    Checkpoints(
        tmp_path, config=new, keep=1, may_change=("optimizer.learning_rate", "train.log_every")
    ).close()
    assert read_config(tmp_path) == new
    (entry,) = json.loads((tmp_path / "config.json").read_text())["history"]
    assert entry == {"step": 7, "changed": {"optimizer.learning_rate": {"was": 1e-4, "is": 0.5}}}
    with pytest.raises(CheckpointError) as caught:
        Checkpoints(tmp_path, config={**new, "model": {"num_layers": 5}}, keep=1)
    assert "--allow_change" not in str(caught.value)


def test_names_of_steps(tmp_path: pathlib.Path) -> None:
    assert locate(f"{tmp_path}/7") == (tmp_path, 7)
    assert locate(str(tmp_path)) == (tmp_path, None)


def test_a_new_file_appears_when_it_is_complete(tmp_path: pathlib.Path) -> None:
    with new_file(tmp_path / "a" / "b") as file:
        file.write(b"whole")
        assert not (tmp_path / "a" / "b").exists()
    assert (tmp_path / "a" / "b").read_bytes() == b"whole"
    with pytest.raises(TypeError), new_file(tmp_path / "a" / "b") as file:
        file.write("text")  # type: ignore[arg-type]
    assert [*(tmp_path / "a").iterdir()] == [tmp_path / "a" / "b"]
    assert (tmp_path / "a" / "b").read_bytes() == b"whole"


def test_an_output_is_checked_before_it_is_written(tmp_path: pathlib.Path) -> None:
    check_output_file(tmp_path / "none" / "out.json")
    assert not (tmp_path / "none" / "out.json").exists()
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "out.json", pathlib.Path("/proc/none/out.json")):
        with pytest.raises(UserError, match=r"cannot be written .*; give another --out"):
            check_output_file(path)
        with pytest.raises(UserError, match="cannot be written"), output_file(path):
            pass
    assert sorted(os.listdir(tmp_path)) == ["file", "none"]


def test_a_damaged_config_is_not_taken_for_another(tmp_path: pathlib.Path) -> None:
    """Every byte of the file in turn has one of its bits flipped."""
    config = resolve({"model": {"rope_base": 10000.0, "norm_epsilon": 1e-6}, "data": {"vocabulary": "bytes"}})
    settle_config(epath.Path(tmp_path), dataclasses.asdict(config), ())
    file = tmp_path / "config.json"
    whole, known = file.read_bytes(), read_config(tmp_path)
    assert resolve(known) == config
    refused: list[str] = []
    for place in range(len(whole)):
        flipped = whole[place] ^ 1 << (place * 5 % 8)
        file.write_bytes(whole[:place] + bytes([flipped]) + whole[place + 1 :])
        try:
            assert resolve(read_config(tmp_path)) == config, whole[max(place - 20, 0) : place + 20]
        except UserError as error:
            refused.append(str(error))
    assert len(refused) > len(whole) / 2  # the others are blanks
    assert not any("\n" in message for message in refused)
    file.write_bytes(whole.replace(b"10000.0", b"90000.0"))
    with pytest.raises(CheckpointError, match=r'damaged or was edited; .* remove the entry "sha256"$'):
        read_config(tmp_path)
    file.write_text(re.sub(r' *"sha256": .*\n', "", file.read_text()))
    assert read_config(tmp_path)["model"]["rope_base"] == 90000.0
