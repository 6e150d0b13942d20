"""The decoder: Block Sliding Window Attention with Feedback Attention Memory.

Letters for axes, here and in every einsum: B batch, T tokens, S keys, C block, M FAM length, N blocks, L layers,
D width, H query heads, K key/value heads, G = H / K, hd head width, F feed-forward width, V vocabulary, m memory
segments, R previous FAMs that a token sees. Blocks are counted from 0; F_tau is the FAM after block tau, F_{-1} the
starting one.
"""

from fam_jax.model.lora import create_model
from fam_jax.model.memory import LayerMemory, Memory, empty_memory, with_fam
from fam_jax.model.parameters import count_parameters, from_dict, to_dict
from fam_jax.model.transformer import Transformer

__all__ = [
    "LayerMemory",
    "Memory",
    "Transformer",
    "count_parameters",
    "create_model",
    "empty_memory",
    "from_dict",
    "to_dict",
    "with_fam",
]
