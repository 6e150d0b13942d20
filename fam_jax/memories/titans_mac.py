"""Titans, memory as context: attention over what a neural memory returns for the block, and over the block."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from fam_jax.config import MemoryConfig, ModelConfig, group, setting
from fam_jax.kernels import Part
from fam_jax.layers.decoder_layer import DecoderLayer
from fam_jax.layers.rope import rotate
from fam_jax.memories.interface import Memory, Stream, Tail, write_tail
from fam_jax.memories.neural_memory import Tokens, explicit, read_chunks, retrieve
from fam_jax.memories.titans import LEARNED, TitansPieceFrames
from fam_jax.memories.titans_layer import CONVOLUTION, ROLES, MemoryLayer, TitansConfig, TitansParameters
from fam_jax.memories.window_cache import (
    WINDOW_AXES,
    PieceFrames,
    Position,
    WindowState,
    piece_frames,
    shift_window,
    window_parts,
)


@group("model.memory", effect="state")
class TitansContextConfig(TitansConfig):
    """Titans, memory as context: the block attends to what a neural memory returns for its tokens."""

    kind: str = setting(default="titans_mac", doc="The architecture.")
    segments: int = setting(
        default=0, doc="m, past blocks that stay visible; the paper's segments see none.", minimum=0
    )
    retrieved: str = setting(
        default="causal",
        doc="Which of the rows that the memory returned, one for each token of the block, a token sees. causal: its "
        "own and those of earlier tokens. own: its own. none: no row.",
        choices=("causal", "own", "none"),
    )
    normalize_attention: bool = setting(
        default=True,
        doc="Normalize what attention adds, too, before the gate mixes it with what the memory returns.",
    )

    @property
    def keys_per_token(self) -> int:
        """Return 1 if the memory's rows are seen."""
        return int(self.retrieved != "none")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class TitansContextState(WindowState):
    """The window's cache and the neural memory of one layer. Sums are float32 or wider."""

    # (B, h, P) the memory's weights and their momentum after the last complete block.
    memory_weights: Any
    memory_momentum: Any
    # (B, 3, 4, D) projections of the last tokens of that block, for the convolutions of the next: queries of the
    # layer's inputs, and queries, keys and values of what attention added.
    convolution_tail: Any
    # Of the unfinished block: (B, C, 4, D) these projections, (B, C, K, hd) keys and values of the rows that the memory
    # returned, and (B, C, h, d) and (B, C, h, 3) the keys, values and rates that its tokens write.
    block_projections: Any
    block_retrieved_keys: Any
    block_retrieved_values: Any
    block_written_keys: Any
    block_written_values: Any
    block_rates: Any


class MemoryAsContext(Memory[TitansContextState]):
    """MAC: tokens attend to [persistent rows ; rows of the memory ; block]; what attention adds is written.

    All tokens of a block read the weights that the block before left. The paper's equations let token j see rows that
    the memory returned for later tokens, and read weights that later tokens have changed. Neither holds here.
    """

    Config: ClassVar[type[MemoryConfig]] = TitansContextConfig
    State: ClassVar[type[WindowState]] = TitansContextState

    def __init__(self, model: ModelConfig):
        super().__init__(model)
        self.memory = MemoryLayer(model, streams=1 + ROLES)
        self.config: TitansContextConfig = model.memory  # type: ignore[assignment]

    @property
    def learned_fields(self) -> tuple[str, ...]:
        """Return the memory's weights, their momentum, and the rows that convolutions still see."""
        return LEARNED

    def layer_parameters(self, rngs: Any) -> TitansParameters:
        """Create a layer's parameters. The norm of what attention adds is also that of what is written."""
        return TitansParameters(self.model, rngs, gate=True, normalize=True)

    def empty_fields(self, batch_size: int) -> dict[str, jax.Array]:
        """Return zeros; :meth:`enter` sets the memory's weights."""
        memory, model = self.memory, self.model
        size = model.block_size
        heads = model.num_kv_heads if self.config.keys_per_token else 0
        rows = jnp.zeros((batch_size, size, heads, model.head_dim), model.dtype)
        written = memory.zeros(batch_size, size, memory.width)
        return memory.empty_learned(batch_size) | {
            "block_projections": jnp.zeros((batch_size, size, memory.streams, model.model_dim), model.dtype),
            "block_retrieved_keys": rows,
            "block_retrieved_values": rows,
            "block_written_keys": written,
            "block_written_values": written,
            "block_rates": memory.zeros(batch_size, size, 3),
        }

    def state_axes(self) -> dict[str, tuple[str | None, ...]]:
        """Return the logical axes of a layer's state: keys and values of attention are divided by head."""
        heads = WINDOW_AXES["block_keys"]
        return super().state_axes() | {"block_retrieved_keys": heads, "block_retrieved_values": heads}

    def enter(
        self, layer: DecoderLayer, state: TitansContextState, stream: Stream, at: Any
    ) -> tuple[TitansContextState, Stream]:
        """Start from the learned weights."""
        start = jnp.broadcast_to(self.memory.start_of(layer.memory), state.memory_weights.shape)
        return dataclasses.replace(state, memory_weights=start), stream

    def piece_at(self, position: Position, width: int) -> TitansPieceFrames:
        """Return the frames of a piece."""
        return TitansPieceFrames(piece_frames(self.model, self.rope, position, width), position.filled)

    def window_piece_frames(self, at: TitansPieceFrames) -> PieceFrames:
        """Return the window's part of the frames."""
        return at.window

    def read_piece(
        self, layer: DecoderLayer, x: jax.Array, state: TitansContextState, at: TitansPieceFrames
    ) -> tuple[jax.Array, Tail]:
        """Ask the memory, attend to its answers and to the block, and mix the result with a second answer."""
        memory, own, config = self.memory, layer.memory, self.config
        before = memory.rows_before(state.convolution_tail, state.block_projections, at.filled)
        matrices = explicit(memory.fast_weights(state).weights)
        asking = own.query(own.norm(x))[:, :, None]
        tail: Tail = {}
        if config.keys_per_token:
            first = memory.convolve(own.convolution[...][:, :1], asking, before[:, :, :1])[:, :, 0]
            answers = retrieve(matrices, memory.unit_heads_of(first)).reshape(x.shape).astype(x.dtype)
            _, k, v = layer.project(answers)
            tail = {"block_retrieved_keys": rotate(k, self._frame_of_rows(at)), "block_retrieved_values": v}
        attended, window_tail = self._attend(layer, x, state, at, tail)
        added = layer.project_attended(attended)
        entering = own.attention_norm(added)
        fresh = memory.project(own, entering)
        tokens = memory.tokens(own, fresh, before[:, :, 1:], entering)
        assert tokens.queries is not None
        recalled = memory.output(own, retrieve(matrices, tokens.queries), x.dtype)
        mixed = own.mix(entering, entering if config.normalize_attention else added, recalled)
        written = {
            "block_projections": jnp.concatenate([asking, fresh], axis=2),
            "block_written_keys": tokens.keys,
            "block_written_values": tokens.values,
            "block_rates": jnp.stack(tokens.rates, axis=-1),
        }
        return layer.feed_forward(x + mixed), tail | window_tail | written

    def _frame_of_rows(self, at: TitansPieceFrames) -> Any:
        """Return the rotation of the piece's rows of the memory: each C positions before its token."""
        return at.window.own.after(self.rope.static(np.asarray(-self.model.block_size)))

    def _attend(
        self, layer: DecoderLayer, x: jax.Array, state: TitansContextState, at: TitansPieceFrames, rows: Tail
    ) -> tuple[jax.Array, Tail]:
        """Attend to the window, to the persistent rows and to `rows` of the memory, of the piece and before it."""
        size, frames = self.model.block_size, at.window
        q, k, v = layer.project(x)
        k = rotate(k, frames.own)
        asked = rotate(q, frames.own)
        keys, values = self.memory.persistent_keys(layer, self.rope, len(x), size if rows else 0)
        extra = [Part(asked, keys, values)] if keys.shape[1] else []
        if rows:
            place = at.filled[:, None] + np.arange(x.shape[1])  # (B, W) in the block
            whole = write_tail(state, rows, at.filled, jnp.full(len(x), x.shape[1]))
            sees = place[:, :, None] >= np.arange(size)
            if self.config.retrieved == "own":
                sees = place[:, :, None] == np.arange(size)
            extra.append(Part(asked, whole.block_retrieved_keys, whole.block_retrieved_values, sees))
        window = window_parts(self.model, state, frames, q, k, v)
        return self.attend_parts(window, extra), {"block_keys": k, "block_values": v}

    def close_block(
        self, layer: DecoderLayer, state: TitansContextState, stream: Stream, position: Position
    ) -> tuple[TitansContextState, Stream]:
        """Write the block into the memory, chunk by chunk, and cache it."""
        memory = self.memory
        history = jnp.concatenate([state.convolution_tail, state.block_projections], axis=1)
        rates = memory.rates_of(state.block_rates)
        tokens = Tokens(None, state.block_written_keys, state.block_written_values, rates)
        weights, _ = read_chunks(memory.fast_weights(state), tokens, self.config.chunk)
        state = dataclasses.replace(
            state, **memory.fields_of(weights), convolution_tail=history[:, 1 - CONVOLUTION :]
        )
        return shift_window(state), stream
