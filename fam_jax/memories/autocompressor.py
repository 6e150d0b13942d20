"""AutoCompressors (Chevalier et al. 2023): a block leaves summary vectors, and later blocks see those of all before."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fam_jax.config import MemoryConfig, ModelConfig, group, require, setting
from fam_jax.kernels import Part, causal_rows, multi_part_attention
from fam_jax.layers.decoder_layer import DecoderLayer, Norm
from fam_jax.layers.rope import Rope, Rotation, rotate
from fam_jax.memories.interface import Memory, Stream
from fam_jax.memories.learned_rows import LearnedRows, embedded_rows
from fam_jax.memories.slots import (
    SLOT_AXES,
    SLOT_FIELDS,
    SlotState,
    empty_slots,
    fill_newest,
    next_slot,
    slots_part,
)
from fam_jax.memories.window_cache import BlockWindowConfig, Position, WindowState, shift_window


@group("model.memory", effect="state")
class AutoCompressorConfig(BlockWindowConfig):
    """AutoCompressors: summaries of blocks."""

    kind: str = setting(default="autocompressor", doc="The architecture.")
    segments: int = setting(
        default=0, doc="m, past blocks whose tokens stay visible to tokens beside the summaries.", minimum=0
    )
    length: int = setting(
        default=8,
        doc="kappa, vectors of a block's summary (50 in the paper); they may outnumber the block's tokens. 0 is Block "
        "Sliding Window Attention.",
        minimum=0,
        effect="parameters",
    )
    summaries: int = setting(
        default=16, doc="n, newest summaries that are kept. Rows of n + 1 blocks lose none.", minimum=1
    )
    summary_positions: str = setting(
        default="consecutive",
        doc="Positions of summaries. consecutive: one after another before the block, so that the oldest is farthest "
        "away. fixed: all directly before the block.",
        choices=("consecutive", "fixed"),
    )
    init_token: int = setting(
        default=-1,
        doc="Token whose embedding the summary rows start from if a trained model changes to this memory (that of the "
        "end of a document in the paper); -1: random tokens.",
        minimum=-1,
        effect="training",
    )

    parameter_axes: ClassVar[Mapping[str, tuple[str, ...]]] = {"summary_rows": ("slots", "width")}

    @property
    def has_state(self) -> bool:
        """Return whether summaries have vectors."""
        return self.length > 0

    @property
    def extra_keys(self) -> int:
        """Return n * kappa."""
        return self.summaries * self.length

    def extra_keys_of_block(self, block: int) -> int:
        """Return kappa for each summary that exists: one of every block before, at most n."""
        return self.length * min(self.summaries, block)

    def check_model(self, model: ModelConfig) -> None:
        """Raise :class:`ConfigError` if there is no such token."""
        require(
            self.init_token < model.vocab_size,
            f"config.model.memory.init_token: {self.init_token} is no token of the vocab_size {model.vocab_size}",
        )


class AutoCompressor(Memory[SlotState]):
    """Learned rows s follow a block and rise through all layers; what leaves the top is the block's summary.

    Block tau is read as [sigma_1 ; .. ; sigma_{tau-1} ; block ; s], every row seeing what is before it. A summary thus
    never sees a later one, and its keys and values are computed once, when it becomes the newest.
    """

    Config: ClassVar[type[MemoryConfig]] = AutoCompressorConfig
    State: ClassVar[type[WindowState]] = SlotState
    order = "segment"

    config: AutoCompressorConfig

    def __init__(self, model: ModelConfig):
        super().__init__(model)
        assert isinstance(model.memory, AutoCompressorConfig)
        self.config = model.memory

    def model_parameters(self, rngs: nnx.Rngs) -> nnx.Module | None:
        """Create the rows s (kappa, D) that follow every block."""
        length = self.config.length
        return LearnedRows(self.model, "summary_rows", length, rngs) if length else None

    def initial_parameters(self, table: jax.Array, seed: int) -> Mapping[str, jax.Array]:
        """Return embeddings, as they enter the first layer, for the rows s: those of `init_token` or random tokens."""
        length, token = self.config.length, self.config.init_token
        if not length:
            return {}
        tokens = jax.random.randint(jax.random.key(seed), (length,), 0, table.shape[0])
        if token >= 0:
            tokens = jnp.full(length, token)
        return {"memory/summary_rows": embedded_rows(self.model, table, tokens)}

    def empty_fields(self, batch_size: int) -> dict[str, jax.Array]:
        """Return slots without summaries."""
        return empty_slots(self.model, batch_size, self.config.summaries, self.config.length)

    def state_axes(self) -> dict[str, tuple[str | None, ...]]:
        """Return the logical axes of a layer's state: keys and values are divided by head."""
        return super().state_axes() | SLOT_AXES

    @property
    def passed_fields(self) -> tuple[str, ...]:
        """Return the slots: of the summaries, the shared state has the newest only."""
        return SLOT_FIELDS

    def start_shared(self, parameters: Any, batch_size: int) -> jax.Array | None:
        """Return zeros (B, kappa, D) in place of the newest summary: there is none."""
        if parameters is None:
            return None
        return jnp.zeros((batch_size, self.config.length, self.model.model_dim), self.model.dtype)

    def next_shared(self, norm: Norm, shared: Any, stream: Stream) -> jax.Array | None:
        """Return the summary of a block: its rows above the top layer, normalized as tokens are for the logits."""
        return None if stream is None else norm(stream)

    def enter_at(self, rope: Rope) -> Rotation:
        """Return the rotation (kappa, 1, hd/2) of a summary in its own frame."""
        return rope.static(np.arange(self.config.length))

    def enter_stream(self, parameters: Any, shared: Any) -> Stream:
        """Return the newest summary."""
        return shared

    def enter(
        self, layer: DecoderLayer, state: SlotState, stream: Stream, at: Rotation
    ) -> tuple[SlotState, Stream]:
        """Pass the newest summary through the layer. It sees older ones, and itself causally."""
        if stream is None:
            return state, stream
        q, k, v = layer.project(stream)
        q, k = rotate(q, at), rotate(k, at)
        # In a frame whose position zero is the summary's first row.
        older = slots_part(state, q, self.rope, self._origins(self.config.summaries - 1, newest=0))
        attended = multi_part_attention(
            [older, Part(q, k, v, self._own_mask())], softcap=layer.attention_softcap
        )
        return fill_newest(state, k, v), layer.finish(attended, stream)

    def extra_of_piece(self, layer: DecoderLayer, q: jax.Array, state: SlotState, at: Any) -> Sequence[Part]:
        """Return the keys and values of all summaries."""
        return [self._summaries(state, rotate(q, at.own))] if self.config.length else ()

    def close_stream(self, parameters: Any, shared: Any, batch_size: int) -> Stream:
        """Return the rows s."""
        return None if parameters is None else parameters.of_batch(batch_size, self.model.dtype)

    def close_block(
        self, layer: DecoderLayer, state: SlotState, stream: Stream, position: Position
    ) -> tuple[SlotState, Stream]:
        """Pass the rows s through the layer. They see all summaries, the block, and themselves causally."""
        if stream is None:
            return shift_window(state), stream
        q, k, v = layer.project(stream)
        after = self.rope.static(self.model.block_size + np.arange(self.config.length))
        q, k = rotate(q, after), rotate(k, after)
        memory = [self._summaries(state, q), Part(q, k, v, self._own_mask())]
        attended = self.attend_to_write(memory, Part(q, state.block_keys, state.block_values))
        return shift_window(next_slot(state)), layer.finish(attended, stream)

    def _summaries(self, state: SlotState, q: jax.Array) -> Part:
        """Return all summaries for queries that are rotated in the frame of the block."""
        origins = self._origins(self.config.summaries, newest=-self.config.length)
        return slots_part(state, q, self.rope, origins)

    def _origins(self, count: int, newest: int) -> np.ndarray:
        """Return where the `count` oldest summaries begin, in a frame that follows them.

        Args:
          count: the number of summaries.
          newest: where they begin with fixed positions.
        """
        if self.config.summary_positions == "fixed":
            return np.full(count, newest)
        return self.config.length * np.arange(-count, 0)

    def _own_mask(self) -> jax.Array:
        """Return which rows (1, kappa, kappa) a row sees among those that stand with it: itself and those before."""
        return causal_rows(self.config.length, self.config.length)
