"""A model small enough to compile dozens of times in a test run, and compiled ways to call it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fam_jax.config import ModelConfig
from fam_jax.memories.fam import FamConfig
from fam_jax.model import StreamState, Transformer, from_dict
from tests.oracle.naive import random_params

TINY = ModelConfig(
    vocab_size=11,
    num_layers=2,
    model_dim=8,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    ff_dim=12,
    block_size=4,
    memory=FamConfig(segments=1, length=2),
)


def variant(config: ModelConfig = TINY, **changes: Any) -> ModelConfig:
    """Return `config` with fields changed; fields of its memory, such as `length=0`, are changed in the memory."""
    own = {field.name for field in dataclasses.fields(config.memory)}
    memory = {name: changes.pop(name) for name in own & changes.keys()}
    if memory:
        changes["memory"] = dataclasses.replace(config.memory, **memory)
    return dataclasses.replace(config, **changes)


def some_tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, TINY.vocab_size, shape).astype(np.int32)


def params_of(config: ModelConfig, seed: int = 0) -> dict[str, Any]:
    """Return the oracle's random parameters, in float64 for a float64 config, else in float32."""
    dtype = "float64" if config.dtype == "float64" else "float32"
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), random_params(config, seed))


@functools.cache
def _structure(config: ModelConfig) -> tuple[Any, Any]:
    return nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))


def build(config: ModelConfig, params: Any) -> Transformer:
    """Return a model with given parameters."""
    graphdef, state = _structure(config)
    return nnx.merge(graphdef, from_dict(state, params))


@functools.cache
def _compiled(config: ModelConfig) -> Callable[..., tuple[jax.Array, StreamState]]:
    @functools.partial(jax.jit, static_argnames="aligned")
    def call(params, tokens, state, *, lengths=None, aligned=False, position_offset=None):
        return build(config, params)(
            tokens, state, lengths=lengths, aligned=aligned, position_offset=position_offset
        )

    return call


@functools.cache
def _compiled_start(config: ModelConfig) -> Callable[[Any, int], StreamState]:
    return jax.jit(lambda params, batch_size: build(config, params).init_state(batch_size), static_argnums=1)


class Reader:
    """Read streams and keep their state between calls. The model is compiled once per config and shape."""

    def __init__(self, config: ModelConfig, params: Any, batch_size: int, state: StreamState | None = None):
        self.config, self.params = config, params
        self.state = _compiled_start(config)(params, batch_size) if state is None else state

    def read(self, tokens: np.ndarray, **how: Any) -> np.ndarray:
        """Read tokens (B, T); return logits (B, T, V)."""
        if "lengths" in how:
            how["lengths"] = jnp.asarray(how["lengths"], jnp.int32)
        logits, self.state = _compiled(self.config)(self.params, jnp.asarray(tokens), self.state, **how)
        return np.asarray(logits)

    def read_ragged(self, rows: list[np.ndarray], width: int) -> list[np.ndarray]:
        """Read each row's next tokens, up to `width`; return logits (number of tokens, V) of each row."""
        tokens = np.stack([np.pad(row, (0, width - len(row)), constant_values=10) for row in rows])
        logits = self.read(tokens, lengths=[len(row) for row in rows])
        return [logits[b, : len(row)] for b, row in enumerate(rows)]

    @property
    def fam(self) -> np.ndarray:
        """Return the FAM (L, B, M, D) of the state."""
        return np.asarray(self.state.layers.fam)
