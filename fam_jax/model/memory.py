"""What the model remembers of a stream: an explicit value that goes in and comes out.

Its size depends on the config and the batch only, never on how much was read. Keys are cached rotated relative to
the first token of their *own* block, so nothing in a memory refers to an absolute position and a stream may run for
ever; only the count of blocks does, which the ablation `fam_positions="zero"` needs.
"""

import dataclasses

import jax
import jax.numpy as jnp

from fam_jax.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerMemory:
    """The part of a memory that each layer has its own of; in :class:`Memory` every array has a leading L axis."""

    keys: jax.Array  # (B, m, C, K, hd) of the last m complete blocks, oldest first
    values: jax.Array  # (B, m, C, K, hd)
    block_keys: jax.Array  # (B, C, K, hd) of the unfinished block; slots from Memory.filled on are unused
    block_values: jax.Array  # (B, C, K, hd)
    fam: jax.Array  # (B, M, D) feedback vectors after the last complete block
    fam_keys: jax.Array  # (B, R, M, K, hd) of the last R FAMs, newest first
    fam_values: jax.Array  # (B, R, M, K, hd)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Memory:
    """Memory of a batch of streams; rows may stand at different positions."""

    layers: LayerMemory  # with a leading L axis
    carries_context: (
        jax.Array
    )  # (B,) bool: the FAM has been updated; the initial one's first update has no residual
    blocks: jax.Array  # (B,) int32: complete blocks read
    filled: jax.Array  # (B,) int32: tokens in the unfinished block, below C


def empty_memory(config: ModelConfig, batch_size: int, *, past_slots: bool = True) -> Memory:
    """A memory of streams that have read nothing, with zeros in place of the initial FAM.

    Enough for an aligned call, which forms the initial FAM itself (and so gives it gradients); otherwise use
    `Transformer.init_memory`. Without `past_slots` there is not even room for cached blocks, and that call knows when
    it is compiled that there are none: the way to train.
    """
    layers, batch, dtype = config.num_layers, batch_size, config.dtype
    heads = (config.num_kv_heads, config.head_dim)
    segments, size = config.memory_segments if past_slots else 0, config.block_size
    length, previous = config.fam_length, config.fam_previous_blocks

    def zeros(*shape: int) -> jax.Array:
        return jnp.zeros((layers, batch, *shape), dtype)

    return Memory(
        layers=LayerMemory(
            keys=zeros(segments, size, *heads),
            values=zeros(segments, size, *heads),
            block_keys=zeros(size, *heads),
            block_values=zeros(size, *heads),
            fam=zeros(length, config.model_dim),
            fam_keys=zeros(previous, length, *heads),
            fam_values=zeros(previous, length, *heads),
        ),
        carries_context=jnp.zeros(batch, bool),
        blocks=jnp.zeros(batch, jnp.int32),
        filled=jnp.zeros(batch, jnp.int32),
    )


def with_fam(memory: Memory, fam: jax.Array, rows: jax.Array) -> Memory:
    """Starts the chosen rows of an empty memory from a saved FAM: random state passing (appendix B.2.3).

    For an aligned call, which projects the FAM anew. A saved FAM carries context, so its first update keeps its
    residual.

    Args:
      memory: that of B streams which have read nothing.
      fam: (L, M, D), shared by all the chosen rows.
      rows: (B,) bool.
    """
    fam = jnp.where(
        rows[None, :, None, None], fam[:, None].astype(memory.layers.fam.dtype), memory.layers.fam
    )
    return dataclasses.replace(
        memory,
        layers=dataclasses.replace(memory.layers, fam=fam),
        carries_context=memory.carries_context | rows,
    )
