"""Run the programs of `launch` as a user does."""

import os
import pathlib
import sys

from tests.flags import xla_flags

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent

# The smallest model that the passkey vocabulary and task allow.
TINY = [
    "--config.model.num_layers=1", "--config.model.model_dim=8", "--config.model.num_heads=1",
    "--config.model.num_kv_heads=1", "--config.model.head_dim=8", "--config.model.ff_dim=8",
    "--config.data.filler_step=1", "--config.model.block_size=8", "--config.data.stage_blocks=(2,)",
    "--config.data.digits=1", "--config.train.batch_size=2",
]  # fmt: skip


def environment() -> dict[str, str]:
    """Return the environment of the tests, with one device and fast compilation."""
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags()}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", *arguments]
