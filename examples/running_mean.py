"""A memory in one file: tokens see, beside their window, the running mean of the values of all past blocks."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from fam_jax.config import MemoryConfig, ModelConfig, group, setting
from fam_jax.kernels import Part
from fam_jax.layers.decoder_layer import DecoderLayer
from fam_jax.memories.interface import Memory, Stream
from fam_jax.memories.window_cache import BlockWindowConfig, Position, WindowState, shift_window


@group("model.memory", effect="state")
class RunningMeanConfig(BlockWindowConfig):
    """Block Sliding Window Attention and a running mean."""

    kind: str = setting(default="running_mean", doc="The architecture.")
    rate: float = setting(default=0.1, doc="Weight of the newest block in the mean.", above=0, maximum=1)

    parameter_axes: ClassVar[Mapping[str, tuple[str, ...]]] = {"mean_key": ("kv_heads", "head")}

    @property
    def extra_keys(self) -> int:
        """Return 1: each token sees one key beside its window."""
        return 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class RunningMeanState(WindowState):
    """The window's cache and the mean of one layer."""

    # (B, 1, K, hd) mean of the values of all complete blocks, float32 or wider.
    mean: Any


class MeanKey(nnx.Module):
    """The learned key (K, hd) by which the tokens of a layer find the mean."""

    def __init__(self, model: ModelConfig, rngs: nnx.Rngs):
        shape = (model.num_kv_heads, model.head_dim)
        self.mean_key = nnx.Param(jax.random.normal(rngs.params(), shape, jnp.float32))


class RunningMean(Memory[RunningMeanState]):
    """Attention to the window and to the mean, in one softmax."""

    Config: ClassVar[type[MemoryConfig]] = RunningMeanConfig
    State: ClassVar[type[WindowState]] = RunningMeanState

    def layer_parameters(self, rngs: nnx.Rngs) -> nnx.Module:
        """Create the learned key of a layer."""
        return MeanKey(self.model, rngs)

    def empty_fields(self, batch_size: int) -> dict[str, jax.Array]:
        """Return a mean of zero."""
        model = self.model
        dtype = jnp.promote_types(model.dtype, jnp.float32)
        return {"mean": jnp.zeros((batch_size, 1, model.num_kv_heads, model.head_dim), dtype)}

    def extra_of_piece(
        self, layer: DecoderLayer, q: jax.Array, state: RunningMeanState, at: Any
    ) -> Sequence[Part]:
        """Return the learned key and the mean. They have no position, so the queries are not rotated."""
        key = jnp.broadcast_to(layer.memory.mean_key[...], state.mean.shape)
        return [Part(q, key.astype(q.dtype), state.mean.astype(q.dtype))]

    def close_block(
        self, layer: DecoderLayer, state: RunningMeanState, stream: Stream, position: Position
    ) -> tuple[RunningMeanState, Stream]:
        """Move the mean towards that of the block, and the block into the window."""
        newest = state.block_values.astype(state.mean.dtype).mean(axis=1, keepdims=True)
        mean = state.mean + self.model.memory.rate * (newest - state.mean)  # type: ignore[attr-defined]
        return shift_window(dataclasses.replace(state, mean=mean)), stream
