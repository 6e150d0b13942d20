"""The model, parameters and data that all training benchmarks use."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fam_jax.config import Config, ModelConfig
from fam_jax.memories.fam import FamConfig
from fam_jax.memories.window import BlockSlidingWindowConfig
from fam_jax.model import Transformer, empty_state, from_dict
from fam_jax.training.losses import token_loss
from fam_jax.training.optimizer import make_optimizer
from fam_jax.training.state import TrainState, init_state, model_structure, nothing_carried
from fam_jax.training.step import Batch, make_train_step

Hidden = Callable[[Transformer, jax.Array], jax.Array]
# C / M, as in the paper: 64 vectors for blocks of 1024 tokens.
TOKENS_PER_FAM = 16


@dataclasses.dataclass(frozen=True)
class Workload:
    """Model and batch of a training step. A step has the same number of tokens at all block sizes."""

    # :func:`with_blocks` replaces block size and memory.
    model: ModelConfig
    batch: int
    length: int
    seed: int

    @property
    def tokens(self) -> int:
        """Tokens per step."""
        return self.batch * self.length


FULL = Workload(
    ModelConfig(
        vocab_size=256, num_layers=2, model_dim=256, num_heads=4, num_kv_heads=4, head_dim=64, ff_dim=1024
    ),
    batch=2,
    length=2048,
    seed=0,
)
QUICK = Workload(
    ModelConfig(
        vocab_size=32, num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, ff_dim=32
    ),
    batch=2,
    length=64,
    seed=0,
)


def with_blocks(model: ModelConfig, size: int, *, fam: bool = True) -> ModelConfig:
    """Return `model` with blocks of `size` tokens and FAM of C / 16 vectors, or BSWA; m is 1 for both."""
    memory = FamConfig(length=size // TOKENS_PER_FAM) if fam else BlockSlidingWindowConfig()
    return dataclasses.replace(model, block_size=size, memory=memory)


def random_batch(work: Workload) -> Batch:
    """Return uniformly random tokens of equal weight."""
    keys = jax.random.split(jax.random.key(work.seed), 2)
    shape = (work.batch, work.length)
    inputs, targets = (jax.random.randint(key, shape, 0, work.model.vocab_size, jnp.int32) for key in keys)
    weights, answer = jnp.ones(shape, jnp.float32), jnp.zeros(shape, bool)
    return {"inputs": inputs, "targets": targets, "weights": weights, "answer": answer}


def random_parameters(model: ModelConfig, seed: int) -> dict[str, Any]:
    """Return a new copy of the parameters that training starts from."""
    return jax.tree.map(jnp.copy, _initial_parameters(model, seed))


@functools.lru_cache(maxsize=2)  # random numbers take seconds to compile
def _initial_parameters(model: ModelConfig, seed: int) -> dict[str, Any]:
    config = Config(model=model)
    return jax.jit(lambda: init_state(config, make_optimizer(config.optimizer, 1), seed).params)()


def blockwise_hidden(model: Transformer, tokens: jax.Array) -> jax.Array:
    """Compute activations as the library does: all tokens of a layer at once, around the FAM chain."""
    return model.hidden(tokens, empty_state(model.config, tokens.shape[0], past_slots=False), aligned=True)[0]


def make_loss(model: ModelConfig, hidden: Hidden = blockwise_hidden) -> Callable[[Any, Batch], jax.Array]:
    """Return loss(params, batch), the mean cross-entropy in nats of the activations that `hidden` computes."""
    graphdef, abstract = model_structure(Config(model=model))

    def loss(params: Any, batch: Batch) -> jax.Array:
        module = nnx.merge(graphdef, from_dict(abstract, params))
        x = hidden(module, batch["inputs"])
        summed = token_loss(module, x, batch["targets"], batch["weights"], chunk=batch["inputs"].size)
        return summed.loss / batch["weights"].sum()

    return loss


def training_call(work: Workload, model: ModelConfig, batch: Batch) -> Callable[[], Any]:
    """Return a function that takes the next training step of `model`, with Adafactor, at every call."""
    config = Config(model=model)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, loss_chunk=work.tokens))
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    step = jax.jit(make_train_step(config, optimizer), donate_argnums=0)
    params = random_parameters(model, work.seed)
    state = TrainState(
        params=params,
        optimizer=jax.jit(optimizer.init)(params),
        step=jnp.zeros((), jnp.int32),
        key=jax.random.key(work.seed),
        carried=nothing_carried(model),
        has_carried=jnp.zeros((), bool),
    )

    def call() -> Any:
        nonlocal state
        state, metrics = step(state, batch)
        return metrics

    return call
