"""Two small memories of kinds that the package does not have yet, to test the interface.

:class:`ReadWriteRows` has "segment" order, as RMT has: the top layer feeds the bottom one. :class:`AssociativeRows` has
"layer" order with rows that rise when a block closes, and changes the input of each layer, as ARMT does.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fam_jax.config import MemoryConfig, ModelConfig, group, setting
from fam_jax.kernels import Part, multi_part_attention
from fam_jax.layers.decoder_layer import DecoderLayer, Norm, embedding_stddev
from fam_jax.layers.rope import Rope, Rotation, rotate
from fam_jax.memories.interface import Memory, Stream, Tail
from fam_jax.memories.window_cache import BlockWindowConfig, Position, WindowState, shift_window


class Rows(nnx.Module):
    """Learned rows (M, D)."""

    def __init__(self, model: ModelConfig, length: int, rngs: nnx.Rngs):
        values = jax.random.normal(rngs.params(), (length, model.model_dim), jnp.float32)
        self.rows = nnx.Param(values * embedding_stddev(model))

    def of_batch(self, batch_size: int, dtype: str) -> jax.Array:
        """Return the rows (B, M, D)."""
        rows = self.rows[...].astype(dtype)
        return jnp.broadcast_to(rows, (batch_size, *rows.shape))


@group("model.memory", effect="state")
class ReadWriteConfig(BlockWindowConfig):
    """The group of :class:`ReadWriteRows`."""

    kind: str = setting(default="toy_read_write", doc="The architecture.")
    length: int = setting(default=2, doc="M, memory rows.", minimum=1, effect="parameters")

    parameter_axes: ClassVar[Mapping[str, tuple[str, ...]]] = {"rows": ("slots", "width")}

    @property
    def extra_keys(self) -> int:
        """Return M."""
        return self.length


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ReadWriteState(WindowState):
    """The window's cache, and keys and values (B, M, K, hd) of the read rows in one layer."""

    read_keys: Any
    read_values: Any


class ReadWriteRows(Memory[ReadWriteState]):
    """M rows are read before a block and written after it: [rows ; block ; rows] through all layers.

    Read rows see read rows, tokens see read rows and tokens causally, write rows see everything. The final norm of the
    write rows is the memory that the next block reads and writes.
    """

    Config: ClassVar[type[MemoryConfig]] = ReadWriteConfig
    State: ClassVar[type[WindowState]] = ReadWriteState
    order = "segment"

    def __init__(self, model: ModelConfig):
        super().__init__(model)
        self.length = model.memory.length  # type: ignore[attr-defined]

    def model_parameters(self, rngs: nnx.Rngs) -> nnx.Module:
        return Rows(self.model, self.length, rngs)

    def empty_fields(self, batch_size: int) -> dict[str, jax.Array]:
        model = self.model
        slots = jnp.zeros((batch_size, self.length, model.num_kv_heads, model.head_dim), model.dtype)
        return {"read_keys": slots, "read_values": slots}

    def start_shared(self, parameters: Any, batch_size: int) -> jax.Array:
        return parameters.of_batch(batch_size, self.model.dtype)

    def enter_at(self, rope: Rope) -> Rotation:
        return rope.static(np.arange(-self.length, 0))

    def enter_stream(self, parameters: Any, shared: Any) -> Stream:
        return shared

    def enter(
        self, layer: DecoderLayer, state: ReadWriteState, stream: Stream, at: Rotation
    ) -> tuple[ReadWriteState, Stream]:
        q, k, v = layer.project(stream)
        k = rotate(k, at)
        out = layer.finish(multi_part_attention([Part(rotate(q, at), k, v)]), stream)
        return dataclasses.replace(state, read_keys=k, read_values=v), out

    def extra_of_piece(
        self, layer: DecoderLayer, q: jax.Array, state: ReadWriteState, at: Any
    ) -> Sequence[Part]:
        return [Part(rotate(q, at.own), state.read_keys, state.read_values)]

    def close_stream(self, parameters: Any, shared: Any, batch_size: int) -> Stream:
        return shared

    def close_block(
        self, layer: DecoderLayer, state: ReadWriteState, stream: Stream, position: Position
    ) -> tuple[ReadWriteState, Stream]:
        q, k, v = layer.project(stream)
        after = self.rope.static(self.model.block_size + np.arange(self.length))
        q, k = rotate(q, after), rotate(k, after)
        itself = [Part(q, state.read_keys, state.read_values), Part(q, k, v)]
        attended = self.attend_to_write(itself, Part(q, state.block_keys, state.block_values))
        return shift_window(state), layer.finish(attended, stream)

    def next_shared(self, norm: Norm, shared: Any, stream: Stream) -> jax.Array:
        return norm(stream)


@group("model.memory", effect="state")
class AssociativeConfig(BlockWindowConfig):
    """The group of :class:`AssociativeRows`."""

    kind: str = setting(default="toy_associative", doc="The architecture.")
    length: int = setting(default=2, doc="M, memory rows.", minimum=1, effect="parameters")

    parameter_axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "rows": ("slots", "width"),
        "ask": ("width", "norm"),
        "store_key": ("width", "norm"),
        "store_value": ("width", "norm"),
    }


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AssociativeState(WindowState):
    """The window's cache and the matrix (B, D, D) of one layer, float32 or wider."""

    matrix: Any


class Associations(nnx.Module):
    """The weights with which a layer queries its matrix and stores in it, each (D, D)."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.ask, self.store_key, self.store_value = (
            nnx.Param(jax.random.normal(rngs.params(), (width, width), jnp.float32) / width) for _ in range(3)
        )


class AssociativeRows(Memory[AssociativeState]):
    """Each layer adds the answer of its matrix A to its input x: x + sigmoid(x Wq) A.

    When a block closes, learned rows rise through the layers after the block's tokens. Each layer adds its output u for
    these rows to its matrix: A + sum sigmoid(u Wk)^T tanh(u Wv).
    """

    Config: ClassVar[type[MemoryConfig]] = AssociativeConfig
    State: ClassVar[type[WindowState]] = AssociativeState

    def __init__(self, model: ModelConfig):
        super().__init__(model)
        self.length = model.memory.length  # type: ignore[attr-defined]

    def layer_parameters(self, rngs: nnx.Rngs) -> nnx.Module:
        return Associations(self.model.model_dim, rngs)

    def model_parameters(self, rngs: nnx.Rngs) -> nnx.Module:
        return Rows(self.model, self.length, rngs)

    def empty_fields(self, batch_size: int) -> dict[str, jax.Array]:
        width, dtype = self.model.model_dim, jnp.promote_types(self.model.dtype, jnp.float32)
        return {"matrix": jnp.zeros((batch_size, width, width), dtype)}

    def with_answer(self, layer: DecoderLayer, x: jax.Array, state: AssociativeState) -> jax.Array:
        """Return x (B, T, D) plus the matrix's answer."""
        asked = jax.nn.sigmoid(x @ layer.memory.ask[...].astype(x.dtype))
        return x + (asked @ state.matrix).astype(x.dtype)

    def read_piece(
        self, layer: DecoderLayer, x: jax.Array, state: AssociativeState, at: Any
    ) -> tuple[jax.Array, Tail]:
        return super().read_piece(layer, self.with_answer(layer, x, state), state, at)

    def close_stream(self, parameters: Any, shared: Any, batch_size: int) -> Stream:
        return parameters.of_batch(batch_size, self.model.dtype)

    def close_block(
        self, layer: DecoderLayer, state: AssociativeState, stream: Stream, position: Position
    ) -> tuple[AssociativeState, Stream]:
        rows = self.with_answer(layer, stream, state)
        q, k, v = layer.project(rows)
        after = self.rope.static(self.model.block_size + np.arange(self.length))
        q, k = rotate(q, after), rotate(k, after)
        parts = [Part(q, state.block_keys, state.block_values), Part(q, k, v)]
        out = layer.finish(multi_part_attention(parts), rows)
        keys = jax.nn.sigmoid(out @ layer.memory.store_key[...].astype(out.dtype))
        values = jnp.tanh(out @ layer.memory.store_value[...].astype(out.dtype))
        stored = jnp.einsum("bmd,bme->bde", keys, values, preferred_element_type=state.matrix.dtype)
        return shift_window(dataclasses.replace(state, matrix=state.matrix + stored)), out
