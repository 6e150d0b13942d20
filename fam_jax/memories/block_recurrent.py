"""The Block-Recurrent Transformer (Hutchins et al. 2022): one layer has a recurrent state, which a gate updates.

The tokens of that layer attend to the M vectors of the state beside their window. When a block closes, the state
attends to itself and to the keys of the tokens, and a gate mixes the result in. These keys do not depend on the state.
So only the M vectors pass from block to block, and all tokens of a chunk read the states before their blocks at once.

The weights of the state exist once, beside the stack of layers. All other layers are windows.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fam_jax.config import MemoryConfig, ModelConfig, group, require, setting
from fam_jax.kernels import Part, multi_part_attention
from fam_jax.layers.decoder_layer import DecoderLayer, Linear, Norm
from fam_jax.layers.fsdp import keep_rows
from fam_jax.layers.rope import rotate
from fam_jax.memories.interface import Stream, Tail
from fam_jax.memories.window import BlockSlidingWindowConfig, ChunkFrames, Window
from fam_jax.memories.window_cache import BlockWindowConfig, Position, WindowState, shift_window

# The gates of LSTMs start out keeping the state: sigmoid(1) of it, and sigmoid(-1) of what is new.
KEEP_BIAS = 1.0
# Variance of the initial weights of these gates, relative to that of other weights.
GATE_VARIANCE = 0.1


@group("model.memory", effect="state")
class BlockRecurrentConfig(BlockWindowConfig):
    """Block Sliding Window Attention, and a recurrent state in one layer."""

    kind: str = setting(default="block_recurrent", doc="The architecture.")
    length: int = setting(default=16, doc="M, vectors of the state.", minimum=1, effect="parameters")
    layers_above: int = setting(
        default=2, doc="The number of layers above the one that has the state.", minimum=0
    )
    form: str = setting(
        default="skip",
        doc="How the state is updated. skip: a gate mixes in what it attends to. dual: a gated feed-forward follows. "
        "single: one gate mixes in the feed-forward of what it attends to.",
        choices=("skip", "dual", "single"),
        effect="parameters",
    )
    gate: str = setting(
        default="fixed",
        doc="fixed: a learned rate of each feature. lstm: forget and input gates computed from what is new.",
        choices=("fixed", "lstm"),
        effect="parameters",
    )

    parameter_axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "initial_state": ("slots", "width"),
        "state_ids": ("slots", "width"),
        "state_norm/scale": ("norm",),
        "state_norm/bias": ("norm",),
        "token_query/kernel": ("width", "heads", "head"),
        "token_output/kernel": ("heads", "head", "width"),
        "state_key/kernel": ("width", "kv_heads", "head"),
        "state_value/kernel": ("width", "kv_heads", "head"),
        "self_query/kernel": ("width", "heads", "head"),
        "block_query/kernel": ("width", "heads", "head"),
        "state_output/kernel": ("heads", "head", "width"),
        "state_output_gate/rate": ("norm",),
        "state_output_gate/forget/kernel": ("heads", "head", "width"),
        "state_output_gate/forget_bias": ("norm",),
        "state_output_gate/admit/kernel": ("heads", "head", "width"),
        "state_output_gate/admit_bias": ("norm",),
        "state_ff_norm/scale": ("norm",),
        "state_ff_norm/bias": ("norm",),
        "state_up/kernel": ("width", "ff"),
        "attended_up/kernel": ("norm", "head", "ff"),
        "state_down/kernel": ("ff", "width"),
        "state_down_gate/rate": ("norm",),
        "state_down_gate/forget/kernel": ("ff", "width"),
        "state_down_gate/forget_bias": ("norm",),
        "state_down_gate/admit/kernel": ("ff", "width"),
        "state_down_gate/admit_bias": ("norm",),
    }

    def layer_index(self, num_layers: int) -> int:
        """Return the number of the layer that has the state, from 0."""
        return num_layers - 1 - self.layers_above

    def of_layer(self, index: int, model: ModelConfig) -> MemoryConfig:
        """Return a window for all layers but one."""
        if index == self.layer_index(model.num_layers):
            return self
        return BlockSlidingWindowConfig(
            segments=self.segments, window=self.window, stop_gradient=self.stop_gradient
        )

    def check_model(self, model: ModelConfig) -> None:
        """Raise :class:`ConfigError` if the layer does not exist, or is a local one."""
        count, index = model.num_layers, self.layer_index(model.num_layers)
        require(
            index >= 0,
            f"config.model.memory.layers_above: {self.layers_above} leaves none of {count} layers for the state; set "
            f"at most {count - 1}",
        )
        require(
            model.layer_pattern[index % len(model.layer_pattern)] == "global",
            f"config.model.memory.layers_above: layer {index} is local by layer_pattern {model.layer_pattern}; choose "
            "a global one",
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class BlockRecurrentState(WindowState):
    """The window's cache and the state after the last complete block, of which one layer makes use."""

    # (B, M, D) vectors of the state.
    recurrent: Any
    # (B, M, K, hd) their keys and values, which have no position.
    recurrent_keys: Any
    recurrent_values: Any


class Gate(nnx.Module):
    """Mixes new values into the state: "fixed" by a learned rate, "lstm" by gates of the input of the last layer."""

    def __init__(self, model: ModelConfig, in_shape: tuple[int, ...], rngs: nnx.Rngs):
        config, width = model.memory, model.model_dim
        assert isinstance(config, BlockRecurrentConfig)
        self.is_lstm = config.gate == "lstm"
        if not self.is_lstm:
            self.rate = nnx.Param(0.1 * jax.random.normal(rngs.params(), (width,), jnp.float32))
            return
        self.forget = Linear("forget", in_shape, (width,), rngs=rngs)
        self.admit = Linear("admit", in_shape, (width,), rngs=rngs)
        for linear in (self.forget, self.admit):
            linear.kernel = nnx.Param(linear.kernel[...] * GATE_VARIANCE**0.5)
        self.forget_bias = nnx.Param(jnp.zeros(width, jnp.float32))
        self.admit_bias = nnx.Param(jnp.zeros(width, jnp.float32))

    def __call__(self, state: jax.Array, new: jax.Array, features: jax.Array) -> jax.Array:
        """Return the next state (B, M, D), of `new` (B, M, D) and the `features` that it was computed from."""
        if not self.is_lstm:
            rate = jax.nn.sigmoid(self.rate[...]).astype(state.dtype)
            return rate * state + (1 - rate) * new
        keep = self.forget(features) + self.forget_bias[...].astype(state.dtype) + KEEP_BIAS
        admit = self.admit(features) + self.admit_bias[...].astype(state.dtype) - KEEP_BIAS
        return jax.nn.sigmoid(keep) * state + jax.nn.sigmoid(admit) * jnp.tanh(new)


class Keys(NamedTuple):
    """What the tokens of a block, and the state itself, attend to."""

    # (B, M, K, hd) each.
    keys: jax.Array
    values: jax.Array


class RecurrentCell(nnx.Module):
    """The weights of the recurrent state, and how it is updated."""

    def __init__(self, model: ModelConfig, rngs: nnx.Rngs):
        config = model.memory
        assert isinstance(config, BlockRecurrentConfig)
        self.form, self.softcap = config.form, model.attention_softcap
        self.nonlinearity = jax.nn.silu if model.activation == "swiglu" else jax.nn.gelu
        width, heads, kv_heads, head = model.model_dim, model.num_heads, model.num_kv_heads, model.head_dim

        def normal(stddev: float) -> nnx.Param:
            vectors = jax.random.normal(rngs.params(), (config.length, width), jnp.float32)
            return nnx.Param(stddev * vectors)

        def linear(name: str, in_shape: tuple[int, ...], *out_shape: int) -> Linear:
            return Linear(name, in_shape, out_shape, rngs=rngs)

        self.initial_state, self.state_ids = normal(0.1), normal(1.0)
        self.state_norm = Norm(model)
        self.token_query = linear("token_query", (width,), heads, head)
        self.token_output = linear("token_output", (heads, head), width)
        self.state_key = linear("state_key", (width,), kv_heads, head)
        self.state_value = linear("state_value", (width,), kv_heads, head)
        self.self_query = linear("self_query", (width,), heads, head)
        self.block_query = linear("block_query", (width,), heads, head)
        attended = (heads, 2 * head)
        if self.form != "single":
            self.state_output = linear("state_output", attended, width)
            self.state_output_gate = Gate(model, attended, rngs)
        if self.form == "dual":
            self.state_ff_norm = Norm(model)
            self.state_up = linear("state_up", (width,), model.ff_dim)
        if self.form == "single":
            self.attended_up = linear("attended_up", attended, model.ff_dim)
        if self.form != "skip":
            self.state_down = linear("state_down", (model.ff_dim,), width)
            self.state_down_gate = Gate(model, (model.ff_dim,), rngs)

    def with_ids(self, state: jax.Array) -> jax.Array:
        """Return the normalized state (B, M, D) with its learned ids."""
        return self.state_norm(state) + self.state_ids[...].astype(state.dtype)

    def keys_of(self, state: jax.Array) -> Keys:
        """Return the keys and values of a state (B, M, D)."""
        named = self.with_ids(state)
        return Keys(self.state_key(named), self.state_value(named))

    def read(self, normed: jax.Array, of_state: Keys) -> jax.Array:
        """Return what tokens add to their output projection (B, T, D).

        Args:
          normed: (B, T, D) normalized input of the layer.
          of_state: (B, M, K, hd) of the state that all T tokens read.
        """
        part = Part(self.token_query(normed), of_state.keys, of_state.values)
        return self.token_output(multi_part_attention([part], softcap=self.softcap))

    def update(self, state: jax.Array, of_state: Keys, block: Keys, seen: jax.Array) -> jax.Array:
        """Return the state (B, M, D) after a block.

        Args:
          state: (B, M, D) before it.
          of_state: its keys and values.
          block: (B, S, K, hd) of the tokens that the block's window shows, and of the block, without positions.
          seen: (B, 1, S) bool, which of them exist.
        """
        named = self.with_ids(state)
        itself = Part(self.self_query(named), of_state.keys, of_state.values)
        tokens = Part(self.block_query(named), block.keys, block.values, seen)
        attended = jnp.concatenate(
            [multi_part_attention([part], softcap=self.softcap) for part in (itself, tokens)], axis=-1
        )
        if self.form == "single":
            hidden = self.nonlinearity(self.attended_up(attended))
            return self.state_down_gate(state, jnp.tanh(self.state_down(hidden)), hidden)
        state = self.state_output_gate(state, self.state_output(attended), attended)
        if self.form == "skip":
            return state
        hidden = self.nonlinearity(self.state_up(self.state_ff_norm(state)))
        return self.state_down_gate(state, self.state_down(hidden), hidden)


class BlockRecurrentTransformer(Window[BlockRecurrentState]):
    """Attention to the window, and beside it to the state of the recurrent layer."""

    Config: ClassVar[type[MemoryConfig]] = BlockRecurrentConfig
    State: ClassVar[type[WindowState]] = BlockRecurrentState

    def __init__(self, model: ModelConfig):
        super().__init__(model)
        assert isinstance(model.memory, BlockRecurrentConfig)
        self.length = model.memory.length
        # From the frame of a block to positions of zero.
        self.unrotated = self.rope.static(-np.arange(model.block_size))

    def model_parameters(self, rngs: nnx.Rngs) -> nnx.Module:
        """Create the weights of the state."""
        return RecurrentCell(self.model, rngs)

    def empty_fields(self, batch_size: int) -> dict[str, jax.Array]:
        """Return zeros for the state and its keys and values."""
        model = self.model
        vectors = jnp.zeros((batch_size, self.length, model.model_dim), model.dtype)
        keys = jnp.zeros((batch_size, self.length, model.num_kv_heads, model.head_dim), model.dtype)
        return {"recurrent": vectors, "recurrent_keys": keys, "recurrent_values": keys}

    def state_axes(self) -> dict[str, tuple[str | None, ...]]:
        """Return the logical axes of a layer's state: keys and values are divided by head."""
        heads = ("batch", None, "kv_heads", None)
        return super().state_axes() | {"recurrent_keys": heads, "recurrent_values": heads}

    def enter(
        self, layer: DecoderLayer, state: BlockRecurrentState, stream: Stream, at: Any
    ) -> tuple[BlockRecurrentState, Stream]:
        """Set the initial state."""
        initial = self.parameters.initial_state[...][None].astype(state.recurrent.dtype)
        fresh = (initial, *self.parameters.keys_of(initial))
        olds = (state.recurrent, state.recurrent_keys, state.recurrent_values)
        new = (jnp.broadcast_to(x, old.shape) for x, old in zip(fresh, olds, strict=True))
        return self._with_recurrent(state, *new), stream

    @staticmethod
    def _with_recurrent(
        state: BlockRecurrentState, recurrent: jax.Array, keys: jax.Array, values: jax.Array
    ) -> BlockRecurrentState:
        return dataclasses.replace(state, recurrent=recurrent, recurrent_keys=keys, recurrent_values=values)

    def blocks_at(self, position: Position, length: int, cached: int) -> Any:
        """Return the frames of the window, and how many blocks (B,) the rows have read."""
        return super().blocks_at(position, length, cached), position.blocks

    def window_frames(self, at: Any) -> ChunkFrames:
        """Return the window's part of the frames."""
        return at[0]

    def read_blocks(
        self, layer: DecoderLayer, x: jax.Array, state: BlockRecurrentState, streams: Stream, at: Any
    ) -> tuple[jax.Array, BlockRecurrentState, Stream]:
        """Update the state over the complete blocks; then all tokens read the states before their blocks at once."""
        cell, size = self.parameters, self.model.block_size
        batch, length, _ = x.shape
        q, k, v = layer.project(x)
        before = Keys(state.recurrent_keys, state.recurrent_values)
        last, of_blocks = self._update_by_block(k, v, state, at[1])
        attended, state = self.attend_blocks(layer, q, k, v, state, at)
        state = self._with_recurrent(state, *last)
        # One row for each block, and one for what is left, which reads the last state.
        full = length // size
        normed = layer.attention_norm(x)
        beside = []
        if full:
            of_rows = Keys(*(y.swapaxes(0, 1).reshape(batch * full, *y.shape[2:]) for y in of_blocks))
            blocks = normed[:, : full * size].reshape(batch * full, size, -1)
            beside.append(cell.read(blocks, of_rows).reshape(batch, full * size, -1))
        if length % size:
            newest = Keys(*last[1:]) if full else before
            beside.append(cell.read(normed[:, full * size :], newest))
        return layer.finish(attended, x + jnp.concatenate(beside, axis=1)), state, streams

    def _update_by_block(
        self, k: jax.Array, v: jax.Array, state: BlockRecurrentState, blocks_read: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], Keys]:
        """Return the state after the complete blocks of k and v, with keys, and the keys (N, B, ...) before each."""
        cell, size, segments = self.parameters, self.model.block_size, self.model.memory_segments
        batch, length, *heads = k.shape
        full, room = length // size, state.keys.shape[1]

        def line(cached: jax.Array, fresh: jax.Array) -> jax.Array:
            """Return (B, m + N, C, K, hd): all blocks from m before the chunk on."""
            fresh = fresh[:, : full * size].reshape(batch, full, size, *heads)
            cached = jnp.pad(cached, ((0, 0), (segments - room, 0), *[(0, 0)] * 3))
            return jnp.concatenate([cached, fresh], axis=1)

        def by_block(blocks: jax.Array) -> jax.Array:
            """Return (N, B, (m + 1) * C, K, hd): for each block the m before it, and the block."""
            past, own = blocks[:, :-1], blocks[:, segments:]
            if self.model.memory.stop_gradient:
                past = jax.lax.stop_gradient(past)
            parts = [*(past[:, age : age + full] for age in range(segments)), own]
            return jnp.concatenate(parts, axis=2).swapaxes(0, 1)

        keys = by_block(line(rotate(state.keys, self.unrotated), k))
        values = by_block(line(state.values, v))
        seen = self._seen(jnp.minimum(blocks_read, segments) + np.arange(full)[:, None])

        def body(carry: Any, block: Any) -> tuple[Any, Any]:
            vectors, of_state = carry
            keys, values, seen = block
            vectors = keep_rows(cell.update(vectors, of_state, Keys(keys, values), seen))
            return (vectors, cell.keys_of(vectors)), of_state

        start = (state.recurrent, Keys(state.recurrent_keys, state.recurrent_values))
        body = jax.checkpoint(body, prevent_cse=False)
        (vectors, of_state), of_blocks = jax.lax.scan(body, start, (keys, values, seen))
        return (vectors, *of_state), of_blocks

    def _seen(self, blocks_read: jax.Array) -> jax.Array:
        """Return (..., 1, (m + 1) * C) bool: which tokens of the window and of the block exist, after (...,) blocks."""
        segments = self.model.memory_segments
        exists = np.arange(segments, -1, -1) <= blocks_read[..., None]
        return jnp.repeat(exists, self.model.block_size, axis=-1)[..., None, :]

    def read_piece(
        self, layer: DecoderLayer, x: jax.Array, state: BlockRecurrentState, at: Any
    ) -> tuple[jax.Array, Tail]:
        """Read the window and the state."""
        attended, tail = self.attend_piece(layer, *layer.project(x), state, at)
        of_state = Keys(state.recurrent_keys, state.recurrent_values)
        beside = self.parameters.read(layer.attention_norm(x), of_state)
        return layer.finish(attended, x + beside), tail

    def close_block(
        self, layer: DecoderLayer, state: BlockRecurrentState, stream: Stream, position: Position
    ) -> tuple[BlockRecurrentState, Stream]:
        """Update the state from the window and the block, then cache the block."""
        cell = self.parameters
        past = (rotate(state.keys, self.unrotated), state.values)
        if self.model.memory.stop_gradient:
            past = jax.lax.stop_gradient(past)
        own = (rotate(state.block_keys, self.unrotated), state.block_values)
        tokens = Keys(
            *(
                jnp.concatenate([x.reshape(x.shape[0], -1, *x.shape[3:]), y], axis=1)
                for x, y in zip(past, own, strict=True)
            )
        )
        of_state = Keys(state.recurrent_keys, state.recurrent_values)
        vectors = cell.update(state.recurrent, of_state, tokens, self._seen(position.blocks))
        return shift_window(self._with_recurrent(state, vectors, *cell.keys_of(vectors))), stream
