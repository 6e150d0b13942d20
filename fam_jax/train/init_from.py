"""The parameters that a run begins with in place of fresh ones: those of another run's checkpoint."""

import dataclasses
import fnmatch
from typing import Any

import jax
from etils import epath

from fam_jax.checkpoint import absolute, load_params, read_config, with_vocabulary_found
from fam_jax.config import Config, ConfigError, resolve
from fam_jax.model import lora
from fam_jax.model.initial import fam_of_embeddings, fam_path
from fam_jax.model.parameters import flatten, unflatten
from fam_jax.sharding import param_shardings

# Of ModelConfig: how a model remembers and executes. All else decides what its parameters are, or mean.
MAY_DIFFER = (
    "block_size", "memory_segments", "window", "stop_gradient", "fam_*", "dtype", "attention", "remat",
)  # fmt: skip
# The initial FAM is taken from the base if it has one.
FAM_FIELDS = ("fam_length", "fam_init")


def locate(name: str) -> tuple[epath.Path, int | None]:
    """Folder and step, if one is named, of a base such as workdir or workdir/STEP."""
    folder = absolute(name)
    return (folder.parent, int(folder.name)) if folder.name.isdigit() else (folder, None)


def base_config(name: str) -> Config:
    """The config of a base.

    Raises:
      CheckpointError: there is no such checkpoint.
      ConfigError: its config is of another version.
    """
    folder, _ = locate(name)
    return with_vocabulary_found(resolve(read_config(folder)), folder)


def check_named(config: Config) -> None:
    """Raises ConfigError if LoRA would adapt random weights and nobody asked for that."""
    if config.lora.rank and not config.train.init_from and not config.lora.random_base:
        raise ConfigError(
            "config.train.init_from: names no checkpoint, and LoRA adapts a trained model; lora.rank=0 trains all "
            "parameters, lora.random_base=true adapts random ones, to try things out"
        )


def load_base(config: Config, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Parameters from `config.train.init_from`, spread over `mesh`, with the base's own LoRA merged into them.

    Where the base has no FAM, the initial FAM of the run begins as embeddings of the base.

    Raises:
      ConfigError: the base is of another model; the message names the fields.
      CheckpointError: there is no such checkpoint, or it is damaged.
    """
    folder, step = locate(config.train.init_from)
    base = base_config(config.train.init_from)
    _check_same_model(config, base)
    params, _, _ = load_params(folder, step, shardings=lambda shapes: param_shardings(shapes, mesh))

    def own(params: dict[str, Any]) -> dict[str, Any]:
        flat = flatten(lora.merge(params, base.lora))
        if config.model.fam_length == 0:
            return unflatten({path: leaf for path, leaf in flat.items() if not path.endswith("initial_fam")})
        if base.model.fam_length == 0:
            fam = fam_of_embeddings(flat["embedding/table"], config.model, config.train.seed)
            flat[fam_path(config.model)] = fam
        return unflatten(flat)

    return jax.jit(own)(params)


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
