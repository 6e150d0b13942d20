"""Everything that a training step reads and writes, as one pytree."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from fam_jax.config import Config
from fam_jax.model import create_model, lora, to_dict


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """State between two steps."""

    params: dict[str, Any]  # float32, but for what LoRA keeps frozen
    optimizer: Any  # state of the parameters that are trained
    step: jax.Array  # () int32: steps taken
    key: jax.Array  # typed PRNG key; step t draws from fold_in(key, t)
    saved_fam: jax.Array  # (L, M, D): last FAM of the first example of the step before (random state passing)
    has_saved_fam: jax.Array  # () bool


def init_state(
    config: Config,
    optimizer: optax.GradientTransformation,
    seed: int,
    base: dict[str, Any] | None = None,
) -> TrainState:
    """Fresh parameters and optimizer state; a pure function, to be jitted with shardings.

    Args:
      config: resolved.
      optimizer: of the parameters that are trained.
      seed: of parameters and steps.
      base: nested dict of parameters to take in place of fresh ones.
    """
    init_key, step_key = jax.random.split(jax.random.key(seed))
    params = to_dict(nnx.state(create_model(config, rngs=nnx.Rngs(init_key))))
    params = lora.stored(lora.join(params, base or {}), config)
    model = config.model
    return TrainState(
        params=params,
        optimizer=optimizer.init(lora.divide(params, config.lora)[0]),
        step=jnp.zeros((), jnp.int32),
        key=step_key,
        saved_fam=jnp.zeros((model.num_layers, model.fam_length, model.model_dim), model.dtype),
        has_saved_fam=jnp.zeros((), bool),
    )


def model_structure(config: Config) -> tuple[Any, Any]:
    """Graph definition and abstract state of the model, to merge parameters into without creating any."""
    abstract = nnx.eval_shape(lambda: create_model(config, rngs=nnx.Rngs(0)))
    return nnx.split(abstract)
