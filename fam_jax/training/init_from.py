"""Start a run from the parameters of another run's checkpoint."""

import dataclasses
from typing import Any

import jax

from fam_jax.checkpoint import find_vocabulary, load_params, locate, read_config
from fam_jax.config import Config, ConfigError, ModelConfig, fields_with_effect, resolve
from fam_jax.model import lora
from fam_jax.model.layer_types import is_memory, start_of_memory
from fam_jax.model.parameters import flatten, unflatten
from fam_jax.sharding import param_shardings


def base_config(name: str) -> Config:
    """Return the config of a base.

    Raises:
      CheckpointError: there is no such checkpoint.
      ConfigError: this version cannot read its config.
    """
    folder, step = locate(name)
    return find_vocabulary(resolve(read_config(folder)), folder, step)


def check_named(config: Config) -> None:
    """Raise :class:`ConfigError` if LoRA would adapt random weights although the config does not ask for it."""
    if config.lora.rank and not config.train.init_from and not config.lora.random_base:
        raise ConfigError(
            "config.train.init_from: names no checkpoint, but LoRA adapts a trained model; name one, or set "
            "lora.rank=0 to train all parameters, or lora.random_base=true to adapt random parameters"
        )


def load_base(config: Config, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Load the parameters of `config.train.init_from` onto `mesh`, with the base's own LoRA merged into them.

    If the base has another memory, the parameters of the run's memory start as `Memory.initial_parameters` says.

    Raises:
      ConfigError: the base is a different model; the message names the fields that differ.
      CheckpointError: there is no such checkpoint, or it is damaged.
    """
    folder, step = locate(config.train.init_from)
    base = base_config(config.train.init_from)
    _check_same_model(config, base)
    params, _, _ = load_params(
        folder,
        step,
        shardings=lambda shapes: param_shardings(shapes, mesh),
        flag=f"--config.train.init_from={folder}/{{step}}",
    )

    def adapt(params: dict[str, Any]) -> dict[str, Any]:
        flat = flatten(lora.merge(params, base.lora))
        if not _same_memory(config.model, base.model):
            flat = {path: leaf for path, leaf in flat.items() if not is_memory(path)}
            flat |= start_of_memory(config.model, flat["embedding/table"], config.train.seed)
        return unflatten(flat)

    return jax.jit(adapt)(params)


def _same_memory(model: ModelConfig, base: ModelConfig) -> bool:
    """Return whether the base's memory has the same parameters as the run's."""
    return model.memory.kind == base.memory.kind and model.memory.has_state == base.memory.has_state


def _check_same_model(config: Config, base: Config) -> None:
    groups: list[tuple[Any, Any, str]] = [(config.model, base.model, "model")]
    if _same_memory(config.model, base.model):
        groups.append((config.model.memory, base.model.memory, "model.memory"))
    differing = [
        f"{path}.{field.name} is {getattr(there, field.name)} there, {getattr(here, field.name)} here"
        for here, there, path in groups
        for field in dataclasses.fields(here)
        if field.name in fields_with_effect(type(here), "parameters")
        and getattr(here, field.name) != getattr(there, field.name)
    ]
    if differing:
        raise ConfigError(
            f"config.train.init_from: {config.train.init_from} holds another model ({'; '.join(differing)}); "
            "set these fields as they are there"
        )
