"""The FAM chain of one layer, with deferred weight gradients as in the library, and with plain differentiation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.workload import Workload
from fam_jax.config import ModelConfig
from fam_jax.kernels import Part, multi_part_attention
from fam_jax.layers.decoder_layer import DecoderLayer
from fam_jax.layers.rope import Rope, rotate
from fam_jax.memories.chain import ChainAttention, ChainInputs, run_chain, update_vectors
from fam_jax.memories.fam import FeedbackAttentionMemory
from fam_jax.model import from_dict

Chain = Callable[[DecoderLayer, jax.Array, ChainInputs, ChainAttention], Any]


def layer_structure(model: ModelConfig) -> tuple[Any, Any]:
    """Return the graph definition and the abstract state of a layer."""
    return nnx.split(nnx.eval_shape(lambda: DecoderLayer(model, rngs=nnx.Rngs(0))))


def plain_chain(layer: DecoderLayer, fam: jax.Array, inputs: ChainInputs, attention: ChainAttention) -> Any:
    """Compute `run_chain` with a plain scan, whose backward pass adds to every gradient at every block."""

    def body(fam: jax.Array, step: Any) -> Any:
        block, rotation, keep = step

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            size = attention.block_size
            keys, values = (
                jax.lax.dynamic_slice_in_dim(x, block * size, size, 1).reshape(len(x), size, *k.shape[2:])
                for x in inputs[:2]
            )
            q, k = rotate(q, rotation), rotate(k, rotation)
            return multi_part_attention([Part(q, k, v), Part(q, keys, values)])

        return update_vectors(layer, fam, keep, attend)

    return jax.lax.scan(body, fam, (jnp.arange(len(inputs.keep)), inputs.rotation, inputs.keep))


def chain_loss(model: ModelConfig, chain: Chain) -> Callable[..., jax.Array]:
    """Return loss(layer parameters, fam (B, M, D), keys, values (B, T, K * hd)): half the results' squared norm."""
    graphdef, _ = layer_structure(model)
    own = FeedbackAttentionMemory(model).enter_at(Rope(model.head_dim, model.rope_base, "float32"))

    def loss(parameters: Any, fam: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        layer = nnx.merge(graphdef, parameters)
        batch, blocks = keys.shape[0], keys.shape[1] // model.block_size
        # The keys of every block are in the block's own frame, so all blocks have the same rotation.
        rotation = own.map(lambda r: jnp.broadcast_to(r, (blocks, 1, *r.shape)))
        keep = jnp.broadcast_to(np.arange(blocks)[:, None] > 0, (blocks, batch))
        attention = ChainAttention(model.block_size, 0.0, "auto")
        out = chain(layer, fam, ChainInputs(keys, values, rotation, keep), attention)
        return sum((jnp.vdot(x, x) for x in jax.tree.leaves(out)), jnp.zeros(())) / 2

    return loss


def chain_inputs(work: Workload, model: ModelConfig, params: dict[str, Any]) -> tuple[Any, ...]:
    """Return arguments of the loss: the first layer's parameters and random activations of unit variance."""
    _, abstract = layer_structure(model)
    parameters = from_dict(abstract, jax.tree.map(lambda x: x[0], params["layers"]))
    shape = (work.batch, work.length, model.num_kv_heads * model.head_dim)
    fam_key, *keys = jax.random.split(jax.random.key(work.seed), 3)
    fam = jax.random.normal(fam_key, (work.batch, model.memory.chained_rows, model.model_dim))
    return parameters, fam, *(jax.random.normal(key, shape) for key in keys)


def chain_calls(work: Workload, model: ModelConfig, params: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """Return calls of one layer: forward, gradient, and gradient without deferred weight gradients."""
    inputs = chain_inputs(work, model, params)
    forward = jax.jit(chain_loss(model, run_chain))
    gradients = [
        jax.jit(jax.value_and_grad(chain_loss(model, chain), argnums=(0, 1, 2, 3)))
        for chain in (run_chain, plain_chain)
    ]
    return {
        "chain_forward": lambda: forward(*inputs),
        "chain_gradient": lambda: gradients[0](*inputs),
        "chain_gradient_plain": lambda: gradients[1](*inputs),
    }
