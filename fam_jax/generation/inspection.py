"""Look into a model: what its tokens and its memory attend to, and how far back the gradient of a loss reaches.

Compiled once per config, mesh and shape, as the calls of `fam_jax.generation.compiled` are.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from fam_jax.config import ModelConfig
from fam_jax.generation.compiled import Params, state_sharding, structure
from fam_jax.generation.streaming import Streamer
from fam_jax.memories.inspection import Attention, WriteAttention
from fam_jax.model import StreamState, Transformer, empty_state, from_dict, memory_vectors
from fam_jax.sharding import replicated, traced_for


class Reading(NamedTuple):
    """What the tokens of a block attend to, in every layer. Shares of a head's attention, between 0 and 1."""

    # (L, B, C, H) all keys of the memory together, and all keys of past blocks.
    memory: Any
    past: Any
    # (L, B, H, S) each key of the memory, the mean of the tokens.
    slots: Any
    # (L, C, S + C) the first stream, the mean of the heads: keys of the memory, then tokens of the block.
    weights: Any


class Writing(NamedTuple):
    """What the rows of a memory attend to when a block is written, in every layer."""

    # (L, B, M, H) all tokens of the block together; the rest goes to the memory itself.
    block: Any
    # (L, B, M, H) how many tokens share the attention to the block: the exponential of its entropy, from 1 to C.
    tokens: Any
    # (L, M, S + C) the first stream, the mean of the heads: rows of the memory, then tokens of the block.
    weights: Any


class Inspected(NamedTuple):
    """What :func:`inspect_block` sees."""

    reading: Reading
    # None if the memory is not written by attention.
    writing: Writing | None
    # (L, B, M, W) what the memory holds after the block, L = 1 if layers share it; None if there is no memory.
    vectors: Any


def inspect_block(
    streamer: Streamer, tokens: np.ndarray, state: StreamState
) -> tuple[Inspected, StreamState]:
    """Read one block (B, C) int32 of streams at a block border; return what was seen, and the state after it."""
    calls = _calls(streamer.config, streamer.mesh, len(tokens))
    found, state = calls.inspect(streamer.params, state, tokens)
    return jax.tree.map(np.asarray, Inspected(*found)), state


def gradient_norms(streamer: Streamer, inputs: np.ndarray, targets: np.ndarray, weights: Any) -> np.ndarray:
    """Return how much the last block's loss depends on the inputs of every block, for streams that begin here.

    Args:
      streamer: the model.
      inputs: (B, N C) int32.
      targets: (B, C) int32, those of the last block.
      weights: (B, C) of the targets in the loss, which is the weighted mean of each stream.

    Returns:
      (B, N) Euclidean norm of the gradient of a stream's loss with respect to the embeddings of each block's inputs.
    """
    calls = _calls(streamer.config, streamer.mesh, len(inputs))
    return np.asarray(calls.gradients(streamer.params, inputs, targets, weights))


class _Calls(NamedTuple):
    inspect: Callable[..., Any]
    gradients: Callable[..., jax.Array]


@functools.lru_cache(maxsize=32)
def _calls(config: ModelConfig, mesh: Mesh | None, rows: int) -> _Calls:
    graphdef, abstract = structure(config)

    def model(params: Params) -> Transformer:
        return nnx.merge(graphdef, from_dict(abstract, params))

    def inspect(params: Params, state: StreamState, tokens: jax.Array) -> Any:
        read, written, state = model(params).inspect(tokens, state, _reading, _writing)
        return (read, written, memory_vectors(config, state)), state

    def gradients(params: Params, *batch: jax.Array) -> jax.Array:
        return _gradients(config, functools.partial(model, params), *batch)

    if mesh is None:
        return _Calls(jax.jit(inspect), jax.jit(gradients))
    one = replicated(mesh)
    return _Calls(
        jax.jit(inspect, out_shardings=(one, state_sharding(mesh, config, rows))),
        jax.jit(traced_for(mesh, gradients), out_shardings=one),
    )


def _reading(found: Attention) -> Reading:
    first = jnp.concatenate([found.memory[0], found.own[0]], axis=-1)
    return Reading(
        memory=found.memory.sum(axis=-1),
        past=found.past,
        slots=found.memory.mean(axis=1),
        weights=first.mean(axis=1),
    )


def _writing(found: WriteAttention) -> Writing:
    block = found.block.sum(axis=-1)
    share = found.block / jnp.maximum(block, jnp.finfo(block.dtype).tiny)[..., None]
    entropy = -(share * jnp.log(jnp.where(share > 0, share, 1))).sum(axis=-1)
    first = jnp.concatenate([found.memory[0], found.block[0]], axis=-1)
    return Writing(block=block, tokens=jnp.exp(entropy), weights=first.mean(axis=1))


def _gradients(
    config: ModelConfig,
    create: Callable[[], Transformer],
    inputs: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
) -> jax.Array:
    """Compute :func:`gradient_norms` of the model that `create` returns."""
    batch, length = inputs.shape
    size, table = config.block_size, create().embedding.table[...]
    places = jnp.arange(batch * length, dtype=jnp.int32).reshape(batch, length)

    def loss(vectors: jax.Array) -> jax.Array:
        """Read with a row of the table for every place, so that each place has a gradient of its own."""
        model = create()
        output_table = model.output_table
        model.embedding.table = nnx.Param(vectors)
        hidden, _ = model.hidden(places, empty_state(config, batch, past_slots=False), aligned=True)
        logits = model.logits_from(output_table, hidden[:, -size:])
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        nats = jax.nn.logsumexp(logits, axis=-1) - chosen
        return ((nats * weights).sum(axis=1) / jnp.maximum(weights.sum(axis=1), 1e-9)).sum()

    slopes = jax.grad(loss)(table[inputs.reshape(-1)]).reshape(batch, length // size, -1)
    return jnp.sqrt(jnp.square(slopes).sum(axis=-1))
