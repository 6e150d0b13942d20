"""A straightforward implementation of the model, in which each layer scans over blocks of tokens and FAM.

It follows algorithm 2 of the paper line by line, with FAM as M more rows of each block: projections, attention and
feed-forward of a block wait for those of the previous block. Its results equal those of `Transformer.hidden`; only the
time differs.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fam_jax.config import ModelConfig
from fam_jax.kernels import Part, multi_part_attention
from fam_jax.layers.decoder_layer import DecoderLayer
from fam_jax.layers.rope import Rope, rotate
from fam_jax.memories.fam import FamConfig, FeedbackAttentionMemory, raise_prompt
from fam_jax.model import Transformer


def naive_hidden(model: Transformer, tokens: jax.Array) -> jax.Array:
    """Return the normalized activations (B, T, D) of rows that start at position 0; T is a multiple of C.

    Raises:
      ValueError: the config uses an option that this implementation lacks, or T is not a multiple of C.
    """
    config = model.config
    _check(config, tokens.shape[1])
    assert model.memory is not None
    rope = Rope(config.head_dim, config.rope_base, str(jnp.promote_types(config.dtype, jnp.float32)))
    batch, length = tokens.shape
    blocks = (batch, length // config.block_size, config.block_size)
    x = model.embedding.table[...][tokens].astype(config.dtype).reshape(*blocks, -1).swapaxes(0, 1)
    prompt = model.memory.initial_fam[...].astype(config.dtype)
    own = FeedbackAttentionMemory(config).enter_at(rope)
    graphdef, state = nnx.split(model.layers)

    def body(carry: tuple[jax.Array, jax.Array], layer_state: nnx.State) -> tuple[Any, None]:
        x, prompt = carry
        layer = nnx.merge(graphdef, layer_state)
        x = _scan_blocks(layer, config, rope, x, prompt)
        return (x, raise_prompt(layer, prompt[None], own)[0]), None

    (x, _), _ = jax.lax.scan(body, (x, prompt), state)
    return model.final_norm(x.swapaxes(0, 1).reshape(batch, length, -1))


def _scan_blocks(
    layer: DecoderLayer, config: ModelConfig, rope: Rope, x: jax.Array, prompt: jax.Array
) -> jax.Array:
    """Apply one layer to x (N, B, C, D), block by block; `prompt` (M, D) is the layer's initial FAM."""
    blocks, batch = x.shape[:2]
    size, fams = config.block_size, config.memory.chained_rows
    past = config.memory_segments * size
    place = np.concatenate([np.arange(size), np.arange(-fams, 0)])  # tokens and FAM, in the block's frame

    def step(carry: tuple[jax.Array, ...], block: tuple[jax.Array, jax.Array]) -> tuple[tuple, jax.Array]:
        past_k, past_v, fam = carry
        x, index = block
        q, k, v = layer.project(jnp.concatenate([x, fam], axis=1))
        rotation = rope.at(index * size + place)
        q, k = rotate(q, rotation), rotate(k, rotation)
        keys, values = jnp.concatenate([past_k, k], axis=1), jnp.concatenate([past_v, v], axis=1)
        attended = multi_part_attention([Part(q, keys, values, _mask(past, size, fams, index))])
        residual = jnp.concatenate([x, jnp.where(index > 0, fam, 0)], axis=1)  # the prompt carries no context
        out = layer.finish(attended, residual)
        # The last m * C tokens of [past, block, FAM].
        recent = slice(size, size + past)
        return (keys[:, recent], values[:, recent], out[:, size:]), out[:, :size]

    nothing = jnp.zeros((batch, past, config.num_kv_heads, config.head_dim), x.dtype)
    fam = jnp.broadcast_to(prompt, (batch, *prompt.shape))
    _, out = jax.lax.scan(step, (nothing, nothing, fam), (x, jnp.arange(blocks)))
    return out


def _mask(past: int, size: int, fams: int, index: jax.Array) -> jax.Array:
    """Return the mask (1, C + M, m * C + C + M) from [tokens ; FAM] of block `index` to [past ; tokens ; FAM]."""
    exists = jnp.broadcast_to(np.arange(-past, 0) + index * size >= 0, (size, past))
    token_rows = jnp.concatenate([exists, np.tri(size, dtype=bool), np.ones((size, fams), bool)], axis=1)
    fam_rows = np.broadcast_to(np.arange(past + size + fams) >= past, (fams, past + size + fams))
    return jnp.concatenate([token_rows, fam_rows])[None]


def _check(config: ModelConfig, length: int) -> None:
    plain = dataclasses.replace(
        config,
        memory=FamConfig(length=config.memory.chained_rows, segments=config.memory_segments),
        attention_softcap=0.0,
        rope_scaling="none",
        layer_pattern=("global",),
        local_window=0,
        scale_embeddings=False,
        remat="none",
    )
    if config != plain or not config.memory.has_state:
        raise ValueError("config.model: the naive form supports only FAM with the paper's defaults")
    if length % config.block_size:
        raise ValueError(
            f"tokens: the naive form needs whole blocks of {config.block_size} tokens, got {length} tokens"
        )
