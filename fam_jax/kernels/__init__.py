"""Attention over arrays: no Flax, no config. One public function per operation, one file per implementation.

- :func:`block_attention`: tokens, in blocks, attend to [memory segment ; FAM keys ; own block, causal].
- :func:`update_attention`: FAM attends to [its own keys ; all keys of a block].
- :func:`multi_part_attention`: dense attention whose softmax spans several groups of keys; small shapes only.
- :func:`rotary`: rotary position embedding of many tokens.
"""

from fam_jax.kernels.block_attention import IMPLEMENTATIONS, block_attention
from fam_jax.kernels.multi_part_attention import Part, multi_part_attention, soft_cap
from fam_jax.kernels.rotary import rotary, turn
from fam_jax.kernels.update_attention import update_attention

__all__ = [
    "IMPLEMENTATIONS",
    "Part",
    "block_attention",
    "multi_part_attention",
    "rotary",
    "soft_cap",
    "turn",
    "update_attention",
]
