"""Losses that FAM may train on beside the next-token loss (appendix C of the FAM paper): diversity, reconstruction."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fam_jax.config import MemoryConfig, ModelConfig, group, require, setting
from fam_jax.kernels import Part, multi_part_attention
from fam_jax.layers.decoder_layer import DecoderLayer
from fam_jax.layers.rope import Rotation, rotate
from fam_jax.memories.fam import FamConfig, FamFrames, FamState, FeedbackAttentionMemory
from fam_jax.memories.inspection import WriteAttention, inspect_close
from fam_jax.memories.interface import Stream
from fam_jax.memories.window_cache import Position, add_auxiliary_loss, with_past_slots


@group("model.memory", effect="state")
class FamLossesConfig(FamConfig):
    """Feedback Attention Memory that also trains on losses of its own."""

    kind: str = setting(default="fam_losses", doc="The architecture.")
    diversity: float = setting(
        default=0.0,
        doc="Weight of the diversity loss, the negative entropy of what FAM attends to in a block.",
        minimum=0,
        effect="training",
    )
    reconstruction: float = setting(
        default=0.0,
        doc="Weight of the reconstruction loss, the squared error of a block's outputs computed from its FAM alone.",
        minimum=0,
        effect="training",
    )

    @property
    def has_auxiliary_loss(self) -> bool:
        """Return whether a loss has a weight."""
        return self.diversity > 0 or self.reconstruction > 0

    def check(self) -> None:
        """Raise :class:`ConfigError` if there is no FAM, or it has noise, which blocks read in turn do not get."""
        require(
            self.length > 0 or not self.has_auxiliary_loss,
            "config.model.memory.length: the losses of fam_losses need a FAM; set it to at least 1",
        )
        require(
            self.noise == 0 or not self.has_auxiliary_loss,
            "config.model.memory.noise: does not go with diversity and reconstruction; leave it at 0",
        )


class LossFrames(NamedTuple):
    """Frames of a chunk, and its position if blocks are read one after another."""

    fam: FamFrames
    position: Position


class FamWithLosses(FeedbackAttentionMemory):
    """FAM whose layers add a diversity loss and a reconstruction loss to the training loss.

    Where these are asked for, a layer reads block after block. Elsewhere it is FAM.
    """

    Config: ClassVar[type[MemoryConfig]] = FamLossesConfig

    config: FamLossesConfig

    def __init__(self, model: ModelConfig):
        super().__init__(model)
        self._plain = FeedbackAttentionMemory(model)

    def blocks_at(self, position: Position, length: int, cached: int) -> Any:
        """Return the frames of a chunk and its position."""
        return LossFrames(super().blocks_at(position, length, cached), position)

    def read_blocks(
        self, layer: DecoderLayer, x: jax.Array, state: FamState, streams: Stream, at: Any
    ) -> tuple[jax.Array, FamState, Stream]:
        """Read all tokens at once, or block by block if the losses are asked for."""
        if state.auxiliary_loss is None or not self.config.has_auxiliary_loss:
            return super().read_blocks(layer, x, state, streams, at.fam)
        return self._read_in_turn(layer, x, state, streams, at.position)

    def _read_in_turn(
        self, layer: DecoderLayer, x: jax.Array, state: FamState, streams: Stream, position: Position
    ) -> tuple[jax.Array, FamState, Stream]:
        """Read block by block; add the losses of every complete block to the state."""
        size, (batch, length, _) = self.model.block_size, x.shape
        full, out = length // size, []
        state = with_past_slots(state, self.model.memory_segments)

        def body(carry: Any, block: jax.Array) -> tuple[Any, jax.Array]:
            state, position = carry
            y, tail = self.read_piece(layer, block, state, self.piece_at(position, size))
            before = dataclasses.replace(state, **tail)
            state, _, attention = inspect_close(self._plain, layer, before, None, position)
            assert attention is not None

            def losses() -> jax.Array:
                rebuilt = self._rebuilt(layer, block, state, position)
                return self.config.diversity * negative_entropy(
                    attention
                ) + self.config.reconstruction * squared_error(rebuilt, y)

            return (add_auxiliary_loss(state, losses), position.next_block()), y

        if full:
            blocks = x[:, : full * size].reshape(batch, full, size, -1).swapaxes(0, 1)
            body = jax.checkpoint(body, prevent_cse=False)
            (state, position), read = jax.lax.scan(body, (state, position), blocks)
            out.append(read.swapaxes(0, 1).reshape(batch, full * size, -1))
        if length > full * size:
            rest = x[:, full * size :]
            frames = self._plain.blocks_at(position, rest.shape[1], self.model.memory_segments)
            y, state, _ = self._plain.read_blocks(layer, rest, state, None, frames)
            out.append(y)
        return jnp.concatenate(out, axis=1), state, streams

    def _rebuilt(self, layer: DecoderLayer, x: jax.Array, state: FamState, position: Position) -> jax.Array:
        """Return the outputs (B, C, D) that a block's inputs x have if they attend to the FAM after the block alone."""
        q, _, _ = layer.project(x)
        fam = Part(rotate(q, self._in_frame_of_fam(position)), state.fam_keys[:, 0], state.fam_values[:, 0])
        return layer.finish(multi_part_attention([fam], softcap=self.model.attention_softcap), x)

    def _in_frame_of_fam(self, position: Position) -> Rotation:
        """Return the rotation of a block's tokens into the frame of the FAM after it."""
        size = self.model.block_size
        if self.config.positions != "zero":
            return self.rope.static(np.arange(-size, 0))
        place = self.rope.static(np.arange(size)).after(self.rope.at(position.blocks, unit=size)[:, None])
        return place if position.offset is None else place.after(self.rope.at(position.offset)[:, None])


def negative_entropy(attention: WriteAttention) -> jax.Array:
    """Return sum p log p (B,) of p, the mean over heads and rows of the shares of attention to each key.

    It is least, -log S for S keys, if the rows and heads together attend to all keys alike (wav2vec 2.0's diversity).
    """
    p = jnp.concatenate([attention.memory, attention.block], axis=-1).mean(axis=(1, 2))
    return jax.scipy.special.xlogy(p, p).sum(axis=-1)


def squared_error(rebuilt: jax.Array, outputs: jax.Array) -> jax.Array:
    """Return the mean square (B,) of the errors of (B, C, D). The outputs, as targets, get no gradient."""
    wide = jnp.promote_types(outputs.dtype, jnp.float32)
    error = rebuilt.astype(wide) - jax.lax.stop_gradient(outputs).astype(wide)
    return jnp.square(error).mean(axis=(1, 2))
