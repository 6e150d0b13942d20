"""Feedback memory segments (FM, appendix C of the FAM paper): tokens see the layer's outputs for past blocks."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from fam_jax.config import MemoryConfig, group, setting
from fam_jax.layers.decoder_layer import DecoderLayer
from fam_jax.layers.rope import rotate
from fam_jax.memories.interface import Memory, Stream, Tail
from fam_jax.memories.window import WindowConfig
from fam_jax.memories.window_cache import (
    WINDOW_AXES,
    BlockWindowConfig,
    Position,
    WindowState,
    shift_window,
)


@group("model.memory", effect="state")
class FeedbackMemoryConfig(WindowConfig, BlockWindowConfig):
    """Block Sliding Window Attention whose past blocks are a layer's outputs instead of its inputs."""

    kind: str = setting(default="fm", doc="The architecture.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class FeedbackMemoryState(WindowState):
    """The cache of one layer. `keys` and `values` are those of its outputs for the last m complete blocks."""

    # (B, C, K, hd) keys and values of the outputs for the unfinished block.
    block_output_keys: Any
    block_output_values: Any


class FeedbackMemory(Memory[FeedbackMemoryState]):
    """A window whose keys and values of past blocks come from the layer's outputs, by the layer's own projections.

    A block's outputs depend on those of the block before, in the same layer. So each layer reads block after block,
    and its receptive field has no end, unlike that of Block Sliding Window Attention.
    """

    Config: ClassVar[type[MemoryConfig]] = FeedbackMemoryConfig
    State: ClassVar[type[WindowState]] = FeedbackMemoryState

    @property
    def learned_fields(self) -> tuple[str, ...]:
        """Return nothing: there is no state beyond the window."""
        return ()

    def empty_fields(self, batch_size: int) -> dict[str, jax.Array]:
        """Return room for the keys and values of a block's outputs."""
        model = self.model
        slots = (batch_size, model.block_size, model.num_kv_heads, model.head_dim)
        return {
            "block_output_keys": jnp.zeros(slots, model.dtype),
            "block_output_values": jnp.zeros(slots, model.dtype),
        }

    def state_axes(self) -> dict[str, tuple[str | None, ...]]:
        """Return the logical axes of a layer's state: keys and values are divided by head."""
        heads = WINDOW_AXES["block_keys"]
        return super().state_axes() | {"block_output_keys": heads, "block_output_values": heads}

    def read_piece(
        self, layer: DecoderLayer, x: jax.Array, state: FeedbackMemoryState, at: Any
    ) -> tuple[jax.Array, Tail]:
        """Read tokens, and project their outputs once more, for the blocks that follow."""
        out, tail = super().read_piece(layer, x, state, at)
        _, k, v = layer.project(self.remembered(x, out))
        own = self.window_piece_frames(at).own
        return out, tail | {"block_output_keys": rotate(k, own), "block_output_values": v}

    def remembered(self, x: jax.Array, out: jax.Array) -> jax.Array:
        """Return the vectors (B, W, D) that later blocks see, of a layer's inputs and outputs: the outputs."""
        return out

    def close_block(
        self, layer: DecoderLayer, state: FeedbackMemoryState, stream: Stream, position: Position
    ) -> tuple[FeedbackMemoryState, Stream]:
        """Cache the keys and values of the block's outputs."""
        outputs = dataclasses.replace(
            state, block_keys=state.block_output_keys, block_values=state.block_output_values
        )
        return shift_window(outputs), stream
