"""The decoder-only transformer: parameters, and the scans over layers that apply them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fam_jax.config import ModelConfig, ceil_div
from fam_jax.kernels import soft_cap
from fam_jax.layers.decoder_layer import (
    LOW_RANK,
    PROJECTIONS,
    DecoderLayer,
    Linear,
    Norm,
    embedding_stddev,
)
from fam_jax.layers.fsdp import embed, gather_layer, keep_rows
from fam_jax.memories.inspection import Attention, WriteAttention
from fam_jax.memories.interface import Memory, Stream, choose_rows, write_tail
from fam_jax.memories.window_cache import packed, unpacked, with_past_slots
from fam_jax.model.layer_types import (
    LayerTypes,
    close_block,
    inspect_block,
    inspect_close,
    layer_types,
    read_blocks,
    read_piece,
)
from fam_jax.model.state import StreamState, empty_state
from fam_jax.model.truncation import FULL, Truncation, read_in_parts

# Results of attention are kept too; otherwise the attention kernels would run twice.
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.save_only_these_names(*PROJECTIONS, "block_attention"),
    # Queries, keys, values and the output projection are recomputed.
    "wide": jax.checkpoint_policies.save_only_these_names("gate", "up", LOW_RANK, "block_attention"),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Embedding(nnx.Module):
    """Table (V, D) of token vectors. With tied embeddings it also gives the logits."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.model_dim)
        self.table = nnx.Param(
            jax.random.normal(rngs.params(), shape, jnp.float32) * embedding_stddev(config)
        )


class Transformer(nnx.Module):
    """A decoder with the memory that its config names.

    Holds parameters and nothing else. `logits, state = model(tokens, state)` reads tokens; any division of a sequence
    into calls gives the same logits.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        memory = layer_types(config).main
        self.embedding = Embedding(config, rngs=rngs)
        self.layers = _stacked_layers(config, memory, rngs)
        self.final_norm = Norm(config)
        tied = config.tie_embeddings
        self.unembedding = (
            None if tied else Linear("unembedding", (config.model_dim,), (config.vocab_size,), rngs=rngs)
        )
        self.memory: Any = memory.model_parameters(rngs)

    def __call__(
        self,
        tokens: jax.Array,
        state: StreamState,
        *,
        lengths: jax.Array | None = None,
        aligned: bool = False,
        position_offset: jax.Array | None = None,
    ) -> tuple[jax.Array, StreamState]:
        """Read tokens (B, T); see :meth:`hidden`. Return float32 logits (B, T, V) and the state after them."""
        hidden, state = self.hidden(
            tokens, state, lengths=lengths, aligned=aligned, position_offset=position_offset
        )
        return self.logits(hidden), state

    def hidden(
        self,
        tokens: jax.Array,
        state: StreamState,
        *,
        lengths: jax.Array | None = None,
        aligned: bool = False,
        position_offset: jax.Array | None = None,
        noise_keys: jax.Array | None = None,
        truncation: Truncation = FULL,
    ) -> tuple[jax.Array, StreamState]:
        """Return the normalized activations (B, T, D) from which logits are computed, and the state after the tokens.

        Args:
          tokens: (B, T) int32, T > 0.
          state: from :meth:`init_state` or an earlier call.
          lengths: (B,) int32, how many of each row's tokens are real: the first ones, at most T. The others do not
            affect the state, and their activations are meaningless. None: all of them.
          aligned: promise that every row is at a block border. All blocks then go through each layer at once. Use it
            to train and to prefill.
          position_offset: (B,) int32 added to all positions (random position offset, appendix B.2.2).
          noise_keys: (B,) typed PRNG keys, for memories to which training adds noise. None: no noise.
          truncation: where gradients stop. It changes no result, and other calls than aligned ones ignore it.

        Raises:
          ValueError: there are no tokens, or `lengths` is given with `aligned`, or `position_offset` or `noise_keys`
            without it; or, outside of compiled functions, a token is no id of the vocabulary.
        """
        if tokens.shape[1] == 0:
            raise ValueError("tokens: there are none; give at least one")
        if lengths is None:
            _check_ids(tokens, self.config.vocab_size)
        if aligned:
            if lengths is not None:
                raise ValueError("lengths: an aligned call does not take it, because all its tokens are real")
            position = dataclasses.replace(state.position, offset=position_offset, noise_keys=noise_keys)
            state = dataclasses.replace(state, position=position)
            in_turn = layer_types(self.config).main.order == "segment"
            parts = truncation.parts(tokens.shape[1], self.config.block_size)
            out, state = read_in_parts(
                self._read_in_turn if in_turn else self._read_aligned, tokens, state, parts
            )
            position = dataclasses.replace(state.position, offset=None, noise_keys=None)
            return out, dataclasses.replace(state, position=position)
        if position_offset is not None:
            raise ValueError("position_offset: only aligned calls take it; set aligned=True")
        if noise_keys is not None:
            raise ValueError("noise_keys: only aligned calls take them; set aligned=True")
        if lengths is None:
            lengths = jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32)
        return self._read_anywhere(tokens, state, jnp.minimum(lengths, tokens.shape[1]))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Return logits (..., V) of activations (..., D) from :meth:`hidden`, in float32, or float64 for float64."""
        return self.logits_from(self.output_table, hidden)

    @property
    def output_table(self) -> jax.Array:
        """Return the weights of the logits: the embedding table (V, D) if tied, else the unembedding (D, V)."""
        if self.unembedding is not None:
            return self.unembedding.kernel[...]
        return self.embedding.table[...]

    def logits_from(self, table: jax.Array, hidden: jax.Array) -> jax.Array:
        """Compute :meth:`logits` with `table` in place of :attr:`output_table`."""
        product = "...d,vd->...v" if self.unembedding is None else "...d,dv->...v"
        dtype = jnp.promote_types(hidden.dtype, jnp.float32)
        logits = jnp.einsum(product, hidden, table.astype(hidden.dtype), preferred_element_type=dtype)
        return soft_cap(logits, self.config.logit_softcap)

    def init_state(self, batch_size: int) -> StreamState:
        """Return the state of `batch_size` streams that have read nothing."""
        types = layer_types(self.config, self.memory)
        state = empty_state(self.config, batch_size, memory=types.main)
        shared = types.main.start_shared(self.memory, batch_size)
        return self._enter(types, dataclasses.replace(state, shared=shared))

    def _enter(self, types: LayerTypes, state: StreamState) -> StreamState:
        """Fill in the part of the state that does not depend on tokens, in all layers."""
        graphdef, parameters = nnx.split(self.layers)

        def body(stream: Stream, xs: Any) -> tuple[Stream, Any]:
            layer_parameters, layer_state, at = xs
            layer = nnx.merge(graphdef, gather_layer(layer_parameters, self.config))
            layer_state, stream = types.main.enter(layer, layer_state, stream, at)
            return stream, layer_state

        stream = types.main.enter_stream(self.memory, state.shared)
        _, layers = jax.lax.scan(body, stream, (parameters, state.layers, types.enter_at()))
        return dataclasses.replace(state, layers=layers)

    def _read_aligned(self, tokens: jax.Array, state: StreamState) -> tuple[jax.Array, StreamState]:
        """Read a chunk layer by layer, all blocks at once."""
        config, length, position = self.config, tokens.shape[1], state.position
        types, full = layer_types(config, self.memory), length // config.block_size
        memory, cached = types.main, state.layers.keys.shape[2]
        at = [each.blocks_at(position, length, cached) for each in types.memories]
        graphdef, parameters = nnx.split(self.layers)

        def body(carry: Any, xs: Any) -> tuple[Any, Any]:
            x, entering, closing = carry
            layer_parameters, layer_state, which, enter_at = xs
            layer = nnx.merge(graphdef, gather_layer(layer_parameters, config))
            layer_state = unpacked(layer_state, config)
            x = keep_rows(x)
            entered, entering = memory.enter(layer, layer_state, entering, enter_at)
            fixed = {name: getattr(entered, name) for name in memory.fixed_fields}
            layer_state = choose_rows(position.carries_context, layer_state, entered)
            layer_state = dataclasses.replace(layer_state, **fixed)
            x, layer_state, closing = read_blocks(types.memories, at, which, layer, x, layer_state, closing)
            return (x, entering, closing), packed(layer_state)

        if config.remat != "none":
            body = jax.checkpoint(body, policy=REMAT_POLICIES[config.remat], prevent_cse=False)
        closing = memory.close_stream(self.memory, state.shared, tokens.shape[0])
        closing = jax.tree.map(lambda rows: jnp.broadcast_to(rows, (full, *rows.shape)), closing)
        start = (self._embed(tokens), memory.enter_stream(self.memory, state.shared), closing)
        per_layer = (parameters, packed(state.layers), jnp.asarray(types.of_layers), types.enter_at())
        (x, *_), layers = jax.lax.scan(body, start, per_layer)
        after = dataclasses.replace(
            position.after_blocks(full, writes=config.memory.has_state),
            filled=jnp.full_like(position.filled, length % config.block_size),
        )
        state = dataclasses.replace(state, layers=unpacked(layers, config), position=after)
        return self.final_norm(x), state

    def _read_in_turn(self, tokens: jax.Array, state: StreamState) -> tuple[jax.Array, StreamState]:
        """Read a chunk block by block, each through all layers, for memories whose top layer feeds the bottom one.

        The backward pass recomputes each block, whatever `config.remat` says. Otherwise the activations of all blocks
        would be kept.
        """
        size, batch = self.config.block_size, tokens.shape[0]
        full, rest = divmod(tokens.shape[1], size)
        state = self._with_initial(state)

        def body(state: StreamState, block: jax.Array) -> tuple[StreamState, jax.Array]:
            (hidden, _), state = self._read_tokens(block, state, jnp.full(batch, size, jnp.int32))
            return self._close(state)[1], hidden

        parts = []
        if full:
            blocks = tokens[:, : full * size].reshape(batch, full, size).swapaxes(0, 1)
            state, hidden = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), state, blocks)
            parts.append(hidden.swapaxes(0, 1).reshape(batch, full * size, -1))
        if rest:
            count = jnp.full(batch, rest, jnp.int32)
            (hidden, _), state = self._read_tokens(tokens[:, full * size :], state, count)
            parts.append(hidden)
        return jnp.concatenate(parts, axis=1), state

    def _with_initial(self, state: StreamState) -> StreamState:
        """Make room for past blocks, and compute the layers' states from the shared one.

        Rows that carry no context start from the initial shared state, which depends on the weights alone.
        """
        types, position = layer_types(self.config, self.memory), state.position
        batch = state.batch_size
        padded = jax.vmap(lambda layer: with_past_slots(layer, self.config.memory_segments))(state.layers)
        start = types.main.start_shared(self.memory, batch)
        shared = start if state.shared is None else choose_rows(position.carries_context, state.shared, start)
        state = dataclasses.replace(state, layers=padded, shared=shared)
        return self._enter(types, state)

    def _read_anywhere(
        self, tokens: jax.Array, state: StreamState, lengths: jax.Array
    ) -> tuple[jax.Array, StreamState]:
        """Read up to `lengths` (B,) tokens of each row, at any position, piece by piece."""
        batch, length = tokens.shape
        size = self.config.block_size
        width = min(length, size)
        if length == 1:
            return self._read_piece(tokens, state, lengths)
        rows, index = np.arange(batch)[:, None], np.arange(width)

        def step(carry: Any, _: None) -> tuple[Any, None]:
            state, read, out = carry
            count = jnp.clip(jnp.minimum(lengths - read, size - state.position.filled), 0, width)
            source = read[:, None] + index
            piece = tokens[rows, jnp.minimum(source, length - 1)]
            hidden, state = self._read_piece(piece, state, count)
            # Entries to leave out get a place beyond the end, where `mode="drop"` discards them.
            target = jnp.where(index < count[:, None], source, length)
            return (state, read + count, out.at[rows, target].set(hidden, mode="drop")), None

        # The first piece may take one token only, to the end of its block; each later one takes up to a block.
        pieces = 1 + ceil_div(length - 1, size)
        out = jnp.zeros((batch, length, self.config.model_dim), self.config.dtype)
        (state, _, out), _ = jax.lax.scan(step, (state, jnp.zeros_like(lengths), out), None, length=pieces)
        return out, state

    def _read_piece(
        self, tokens: jax.Array, state: StreamState, count: jax.Array
    ) -> tuple[jax.Array, StreamState]:
        """Read the first `count` (B,) tokens of each row of (B, W), at most to its block's end; close full blocks."""
        (hidden, _), state = self._read_tokens(tokens, state, count)
        full = state.position.filled == self.config.block_size

        def close(state: StreamState) -> StreamState:
            _, closed = self._close(state)
            by_layer = jax.vmap(lambda new, old: choose_rows(full, new, old))
            return StreamState(
                layers=by_layer(closed.layers, state.layers),
                shared=choose_rows(full, closed.shared, state.shared),
                position=choose_rows(full, closed.position, state.position),
            )

        # While no row's block is full, this costs only the test.
        return hidden, jax.lax.cond(full.any(), close, lambda state: state, state)

    def inspect(
        self,
        tokens: jax.Array,
        state: StreamState,
        of_read: Callable[[Attention], Any],
        of_write: Callable[[WriteAttention], Any],
    ) -> tuple[Any, Any, StreamState]:
        """Read one block and watch what attends to what.

        Args:
          tokens: (B, C) int32.
          state: of streams at a block border.
          of_read: what to keep of a layer's attention. The whole of all layers may be too large for the device.
          of_write: what to keep of the attention with which a layer's memory is written.

        Returns:
          What `of_read` and `of_write` returned, stacked (L, ...), and the state after the block. The second is None if
          no layer writes by attention.
        """
        counts = jnp.full(tokens.shape[0], self.config.block_size, jnp.int32)
        (_, read), state = self._read_tokens(tokens, state, counts, of_read)
        written, state = self._close(state, of_write)
        return read, written, state

    def _read_tokens(
        self,
        tokens: jax.Array,
        state: StreamState,
        count: jax.Array,
        watch: Callable[[Attention], Any] | None = None,
    ) -> tuple[tuple[jax.Array, Any], StreamState]:
        """Read a piece and write it into the unfinished block; also return what `watch` returned, (L, ...)."""
        config, position = self.config, state.position
        types = layer_types(config, self.memory)
        at = [memory.piece_at(position, tokens.shape[1]) for memory in types.memories]
        graphdef, parameters = nnx.split(self.layers)

        def body(x: jax.Array, xs: Any) -> tuple[jax.Array, Any]:
            layer_parameters, layer_state, which = xs
            layer = nnx.merge(graphdef, gather_layer(layer_parameters, config))
            if watch is None:
                x, tail = read_piece(types.memories, at, which, layer, x, layer_state)
                return x, (tail, None)
            x, tail, attention = inspect_block(types.memories, at, which, layer, x, layer_state)
            return x, (tail, watch(attention))

        per_layer = (parameters, state.layers, jnp.asarray(types.of_layers))
        x, (tail, watched) = jax.lax.scan(body, self._embed(tokens), per_layer)
        layers = write_tail(state.layers, tail, position.filled, count, stacked=True)
        position = dataclasses.replace(position, filled=position.filled + count)
        state = dataclasses.replace(state, layers=layers, position=position)
        return (self.final_norm(x), watched), state

    def _close(
        self, state: StreamState, watch: Callable[[WriteAttention], Any] | None = None
    ) -> tuple[Any, StreamState]:
        """Write the unfinished block, which must be full in every row; also return what `watch` returned, (L, ...)."""
        config, types = self.config, layer_types(self.config, self.memory)
        graphdef, parameters = nnx.split(self.layers)

        def body(stream: Stream, xs: Any) -> tuple[Stream, Any]:
            layer_parameters, layer_state, which = xs
            layer = nnx.merge(graphdef, gather_layer(layer_parameters, config))
            args = (types.memories, which, layer, layer_state, stream, state.position)
            if watch is None:
                layer_state, stream = close_block(*args)
                return stream, (layer_state, None)
            layer_state, stream, attention = inspect_close(*args)
            return stream, (layer_state, None if attention is None else watch(attention))

        stream = types.main.close_stream(self.memory, state.shared, state.batch_size)
        per_layer = (parameters, state.layers, jnp.asarray(types.of_layers))
        stream, (layers, watched) = jax.lax.scan(body, stream, per_layer)
        position = dataclasses.replace(
            state.position.next_block(writes=config.memory.has_state),
            filled=jnp.zeros_like(state.position.filled),
        )
        shared = types.main.next_shared(self.final_norm, state.shared, stream)
        closed = StreamState(layers, shared, position)
        return watched, self._enter(types, closed) if types.main.order == "segment" else closed

    def _embed(self, tokens: jax.Array) -> jax.Array:
        x = embed(self.embedding.table[...], tokens, self.config.dtype)
        return x * self.config.model_dim**0.5 if self.config.scale_embeddings else x


def _stacked_layers(config: ModelConfig, memory: Memory, rngs: nnx.Rngs) -> DecoderLayer:
    """Create one layer whose every parameter has a leading L axis."""

    def create(key: jax.Array) -> DecoderLayer:
        return DecoderLayer(config, rngs=nnx.Rngs(key), memory=memory.layer_parameters)

    keys = jax.random.split(rngs.params(), config.num_layers)
    graphdef = nnx.graphdef(nnx.eval_shape(create, keys[0]))
    return nnx.merge(graphdef, jax.vmap(lambda key: nnx.state(create(key)))(keys))


def _check_ids(tokens: jax.Array, vocab_size: int) -> None:
    """Raise ValueError if a token is no id of the vocabulary. JAX would take the nearest id instead.

    The values are known outside of compiled functions only.
    """
    if isinstance(tokens, jax.core.Tracer) or not getattr(tokens, "is_fully_addressable", True):
        return
    # In NumPy: within a compiled function, JAX would make a traced array of a known one.
    values = np.asarray(tokens)
    wrong = values[(values < 0) | (values >= vocab_size)]
    if wrong.size:
        raise ValueError(
            f"tokens: {wrong[0]} is not an id of the vocabulary; give ids from 0 to {vocab_size - 1}"
        )
