"""Associative Recurrent Memory Transformer (Rodkin et al. 2024): each layer has a matrix that memory rows write to."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fam_jax.config import MemoryConfig, ModelConfig, group, require, setting
from fam_jax.kernels import Part, causal_rows
from fam_jax.layers.decoder_layer import DecoderLayer
from fam_jax.layers.fsdp import keep_rows
from fam_jax.layers.rope import rotate
from fam_jax.memories.interface import Stream, Tail
from fam_jax.memories.learned_rows import LearnedRows, embedded_rows
from fam_jax.memories.window import ChunkFrames, Window
from fam_jax.memories.window_cache import BlockWindowConfig, Position, WindowState, shift_window

# Added to the sum of weights that what is recalled is divided by, as in the authors' code.
EPSILON = 1e-5


@group("model.memory", effect="state")
class ArmtConfig(BlockWindowConfig):
    """Memory rows that store what they read of a block in an associative matrix of each layer."""

    kind: str = setting(default="armt", doc="The architecture.")
    segments: int = setting(
        default=0, doc="m, past blocks that stay visible to attention; 0 in the paper.", minimum=0
    )
    length: int = setting(
        default=8, doc="M, memory rows, each of which stores one association.", minimum=1, effect="parameters"
    )
    key_dim: int = setting(
        default=64,
        doc="Width of keys and queries of the matrix, before DPFP.",
        minimum=1,
        effect="parameters",
    )
    dpfp_nu: int = setting(
        default=3, doc="nu of DPFP: the matrix has 2 * nu * key_dim rows.", minimum=1, effect="parameters"
    )
    correction: bool = setting(
        default=True,
        doc="Let a key add to the normalizer only as far as it is new (gamma in the paper). False: all of it.",
    )

    parameter_axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "memory_rows": ("slots", "width"),
        "recall_query": ("width", "norm"),
        "write_key": ("width", "norm"),
        "write_value": ("width", "norm"),
        "write_gate": ("norm",),
        "write_gate_bias": (),
    }

    @property
    def features(self) -> int:
        """Return 2 * nu * key_dim, the rows of the matrix."""
        return 2 * self.dpfp_nu * self.key_dim

    def read_products(self, model: ModelConfig) -> int:
        """Return those of the query, of the matrix and of the normalizer."""
        return model.model_dim * self.key_dim + self.features * (model.model_dim + 1)

    def check_model(self, model: ModelConfig) -> None:
        """Raise :class:`ConfigError` if DPFP would multiply a feature by itself."""
        require(
            self.dpfp_nu < 2 * self.key_dim,
            f"config.model.memory.dpfp_nu: {self.dpfp_nu} is not below 2 * key_dim = {2 * self.key_dim}",
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class ArmtState(WindowState):
    """The window's cache and the associations of one layer, float32 or wider."""

    # (B, F, D) A, with F = 2 * nu * key_dim.
    associative_matrix: Any
    # (B, F) z.
    associative_normalizer: Any


class Associations(NamedTuple):
    """A matrix (B, F, D) from features of keys to values, and its normalizer (B, F)."""

    matrix: jax.Array
    normalizer: jax.Array


class AssociativeParameters(nnx.Module):
    """The weights with which a layer asks its matrix and writes to it.

    Values start at zero, as in the authors' code: a new model reads zeros, and a trained one that changes to this
    memory computes what it did.
    """

    def __init__(self, model: ModelConfig, config: ArmtConfig, rngs: nnx.Rngs):
        width = model.model_dim

        def normal(*shape: int) -> nnx.Param:
            return nnx.Param(jax.random.normal(rngs.params(), shape, jnp.float32) * width**-0.5)

        # Wq and Wk (D, dm), Wv (D, D), wb (D,) and bb () of the paper.
        self.recall_query = normal(width, config.key_dim)
        self.write_key = normal(width, config.key_dim)
        self.write_value = nnx.Param(jnp.zeros((width, width), jnp.float32))
        self.write_gate = normal(width)
        self.write_gate_bias = nnx.Param(jnp.zeros((), jnp.float32))


class AssociativeRecurrentMemory(Window[ArmtState]):
    """Each layer adds to its input what its matrix recalls; M rows rise after each block and write to the matrices.

    The keys and values of a block's tokens depend on the state, but the tokens' outputs are not needed to write. So a
    scan over blocks recalls, projects keys and values, takes the M rows through the layer and writes. Then all tokens
    of a chunk attend and go through the rest of the layer at once.
    """

    Config: ClassVar[type[MemoryConfig]] = ArmtConfig
    State: ClassVar[type[WindowState]] = ArmtState

    config: ArmtConfig

    def __init__(self, model: ModelConfig):
        super().__init__(model)
        assert isinstance(model.memory, ArmtConfig)
        self.config = model.memory
        self.sum_dtype = jnp.promote_types(model.dtype, jnp.float32)

    def layer_parameters(self, rngs: nnx.Rngs) -> nnx.Module:
        """Create the weights of a layer's matrix."""
        return AssociativeParameters(self.model, self.config, rngs)

    def model_parameters(self, rngs: nnx.Rngs) -> nnx.Module:
        """Create the memory rows, the same for every block."""
        return LearnedRows(self.model, "memory_rows", self.config.length, rngs)

    def initial_parameters(self, table: jax.Array, seed: int) -> Mapping[str, jax.Array]:
        """Return the embeddings of random tokens for the memory rows."""
        tokens = jax.random.randint(jax.random.key(seed), (self.config.length,), 0, table.shape[0])
        return {"memory/memory_rows": embedded_rows(self.model, table, tokens)}

    def empty_fields(self, batch_size: int) -> dict[str, jax.Array]:
        """Return a matrix and a normalizer of zero."""
        features = self.config.features
        return {
            "associative_matrix": jnp.zeros((batch_size, features, self.model.model_dim), self.sum_dtype),
            "associative_normalizer": jnp.zeros((batch_size, features), self.sum_dtype),
        }

    def close_stream(self, parameters: Any, shared: Any, batch_size: int) -> Stream:
        """Return the memory rows (B, M, D)."""
        return parameters.of_batch(batch_size, self.model.dtype)

    def read_piece(
        self, layer: DecoderLayer, x: jax.Array, state: ArmtState, at: Any
    ) -> tuple[jax.Array, Tail]:
        """Add what the matrix recalls to the layer's input, then read as usual."""
        return super().read_piece(layer, self.with_recalled(layer, x, _associations_of(state)), state, at)

    def read_blocks(
        self, layer: DecoderLayer, x: jax.Array, state: ArmtState, streams: Stream, at: ChunkFrames
    ) -> tuple[jax.Array, ArmtState, Stream]:
        """Recall and write block by block; then read all tokens of the chunk at once."""
        size, batch, length = self.model.block_size, *x.shape[:2]
        full = length // size

        def body(associations: Associations, block: tuple[jax.Array, jax.Array]) -> tuple[Associations, Any]:
            tokens, rows = map(keep_rows, block)
            tokens = self.with_recalled(layer, tokens, associations)
            _, k, v = layer.project(tokens)
            rows, associations = self.write(layer, rows, rotate(k, at.own_tokens), v, associations)
            return associations, ((tokens, k, v), rows)

        blocks = x[:, : full * size].reshape(batch, full, size, x.shape[2]).swapaxes(0, 1)
        body = jax.checkpoint(body, prevent_cse=False)
        associations, (read, streams) = jax.lax.scan(body, _associations_of(state), (blocks, streams))
        rest = self.with_recalled(layer, x[:, full * size :], associations)
        _, *rest_of_keys = layer.project(rest)

        def in_order(blocks: jax.Array, rest: jax.Array) -> jax.Array:
            """Return (B, T, ...) of (N, B, C, ...) and (B, T - N * C, ...)."""
            blocks = blocks.swapaxes(0, 1).reshape(batch, full * size, *blocks.shape[3:])
            return jnp.concatenate([blocks, rest], axis=1)

        x, k, v = map(in_order, read, (rest, *rest_of_keys))
        q, *_ = layer.project(x)
        attended, state = self.attend_blocks(layer, q, k, v, state, at)
        state = dataclasses.replace(
            state,
            associative_matrix=associations.matrix,
            associative_normalizer=associations.normalizer,
        )
        return layer.finish(attended, x), state, streams

    def close_block(
        self, layer: DecoderLayer, state: ArmtState, stream: Stream, position: Position
    ) -> tuple[ArmtState, Stream]:
        """Take the memory rows through the layer, and write what they have become to the matrix."""
        associations = _associations_of(state)
        rows, after = self.write(layer, stream, state.block_keys, state.block_values, associations)
        state = dataclasses.replace(
            state, associative_matrix=after.matrix, associative_normalizer=after.normalizer
        )
        return shift_window(state), rows

    def with_recalled(self, layer: DecoderLayer, x: jax.Array, associations: Associations) -> jax.Array:
        """Return x (B, T, D) plus what the matrix recalls for it."""
        query = x @ layer.memory.recall_query[...].astype(x.dtype)
        return x + _recall(self.dpfp(query), associations)[0].astype(x.dtype)

    def write(
        self, layer: DecoderLayer, rows: jax.Array, k: jax.Array, v: jax.Array, associations: Associations
    ) -> tuple[jax.Array, Associations]:
        """Take the memory rows through the layer after the tokens of a block, and write to the matrix.

        Args:
          layer: the layer.
          rows: (B, M, D) the rows from the layer below.
          k: (B, C, K, hd) keys of the block, rotated in its frame.
          v: (B, C, K, hd) their values.
          associations: those before the block.

        Returns:
          (B, M, D) the rows for the layer above, and the associations after the block.
        """
        rows = self.with_recalled(layer, rows, associations)
        q, own_k, own_v = layer.project(rows)
        length = self.config.length
        after = self.rope.static(self.model.block_size + np.arange(length))
        q, own_k = rotate(q, after), rotate(own_k, after)
        itself = Part(q, own_k, own_v, causal_rows(length, length))
        attended = self.attend_to_write([itself], Part(q, k, v))
        rows = layer.finish(attended, rows)
        return rows, self.stored(layer, rows, associations)

    def stored(self, layer: DecoderLayer, rows: jax.Array, associations: Associations) -> Associations:
        """Return the associations after the rows (B, M, D) have written to them, all against the same old ones."""
        own, dtype = layer.memory, self.sum_dtype
        keys = self.dpfp(rows @ own.write_key[...].astype(rows.dtype))
        values = (rows @ own.write_value[...].astype(rows.dtype)).astype(dtype)
        gate = rows.astype(dtype) @ own.write_gate[...].astype(dtype) + own.write_gate_bias[...].astype(dtype)
        known, overlap = _recall(keys, associations)
        change = jax.nn.sigmoid(gate)[..., None] * (values - known)
        new = jnp.ones_like(overlap)
        if self.config.correction:
            size = jnp.square(keys).sum(axis=-1) + EPSILON
            share = jax.lax.stop_gradient(jnp.clip(1 - overlap / size, 0, 1))
            # While nothing is stored, all of a key is new.
            new = jnp.where(associations.normalizer.any(axis=-1)[:, None], share, new)
        return Associations(
            associations.matrix + jnp.einsum("bmf,bmd->bfd", keys, change),
            associations.normalizer + jnp.einsum("bmf,bm->bf", keys, new),
        )

    def dpfp(self, x: jax.Array) -> jax.Array:
        """Return the features (..., F) of x (..., dm) by DPFP-nu (Schlag et al. 2021), in the dtype of sums."""
        x = x.astype(self.sum_dtype)
        both = jnp.concatenate([jax.nn.relu(x), jax.nn.relu(-x)], axis=-1)
        shifted = [both * jnp.roll(both, shift, axis=-1) for shift in range(1, self.config.dpfp_nu + 1)]
        return jnp.concatenate(shifted, axis=-1)


def _associations_of(state: ArmtState) -> Associations:
    return Associations(state.associative_matrix, state.associative_normalizer)


def _recall(features: jax.Array, associations: Associations) -> tuple[jax.Array, jax.Array]:
    """Return the recalled values (B, T, D) for features (B, T, F), and the overlap (B, T) with what is stored."""
    overlap = jnp.einsum("btf,bf->bt", features, associations.normalizer) + EPSILON
    found = jnp.einsum("btf,bfd->btd", features, associations.matrix)
    return found / overlap[..., None], overlap
