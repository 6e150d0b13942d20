"""A trained model from its checkpoint, ready to read and write."""

import os
from typing import Any

import jax

from fam_jax.checkpoint import load_params
from fam_jax.config import Config, resolve
from fam_jax.model import lora
from fam_jax.sharding import param_shardings


def load_model(
    folder: str | os.PathLike[str], step: int | None = None, mesh: jax.sharding.Mesh | None = None
) -> tuple[Config, dict[str, Any], int]:
    """The config of a run, its parameters with LoRA merged into them, and their step.

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
    config = resolve(values)
    if config.lora.rank:
        params = jax.jit(lambda params: lora.merge(params, config.lora))(params)
    return config, params, step
