"""Recurrent Memory Transformer (Bulatov et al. 2022): rows are read before a block and written after it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fam_jax.config import MemoryConfig, ModelConfig, group, setting
from fam_jax.kernels import Part, causal_rows, multi_part_attention
from fam_jax.layers.decoder_layer import DecoderLayer, Norm
from fam_jax.layers.rope import Rope, Rotation, rotate
from fam_jax.memories.interface import Memory, Stream
from fam_jax.memories.learned_rows import LearnedRows, embedded_rows
from fam_jax.memories.window_cache import BlockWindowConfig, Position, WindowState, shift_window


@group("model.memory", effect="state")
class RmtConfig(BlockWindowConfig):
    """Recurrent Memory Transformer."""

    kind: str = setting(default="rmt", doc="The architecture.")
    segments: int = setting(
        default=0, doc="m, past blocks whose tokens stay visible to tokens beside the memory.", minimum=0
    )
    length: int = setting(
        default=8,
        doc="M, memory rows; they may outnumber the tokens of a block. 0 is Block Sliding Window Attention.",
        minimum=0,
        effect="parameters",
    )
    mask: str = setting(
        default="paper",
        doc="What memory rows see. paper: rows before a block see each other, those after it see everything. causal: "
        "each row sees what is before it, as in the authors' code for Hugging Face models.",
        choices=("paper", "causal"),
    )

    parameter_axes: ClassVar[Mapping[str, tuple[str, ...]]] = {"memory_rows": ("slots", "width")}

    @property
    def has_state(self) -> bool:
        """Return whether there are memory rows."""
        return self.length > 0

    @property
    def extra_keys(self) -> int:
        """Return M."""
        return self.length


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class RmtState(WindowState):
    """The window's cache, and what one layer makes of the memory. The memory itself is the shared state (B, M, D)."""

    # (B, M, K, hd) keys, rotated in the frame of the block that follows, and values of the rows before the block.
    read_keys: Any
    read_values: Any


class RecurrentMemoryTransformer(Memory[RmtState]):
    """The memory m (M, D) passes through all layers twice per block: [m ; block ; m].

    The rows before the block do not see it. So they pass through the layers once, when the block before closes, and
    the block's tokens find their keys and values in the state. The rows after the block pass when it closes. What
    leaves the top layer and the final norm is the next memory.
    """

    Config: ClassVar[type[MemoryConfig]] = RmtConfig
    State: ClassVar[type[WindowState]] = RmtState
    order = "segment"

    config: RmtConfig

    def __init__(self, model: ModelConfig):
        super().__init__(model)
        assert isinstance(model.memory, RmtConfig)
        self.config = model.memory

    def model_parameters(self, rngs: nnx.Rngs) -> nnx.Module | None:
        """Create the initial memory (M, D)."""
        length = self.config.length
        return LearnedRows(self.model, "memory_rows", length, rngs) if length else None

    def initial_parameters(self, table: jax.Array, seed: int) -> Mapping[str, jax.Array]:
        """Return the embeddings of random tokens, as they enter the first layer, for the initial memory."""
        if not self.config.length:
            return {}
        tokens = jax.random.randint(jax.random.key(seed), (self.config.length,), 0, table.shape[0])
        return {"memory/memory_rows": embedded_rows(self.model, table, tokens)}

    def empty_fields(self, batch_size: int) -> dict[str, jax.Array]:
        """Return zeros for the keys and values of the rows before a block."""
        model = self.model
        rows = jnp.zeros((batch_size, self.config.length, model.num_kv_heads, model.head_dim), model.dtype)
        return {"read_keys": rows, "read_values": rows}

    def state_axes(self) -> dict[str, tuple[str | None, ...]]:
        """Return the logical axes of a layer's state: keys and values are divided by head."""
        heads = ("batch", None, "kv_heads", None)
        return super().state_axes() | {"read_keys": heads, "read_values": heads}

    def start_shared(self, parameters: Any, batch_size: int) -> jax.Array | None:
        """Return the initial memory (B, M, D)."""
        return None if parameters is None else parameters.of_batch(batch_size, self.model.dtype)

    def next_shared(self, norm: Norm, shared: Any, stream: Stream) -> jax.Array | None:
        """Return the memory after a block: its rows above the top layer, normalized as tokens are for the logits."""
        return None if stream is None else norm(stream)

    def enter_at(self, rope: Rope) -> Rotation:
        """Return the rotation (M, 1, hd/2) of the rows before a block: positions -M to -1."""
        return rope.static(np.arange(-self.config.length, 0))

    def enter_stream(self, parameters: Any, shared: Any) -> Stream:
        """Return the memory, which enters the bottom layer before a block."""
        return shared

    def enter(
        self, layer: DecoderLayer, state: RmtState, stream: Stream, at: Rotation
    ) -> tuple[RmtState, Stream]:
        """Pass the rows before a block through the layer; they see each other only. Keep their keys and values."""
        if stream is None:
            return state, stream
        q, k, v = layer.project(stream)
        k = rotate(k, at)
        itself = Part(rotate(q, at), k, v, self._own_mask())
        out = layer.finish(multi_part_attention([itself], softcap=layer.attention_softcap), stream)
        return dataclasses.replace(state, read_keys=k, read_values=v), out

    def extra_of_piece(self, layer: DecoderLayer, q: jax.Array, state: RmtState, at: Any) -> Sequence[Part]:
        """Return the keys and values of the rows before the block."""
        if not self.config.length:
            return ()
        return [Part(rotate(q, at.own), state.read_keys, state.read_values)]

    def close_stream(self, parameters: Any, shared: Any, batch_size: int) -> Stream:
        """Return the memory, which enters the bottom layer after a block, too."""
        return shared

    def close_block(
        self, layer: DecoderLayer, state: RmtState, stream: Stream, position: Position
    ) -> tuple[RmtState, Stream]:
        """Pass the rows after the block through the layer; they see the rows before it, the block and each other.

        As in the authors' code for Transformer-XL, they do not see the window.
        """
        if stream is None:
            return shift_window(state), stream
        q, k, v = layer.project(stream)
        after = self.rope.static(self.model.block_size + np.arange(self.config.length))
        q, k = rotate(q, after), rotate(k, after)
        memory = [Part(q, state.read_keys, state.read_values), Part(q, k, v, self._own_mask())]
        attended = self.attend_to_write(memory, Part(q, state.block_keys, state.block_values))
        return shift_window(state), layer.finish(attended, stream)

    def _own_mask(self) -> jax.Array | None:
        """Return which rows (1, M, M) a memory row sees among those that stand with it; None: all."""
        length = self.config.length
        return None if self.config.mask == "paper" else causal_rows(length, length)
