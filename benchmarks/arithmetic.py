"""What FAM should cost: floating-point operations of a forward pass, counted from the shapes.

The backward pass of a matrix product is two products of the same size, so the ratio of two counts is also that of two
training steps, if all operations ran equally fast. They do not: FAM's products have few rows, and they wait for each
other. The measured ratio lies above the expected one by as much.
"""

import dataclasses

from fam_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Flops:
    """Multiplications and additions of matrix products, forward, per batch."""

    tokens_dense: int  # projections and feed-forward of all layers, and logits
    tokens_attention: int  # to the memory segment and the own block, masked pairs included: they are computed
    fam_dense: int  # projections and feed-forward of FAM: M / C of the tokens'
    fam_attention: int  # of FAM to itself and its block
    fam_read: int  # attention of tokens to FAM

    @property
    def ratio(self) -> float:
        """With FAM against without."""
        with_fam = self.fam_dense + self.fam_attention + self.fam_read
        return 1 + with_fam / (self.tokens_dense + self.tokens_attention)


def count_flops(config: ModelConfig, batch: int, length: int) -> Flops:
    """For `batch` rows of `length` tokens, a multiple of C.

    A product of (a, b) and (b, c) counts 2abc. FAM passes through a layer's weights once per block; beyond that, once
    as the prompt that makes the initial FAM, and the last FAM of each row through keys and values only.
    """
    layers, width, heads, kv_heads = (
        config.num_layers,
        config.model_dim,
        config.num_heads,
        config.num_kv_heads,
    )
    tokens, blocks = batch * length, length // config.block_size
    vectors = config.memory.chained_rows
    reach = (config.memory_segments + 1) * config.block_size
    kernels = 2 if config.activation == "gelu" else 3
    key_value = 4 * width * kv_heads * config.head_dim
    dense = key_value + 4 * width * heads * config.head_dim + 2 * kernels * width * config.ff_dim  # per row
    pair = 4 * heads * config.head_dim  # score and weighted value of a query and a key
    prompt = vectors if getattr(config.memory, "init", "") == "prompt" else 0
    updates = batch * blocks * vectors
    return Flops(
        tokens_dense=tokens * (layers * dense + 2 * width * config.vocab_size),
        tokens_attention=tokens * layers * pair * reach,
        fam_dense=layers * ((updates + prompt) * dense + batch * vectors * key_value),
        fam_attention=layers * pair * (updates * (vectors + config.block_size) + prompt * vectors),
        fam_read=tokens * layers * pair * config.memory.extra_keys,
    )
