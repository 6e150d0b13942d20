"""A trained model from its checkpoint, ready to read and write."""

import os
from typing import Any

import jax
import jax.numpy as jnp

from fam_jax.checkpoint import load_params, with_vocabulary_found
from fam_jax.config import Config, ModelConfig, resolve
from fam_jax.model import lora
from fam_jax.sharding import param_shardings


def load_model(
    folder: str | os.PathLike[str], step: int | None = None, mesh: jax.sharding.Mesh | None = None
) -> tuple[Config, dict[str, Any], int]:
    """The config of a run, its parameters with LoRA merged into them, and their step.

    Weights are in the dtype of the model's activations, if that is narrower than their own: the outputs are the same.

    Args:
      folder: Of the run.
      step: None takes the latest.
      mesh: From `fam_jax.sharding`, to spread the parameters over; None keeps them on the first device.

    Raises:
      CheckpointError: no such folder or step, or a damaged one.
      ConfigError: `mesh` does not divide a parameter.
    """

    def places(shapes: Any) -> Any:
        if mesh is not None:
            return param_shardings(shapes, mesh)
        first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return jax.tree.map(lambda _: first, shapes)

    params, values, step = load_params(folder, step, shardings=places)
    config = with_vocabulary_found(resolve(values), folder)
    return config, _to_use(params, config), step


def _to_use(params: dict[str, Any], config: Config) -> dict[str, Any]:
    """Merges LoRA, and rounds weights to the dtype that the model rounds them to at every use; consumes `params`."""

    def narrow(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        return x.astype(dtype_of_use(path, x, config.model))

    if config.lora.rank:
        # In one program, so that there are never weights in float32 beside those given.
        return jax.jit(
            lambda params: jax.tree_util.tree_map_with_path(narrow, lora.merge(params, config.lora))
        )(params)

    def replaced(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        found = narrow(path, x)
        if found.dtype != x.dtype:
            x.delete()  # there may be no room for both, of all weights
        return found

    return jax.tree_util.tree_map_with_path(replaced, params)


def dtype_of_use(path: tuple[Any, ...], x: Any, config: ModelConfig) -> jnp.dtype:
    """That of the model for what it rounds to it, if that is narrower; else that of the parameter `x` itself."""
    own, used = jnp.dtype(x.dtype), jnp.dtype(config.dtype)
    is_weight = jax.tree_util.keystr(path[-1:], simple=True) in ("kernel", "table")
    return used if is_weight and used.itemsize < own.itemsize else own
