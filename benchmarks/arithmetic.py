"""Count the floating-point operations of a forward pass from shapes, to predict the cost of FAM.

The backward pass of a matrix product consists of two products of the same size. So if all operations ran equally fast,
the ratio of two counts would also be the ratio of the times of two training steps. The measured ratio is higher,
because FAM's products have few rows and depend on each other.
"""

import dataclasses

from fam_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs of the matrix products in the forward pass of a batch."""

    # Projections and feed-forward of all layers, and logits.
    tokens_dense: int
    # Attention to the window. Masked pairs count, because they are computed.
    tokens_attention: int
    # Projections and feed-forward of FAM: M / C of those of the tokens.
    fam_dense: int
    # Attention of FAM to itself and its block.
    fam_attention: int
    # Attention of tokens to FAM.
    fam_read: int

    @property
    def ratio(self) -> float:
        """FLOPs with FAM, divided by those without."""
        with_fam = self.fam_dense + self.fam_attention + self.fam_read
        return 1 + with_fam / (self.tokens_dense + self.tokens_attention)


def count_flops(config: ModelConfig, batch: int, length: int) -> Flops:
    """Count the FLOPs of `batch` rows of `length` tokens, a multiple of C.

    A product of (a, b) and (b, c) counts 2abc. FAM goes through the weights of a layer once per block. The prompt that
    gives the initial FAM goes through them once, and the last FAM of each row through keys and values only.
    """
    layers, width = config.num_layers, config.model_dim
    heads, kv_heads = config.num_heads, config.num_kv_heads
    tokens, blocks = batch * length, length // config.block_size
    vectors = config.memory.chained_rows
    reach = (config.memory_segments + 1) * config.block_size
    kernels = 2 if config.activation == "gelu" else 3
    key_value = 4 * width * kv_heads * config.head_dim
    # Per row of activations.
    dense = key_value + 4 * width * heads * config.head_dim + 2 * kernels * width * config.ff_dim
    # Per pair of query and key: the score and the weighted value.
    pair = 4 * heads * config.head_dim
    prompt = vectors if getattr(config.memory, "init", "") == "prompt" else 0
    updates = batch * blocks * vectors
    return Flops(
        tokens_dense=tokens * (layers * dense + 2 * width * config.vocab_size),
        tokens_attention=tokens * layers * pair * reach,
        fam_dense=layers * ((updates + prompt) * dense + batch * vectors * key_value),
        fam_attention=layers * pair * (updates * (vectors + config.block_size) + prompt * vectors),
        fam_read=tokens * layers * pair * config.memory.extra_keys,
    )
