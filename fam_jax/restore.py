"""Load a trained model from a checkpoint: config and parameters, ready to read and generate."""

import os
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fam_jax.checkpoint import check_task_vocabulary, find_vocabulary, load_params, read_config
from fam_jax.config import Config, ConfigError, ModelConfig, resolve
from fam_jax.data.vocabulary import task_digest
from fam_jax.model import lora
from fam_jax.sharding import param_shardings


def load_model(
    folder: str | os.PathLike[str],
    step: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    *,
    imports: Sequence[str] = (),
) -> tuple[Config, dict[str, Any], int]:
    """Load the model of a run.

    Weights get the dtype of the model's activations if it is narrower than their own. That halves their memory and does
    not change any output, because the model rounds them at every use anyway.

    Args:
      folder: workdir of the run.
      step: a saved step; None: the latest.
      mesh: from `fam_jax.sharding`, to spread the parameters over; None: they go to the first device.
      imports: modules that the config of the run may import; see :func:`check_imports`.

    Returns:
      The config of the run, its parameters as a nested dict with LoRA merged into them, and their step.

    Raises:
      CheckpointError: the folder or the step is missing or damaged.
      ConfigError: the mesh does not divide a parameter, or the config names other modules to import.
    """
    check_imports(resolve(read_config(folder)), folder, imports)

    def places(shapes: Any) -> Any:
        if mesh is not None:
            return param_shardings(shapes, mesh)
        first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return jax.tree.map(lambda _: first, shapes)

    params, values, step = load_params(folder, step, shardings=places)
    config = find_vocabulary(resolve(values), folder, step)
    return config, _to_use(params, config), step


def load_task_vocabulary(config: Config, folder: str | os.PathLike[str], step: int) -> Any:
    """Load the vocabulary of a run's data task.

    Args:
      config: of the run, from :func:`load_model`.
      folder: workdir of the run.
      step: the saved step that the vocabulary has to be of.

    Raises:
      CheckpointError: the data task brings along another vocabulary than the run was trained with.
      ConfigError: seqio has no such task.
      UserError: the vocabulary cannot be loaded.
    """
    from fam_jax.data.build import task_vocabulary  # imports TensorFlow, which takes seconds

    vocabulary = task_vocabulary(config.data)
    check_task_vocabulary(folder, step, task_digest(vocabulary, config.data))
    return vocabulary


def check_imports(config: Config, folder: str | os.PathLike[str], allowed: Sequence[str]) -> None:
    """Check that a checkpoint imports no module, and so runs no code, that its user has not named or imported already.

    Args:
      config: of the checkpoint.
      folder: workdir of the run, for the message.
      allowed: modules that the user has named.

    Raises:
      ConfigError: config.data.imports names another one.
    """
    others = [name for name in config.data.imports if name not in allowed and name not in sys.modules]
    if others:
        raise ConfigError(
            f"{folder}: its config imports {', '.join(others)} (data.imports), which would run code of that name; if "
            f"that is what you want, add --imports={','.join([*allowed, *others])}"
        )


def _to_use(params: dict[str, Any], config: Config) -> dict[str, Any]:
    """Merge LoRA and round weights to the dtype in which the model uses them. Consumes `params`."""

    def narrow(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        return x.astype(dtype_of_use(path, x, config.model))

    if config.lora.rank:
        # One program, so that no second copy of the weights ever exists in float32.
        return jax.jit(
            lambda params: jax.tree_util.tree_map_with_path(narrow, lora.merge(params, config.lora))
        )(params)

    def replaced(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        found = narrow(path, x)
        if found.dtype != x.dtype:
            x.delete()  # both dtypes of all weights may not fit
        return found

    return jax.tree_util.tree_map_with_path(replaced, params)


def dtype_of_use(path: tuple[Any, ...], x: Any, config: ModelConfig) -> jnp.dtype:
    """Return the dtype in which the model uses parameter `x`: for kernels and tables the narrower of both dtypes."""
    own, used = jnp.dtype(x.dtype), jnp.dtype(config.dtype)
    is_weight = jax.tree_util.keystr(path[-1:], simple=True) in ("kernel", "table")
    return used if is_weight and used.itemsize < own.itemsize else own
