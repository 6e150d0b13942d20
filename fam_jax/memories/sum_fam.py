"""SUM FAM (appendix C of the FAM paper): summary tokens that always ask the same queries."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from fam_jax.config import MemoryConfig, ceil_div, group, require, setting
from fam_jax.kernels import Part
from fam_jax.layers.decoder_layer import Apply, DecoderLayer
from fam_jax.layers.rope import rotate
from fam_jax.memories.chain import Attend, ChainAttention, ChainInputs, run_chain
from fam_jax.memories.fam import FamConfig, FamFrames, FamState, FeedbackAttentionMemory
from fam_jax.memories.interface import Memory, Stream
from fam_jax.memories.window import ExtraKeys
from fam_jax.memories.window_cache import Position, WindowState, shift_window

# Fields of FamConfig that change the residual connection of FAM, which a summary does not have.
OF_THE_RESIDUAL = ("bound", "noise")


@group("model.memory", effect="state")
class SummaryFamConfig(FamConfig):
    """Feedback Attention Memory whose queries never change: static summary tokens."""

    kind: str = setting(default="sum_fam", doc="The architecture.")
    residual: str = setting(
        default="summary",
        doc="What is added to the attention of a summary. summary: its own learned vectors. none: nothing, as in the "
        "first update of FAM. The paper does not say.",
        choices=("summary", "none"),
    )

    @property
    def chained_rows(self) -> int:
        """Return M, or 0 if blocks are read one after another."""
        return self.length if self.previous_blocks == 1 else 0

    def check(self) -> None:
        """Raise :class:`ConfigError` if there is no summary, or a field is set that has no meaning here."""
        require(
            self.length > 0,
            "config.model.memory.length: sum_fam needs at least 1; without a summary, choose the kind bswa",
        )
        for name in OF_THE_RESIDUAL:
            require(
                not getattr(self, name),
                f"config.model.memory.{name}: sum_fam adds nothing of one FAM to the next; leave it at 0",
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class SummaryFamState(FamState):
    """The state of FAM, and the summary tokens of one layer."""

    # (B, M, D) the initial FAM S of the layer, which asks the queries of every block.
    summary_rows: Any


class SummaryFam(FeedbackAttentionMemory):
    """F_tau = layer(attention of S to F_{tau-1} .. F_{tau-R} and to block tau), S the initial FAM of the layer.

    Feedback passes through keys and values alone. What tokens see is as with FAM.
    """

    Config: ClassVar[type[MemoryConfig]] = SummaryFamConfig
    State: ClassVar[type[WindowState]] = SummaryFamState

    config: SummaryFamConfig

    @property
    def fixed_fields(self) -> tuple[str, ...]:
        """Return the summary tokens, which follow from the weights."""
        return ("summary_rows",)

    @property
    def passed_fields(self) -> tuple[str, ...]:
        """Return "fam" alone; with R > 1 also its keys, because blocks are then read from those of the state."""
        return ("fam", "fam_keys", "fam_values") if self._one_by_one else ("fam",)

    def empty_fields(self, batch_size: int) -> dict[str, jax.Array]:
        """Return zeros for FAM, its keys and values, and the summary tokens."""
        fields = super().empty_fields(batch_size)
        return fields | {"summary_rows": fields["fam"]}

    def enter(self, layer: DecoderLayer, state: Any, stream: Stream, at: Any) -> tuple[FamState, Stream]:
        """Set the initial FAM, and keep it as the summary tokens."""
        entered, stream = super().enter(layer, state, stream, at)
        return dataclasses.replace(entered, summary_rows=entered.fam), stream  # type: ignore[call-arg]

    def blocks_at(self, position: Position, length: int, cached: int) -> Any:
        """Return the frames of a chunk; if blocks are read one after another, their position."""
        return position if self._one_by_one else super().blocks_at(position, length, cached)

    def read_blocks(
        self, layer: DecoderLayer, x: jax.Array, state: Any, streams: Stream, at: Any
    ) -> tuple[jax.Array, FamState, Stream]:
        """Read all tokens of the chunk at once, or block by block if a summary asks several past FAMs."""
        if self._one_by_one:
            return Memory.read_blocks(self, layer, x, state, streams, at)
        return super().read_blocks(layer, x, state, streams, at)

    @property
    def _one_by_one(self) -> bool:
        """Return whether a summary asks more than the latest FAM, which a chain of updates does not pass on."""
        return self.config.previous_blocks > 1

    def extra_of_blocks(
        self, layer: DecoderLayer, k: jax.Array, v: jax.Array, state: Any, at: FamFrames
    ) -> tuple[ExtraKeys, FamState]:
        """Update FAM over the complete blocks; return the M keys that each block sees (R = 1)."""
        model, length = self.model, self.config.length
        batch, tokens, *heads = k.shape
        full = tokens // model.block_size
        chain_k = chain_v = jnp.zeros((0, batch, length, *heads), k.dtype)
        fam = state.fam
        if full:
            # Each FAM's own rotation, then that of its frame in the chunk: (N, B or 1, M, 1, hd/2).
            rotation = at.own_fam.after(at.fams[:, :full]).map(lambda r: r.swapaxes(0, 1))
            keys, values = (x.reshape(batch, tokens, -1) for x in (k, v))
            inputs = ChainInputs(keys, values, rotation, jnp.ones((full, batch), bool))
            attention = ChainAttention(model.block_size, model.attention_softcap, model.attention)
            rows = jnp.concatenate([fam, state.summary_rows], axis=1)
            rows, (chain_k, chain_v) = run_chain(layer, rows, inputs, attention, self._update_both)
            fam = rows[:, :length]
        _, last_k, last_v = layer.project(fam)
        fam_k = rotate(jnp.concatenate([chain_k, last_k[None]]), at.own_fam).swapaxes(0, 1)
        fam_v = jnp.concatenate([chain_v, last_v[None]]).swapaxes(0, 1)  # (B, N + 1, M, K, hd)
        state = dataclasses.replace(state, fam=fam, fam_keys=fam_k[:, -1:], fam_values=fam_v[:, -1:])
        seen = slice(0, ceil_div(tokens, model.block_size))
        return ExtraKeys(rotate(fam_k, at.fams)[:, seen], fam_v[:, seen], None), state

    def _update_both(
        self, layer: DecoderLayer, rows: jax.Array, keep: jax.Array, attend: Attend, apply: Apply
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Update the first half of rows (B, 2 M, D), FAM, by the queries of the second, the summary tokens.

        A chain applies each projection once per update and differentiates what it carries, so it carries both.
        """
        length = self.config.length
        q, k, v = layer.project(rows, apply)
        k, v, summary = k[:, :length], v[:, :length], rows[:, length:]
        fam = layer.finish(attend(q[:, length:], k, v), self._residual(summary), apply)
        return jnp.concatenate([fam, summary], axis=1), (k, v)

    def _residual(self, summary: jax.Array) -> jax.Array:
        return summary if self.config.residual == "summary" else jnp.zeros_like(summary)

    def close_block(
        self, layer: DecoderLayer, state: Any, stream: Stream, position: Position
    ) -> tuple[FamState, Stream]:
        """Ask the last R FAMs and the block, then cache the block."""
        own, size = self._own_rotation(self.rope), self.model.block_size
        q, _, _ = layer.project(state.summary_rows)
        zero = self.config.positions == "zero"
        # In the frame of each FAM, which keys in the state have; with "zero", of the stream.
        past = [
            rotate(q, own if zero else own.after(self.rope.static(np.asarray(r * size))))
            for r in range(self.config.previous_blocks)
        ]
        fams = [
            Part(asked, state.fam_keys[:, r], state.fam_values[:, r], (position.blocks >= r)[:, None, None])
            for r, asked in enumerate(past)
        ]
        block = Part(rotate(q, self._in_frame_of_block(position)), state.block_keys, state.block_values)
        fam = layer.finish(self.attend_to_write(fams, block), self._residual(state.summary_rows))
        return shift_window(self._with_newest(layer, state, fam)), stream
