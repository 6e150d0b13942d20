"""The parameters that a run begins with in place of fresh ones: those of another run's checkpoint."""

import dataclasses
import fnmatch
from typing import Any

import jax

from fam_jax.checkpoint import absolute, load_params, read_config
from fam_jax.config import Config, ConfigError, resolve
from fam_jax.model import lora
from fam_jax.sharding import param_shardings

# Of ModelConfig: how a model remembers and executes. All else decides what its parameters are, or mean.
MAY_DIFFER = (
    "block_size", "memory_segments", "window", "stop_gradient", "fam_*", "dtype", "attention", "remat",
)  # fmt: skip
# The initial FAM is taken from the base if it has one.
FAM_FIELDS = ("fam_length", "fam_init")


def load_base(config: Config, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Parameters from `config.train.init_from`, spread over `mesh`, with the base's own LoRA merged into them.

    A base without FAM lacks the initial FAM, which then is the run's own.

    Raises:
      ConfigError: the base is of another model; the message names the fields.
      CheckpointError: there is no such checkpoint, or it is damaged.
    """
    folder, step = absolute(config.train.init_from), None
    if folder.name.isdigit():
        folder, step = folder.parent, int(folder.name)
    base = resolve(read_config(folder))
    _check_same_model(config, base)
    params, _, _ = load_params(folder, step, shardings=lambda shapes: param_shardings(shapes, mesh))
    params = jax.jit(lambda params: lora.merge(params, base.lora))(params)
    if config.model.fam_length == 0:
        params.pop("initial_fam", None)
        params["layers"].pop("initial_fam", None)
    return params


def _check_same_model(config: Config, base: Config) -> None:
    here, there = dataclasses.asdict(config.model), dataclasses.asdict(base.model)
    fixed = {name for name in here if not any(fnmatch.fnmatch(name, pattern) for pattern in MAY_DIFFER)}
    if config.model.fam_length and base.model.fam_length:
        fixed |= {*FAM_FIELDS}
    differing = [
        f"model.{name} is {there[name]} there, {here[name]} here"
        for name in here
        if name in fixed and here[name] != there[name]
    ]
    if differing:
        raise ConfigError(
            f"config.train.init_from: {config.train.init_from} holds another model ({'; '.join(differing)}); "
            "set these fields as they are there"
        )
