"""The state of training as one pytree: parameters, optimizer state, and everything else that a step changes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from fam_jax.config import Config, ModelConfig, TrainConfig
from fam_jax.model import (
    StreamState,
    Transformer,
    create_model,
    lora,
    passed_on,
    passed_on_by_row,
    to_dict,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state between two steps."""

    # float32, except parameters that LoRA freezes.
    params: dict[str, Any]
    # State of the parameters that are trained.
    optimizer: Any
    # () int32: steps taken.
    step: jax.Array
    # Typed PRNG key; step t draws from fold_in(key, t).
    key: jax.Array
    # The memory of the last step's first row, for random state passing (see `passed_on`); with train.carry, what all
    # rows of the last step go on with (see `passed_on_by_row`).
    carried: dict[str, Any]
    # () bool: False before the first step, when `carried` holds zeros.
    has_carried: jax.Array


def init_state(
    config: Config,
    optimizer: optax.GradientTransformation,
    seed: int,
    base: dict[str, Any] | None = None,
) -> TrainState:
    """Create parameters and optimizer state; a pure function, to be jitted with shardings.

    Args:
      config: the experiment.
      optimizer: optimizer of the trained parameters.
      seed: seed of parameters and steps.
      base: nested dict of parameters that replace random ones.
    """
    init_key, step_key = jax.random.split(jax.random.key(seed))
    params = to_dict(nnx.state(create_model(config, rngs=nnx.Rngs(init_key))))
    params = lora.stored(lora.join(params, base or {}), config)
    return TrainState(
        params=params,
        optimizer=optimizer.init(lora.divide(params, config.lora)[0]),
        step=jnp.zeros((), jnp.int32),
        key=step_key,
        carried=nothing_carried(config.model, config.train),
        has_carried=jnp.zeros((), bool),
    )


def nothing_carried(model: ModelConfig, train: TrainConfig = TrainConfig()) -> dict[str, Any]:  # noqa: B008
    """Return zeros in the shapes of what a step passes on."""
    rows = 1 if train.carry == "none" else train.batch_size

    def pass_on() -> dict[str, Any]:
        return what_is_carried(model, train, Transformer(model, rngs=nnx.Rngs(0)).init_state(rows))

    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(pass_on))


def what_is_carried(model: ModelConfig, train: TrainConfig, state: StreamState) -> dict[str, Any]:
    """Return what a step passes on of the state that its rows leave, or of a tree of the same structure."""
    if train.carry == "none":
        return passed_on(model, state)
    return passed_on_by_row(model, state, window=train.carry == "all")


def model_structure(config: Config) -> tuple[Any, Any]:
    """Return the graph definition and the abstract state of the model, for `nnx.merge`."""
    abstract = nnx.eval_shape(lambda: create_model(config, rngs=nnx.Rngs(0)))
    return nnx.split(abstract)
