"""The same seed gives the same bits on the same devices, and the same numbers up to rounding on more of them."""

import hashlib
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from fam_jax import sharding
from fam_jax.config import Config
from fam_jax.training.loop import make_trainer
from tests.launch.running import ROOT, TINY, environment
from tests.training.tiny import assert_close, changed, some_batch

ALL = changed(
    train__random_state_passing=0.5,
    train__random_position_offset=True,
    memory__noise=0.1,
)  # fmt: skip
STEPS = 3
# Of float32 sums in another order, in the steps of this test.
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}


def train(config: Config, devices: int) -> tuple[dict[str, np.ndarray], list[dict[str, float]]]:
    """Return parameters and metrics after some steps on so many devices, with a program compiled for it alone."""
    trainer = make_trainer(config, jax.devices()[:devices])
    state, metrics = trainer.create(), []
    for step in range(STEPS):
        batch = jax.device_put(some_batch(step), sharding.batch_sharding(trainer.mesh))
        state, found = trainer.step(state, batch)
        metrics.append(jax.tree.map(float, found))
    return jax.tree.map(np.asarray, state.params), metrics


@pytest.fixture(scope="module")
def on_one_device() -> tuple[dict[str, np.ndarray], list[dict[str, float]]]:
    return train(ALL, 1)


def test_two_runs_have_the_same_bits(
    on_one_device: tuple[dict[str, np.ndarray], list[dict[str, float]]],
) -> None:
    """The program is compiled again."""
    params, metrics = train(ALL, 1)
    jax.tree.map(np.testing.assert_array_equal, params, on_one_device[0])
    assert metrics == on_one_device[1]


@pytest.mark.parametrize(
    ("devices", "mesh"),
    [
        (2, {"mesh__data": 2}),
        (8, {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}),
        pytest.param(2, {"mesh__data": 1, "mesh__tensor": 2}, marks=pytest.mark.slow),
        pytest.param(8, {"mesh__data": 1, "mesh__fsdp": 8}, marks=pytest.mark.slow),
    ],
)
def test_more_devices_change_the_rounding_alone(
    devices: int,
    mesh: dict[str, int],
    on_one_device: tuple[dict[str, np.ndarray], list[dict[str, float]]],
) -> None:
    params, metrics = train(changed(ALL, **mesh), devices)
    assert_close(params, on_one_device[0], **ROUNDING)
    for found, wanted in zip(metrics, on_one_device[1], strict=True):
        assert_close(found, wanted, **ROUNDING)
    again, _ = train(changed(ALL, **mesh), devices)
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.slow
def test_two_commands_have_the_same_bits(tmp_path: pathlib.Path) -> None:
    digests = []
    for name in ("one", "other"):
        command = [
            sys.executable, "-m", "launch.train", "--config=configs/passkey.py", f"--workdir={tmp_path / name}", *TINY,
            "--config.train.steps=6", "--config.evaluate.every=0", "--quiet",
        ]  # fmt: skip
        subprocess.run(command, cwd=ROOT, env=environment(), check=True, timeout=600)
        contents = (tmp_path / name / "6" / "contents" / "data.json").read_bytes()
        digests.append(hashlib.sha256(contents).hexdigest())  # it has the checksums of all arrays
    assert digests[0] == digests[1]
