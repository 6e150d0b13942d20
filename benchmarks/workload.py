"""The model, its parameters and its data, as all benchmarks of training use them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fam_jax.config import Config, ModelConfig
from fam_jax.memories.fam import FamConfig
from fam_jax.model import Transformer, empty_state, from_dict
from fam_jax.train.losses import token_loss
from fam_jax.train.optimizer import make_optimizer
from fam_jax.train.state import TrainState, init_state, model_structure, nothing_carried
from fam_jax.train.step import Batch, make_train_step

Hidden = Callable[[Transformer, jax.Array], jax.Array]
TOKENS_PER_FAM = 16  # C / M, as in the paper: 64 vectors for blocks of 1024 tokens


@dataclasses.dataclass(frozen=True)
class Workload:
    """What a training step is given; the tokens of a step are the same at all block sizes."""

    model: ModelConfig  # its block_size and fam_length are those of the first block size
    batch: int
    length: int
    seed: int

    @property
    def tokens(self) -> int:
        """Per step."""
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
    """Return `model` with blocks of `size` tokens and a FAM of C / 16 vectors, or none."""
    memory = FamConfig(length=size // TOKENS_PER_FAM if fam else 0)
    return dataclasses.replace(model, block_size=size, memory=memory)


def random_batch(work: Workload) -> Batch:
    """Uniformly random tokens, all of the same weight."""
    keys = jax.random.split(jax.random.key(work.seed), 2)
    shape = (work.batch, work.length)
    inputs, targets = (jax.random.randint(key, shape, 0, work.model.vocab_size, jnp.int32) for key in keys)
    return {
        "inputs": inputs, "targets": targets, "weights": jnp.ones(shape, jnp.float32), "answer": jnp.zeros(shape, bool)
    }  # fmt: skip


def random_parameters(model: ModelConfig, seed: int) -> dict[str, Any]:
    """As at the start of a training; copies of their own for every caller."""
    return jax.tree.map(jnp.copy, _initial_parameters(model, seed))


@functools.lru_cache(maxsize=2)  # random numbers take seconds to compile
def _initial_parameters(model: ModelConfig, seed: int) -> dict[str, Any]:
    config = Config(model=model)
    return jax.jit(lambda: init_state(config, make_optimizer(config.optimizer, 1), seed).params)()


def blockwise_hidden(model: Transformer, tokens: jax.Array) -> jax.Array:
    """The library's form: all tokens of a layer at once, around the chain of FAM."""
    return model.hidden(tokens, empty_state(model.config, tokens.shape[0], past_slots=False), aligned=True)[0]


def make_loss(model: ModelConfig, hidden: Hidden = blockwise_hidden) -> Callable[[Any, Batch], jax.Array]:
    """loss(params, batch): the mean cross-entropy in nats, from the activations that `hidden` forms."""
    graphdef, abstract = model_structure(Config(model=model))

    def loss(params: Any, batch: Batch) -> jax.Array:
        module = nnx.merge(graphdef, from_dict(abstract, params))
        x = hidden(module, batch["inputs"])
        summed = token_loss(module, x, batch["targets"], batch["weights"], chunk=batch["inputs"].size)
        return summed.loss / batch["weights"].sum()

    return loss


def training_call(work: Workload, model: ModelConfig, batch: Batch) -> Callable[[], Any]:
    """A call that takes the next step of a training of `model` from its start: Adafactor, the state donated."""
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
