"""Folders of training runs to evaluate."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from fam_jax.checkpoint import Checkpoints
from fam_jax.config import Config
from tests.model.tiny import params_of


def save_run(folder: pathlib.Path, config: Config, params: Any = None) -> pathlib.Path:
    """Save the same parameters, random ones by default, as steps 5 and 10 of a run."""
    params = jax.tree.map(jnp.asarray, params_of(config.model) if params is None else params)
    with Checkpoints(folder, config=dataclasses.asdict(config), keep=2) as checkpoints:
        for step in (5, 10):
            checkpoints.save(step, {"params": params, "step": jnp.int32(step)}, {})
    return folder
