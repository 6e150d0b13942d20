"""Training on two processes gives the same results as on one."""

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

from tests.flags import xla_flags
from tests.training.process import CONFIG, STEPS
from tests.training.tiny import changed, run

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


@pytest.mark.slow
def test_two_processes_of_four_devices_train_as_one_device(tmp_path: pathlib.Path) -> None:
    """Every process makes half of each batch's rows; the mesh spans both."""
    out, address = tmp_path / "found.npz", f"localhost:{free_port()}"
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla_flags(4),
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.training.process", str(index), "2", address, str(out)],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    one_device = changed(CONFIG, mesh__data=1, mesh__fsdp=1, mesh__tensor=1)
    state, metrics = run(one_device, STEPS)
    expected = {"loss": metrics[-1]["loss"], "carried": state.carried["fam"]}
    with np.load(out) as found:
        for name in found.files:
            if name not in expected:
                leaf = state.params
                for part in name.split("/"):
                    leaf = leaf[part]
                expected[name] = leaf
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-5, err_msg=name)
        assert set(found.files) == set(expected) and len(found.files) > 8
