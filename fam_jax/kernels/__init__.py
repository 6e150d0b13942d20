"""Attention over arrays, without Flax or config: one public function per operation.

- :func:`block_attention`: tokens attend, block by block, to [past blocks ; extra keys ; own block, causally].
- :func:`update_attention`: the rows of a memory attend to [themselves ; all tokens of a block].
- :func:`multi_part_attention`: dense attention with one softmax over several groups of keys, for few queries.
- :func:`rotary`: rotary position embedding of many tokens.

Each implementation of block attention has a file of its own; `pallas/` holds its TPU kernels.
"""

from fam_jax.kernels.arguments import BlockInputs, BlockOptions
from fam_jax.kernels.block_attention import IMPLEMENTATIONS, block_attention
from fam_jax.kernels.multi_part_attention import (
    Part,
    multi_part_attention,
    multi_part_weights,
    soft_cap,
)
from fam_jax.kernels.pallas.block_attention import AttentionError, why_not_pallas
from fam_jax.kernels.pallas.blocks import KV
from fam_jax.kernels.rotary import rotary, turn
from fam_jax.kernels.update_attention import UpdateInputs, can_update, causal_rows, update_attention

__all__ = [
    "IMPLEMENTATIONS",
    "KV",
    "AttentionError",
    "BlockInputs",
    "BlockOptions",
    "Part",
    "UpdateInputs",
    "block_attention",
    "can_update",
    "causal_rows",
    "multi_part_attention",
    "multi_part_weights",
    "rotary",
    "soft_cap",
    "turn",
    "update_attention",
    "why_not_pallas",
]
