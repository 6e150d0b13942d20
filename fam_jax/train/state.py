"""Everything that a training step reads and writes, as one pytree."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from fam_jax.config import Config
from fam_jax.model import Transformer, to_dict


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """State between two steps."""

    params: dict[str, Any]  # float32
    optimizer: Any
    step: jax.Array  # () int32: steps taken
    key: jax.Array  # typed PRNG key; step t draws from fold_in(key, t)
    saved_fam: jax.Array  # (L, M, D): last FAM of the first example of the step before (random state passing)
    has_saved_fam: jax.Array  # () bool


def init_state(config: Config, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """Fresh parameters and optimizer state; a pure function, to be jitted with shardings."""
    init_key, step_key = jax.random.split(jax.random.key(seed))
    params = to_dict(nnx.state(Transformer(config.model, rngs=nnx.Rngs(init_key))))
    model = config.model
    return TrainState(
        params=params,
        optimizer=optimizer.init(params),
        step=jnp.zeros((), jnp.int32),
        key=step_key,
        saved_fam=jnp.zeros((model.num_layers, model.fam_length, model.model_dim), model.dtype),
        has_saved_fam=jnp.zeros((), bool),
    )


def model_structure(config: Config) -> tuple[Any, Any]:
    """Graph definition and abstract state of the model, to merge parameters into without creating any."""
    abstract = nnx.eval_shape(lambda: Transformer(config.model, rngs=nnx.Rngs(0)))
    return nnx.split(abstract)
