"""Runs that cannot fit are refused before anything is allocated or written."""

import pathlib
import re

import jax
import pytest

from fam_jax.config import Config, ConfigError, changed
from fam_jax.training import loop, room
from tests.training.tiny import TINY


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (
            {"model": {"vocab_size": 2**30}},
            r"parameters and optimizer state take [\d,.]+ GiB on each device, which ",
        ),
        (
            {"train": {"batch_size": 2**30}},
            r"1,073,741,824 rows of \d+ tokens take [\d,.]+ GiB, and this machine",
        ),
        (
            {"model": {"block_size": 2**30}},
            r"\d+ rows of [\d,]+ tokens take [\d,.]+ GiB, and this machine has ",
        ),
    ],
)
def test_what_cannot_fit_is_refused(values: dict, says: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError) as caught:
        loop.train(changed(TINY, **values), str(tmp_path / "run"), quiet=True)
    assert re.match(says, str(caught.value)) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_state_that_fits_exactly_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = loop.make_trainer(TINY, jax.devices()[:1])
    (device,) = trainer.mesh.devices.flat
    leaves = jax.tree.leaves(jax.eval_shape(trainer.create))
    exact = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    monkeypatch.setattr(room, "device_memory", lambda _: exact)
    room.check_state_fits(trainer.state_shapes, device)
    monkeypatch.setattr(room, "device_memory", lambda _: exact - 1)
    with pytest.raises(ConfigError):
        room.check_state_fits(trainer.state_shapes, device)


def test_processes_share_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    config = changed(Config(), train={"batch_size": 8})
    monkeypatch.setattr(room, "host_memory", lambda: 4 * 100 * room.BYTES_PER_TOKEN)
    room.check_batch_fits(config, 100, processes=2)
    with pytest.raises(ConfigError, match="8 rows of 100 tokens"):
        room.check_batch_fits(config, 100, processes=1)
