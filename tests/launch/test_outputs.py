"""Programs check where their results go before they work."""

import os
import pathlib

import pytest

from fam_jax.config import UserError
from launch import plan, train_vocabulary

# No such files and slices: an error about them would mean that the output was checked too late.
PROGRAMS = {
    "plan": (plan, ["--config=configs/passkey.py:smoke", "--topology=v5e:none"]),
    "train_vocabulary": (train_vocabulary, ["--files=missing.txt", "--size=300"]),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_an_output_that_cannot_be_written(name: str, tmp_path: pathlib.Path) -> None:
    program, arguments = PROGRAMS[name]
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    for out in (tmp_path, tmp_path / "file" / "out", tmp_path / "pipe"):
        with pytest.raises(UserError, match=r"cannot be written \(.*\); give another --out") as caught:
            program.main([*arguments, f"--out={out}"])
        assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "pipe"]
    assert (tmp_path / "pipe").is_fifo()
