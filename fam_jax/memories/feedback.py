"""Feedback Transformer (Fan et al. 2020): past tokens are seen as mixtures of all their layers, by every layer."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fam_jax.config import MemoryConfig, ModelConfig, group, require, setting
from fam_jax.kernels import Part
from fam_jax.layers.decoder_layer import DecoderLayer, Norm
from fam_jax.layers.rope import Rope, Rotation, rotate
from fam_jax.memories.interface import Memory, Stream, Tail, choose_rows
from fam_jax.memories.window_cache import (
    BlockWindowConfig,
    PieceFrames,
    Position,
    WindowState,
    piece_frames,
    shift_window,
)


@group("model.memory", effect="state")
class FeedbackConfig(BlockWindowConfig):
    """Feedback Transformer, block by block; with blocks of one token it is the paper's."""

    kind: str = setting(default="feedback", doc="The architecture.")
    segments: int = setting(default=1, doc="m, past blocks whose mixed vectors stay visible.", minimum=1)
    sees_itself: bool = setting(
        default=False, doc="Whether a token sees its own key, which the paper's does not."
    )

    parameter_axes: ClassVar[Mapping[str, tuple[str, ...]]] = {"layer_mix": ("layers",)}

    @property
    def has_state(self) -> bool:
        """Return False: the mixed vectors are what the window shows."""
        return False

    @property
    def extra_keys(self) -> int:
        """Return 1 if a stream's first token sees nothing else: a key whose value is zero."""
        return 0 if self.sees_itself else 1

    def extra_keys_of_block(self, block: int) -> int:
        """Return 0: one token of a stream alone sees the extra key."""
        return 0

    def check_model(self, model: ModelConfig) -> None:
        """Raise :class:`ConfigError` if the window shows nothing."""
        require(
            self.sees_itself or self.window != 1,
            "config.model.memory.window: 1 shows a token only itself, which sees_itself=False hides; set 0 or more "
            "than 1",
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class FeedbackState(WindowState):
    """One layer's cache: its keys and values of the mixed vectors of past blocks, and the unfinished block.

    The shared state is the mixed vectors (B, C, D) of the newest block, and whether there is one (B,).
    """

    # (B, C, D) input and output of the layer for the tokens of the unfinished block.
    block_inputs: Any
    block_outputs: Any


class LayerMix(nnx.Module):
    """The logits (L+1,) of the mixture of embedding and layers, first all alike."""

    def __init__(self, model: ModelConfig):
        self.layer_mix = nnx.Param(jnp.zeros(model.num_layers + 1, jnp.float32))


class FeedbackFrames(NamedTuple):
    """Frames of a piece."""

    window: PieceFrames
    # (B, W, 1): whether a token sees no key of another, nor its own.
    alone: jax.Array


class FeedbackTransformer(Memory[FeedbackState]):
    """A token leaves one vector, m_t = sum_l softmax(w)_l x_t^l over embedding and layers; every layer attends to it.

    Within a block, where m_t is not known yet, tokens attend to the keys of their own layer, as usual.
    """

    Config: ClassVar[type[MemoryConfig]] = FeedbackConfig
    State: ClassVar[type[WindowState]] = FeedbackState
    order = "segment"

    config: FeedbackConfig

    def __init__(self, model: ModelConfig):
        super().__init__(model)
        assert isinstance(model.memory, FeedbackConfig)
        self.config = model.memory

    def model_parameters(self, rngs: nnx.Rngs) -> nnx.Module:
        """Create the weights of the mixture."""
        return LayerMix(self.model)

    def empty_fields(self, batch_size: int) -> dict[str, jax.Array]:
        """Return an empty unfinished block."""
        model = self.model
        block = jnp.zeros((batch_size, model.block_size, model.model_dim), model.dtype)
        return {"block_inputs": block, "block_outputs": block}

    @property
    def learned_fields(self) -> tuple[str, ...]:
        """Return nothing: the state is the window and the unfinished block."""
        return ()

    def start_shared(self, parameters: Any, batch_size: int) -> dict[str, jax.Array]:
        """Return no mixed vectors."""
        model = self.model
        mixed = jnp.zeros((batch_size, model.block_size, model.model_dim), model.dtype)
        return {"mixed": mixed, "exists": jnp.zeros(batch_size, bool)}

    def next_shared(self, norm: Norm, shared: Any, stream: Stream) -> dict[str, jax.Array]:
        """Return the mixed vectors of a block."""
        mixed = stream["mixed"].astype(self.model.dtype)
        return {"mixed": mixed, "exists": jnp.ones(len(mixed), bool)}

    def enter_at(self, rope: Rope) -> Rotation:
        """Return the rotation (C, 1, hd/2) of the vectors of a block in its own frame."""
        return rope.static(np.arange(self.model.block_size))

    def enter_stream(self, parameters: Any, shared: Any) -> Stream:
        """Return the mixed vectors of the newest block, the same for all layers."""
        return shared

    def enter(
        self, layer: DecoderLayer, state: FeedbackState, stream: Stream, at: Rotation
    ) -> tuple[FeedbackState, Stream]:
        """Put the layer's keys and values of the newest mixed vectors, if there are any, into the window."""
        _, k, v = layer.project(stream["mixed"])

        def put(past: jax.Array, newest: jax.Array) -> jax.Array:
            return choose_rows(stream["exists"], past.at[:, -1].set(newest), past)

        state = dataclasses.replace(state, keys=put(state.keys, rotate(k, at)), values=put(state.values, v))
        return state, stream

    def piece_at(self, position: Position, width: int) -> FeedbackFrames:
        """Return the frames of a piece whose tokens do not see themselves, unless the config says so."""
        window = piece_frames(self.model, self.rope, position, width)
        place = position.filled[:, None, None] + np.arange(width)[:, None]
        if not self.config.sees_itself:
            others = jnp.asarray(~np.eye(width, dtype=bool))
            window = window._replace(piece_mask=window.piece_mask & others)
        return FeedbackFrames(window, (place == 0) & (position.blocks == 0)[:, None, None])

    def window_piece_frames(self, at: FeedbackFrames) -> PieceFrames:
        """Return the window's part of the frames."""
        return at.window

    def extra_of_piece(
        self, layer: DecoderLayer, q: jax.Array, state: FeedbackState, at: FeedbackFrames
    ) -> Sequence[Part]:
        """Return a key whose value is zero for the token that sees no other."""
        if self.config.sees_itself:
            return ()
        nothing = jnp.zeros((q.shape[0], 1, self.model.num_kv_heads, self.model.head_dim), q.dtype)
        return [Part(q, nothing, nothing, at.alone)]

    def read_piece(
        self, layer: DecoderLayer, x: jax.Array, state: FeedbackState, at: FeedbackFrames
    ) -> tuple[jax.Array, Tail]:
        """Read tokens, and keep the layer's input and output for the mixture."""
        out, tail = super().read_piece(layer, x, state, at)
        return out, tail | {"block_inputs": x, "block_outputs": out}

    def close_stream(self, parameters: Any, shared: Any, batch_size: int) -> Stream:
        """Return an empty mixture, to which each layer adds its output, and the weights."""
        model = self.model
        dtype = jnp.promote_types(model.dtype, jnp.float32)
        return {
            "mixed": jnp.zeros((batch_size, model.block_size, model.model_dim), dtype),
            "weights": jax.nn.softmax(parameters.layer_mix[...].astype(dtype)),
            "layer": jnp.zeros((), jnp.int32),
        }

    def close_block(
        self, layer: DecoderLayer, state: FeedbackState, stream: Stream, position: Position
    ) -> tuple[FeedbackState, Stream]:
        """Add the layer's output, and below the bottom layer the embedding, to the mixture."""
        weights, number = stream["weights"], stream["layer"]
        of_input = jnp.where(number == 0, weights[0], 0)
        mixed = stream["mixed"] + of_input * state.block_inputs + weights[number + 1] * state.block_outputs
        return shift_window(state), {**stream, "mixed": mixed, "layer": number + 1}
