"""Attention over arrays: no Flax, no config. One public function per operation, one file per implementation.

- :func:`block_attention`: tokens, in blocks, attend to [memory segment ; FAM keys ; own block, causal].
- :func:`joint_attention`: dense attention whose softmax spans several groups of keys; small shapes only.
"""

from fam_jax.kernels.block_attention import IMPLEMENTATIONS, block_attention
from fam_jax.kernels.joint import Part, joint_attention, soft_cap
from fam_jax.kernels.rotary import rotary, turn

__all__ = ["IMPLEMENTATIONS", "Part", "block_attention", "joint_attention", "rotary", "soft_cap", "turn"]
