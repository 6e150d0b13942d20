"""One training step: a pure function of state and batch."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from fam_jax.config import Config
from fam_jax.model import empty_state, from_dict, lora, passed_on, with_passed_on
from fam_jax.training.losses import token_loss
from fam_jax.training.optimizer import learning_rate
from fam_jax.training.state import TrainState, model_structure

# The arrays (B, T) of a batch that a step takes, and their types.
BATCH_TYPES = {"inputs": jnp.int32, "targets": jnp.int32, "weights": jnp.float32, "answer": jnp.bool_}

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


class Draws(NamedTuple):
    """Random choices of a step, per row."""

    # (B,) bool: start from the state that the last step left (random state passing, appendix B.2.3).
    from_carried: jax.Array
    # (B,) int32 random position offset (appendix B.2.2), or None.
    offset: jax.Array | None


def make_train_step(
    config: Config, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Build `train_step(state, batch) -> (state, metrics)`; jit it with the state donated.

    A batch has the arrays of `BATCH_TYPES`. The loss is the weighted mean over the whole batch, however many
    micro-batches it is split into.
    """
    graphdef, abstract = model_structure(config)
    train = config.train
    schedule = learning_rate(config.optimizer, train.steps)

    def loss(
        trained: Any, frozen: Any, state: TrainState, batch: Batch, draws: Draws, total: jax.Array
    ) -> tuple[jax.Array, Any]:
        model = nnx.merge(graphdef, from_dict(abstract, lora.join(trained, frozen)))
        start = empty_state(config.model, batch["inputs"].shape[0], past_slots=False)
        if train.random_state_passing:
            start = with_passed_on(start, state.carried, draws.from_carried)
        hidden, after = model.hidden(batch["inputs"], start, aligned=True, position_offset=draws.offset)
        result = token_loss(
            model, hidden, batch["targets"], batch["weights"], chunk=train.loss_chunk, z_loss=train.z_loss
        )
        scores = {
            "loss": result.cross_entropy / total,
            "answer_correct": (result.correct & batch["answer"]).sum(),
            "answers": batch["answer"].sum(),
            "exact_match": (result.correct | ~batch["answer"]).all(axis=1).sum(),
        }
        return result.loss / total, (scores, jax.lax.stop_gradient(passed_on(config.model, after)))

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        draws = _draw(config, state, batch["inputs"].shape[0])
        total = jnp.maximum(batch["weights"].sum(), 1e-6)
        trained, frozen = lora.divide(state.params, config.lora)
        gradient = jax.value_and_grad(loss, has_aux=True)
        (value, (scores, carried)), grads = _accumulate(
            lambda part, d: gradient(trained, frozen, state, part, d, total), batch, draws, train.accumulation
        )
        updates, optimizer_state = optimizer.update(grads, state.optimizer, trained)
        new_state = TrainState(
            params=lora.join(optax.apply_updates(trained, updates), frozen),
            optimizer=optimizer_state,
            step=state.step + 1,
            key=state.key,
            carried=jax.tree.map(lambda new, old: new.astype(old.dtype), carried, state.carried),
            has_carried=jnp.ones((), bool),
        )
        return new_state, {
            "loss": scores["loss"],
            "objective": value,
            "answer_accuracy": scores["answer_correct"] / jnp.maximum(scores["answers"], 1),
            "exact_match": scores["exact_match"] / batch["inputs"].shape[0],
            "gradient_norm": optax.tree.norm(grads),
            "update_norm": optax.tree.norm(updates),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "from_saved_state": draws.from_carried.mean(),
        }

    return train_step


def _draw(config: Config, state: TrainState, batch_size: int) -> Draws:
    train = config.train
    saved_key, zero_key, offset_key = jax.random.split(jax.random.fold_in(state.key, state.step), 3)
    active = state.has_carried & (state.step >= train.random_state_passing_from)
    from_carried = jax.random.bernoulli(saved_key, train.random_state_passing, (batch_size,)) & active
    offset = None
    if train.random_position_offset:
        wavelength = round(2 * math.pi * config.model.rope_base)
        offset = jax.random.randint(offset_key, (batch_size,), 0, wavelength)
        offset = jnp.where(jax.random.bernoulli(zero_key, 0.5, (batch_size,)), 0, offset)
    return Draws(from_carried, offset)


def _accumulate(gradient: Callable, batch: Batch, draws: Draws, parts: int) -> Any:
    """Sum loss, scores and gradients over micro-batches; carry the state of the whole batch's first row."""
    if parts == 1:
        return gradient(batch, draws)
    # Deal the rows out in turn. This spreads each micro-batch evenly over the devices.
    dealt = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), (batch, draws))

    def body(total: Any, part: Any) -> tuple[Any, Any]:
        (value, (scores, carried)), grads = gradient(*part)
        return jax.tree.map(jnp.add, total, (value, scores, grads)), carried

    shapes = jax.eval_shape(gradient, *jax.tree.map(lambda x: x[0], dealt))
    (value, (scores, _)), grads = shapes
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (value, scores, grads))
    (value, scores, grads), carried = jax.lax.scan(body, zeros, dealt)
    return (value, (scores, jax.tree.map(lambda x: x[0], carried))), grads
