"""Infini-attention (Munkhdalai et al. 2024): each key/value head sums up the keys and values of all past blocks."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fam_jax.config import MemoryConfig, ModelConfig, ceil_div, group, setting
from fam_jax.layers.decoder_layer import DecoderLayer
from fam_jax.layers.rope import rotate
from fam_jax.memories.interface import Stream, Tail
from fam_jax.memories.window import Window
from fam_jax.memories.window_cache import BlockWindowConfig, Position, WindowState, shift_window


@group("model.memory", effect="state")
class InfiniConfig(BlockWindowConfig):
    """Infini-attention: attention to the own block, mixed in each head with what linear attention recalls."""

    kind: str = setting(default="infini", doc="The architecture.")
    segments: int = setting(
        default=0, doc="m, past blocks that stay visible to attention; 0 in the paper.", minimum=0
    )
    update: str = setting(
        default="linear",
        doc="What a key adds to its sums. linear: its value. delta: its value less what the key recalls already.",
        choices=("linear", "delta"),
    )

    parameter_axes: ClassVar[Mapping[str, tuple[str, ...]]] = {"gate": ("heads",)}

    def read_products(self, model: ModelConfig) -> int:
        """Return H * (hd^2 + hd): each query multiplies the sums of its head."""
        return model.num_heads * model.head_dim * (model.head_dim + 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class InfiniState(WindowState):
    """The window's cache and the sums of one layer, float32 or wider."""

    # (B, K, hd, hd) sum over past tokens of s(k) v^T; the delta rule subtracts from v.
    key_value_sums: Any
    # (B, K, hd) sum over past tokens of s(k).
    key_sums: Any


class Sums(NamedTuple):
    """The sums of linear attention, with any leading axes."""

    # (..., K, hd, hd)
    key_values: jax.Array
    # (..., K, hd)
    keys: jax.Array


class Gate(nnx.Module):
    """The logit (H,) of the share that each head gives to what it recalls; zero at first, a share of one half."""

    def __init__(self, model: ModelConfig):
        self.gate = nnx.Param(jnp.zeros(model.num_heads, jnp.float32))


class InfiniAttention(Window[InfiniState]):
    """Softmax attention within the window, and linear attention to all past blocks, mixed by a gate per head.

    What a block adds depends on its keys and values and, for the delta rule, on the sums before it, but not on what its
    tokens read. So all tokens of a chunk attend at once. The linear update is a prefix sum over blocks, the delta rule
    a scan over them.
    """

    Config: ClassVar[type[MemoryConfig]] = InfiniConfig
    State: ClassVar[type[WindowState]] = InfiniState

    config: InfiniConfig

    def __init__(self, model: ModelConfig):
        super().__init__(model)
        assert isinstance(model.memory, InfiniConfig)
        self.config = model.memory

    @property
    def sum_dtype(self) -> Any:
        """Return the dtype of sums and of what is recalled."""
        return jnp.promote_types(self.model.dtype, jnp.float32)

    def layer_parameters(self, rngs: nnx.Rngs) -> nnx.Module:
        """Create the gates of a layer."""
        return Gate(self.model)

    def empty_fields(self, batch_size: int) -> dict[str, jax.Array]:
        """Return sums of zero."""
        shape = (batch_size, self.model.num_kv_heads, self.model.head_dim)
        return {
            "key_value_sums": jnp.zeros((*shape, self.model.head_dim), self.sum_dtype),
            "key_sums": jnp.zeros(shape, self.sum_dtype),
        }

    def state_axes(self) -> dict[str, tuple[str | None, ...]]:
        """Return the logical axes of a layer's state: sums are divided by head."""
        own = {"key_value_sums": ("batch", "kv_heads", None, None), "key_sums": ("batch", "kv_heads", None)}
        return super().state_axes() | own

    def attend_piece(
        self, layer: DecoderLayer, q: jax.Array, k: jax.Array, v: jax.Array, state: InfiniState, at: Any
    ) -> tuple[jax.Array, Tail]:
        """Attend within the window, and mix in what the sums recall."""
        attended, tail = super().attend_piece(layer, q, k, v, state, at)
        return self.mix(layer, q, attended, _sums_of(state)), tail

    def attend_blocks(
        self, layer: DecoderLayer, q: jax.Array, k: jax.Array, v: jax.Array, state: InfiniState, at: Any
    ) -> tuple[jax.Array, InfiniState]:
        """Attend within the window, and mix into each block what the sums before it recall."""
        attended, after = super().attend_blocks(layer, q, k, v, state, at)
        size, length = self.model.block_size, q.shape[1]
        blocks, missing = ceil_div(length, size), -length % size

        def by_block(x: jax.Array) -> jax.Array:
            """Return (B, N, C, ...) of (B, T, ...)."""
            x = jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0)))
            return x.reshape(x.shape[0], blocks, size, *x.shape[2:])

        sums = self.sums_by_block(by_block(k)[:, : length // size], by_block(v)[:, : length // size], state)
        before = jax.tree.map(lambda x: x[:, :blocks], sums)
        mixed = self.mix(layer, by_block(q), by_block(attended), before)
        last = jax.tree.map(lambda x: x[:, -1], sums)
        after = dataclasses.replace(after, key_value_sums=last.key_values, key_sums=last.keys)
        return mixed.reshape(mixed.shape[0], blocks * size, *mixed.shape[3:])[:, :length], after

    def sums_by_block(self, k: jax.Array, v: jax.Array, state: InfiniState) -> Sums:
        """Return the sums (B, N + 1, ...) before each of N blocks and after the last.

        Args:
          k: (B, N, C, K, hd) keys, not rotated.
          v: (B, N, C, K, hd) values.
          state: the layer's state before the blocks.
        """
        start = _sums_of(state)
        if self.config.update == "linear":
            added = self.added(k, v, None)
            return jax.tree.map(
                lambda first, each: jnp.cumsum(jnp.concatenate([first[:, None], each], axis=1), axis=1),
                start,
                added,
            )

        def body(sums: Sums, block: tuple[jax.Array, jax.Array]) -> tuple[Sums, Sums]:
            return jax.tree.map(jnp.add, sums, self.added(*block, sums)), sums

        body = jax.checkpoint(body, prevent_cse=False)
        last, before = jax.lax.scan(body, start, (k.swapaxes(0, 1), v.swapaxes(0, 1)))
        return jax.tree.map(lambda each, end: jnp.concatenate([each, end[None]]).swapaxes(0, 1), before, last)

    def close_block(
        self, layer: DecoderLayer, state: InfiniState, stream: Stream, position: Position
    ) -> tuple[InfiniState, Stream]:
        """Add the block's keys and values to the sums, then move the block into the window.

        Sums take keys without RoPE. The cache has rotated ones, which are rotated back.
        """
        turned_back = self.rope.static(-np.arange(self.model.block_size))
        k = rotate(state.block_keys.astype(self.sum_dtype), turned_back)
        sums = _sums_of(state)
        sums = jax.tree.map(jnp.add, sums, self.added(k, state.block_values, sums))
        state = dataclasses.replace(state, key_value_sums=sums.key_values, key_sums=sums.keys)
        return shift_window(state), stream

    def added(self, k: jax.Array, v: jax.Array, sums: Sums | None) -> Sums:
        """Return what a block adds to the sums.

        Args:
          k: (..., C, K, hd) keys, not rotated.
          v: (..., C, K, hd) values.
          sums: the sums before the block (..., K, ...), for the delta rule.
        """
        features, values = positive(k.astype(self.sum_dtype)), v.astype(self.sum_dtype)
        if self.config.update == "delta":
            assert sums is not None
            known, weight = _recall(features[..., None, :], sums)
            values = values - _divided(known, weight)[..., 0, :]
        return Sums(jnp.einsum("...ckd,...cke->...kde", features, values), features.sum(axis=-3))

    def mix(self, layer: DecoderLayer, q: jax.Array, attended: jax.Array, sums: Sums) -> jax.Array:
        """Return attention mixed with what the sums recall; while the sums are empty, attention alone.

        Args:
          layer: the layer, with its gates.
          q: (..., T, H, hd) queries, not rotated.
          attended: (..., T, H, hd) result of softmax attention.
          sums: (..., K, ...).
        """
        kv_heads, head_dim = self.model.num_kv_heads, self.model.head_dim
        grouped = (*q.shape[:-2], kv_heads, self.model.num_heads // kv_heads, head_dim)
        found, weight = _recall(positive(q.astype(self.sum_dtype)).reshape(grouped), sums)
        share = jax.nn.sigmoid(layer.memory.gate[...].astype(self.sum_dtype)).reshape(grouped[-3:-1])
        share = jnp.where(weight > 0, share, 0)[..., None]
        local = attended.astype(self.sum_dtype).reshape(grouped)
        mixed = share * _divided(found, weight) + (1 - share) * local
        return mixed.reshape(attended.shape).astype(attended.dtype)


def positive(x: jax.Array) -> jax.Array:
    """Return elu(x) + 1, computed without cancellation: the features of linear attention."""
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))


def _sums_of(state: InfiniState) -> Sums:
    return Sums(state.key_value_sums, state.key_sums)


def _recall(features: jax.Array, sums: Sums) -> tuple[jax.Array, jax.Array]:
    """Return the weighted sum of values (..., T, K, G, hd) and the sum of weights (..., T, K, G).

    Args:
      features: (..., T, K, G, hd) of queries that share key/value heads in groups of G.
      sums: (..., K, ...).
    """
    found = jnp.einsum("...tkgd,...kde->...tkge", features, sums.key_values)
    return found, jnp.einsum("...tkgd,...kd->...tkg", features, sums.keys)


def _divided(found: jax.Array, weight: jax.Array) -> jax.Array:
    """Return the weighted mean; zero where nothing was written, with finite gradients."""
    exists = (weight > 0)[..., None]
    return jnp.where(exists, found / jnp.where(exists, weight[..., None], 1), 0)
