"""The decoder-only transformer: parameters, and the scans over layers that apply them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fam_jax.config import ModelConfig
from fam_jax.kernels import soft_cap
from fam_jax.model.blocks import chunk_frames, read_blocks
from fam_jax.model.fam import local_rotation, prompt_step
from fam_jax.model.fsdp import embed, gather_layer, keep_rows
from fam_jax.model.layer_types import kind_of_layers, kinds_of
from fam_jax.model.layers import (
    LOW_RANK,
    PROJECTIONS,
    DecoderLayer,
    Linear,
    Norm,
    embedding_stddev,
    initial_fam,
)
from fam_jax.model.memory import LayerMemory, Memory, empty_memory
from fam_jax.model.pieces import close_blocks, extend_memory, piece_frames, read_piece
from fam_jax.model.rope import Rotation, rotate

# The results of attention are kept beside those of products, lest its kernels run twice.
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.save_only_these_names(*PROJECTIONS, "block_attention"),
    # Queries, keys, values and the output are formed again.
    "wide": jax.checkpoint_policies.save_only_these_names("gate", "up", LOW_RANK, "block_attention"),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Embedding(nnx.Module):
    """Table (V, D) of token vectors, which also gives the logits where embeddings are tied."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.model_dim)
        self.table = nnx.Param(
            jax.random.normal(rngs.params(), shape, jnp.float32) * embedding_stddev(config)
        )


class Transformer(nnx.Module):
    """TransformerFAM, or TransformerBSWA where `config.fam_length` is 0.

    Holds parameters and nothing else. `logits, memory = model(tokens, memory)` reads tokens; any division of a
    sequence into calls gives the same logits.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = Embedding(config, rngs=rngs)
        self.layers = _stacked_layers(config, rngs)
        self.final_norm = Norm(config)
        tied = config.tie_embeddings
        self.unembedding = (
            None if tied else Linear("unembedding", (config.model_dim,), (config.vocab_size,), rngs=rngs)
        )
        has_prompt = config.fam_length > 0 and config.fam_init == "prompt"
        self.initial_fam = nnx.Param(initial_fam(config, rngs)) if has_prompt else None

    def __call__(
        self,
        tokens: jax.Array,
        memory: Memory,
        *,
        lengths: jax.Array | None = None,
        aligned: bool = False,
        position_offset: jax.Array | None = None,
    ) -> tuple[jax.Array, Memory]:
        """Reads tokens (B, T); see :meth:`hidden`. Returns float32 logits (B, T, V) and the memory after them."""
        hidden, memory = self.hidden(
            tokens, memory, lengths=lengths, aligned=aligned, position_offset=position_offset
        )
        return self.logits(hidden), memory

    def hidden(
        self,
        tokens: jax.Array,
        memory: Memory,
        *,
        lengths: jax.Array | None = None,
        aligned: bool = False,
        position_offset: jax.Array | None = None,
    ) -> tuple[jax.Array, Memory]:
        """The normalised activations (B, T, D) that logits are a linear function of, and the memory after.

        Args:
          tokens: (B, T) int32, T > 0.
          memory: from :meth:`init_memory` or an earlier call.
          lengths: (B,) int32, how many of each row's tokens are real: the first ones, at most T; the others leave no
            trace in memory, and their activations mean nothing. None: all of them.
          aligned: the caller's promise that every row stands at a block border. All blocks then go through each layer
            at once: the way to train and to prefill.
          position_offset: (B,) int32 added to all positions (random position offset, appendix B.2.2).

        Raises:
          ValueError: no tokens, or `lengths` with `aligned`, or `position_offset` without it.
        """
        if tokens.shape[1] == 0:
            raise ValueError("there are no tokens to read: the model needs at least one")
        if aligned:
            if lengths is not None:
                raise ValueError("an aligned call takes no lengths: all its tokens are real")
            return self._read_aligned(tokens, memory, position_offset)
        if position_offset is not None:
            raise ValueError("a position offset is for training, which makes aligned calls")
        if lengths is None:
            lengths = jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32)
        return self._read_anywhere(tokens, memory, jnp.minimum(lengths, tokens.shape[1]))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """(..., D) activations from :meth:`hidden` to (..., V) logits, in float32 (float64 for float64)."""
        return self.logits_from(self.output_table, hidden)

    @property
    def output_table(self) -> jax.Array:
        """What logits are formed with: the embedding table (V, D) if tied, else the unembedding's kernel (D, V)."""
        if self.unembedding is not None:
            return self.unembedding.kernel[...]
        return self.embedding.table[...]

    def logits_from(self, table: jax.Array, hidden: jax.Array) -> jax.Array:
        """:meth:`logits` with another array in place of :attr:`output_table`."""
        product = "...d,vd->...v" if self.unembedding is None else "...d,dv->...v"
        dtype = jnp.promote_types(hidden.dtype, jnp.float32)
        logits = jnp.einsum(product, hidden, table.astype(hidden.dtype), preferred_element_type=dtype)
        return soft_cap(logits, self.config.logit_softcap)

    def init_memory(self, batch_size: int) -> Memory:
        """The memory of `batch_size` streams that have read nothing; holds the initial FAM of every layer."""
        config = self.config
        memory = empty_memory(config, batch_size)
        if config.fam_length == 0:
            return memory
        graphdef, state = nnx.split(self.layers)
        own = _own_rotations(config)

        def body(
            prompt: jax.Array | None, xs: tuple[nnx.State, Rotation]
        ) -> tuple[jax.Array | None, tuple[jax.Array, ...]]:
            layer = nnx.merge(graphdef, gather_layer(xs[0], config.dtype))
            fam, prompt = _initial_fam(layer, prompt, xs[1])
            fam = fam.astype(config.dtype)
            _, k, v = layer.project(fam[None])
            return prompt, (fam, rotate(k, xs[1])[0], v[0])

        _, (fam, k, v) = jax.lax.scan(body, self._prompt(), (state, own))

        def start(into: jax.Array, initial: jax.Array) -> jax.Array:
            return jnp.broadcast_to(initial[:, None], into.shape).astype(into.dtype)

        layers = memory.layers
        layers = dataclasses.replace(
            layers,
            fam=start(layers.fam, fam),
            fam_keys=layers.fam_keys.at[:, :, 0].set(start(layers.fam_keys[:, :, 0], k)),
            fam_values=layers.fam_values.at[:, :, 0].set(start(layers.fam_values[:, :, 0], v)),
        )
        return dataclasses.replace(memory, layers=layers)

    def _read_aligned(
        self, tokens: jax.Array, memory: Memory, position_offset: jax.Array | None
    ) -> tuple[jax.Array, Memory]:
        config, length = self.config, tokens.shape[1]
        kinds = [(kind, chunk_frames(kind, memory, length, position_offset)) for kind in kinds_of(config)]
        graphdef, state = nnx.split(self.layers)

        def body(
            carry: Any, xs: tuple[nnx.State, LayerMemory, jax.Array, Rotation]
        ) -> tuple[Any, LayerMemory]:
            x, prompt = carry
            layer, layer_memory, which, own = nnx.merge(graphdef, gather_layer(xs[0], config.dtype)), *xs[1:]
            x = keep_rows(x)
            initial, prompt = _initial_fam(layer, prompt, own)
            carried = layer_memory.fam
            start = jnp.where(memory.carries_context[:, None, None], carried, initial.astype(carried.dtype))
            x, layer_memory = read_blocks(layer, kinds, which, x, layer_memory, start)
            return (x, prompt), layer_memory

        if config.remat != "none":
            body = jax.checkpoint(body, policy=REMAT_POLICIES[config.remat], prevent_cse=False)
        per_layer = (state, memory.layers, kind_of_layers(config), _own_rotations(config))
        (x, _), layers = jax.lax.scan(body, (self._embed(tokens), self._prompt()), per_layer)
        full = length // config.block_size
        updated = config.fam_length > 0 and full > 0
        after = Memory(
            layers=layers,
            carries_context=memory.carries_context | updated,
            blocks=memory.blocks + full,
            filled=jnp.full_like(memory.filled, length % config.block_size),
        )
        return self.final_norm(x), after

    def _read_anywhere(
        self, tokens: jax.Array, memory: Memory, lengths: jax.Array
    ) -> tuple[jax.Array, Memory]:
        batch, length = tokens.shape
        size = self.config.block_size
        width = min(length, size)
        if length == 1:
            return self._read_piece(tokens, memory, lengths)
        rows, index = np.arange(batch)[:, None], np.arange(width)

        def step(carry: Any, _: None) -> tuple[Any, None]:
            memory, read, out = carry
            count = jnp.clip(jnp.minimum(lengths - read, size - memory.filled), 0, width)
            source = read[:, None] + index
            piece = tokens[rows, jnp.minimum(source, length - 1)]
            hidden, memory = self._read_piece(piece, memory, count)
            target = jnp.where(index < count[:, None], source, length)  # beyond the end: dropped
            return (memory, read + count, out.at[rows, target].set(hidden, mode="drop")), None

        # The first piece may take one token only, to the end of its block; each later one takes up to a block.
        pieces = 1 + -(-(length - 1) // size)
        out = jnp.zeros((batch, length, self.config.model_dim), self.config.dtype)
        (memory, _, out), _ = jax.lax.scan(step, (memory, jnp.zeros_like(lengths), out), None, length=pieces)
        return out, memory

    def _read_piece(self, tokens: jax.Array, memory: Memory, count: jax.Array) -> tuple[jax.Array, Memory]:
        """Reads the first `count` (B,) tokens of each row of (B, W), none of which may cross a block border."""
        config = self.config
        kinds = [(kind, piece_frames(kind, memory, tokens.shape[1])) for kind in kinds_of(config)]
        graphdef, state = nnx.split(self.layers)

        def body(
            x: jax.Array, xs: tuple[nnx.State, LayerMemory, jax.Array]
        ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            layer, layer_memory, which = nnx.merge(graphdef, gather_layer(xs[0], config.dtype)), *xs[1:]
            return read_piece(layer, kinds, which, x, layer_memory)

        per_layer = (state, memory.layers, kind_of_layers(config))
        x, (keys, values) = jax.lax.scan(body, self._embed(tokens), per_layer)
        memory = close_blocks(self.layers, config, extend_memory(memory, keys, values, count))
        return self.final_norm(x), memory

    def _embed(self, tokens: jax.Array) -> jax.Array:
        x = embed(self.embedding.table[...], tokens, self.config.dtype)
        return x * self.config.model_dim**0.5 if self.config.scale_embeddings else x

    def _prompt(self) -> jax.Array | None:
        """(M, D) learned vectors at the level of embeddings."""
        return None if self.initial_fam is None else self.initial_fam[...].astype(self.config.dtype)


def _own_rotations(config: ModelConfig) -> Rotation:
    """Rotation (L, M, 1, hd/2) of every layer's FAM in the frame of the block that follows it."""
    kinds = [local_rotation(config, kind.rope) for kind in kinds_of(config)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *kinds)
    return stacked[kind_of_layers(config)]


def _initial_fam(
    layer: DecoderLayer, prompt: jax.Array | None, own: Rotation
) -> tuple[jax.Array, jax.Array | None]:
    """A layer's initial FAM (M, D), and the prompt stream above the layer (appendix B.1)."""
    if prompt is not None:
        return prompt, prompt_step(layer, prompt, own)
    if layer.initial_fam is not None:
        return layer.initial_fam[...], None
    return jnp.zeros(()), None  # no FAM: broadcasts against (B, 0, D)


def _stacked_layers(config: ModelConfig, rngs: nnx.Rngs) -> DecoderLayer:
    """One layer whose every parameter has a leading L axis."""

    def create(key: jax.Array) -> DecoderLayer:
        return DecoderLayer(config, rngs=nnx.Rngs(key))

    keys = jax.random.split(rngs.params(), config.num_layers)
    graphdef = nnx.graphdef(nnx.eval_shape(create, keys[0]))
    return nnx.merge(graphdef, jax.vmap(lambda key: nnx.state(create(key)))(keys))
