"""Fixtures of the tests of checkpoints."""

import pathlib
import shutil

import pytest

from tests.checkpoint.states import write_run


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Return the folder of a run with steps 10 and 20. Do not change it."""
    return write_run(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def run(saved: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return shutil.copytree(saved, tmp_path / "run")
