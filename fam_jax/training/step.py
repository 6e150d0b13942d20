"""One training step: a pure function of state and batch."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from fam_jax.config import Config, TrainConfig
from fam_jax.model import (
    StreamState,
    Transformer,
    auxiliary_loss,
    empty_state,
    from_dict,
    going_on_by_row,
    lora,
    with_auxiliary_loss,
    with_passed_on,
)
from fam_jax.model.truncation import truncation_of
from fam_jax.training.losses import token_loss
from fam_jax.training.optimizer import learning_rate
from fam_jax.training.state import TrainState, model_structure, what_is_carried

# The arrays (B, T) of a batch that a step takes, and their types.
BATCH_TYPES = {"inputs": jnp.int32, "targets": jnp.int32, "weights": jnp.float32, "answer": jnp.bool_}
# The array (B,) bool that it takes, too, with train.carry: rows that begin a new stream.
START = "start"

# What sets the keys of the memory's noise apart from a step's other random choices.
NOISE = 1

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


class Draws(NamedTuple):
    """What each row starts from, and other random choices of a step."""

    # (B,) bool: start from the state that the last step left (random state passing, appendix B.2.3, or train.carry).
    from_carried: jax.Array
    # (B,) int32 random position offset (appendix B.2.2), or None.
    offset: jax.Array | None
    # What the last step left of each row (see `passed_on_by_row`), if the rows go on with it; else None.
    by_row: Any = None
    # (B,) typed PRNG keys of the memory's noise, or None.
    noise_keys: jax.Array | None = None


def make_train_step(
    config: Config, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Build `train_step(state, batch) -> (state, metrics)`; jit it with the state donated.

    A batch has the arrays of `BATCH_TYPES`, and `START` with train.carry. The loss is the weighted mean over the whole
    batch, however many micro-batches it is split into. The memory's auxiliary losses are added to it.
    """
    graphdef, abstract = model_structure(config)
    train = config.train
    schedule = learning_rate(config.optimizer, train.steps)

    def loss(
        trained: Any, frozen: Any, state: TrainState, batch: Batch, draws: Draws, total: jax.Array
    ) -> tuple[jax.Array, Any]:
        model = nnx.merge(graphdef, from_dict(abstract, lora.join(trained, frozen)))
        hidden, after = _read_rows(train, model, batch, _start_of_rows(config, state, draws), draws)
        result = token_loss(
            model, hidden, batch["targets"], batch["weights"], chunk=train.loss_chunk, z_loss=train.z_loss
        )
        scores: dict[str, Any] = {
            "own": _own_losses(config, after, batch["inputs"].shape[1]),
            "loss": result.cross_entropy / total,
            "answer_correct": (result.correct & batch["answer"]).sum(),
            "answers": batch["answer"].sum(),
            "exact_match": (result.correct | ~batch["answer"]).all(axis=1).sum(),
        }
        left = what_is_carried(config.model, train, after)
        return result.loss / total + sum(scores["own"].values()), (scores, jax.lax.stop_gradient(left))

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        draws = _draw(config, state, batch)
        total = jnp.maximum(batch["weights"].sum(), 1e-6)
        trained, frozen = lora.divide(state.params, config.lora)
        gradient = jax.value_and_grad(loss, has_aux=True)
        (value, (scores, carried)), grads = _accumulate(
            lambda part, d: gradient(trained, frozen, state, part, d, total), batch, draws, train.accumulation
        )
        updates, optimizer_state = optimizer.update(grads, state.optimizer, trained)
        norms = {"gradient_norm": optax.tree.norm(grads), "update_norm": optax.tree.norm(updates)}
        good = jnp.isfinite(value) & jnp.isfinite(norms["gradient_norm"]) & jnp.isfinite(norms["update_norm"])
        params = lora.join(optax.apply_updates(trained, updates), frozen)
        new_state = TrainState(
            params, optimizer_state, state.step + 1, state.key, carried, jnp.ones((), bool)
        )
        return _unless_broken(good, new_state, state), scores["own"] | {
            "skipped": 1.0 - good,
            "loss": scores["loss"],
            "objective": value,
            "answer_accuracy": scores["answer_correct"] / jnp.maximum(scores["answers"], 1),
            "exact_match": scores["exact_match"] / batch["inputs"].shape[0],
            **norms,
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "from_saved_state": draws.from_carried.mean(),
        }

    return train_step


def _unless_broken(good: jax.Array, new: TrainState, old: TrainState) -> TrainState:
    """Return the new state if the batch was `good`, else the old one, which a batch that is not finite would break."""
    kept = jax.tree.map(
        lambda a, b: b if a is b else jnp.where(good, a.astype(b.dtype), b),
        dataclasses.replace(new, step=old.step),
        old,
    )
    return dataclasses.replace(kept, step=new.step)


def _start_of_rows(config: Config, state: TrainState, draws: Draws) -> StreamState:
    """Return the state that each row starts from."""
    model = config.model
    if draws.by_row is not None:
        start = going_on_by_row(model, draws.by_row, ~draws.from_carried)
    else:
        start = empty_state(model, len(draws.from_carried), past_slots=False)
        if config.train.random_state_passing:
            start = with_passed_on(start, state.carried, draws.from_carried)
    return with_auxiliary_loss(model, start) if model.memory.has_auxiliary_loss else start


def _own_losses(config: Config, after: StreamState, tokens: int) -> Metrics:
    """Return the mean of the memory's auxiliary losses over rows and complete blocks, if it has any.

    The rows are those of the whole batch, of which these may be a part. Weights of tokens play no role.
    """
    if not config.model.memory.has_auxiliary_loss:
        return {}
    blocks = max(tokens // config.model.block_size, 1)
    return {"auxiliary_loss": auxiliary_loss(after).sum() / (config.train.batch_size * blocks)}


def _read_rows(
    train: TrainConfig, model: Transformer, batch: Batch, start: StreamState, draws: Draws
) -> tuple[jax.Array, StreamState]:
    """Return the activations (B, T, D) of a batch and the state after it."""
    return model.hidden(
        batch["inputs"],
        start,
        aligned=True,
        position_offset=draws.offset,
        noise_keys=draws.noise_keys,
        truncation=truncation_of(train),
    )


def _draw(config: Config, state: TrainState, batch: Batch) -> Draws:
    train, batch_size = config.train, batch["inputs"].shape[0]
    step_key = jax.random.fold_in(state.key, state.step)
    saved_key, zero_key, offset_key = jax.random.split(step_key, 3)
    active = state.has_carried & (state.step >= train.random_state_passing_from)
    from_carried = jax.random.bernoulli(saved_key, train.random_state_passing, (batch_size,)) & active
    offset = None
    if train.random_position_offset:
        wavelength = round(2 * math.pi * config.model.rope_base)
        offset = jax.random.randint(offset_key, (batch_size,), 0, wavelength)
        offset = jnp.where(jax.random.bernoulli(zero_key, 0.5, (batch_size,)), 0, offset)
    noise_keys = None
    if config.model.memory.noisy:
        noise_keys = jax.random.split(jax.random.fold_in(step_key, NOISE), batch_size)
    if train.carry == "none":
        return Draws(from_carried, offset, noise_keys=noise_keys)
    return Draws(~batch[START] & state.has_carried, offset, state.carried, noise_keys)


def _accumulate(gradient: Callable, batch: Batch, draws: Draws, parts: int) -> Any:
    """Sum loss, scores and gradients over micro-batches; carry what a step on the whole batch would."""
    if parts == 1:
        return gradient(batch, draws)

    # Deal the rows out in turn. This spreads each micro-batch evenly over the devices.
    def deal(x: jax.Array, axis: int = 0) -> jax.Array:
        return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, parts, *x.shape[axis + 1 :]), axis + 1, 0)

    def collect(x: jax.Array, axis: int) -> jax.Array:
        x = jnp.moveaxis(x, 0, axis + 1)
        return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

    def body(total: Any, part: Any) -> tuple[Any, Any]:
        (value, (scores, carried)), grads = gradient(*part)
        return jax.tree.map(jnp.add, total, (value, scores, grads)), carried

    by_row = draws.by_row
    dealt = jax.tree.map(deal, (batch, draws._replace(by_row=None)))
    if by_row is not None:
        dealt = (dealt[0], dealt[1]._replace(by_row=_along_rows(deal, by_row)))
    shapes = jax.eval_shape(gradient, *jax.tree.map(lambda x: x[0], dealt))
    (value, (scores, _)), grads = shapes
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (value, scores, grads))
    (value, scores, grads), carried = jax.lax.scan(body, zeros, dealt)
    if by_row is None:
        carried = jax.tree.map(lambda x: x[0], carried)
    else:
        carried = _along_rows(collect, carried)
    return (value, (scores, carried)), grads


def _along_rows(change: Callable[[jax.Array, int], jax.Array], by_row: dict[str, Any]) -> dict[str, Any]:
    """Change the arrays of :func:`passed_on_by_row`; `change` gets the axis of their rows."""
    axes = {name: 1 if name == "layers" else 0 for name in by_row}
    return {
        name: jax.tree.map(lambda x, axis=axes[name]: change(x, axis), tree) for name, tree in by_row.items()
    }
