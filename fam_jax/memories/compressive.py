"""The Compressive Transformer (Rae et al. 2019): blocks that leave the window stay visible as fewer, compressed rows.

A block is compressed from the inputs of the layer alone. So it is compressed when it closes, and its rows are hidden
for m blocks, as long as the window shows the block itself. Nothing is recurrent: all blocks of a chunk are compressed
by one matrix product, and all its tokens attend at once.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fam_jax.config import MemoryConfig, ModelConfig, ceil_div, group, require, setting
from fam_jax.kernels import Part, multi_part_attention
from fam_jax.layers.decoder_layer import DecoderLayer, contract
from fam_jax.layers.rope import Rotation, rotate
from fam_jax.memories.interface import Stream, Tail
from fam_jax.memories.window import ChunkFrames, ExtraKeys, Window
from fam_jax.memories.window_cache import (
    BlockWindowConfig,
    PieceFrames,
    Position,
    WindowState,
    add_auxiliary_loss,
    piece_frames,
    shift_window,
)


@group("model.memory", effect="state")
class CompressiveConfig(BlockWindowConfig):
    """Block Sliding Window Attention and compressed rows of the blocks before its window."""

    kind: str = setting(default="compressive", doc="The architecture.")
    stop_gradient: bool = setting(
        default=True,
        doc="Stop the gradients of the next-token loss at earlier blocks, compressed or not.",
        effect="training",
    )
    compressed_rows: int = setting(
        default=16,
        doc="r, rows that a block is compressed to. C / r is the compression rate c.",
        minimum=1,
        effect="parameters",
    )
    compressed_blocks: int = setting(
        default=1, doc="k, blocks that stay visible in compressed form: n_cm = k * r rows.", minimum=1
    )
    compression: str = setting(
        default="conv",
        doc="How c rows become one. conv: a learned convolution of stride c. mean: their mean.",
        choices=("conv", "mean"),
        effect="parameters",
    )
    positions: str = setting(
        default="index",
        doc="Positions of compressed rows. index: a row counts as one token before the window. centre: the centre of "
        "the c tokens that it stands for.",
        choices=("index", "centre"),
    )
    auxiliary_weight: float = setting(
        default=1.0,
        doc="Weight of the attention-reconstruction loss, from which the convolution learns.",
        minimum=0,
        effect="training",
    )

    parameter_axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "compress_kernel": ("width", "norm"),
        "compress_bias": ("norm",),
    }

    @property
    def extra_keys(self) -> int:
        """Return k * r."""
        return self.compressed_blocks * self.compressed_rows

    def extra_keys_of_block(self, block: int) -> int:
        """Return r for each of the last k blocks before the window that exist."""
        return self.compressed_rows * min(self.compressed_blocks, max(block - self.segments, 0))

    @property
    def has_auxiliary_loss(self) -> bool:
        """Return whether there is a convolution to train, and its loss has a weight."""
        return self.compression == "conv" and self.auxiliary_weight > 0

    def check_model(self, model: ModelConfig) -> None:
        """Raise :class:`ConfigError` if a block cannot be divided into `compressed_rows` equal parts."""
        require(
            model.block_size % self.compressed_rows == 0,
            f"config.model.memory.compressed_rows: {self.compressed_rows} does not divide block_size "
            f"{model.block_size}; choose a divisor",
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class CompressiveState(WindowState):
    """The window's cache and the compressed blocks of one layer."""

    # (B, k + m, r, K, hd) keys, rotated in the frame of their own block, and values of the compressed blocks, oldest
    # first. The newest m are hidden, because their blocks are in the window.
    compressed_keys: Any
    compressed_values: Any
    # (B,) int32: how many of the k + m there are, the newest ones.
    compressed_count: Any
    # (B, C, D) inputs of the layer in the unfinished block.
    block_inputs: Any


class Convolution(nnx.Module):
    """The kernel (c * D, D) and the bias (D,) of a convolution whose stride is its width c."""

    def __init__(self, model: ModelConfig, rate: int, rngs: nnx.Rngs):
        width = model.model_dim
        kernel = jax.random.normal(rngs.params(), (rate * width, width), jnp.float32)
        self.compress_kernel = nnx.Param(kernel * (rate * width) ** -0.5)
        self.compress_bias = nnx.Param(jnp.zeros(width, jnp.float32))


class CompressiveFrames(NamedTuple):
    """Frames of a chunk with compressed blocks."""

    window: ChunkFrames
    # (B or 1, N, k, 1, 1, hd/2), from the frame of each compressed block, newest first, to that of the chunk.
    compressed: Rotation


class CompressivePieceFrames(NamedTuple):
    """Frames of a piece with compressed blocks."""

    window: PieceFrames
    # k rotations (B, W, 1, hd/2), into the frame of each compressed block, newest first.
    compressed: list[Rotation]


class CompressiveTransformer(Window[CompressiveState]):
    """Attention to the window and to compressed blocks, in one softmax."""

    Config: ClassVar[type[MemoryConfig]] = CompressiveConfig
    State: ClassVar[type[WindowState]] = CompressiveState

    config: CompressiveConfig

    def __init__(self, model: ModelConfig):
        super().__init__(model)
        assert isinstance(model.memory, CompressiveConfig)
        self.config = model.memory
        self.rate = model.block_size // self.config.compressed_rows
        index = np.arange(self.config.compressed_rows)
        centred = self.config.positions == "centre"
        # (r, 1, hd/2) of the rows in the frame of their own block.
        self.own_rows = self.rope.static(index * self.rate + (self.rate - 1) / 2 if centred else index)
        # (k,) position of each compressed block, newest first, in the frame of the block that sees it.
        step = model.block_size if centred else self.config.compressed_rows
        age = np.arange(1, self.config.compressed_blocks + 1)
        self.places = -self.config.segments * model.block_size - step * age

    def layer_parameters(self, rngs: nnx.Rngs) -> nnx.Module | None:
        """Create the convolution of a layer."""
        return Convolution(self.model, self.rate, rngs) if self.config.compression == "conv" else None

    def initial_parameters(self, table: jax.Array, seed: int) -> Mapping[str, jax.Array]:
        """Return a convolution that computes means: those are vectors that the layers of a trained model can read."""
        if self.config.compression == "mean":
            return {}
        mean = jnp.tile(jnp.eye(self.model.model_dim, dtype=jnp.float32) / self.rate, (self.rate, 1))
        return {"layers/memory/compress_kernel": jnp.broadcast_to(mean, (self.model.num_layers, *mean.shape))}

    @property
    def slots(self) -> int:
        """Return k + m, the number of compressed blocks in the state."""
        return self.config.compressed_blocks + self.config.segments

    def empty_fields(self, batch_size: int) -> dict[str, jax.Array]:
        """Return no compressed blocks and no inputs."""
        model = self.model
        rows = (self.slots, self.config.compressed_rows, model.num_kv_heads, model.head_dim)
        return {
            "compressed_keys": jnp.zeros((batch_size, *rows), model.dtype),
            "compressed_values": jnp.zeros((batch_size, *rows), model.dtype),
            "compressed_count": jnp.zeros(batch_size, jnp.int32),
            "block_inputs": jnp.zeros((batch_size, model.block_size, model.model_dim), model.dtype),
        }

    def state_axes(self) -> dict[str, tuple[str | None, ...]]:
        """Return the logical axes of a layer's state: keys and values are divided by head."""
        heads = ("batch", None, None, "kv_heads", None)
        return super().state_axes() | {"compressed_keys": heads, "compressed_values": heads}

    @property
    def learned_fields(self) -> tuple[str, ...]:
        """Return the fields of the compressed blocks."""
        return ("compressed_keys", "compressed_values", "compressed_count")

    def compress(self, layer: DecoderLayer, blocks: jax.Array) -> jax.Array:
        """Return the compressed rows (B, N, r, D) of the inputs (B, N, C, D) of blocks."""
        batch, count, _, width = blocks.shape
        parts = blocks.reshape(batch, count, self.config.compressed_rows, self.rate, width)
        if self.config.compression == "mean":
            return parts.mean(axis=3)
        kernel, bias = (
            x[...].astype(blocks.dtype) for x in (layer.memory.compress_kernel, layer.memory.compress_bias)
        )
        joined = parts.reshape(batch, count, self.config.compressed_rows, self.rate * width)
        return contract(joined, kernel, 1, "compress") + bias

    def _append(self, layer: DecoderLayer, blocks: jax.Array, state: CompressiveState) -> CompressiveState:
        """Compress blocks (B, N, C, D) and put them after those of the state, which has N more of them then."""
        rows = self.compress(layer, blocks)
        if self.config.stop_gradient:
            rows = jax.lax.stop_gradient(rows)
        _, k, v = layer.project(rows)
        return dataclasses.replace(
            state,
            compressed_keys=jnp.concatenate([state.compressed_keys, rotate(k, self.own_rows)], axis=1),
            compressed_values=jnp.concatenate([state.compressed_values, v], axis=1),
        )

    def _drop_oldest(self, state: CompressiveState) -> CompressiveState:
        """Keep the newest k + m blocks after :meth:`_append`, and count those that it added."""
        added = state.compressed_keys.shape[1] - self.slots
        return dataclasses.replace(
            state,
            compressed_keys=state.compressed_keys[:, added:],
            compressed_values=state.compressed_values[:, added:],
            compressed_count=jnp.minimum(state.compressed_count + added, self.slots),
        )

    def blocks_at(self, position: Position, length: int, cached: int) -> CompressiveFrames:
        """Return the frames of a chunk."""
        size = self.model.block_size
        shift = jnp.zeros(1, jnp.int32) if position.offset is None else position.offset
        places = size * np.arange(ceil_div(length, size))[:, None] + self.places
        compressed = self.rope.at(shift[:, None, None] + places)[:, :, :, None]
        return CompressiveFrames(super().blocks_at(position, length, cached), compressed)

    def window_frames(self, at: CompressiveFrames) -> ChunkFrames:
        """Return the window's part of the frames."""
        return at.window

    def read_blocks(
        self, layer: DecoderLayer, x: jax.Array, state: CompressiveState, streams: Stream, at: Any
    ) -> tuple[jax.Array, CompressiveState, Stream]:
        """Compress the complete blocks, read all tokens at once, and add the loss of the compression."""
        batch, length, width = x.shape
        size = self.model.block_size
        full = length // size
        blocks = x[:, : full * size].reshape(batch, full, size, width)
        state = self._append(layer, blocks, state)
        out, state, streams = super().read_blocks(layer, x, state, streams, at)
        rest = x[:, full * size :]
        state = dataclasses.replace(
            state, block_inputs=jnp.pad(rest, ((0, 0), (0, size - rest.shape[1]), (0, 0)))
        )
        if full and self.config.has_auxiliary_loss:
            state = add_auxiliary_loss(state, lambda: self._reconstruction_loss(layer, blocks))
        return out, state, streams

    def extra_of_blocks(
        self, layer: DecoderLayer, k: jax.Array, v: jax.Array, state: CompressiveState, at: CompressiveFrames
    ) -> tuple[ExtraKeys, CompressiveState]:
        """Return the k compressed blocks that each block of a chunk sees, newest first."""
        blocks, seen = at.compressed.cos.shape[1:3]

        def of_blocks(line: jax.Array) -> jax.Array:
            """Return (B, N, k, r, K, hd): for each block the last k before its window."""
            return jnp.stack([line[:, slot : slot + blocks] for slot in reversed(range(seen))], axis=2)

        def as_keys(x: jax.Array) -> jax.Array:
            return x.reshape(*x.shape[:2], -1, *x.shape[4:])

        before = jnp.minimum(state.compressed_count[:, None] + np.arange(blocks), self.slots)
        existing = jnp.maximum(before - self.config.segments, 0) * self.config.compressed_rows
        keys = as_keys(rotate(of_blocks(state.compressed_keys), at.compressed))
        values = as_keys(of_blocks(state.compressed_values))
        return ExtraKeys(keys, values, existing), self._drop_oldest(state)

    def piece_at(self, position: Position, width: int) -> CompressivePieceFrames:
        """Return the frames of a piece."""
        window = piece_frames(self.model, self.rope, position, width)
        into = [window.own.after(self.rope.static(np.asarray(-place))) for place in self.places]
        return CompressivePieceFrames(window, into)

    def window_piece_frames(self, at: CompressivePieceFrames) -> PieceFrames:
        """Return the window's part of the frames."""
        return at.window

    def read_piece(
        self, layer: DecoderLayer, x: jax.Array, state: CompressiveState, at: Any
    ) -> tuple[jax.Array, Tail]:
        """Read a piece, and keep its inputs, which are compressed when the block closes."""
        out, tail = super().read_piece(layer, x, state, at)
        return out, {**tail, "block_inputs": x}

    def extra_of_piece(
        self, layer: DecoderLayer, q: jax.Array, state: CompressiveState, at: CompressivePieceFrames
    ) -> Sequence[Part]:
        """Return the k compressed blocks before the window, newest first."""
        visible = state.compressed_count - self.config.segments
        oldest_first = range(self.config.compressed_blocks - 1, -1, -1)
        return [
            Part(
                rotate(q, rotation),
                state.compressed_keys[:, slot],
                state.compressed_values[:, slot],
                (visible > age)[:, None, None],
            )
            for age, (slot, rotation) in enumerate(zip(oldest_first, at.compressed, strict=True))
        ]

    def close_block(
        self, layer: DecoderLayer, state: CompressiveState, stream: Stream, position: Position
    ) -> tuple[CompressiveState, Stream]:
        """Compress the block, then cache it."""
        state = self._append(layer, state.block_inputs[:, None], state)
        return shift_window(self._drop_oldest(state)), stream

    def _reconstruction_loss(self, layer: DecoderLayer, blocks: jax.Array) -> jax.Array:
        """Return the weighted loss (B,) of compressing blocks (B, N, C, D), summed over them.

        The tokens of the block at whose end a block leaves the window attend to its inputs and to its compressed rows,
        without positions or masks. The loss is the mean square of the difference. If the chunk ends before, the tokens
        of its last block stand in. Only the convolution gets a gradient.
        """
        graphdef, parameters = nnx.split(layer)
        fixed = nnx.merge(graphdef, jax.lax.stop_gradient(parameters))
        inputs = jax.lax.stop_gradient(blocks)
        q, *old = fixed.project(inputs)
        _, *new = fixed.project(self.compress(layer, inputs))
        batch, count = blocks.shape[:2]
        q = q[:, np.minimum(np.arange(count) + self.config.segments, count - 1)]

        def attend(k: jax.Array, v: jax.Array) -> jax.Array:
            part = Part(*(x.reshape(batch * count, *x.shape[2:]) for x in (q, k, v)))
            attended = multi_part_attention([part], softcap=self.model.attention_softcap)
            return attended.astype(jnp.promote_types(attended.dtype, jnp.float32))

        squares = jnp.square(attend(*old) - attend(*new))
        return self.config.auxiliary_weight * squares.mean(axis=(1, 2, 3)).reshape(batch, count).sum(axis=1)
