"""Feedback Attention Memory (section 2.2, algorithm 2): each layer attends to its own latent vectors."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fam_jax.config import MemoryConfig, ModelConfig, ceil_div, group, require, setting
from fam_jax.kernels import Part, multi_part_attention
from fam_jax.layers.decoder_layer import Apply, DecoderLayer, apply_linear
from fam_jax.layers.rope import Rope, Rotation, rotate
from fam_jax.memories.chain import Attend, ChainAttention, ChainInputs, run_chain, update_vectors
from fam_jax.memories.interface import Stream
from fam_jax.memories.learned_rows import LearnedRows, embedded_rows
from fam_jax.memories.window import ChunkFrames, ExtraKeys, Window
from fam_jax.memories.window_cache import (
    BlockWindowConfig,
    PieceFrames,
    Position,
    WindowState,
    piece_frames,
    shift_window,
)


@group("model.memory", effect="state")
class FamConfig(BlockWindowConfig):
    """Feedback Attention Memory beside Block Sliding Window Attention."""

    kind: str = setting(default="fam", doc="The architecture.")
    length: int = setting(
        default=8,
        doc="M, feedback vectors of a layer; 0 is Block Sliding Window Attention.",
        minimum=0,
        effect="parameters",
    )
    init: str = setting(
        default="prompt",
        doc="Initial FAM. prompt: learned vectors that rise through the layers. prefix: learned vectors of each layer "
        "(appendix B.1).",
        choices=("prompt", "prefix"),
        effect="parameters",
    )
    positions: str = setting(
        default="last",
        doc="Positions of FAM (appendix B.2.1). last: those of the last M tokens of its block. float: spread between "
        "two blocks. zero: the beginning of the stream.",
        choices=("last", "float", "zero"),
    )
    previous_blocks: int = setting(
        default=1, doc="R, past blocks whose FAM a token sees (appendix B.4.2).", minimum=1
    )
    bound: float = setting(
        default=0.0,
        doc="c, largest root mean square of a FAM vector as it is added to its update; 0: no bound, as in the paper. "
        "FAM then stays as easy to change after any number of blocks.",
        minimum=0,
    )
    noise: float = setting(
        default=0.0,
        doc="Training only: standard deviation of the Gaussian noise that each update of FAM gets, relative to its "
        "root mean square.",
        minimum=0,
        effect="training",
    )

    parameter_axes: ClassVar[Mapping[str, tuple[str, ...]]] = {"initial_fam": ("slots", "width")}

    @property
    def has_state(self) -> bool:
        """Return whether there is a FAM."""
        return self.length > 0

    @property
    def extra_keys(self) -> int:
        """Return R * M."""
        return self.previous_blocks * self.length

    def extra_keys_of_block(self, block: int) -> int:
        """Return M for each FAM that exists: the initial one, and those after the blocks before."""
        return self.length * min(self.previous_blocks, block + 1)

    @property
    def chained_rows(self) -> int:
        """Return M."""
        return self.length

    @property
    def noisy(self) -> bool:
        """Return whether training adds noise to FAM."""
        return self.noise > 0

    def check_model(self, model: ModelConfig) -> None:
        """Raise :class:`ConfigError` if FAM is longer than the block that it takes its positions from."""
        require(
            self.length <= model.block_size,
            f"config.model.memory.length: {self.length} is longer than block_size {model.block_size}",
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class FamState(WindowState):
    """The window's cache and FAM of one layer."""

    # (B, M, D) feedback vectors after the last complete block, float32 or wider: FAM adds to itself at every block, and
    # in a narrower type an update would soon be too small to change it.
    fam: Any
    # (B, R, M, K, hd) keys, rotated in FAM's own frame, and values of the last R FAMs, newest first.
    fam_keys: Any
    fam_values: Any


class FamFrames(NamedTuple):
    """Frames of a chunk with FAM."""

    window: ChunkFrames
    # (B or 1, R + full blocks, 1, 1, hd/2), from each FAM's own frame; the FAMs are F_{-R} .. F_last.
    fams: Rotation
    # (M, 1, hd/2), in a FAM's own frame.
    own_fam: Rotation
    # (B, N) feedback keys that exist; None: all.
    fam_count: jax.Array | None
    # (B,) bool, as in Position.
    carries_context: jax.Array
    # (full blocks, B, M, D), as in ChainInputs; the same for all layers.
    noise: jax.Array | None


class FamPieceFrames(NamedTuple):
    """Frames of a piece with FAM."""

    window: PieceFrames
    # R rotations (B, W, 1, hd/2), into the frame of each FAM, newest first.
    fams: list[Rotation]
    # R masks (B, 1, 1): whether each FAM exists.
    fam_masks: list[jax.Array]


class FeedbackAttentionMemory(Window[FamState]):
    """M vectors per layer that attend to themselves and to a block; the next block's tokens attend to them.

    The recurrence stays within a layer and passes through M vectors per block. So each layer projects all tokens at
    once, scans over the blocks to update FAM (M / C of the tokens' work), and then lets all tokens attend at once.
    """

    Config: ClassVar[type[MemoryConfig]] = FamConfig
    State: ClassVar[type[WindowState]] = FamState

    config: FamConfig

    def __init__(self, model: ModelConfig):
        super().__init__(model)
        assert isinstance(model.memory, FamConfig)
        self.config = model.memory

    def layer_parameters(self, rngs: nnx.Rngs) -> nnx.Module | None:
        """Create the initial FAM of a layer, if each layer has its own."""
        return self._initial(rngs) if self.config.init == "prefix" else None

    def model_parameters(self, rngs: nnx.Rngs) -> nnx.Module | None:
        """Create the prompt from which all layers' initial FAMs are computed, unless each has its own."""
        return self._initial(rngs) if self.config.init == "prompt" else None

    def _initial(self, rngs: nnx.Rngs) -> LearnedRows | None:
        """Create learned vectors (M, D) at the scale of embeddings (appendix B.1)."""
        length = self.config.length
        return LearnedRows(self.model, "initial_fam", length, rngs) if length else None

    def initial_parameters(self, table: jax.Array, seed: int) -> Mapping[str, jax.Array]:
        """Return the embeddings of random tokens for the initial FAM."""
        model, config = self.model, self.config
        if not config.length:
            return {}
        layers = (model.num_layers,) if config.init == "prefix" else ()
        tokens = jax.random.randint(jax.random.key(seed), (*layers, config.length), 0, table.shape[0])
        path = "layers/memory/initial_fam" if layers else "memory/initial_fam"
        return {path: embedded_rows(model, table, tokens)}

    @property
    def _state_dtype(self) -> Any:
        return jnp.promote_types(self.model.dtype, jnp.float32)

    @property
    def passed_fields(self) -> tuple[str, ...]:
        """Return "fam" alone: reading blocks recomputes the keys of the FAM that it starts from."""
        return ("fam",)

    def empty_fields(self, batch_size: int) -> dict[str, jax.Array]:
        """Return zeros for FAM and its keys and values."""
        model, config = self.model, self.config
        keys = (batch_size, config.previous_blocks, config.length, model.num_kv_heads, model.head_dim)
        return {
            "fam": jnp.zeros((batch_size, config.length, model.model_dim), self._state_dtype),
            "fam_keys": jnp.zeros(keys, model.dtype),
            "fam_values": jnp.zeros(keys, model.dtype),
        }

    def state_axes(self) -> dict[str, tuple[str | None, ...]]:
        """Return the logical axes of a layer's state: keys and values are divided by head."""
        heads = ("batch", None, None, "kv_heads", None)
        return super().state_axes() | {"fam_keys": heads, "fam_values": heads}

    def enter_at(self, rope: Rope) -> Rotation:
        """Return the rotation (M, 1, hd/2) of FAM in the frame of the block that follows it."""
        return self._own_rotation(rope)

    def enter_stream(self, parameters: Any, shared: Any) -> Stream:
        """Return the prompt (1, M, D)."""
        return None if parameters is None else parameters.initial_fam[...].astype(self._state_dtype)[None]

    def enter(self, layer: DecoderLayer, state: FamState, stream: Stream, at: Any) -> tuple[FamState, Stream]:
        """Set the initial FAM, and pass the prompt up through the layer (appendix B.1)."""
        if not self.config.length:
            return state, stream
        if stream is not None:
            initial, stream = stream, raise_prompt(layer, stream, at)
        else:
            assert layer.memory is not None
            initial = layer.memory.initial_fam[...][None]
        initial = initial.astype(state.fam.dtype)
        _, k, v = layer.project(initial)

        def newest(fams: jax.Array, x: jax.Array) -> jax.Array:
            return fams.at[:, 0].set(jnp.broadcast_to(x, fams[:, 0].shape).astype(fams.dtype))

        state = dataclasses.replace(
            state,
            fam=jnp.broadcast_to(initial, state.fam.shape),
            fam_keys=newest(state.fam_keys, rotate(k, at)),
            fam_values=newest(state.fam_values, v),
        )
        return state, stream

    def blocks_at(self, position: Position, length: int, cached: int) -> FamFrames:
        """Return the frames of a chunk."""
        rope, size, previous = self.rope, self.model.block_size, self.config.previous_blocks
        full, blocks = length // size, ceil_div(length, size)
        shift = jnp.zeros(1, jnp.int32) if position.offset is None else position.offset
        fam_blocks = np.arange(-(previous - 1), full + 1)  # the block that follows each FAM
        if self.config.positions == "zero":
            # Position zero of the stream is as many blocks before the chunk as the row has read.
            fams = rope.at(-position.blocks, unit=size)[:, None, None]
            fams = fams.map(lambda x: jnp.broadcast_to(x, (x.shape[0], len(fam_blocks), *x.shape[2:])))
        else:
            fams = rope.at(shift[:, None] + size * fam_blocks)[:, :, None]
        existing = jnp.minimum(position.blocks, previous)[:, None] + np.arange(1, blocks + 1)
        return FamFrames(
            window=super().blocks_at(position, length, cached),
            fams=fams,
            own_fam=self._own_rotation(rope),
            fam_count=jnp.minimum(existing, previous) * self.config.length if previous > 1 else None,
            carries_context=position.carries_context,
            noise=self._noise(position, full),
        )

    def _noise(self, position: Position, blocks: int) -> jax.Array | None:
        if position.noise_keys is None or not self.config.noise:
            return None
        shape = (blocks, self.config.length, self.model.model_dim)

        def draw(key: jax.Array, blocks: jax.Array) -> jax.Array:
            # A row may be read in several calls.
            return jax.random.normal(jax.random.fold_in(key, blocks), shape, self._state_dtype)

        draws = jax.vmap(draw)(position.noise_keys, position.blocks)
        return self.config.noise * draws.swapaxes(0, 1)

    def window_frames(self, at: FamFrames) -> ChunkFrames:
        """Return the window's part of the frames."""
        return at.window

    def extra_of_blocks(
        self, layer: DecoderLayer, k: jax.Array, v: jax.Array, state: FamState, at: FamFrames
    ) -> tuple[ExtraKeys, FamState]:
        """Update FAM over the complete blocks; return the R * M feedback keys of each block, newest FAM first."""
        if not self.config.length:
            return super().extra_of_blocks(layer, k, v, state, at)
        previous, blocks = self.config.previous_blocks, ceil_div(k.shape[1], self.model.block_size)
        fam, chain_k, chain_v = self._update_by_block(layer, k, v, state.fam, at)
        _, last_k, last_v = layer.project(fam)

        # All FAMs in order of time, in their own frames: older ones from the state, those before each block, the last.
        def in_order(older: jax.Array, chained: jax.Array, last: jax.Array) -> jax.Array:
            return jnp.concatenate([older[:, :0:-1], chained.swapaxes(0, 1), last[:, None]], axis=1)

        fresh_k = rotate(jnp.concatenate([chain_k, last_k[None]]), at.own_fam)
        keys = in_order(state.fam_keys, fresh_k[:-1], fresh_k[-1])  # (B, R + full, M, K, hd)
        values = in_order(state.fam_values, chain_v, last_v)

        def seen(a: jax.Array) -> jax.Array:
            """Return (B, N, R * M, K, hd): for each block the R FAMs before it, newest first."""
            return jnp.concatenate([a[:, i : i + blocks] for i in range(previous - 1, -1, -1)], axis=2)

        newest = slice(-1, -previous - 1, -1)
        state = dataclasses.replace(state, fam=fam, fam_keys=keys[:, newest], fam_values=values[:, newest])
        return ExtraKeys(seen(rotate(keys, at.fams)), seen(values), at.fam_count), state

    def _update_by_block(
        self, layer: DecoderLayer, k: jax.Array, v: jax.Array, fam: jax.Array, at: FamFrames
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return FAM after the complete blocks of the rotated k and v, and keys and values of the FAM before each."""
        model, previous = self.model, self.config.previous_blocks
        batch, length, kv_heads, head_dim = k.shape
        full = length // model.block_size
        if full == 0:
            nothing = jnp.zeros((0, batch, self.config.length, kv_heads, head_dim), k.dtype)
            return fam, nothing, nothing
        # The rotation of the FAM before each block: its own, then that of its frame in the chunk.
        before = at.fams[:, previous - 1 : previous - 1 + full]
        rotation = at.own_fam.after(before).map(lambda r: r.swapaxes(0, 1))  # (N, B or 1, M, 1, hd/2)
        keep = at.carries_context[None] | (np.arange(full) > 0)[:, None]
        keys, values = (x.reshape(batch, length, -1) for x in (k, v))
        inputs = ChainInputs(keys, values, rotation, jnp.broadcast_to(keep, (full, batch)), at.noise)
        attention = ChainAttention(model.block_size, model.attention_softcap, model.attention)
        fam, (chain_k, chain_v) = run_chain(layer, fam, inputs, attention, self._update)
        return fam, chain_k, chain_v

    def _update(
        self,
        layer: DecoderLayer,
        fam: jax.Array,
        keep: jax.Array,
        attend: Attend,
        apply: Apply = apply_linear,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Update FAM once; see :func:`fam_jax.memories.chain.update_vectors`."""
        return update_vectors(layer, fam, keep, attend, apply, bound=self.config.bound)

    def piece_at(self, position: Position, width: int) -> FamPieceFrames:
        """Return the frames of a piece."""
        size, previous = self.model.block_size, range(self.config.previous_blocks)
        window = piece_frames(self.model, self.rope, position, width)
        if self.config.positions == "zero":
            place = window.own.after(self.rope.at(position.blocks, unit=size)[:, None])
            if position.offset is not None:
                place = place.after(self.rope.at(position.offset)[:, None])
            fams = [place for _ in previous]
        else:
            fams = [window.own.after(self.rope.static(np.asarray(r * size))) for r in previous]
        return FamPieceFrames(window, fams, [(position.blocks >= r)[:, None, None] for r in previous])

    def window_piece_frames(self, at: FamPieceFrames) -> PieceFrames:
        """Return the window's part of the frames."""
        return at.window

    def extra_of_piece(
        self, layer: DecoderLayer, q: jax.Array, state: FamState, at: FamPieceFrames
    ) -> list[Part]:
        """Return the last R FAMs' keys and values."""
        if not self.config.length:
            return []
        return [
            Part(rotate(q, rotation), state.fam_keys[:, r], state.fam_values[:, r], mask)
            for r, (rotation, mask) in enumerate(zip(at.fams, at.fam_masks, strict=True))
        ]

    def close_block(
        self, layer: DecoderLayer, state: FamState, stream: Stream, position: Position
    ) -> tuple[FamState, Stream]:
        """Update FAM from the block, then cache the block."""
        if not self.config.length:
            return shift_window(state), stream
        rotation = self._in_frame_of_block(position)

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            q, k = rotate(q, rotation), rotate(k, rotation)
            return self.attend_to_write([Part(q, k, v)], Part(q, state.block_keys, state.block_values))

        fam, _ = self._update(layer, state.fam, position.carries_context, attend)
        return shift_window(self._with_newest(layer, state, fam)), stream

    def _in_frame_of_block(self, position: Position) -> Rotation:
        """Return the rotation (1, M, 1, hd/2) of F_{tau-1} in the frame of block tau, or (B, 1, 1, hd/2) for "zero"."""
        if self.config.positions != "zero":
            return self._own_rotation(self.rope)[None]
        # All M vectors are at one position.
        rotation = self.rope.at(-position.blocks, unit=self.model.block_size)[:, None]
        return (
            rotation if position.offset is None else rotation.after(self.rope.at(-position.offset)[:, None])
        )

    def _with_newest(self, layer: DecoderLayer, state: FamState, fam: jax.Array) -> FamState:
        """Return the state with a new FAM (B, M, D), and its keys and values as the newest of R."""
        _, k, v = layer.project(fam)
        k = rotate(k, self._own_rotation(self.rope))
        return dataclasses.replace(
            state,
            fam=fam,
            fam_keys=jnp.concatenate([k[:, None], state.fam_keys[:, :-1]], axis=1),
            fam_values=jnp.concatenate([v[:, None], state.fam_values[:, :-1]], axis=1),
        )

    def ablate(self, state: FamState, initial: FamState, how: str) -> FamState:
        """Zero, shuffle or freeze FAM. Freezing replaces every past FAM by the initial one."""
        state = super().ablate(state, initial, how)
        if how != "frozen":
            return state

        def first(name: str) -> jax.Array:
            fams = getattr(initial, name)
            return jnp.broadcast_to(fams[:, :, :1], fams.shape)

        return dataclasses.replace(state, fam_keys=first("fam_keys"), fam_values=first("fam_values"))

    def _own_rotation(self, rope: Rope) -> Rotation:
        """Return the rotation (M, 1, hd/2) of F_{tau-1} in the frame of block tau (appendix B.2.1).

        "last": the positions of the last M tokens before the block. "float": spread evenly between the last token
        before the block and its first. "zero": no rotation; such a FAM's frame is that of the whole stream.
        """
        length = self.config.length
        index = np.arange(length)
        if self.config.positions == "last":
            return rope.static(index - length)
        if self.config.positions == "float":
            return rope.static((index + 1) / (length + 1) - 1)
        return rope.static(0 * index)


def raise_prompt(layer: DecoderLayer, prompt: jax.Array, rotation: Rotation) -> jax.Array:
    """Pass the prompt (1, M, D) up through a layer, with full attention to itself (appendix B.1).

    The prompt never sees tokens. If it did, tokens of the first block would see their own future one layer up.
    """
    q, k, v = layer.project(prompt)
    itself = Part(rotate(q, rotation), rotate(k, rotation), v)
    return layer.finish(multi_part_attention([itself], softcap=layer.attention_softcap), prompt)
