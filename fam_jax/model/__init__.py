"""The decoder: layers, the memory that its config names, and the state that streams carry.

The letters for axes are those of `fam_jax/layers/__init__.py`.
"""

from fam_jax.model.lora import create_model
from fam_jax.model.parameters import count_parameters, from_dict, to_dict
from fam_jax.model.state import (
    StreamState,
    ablated,
    auxiliary_loss,
    empty_state,
    going_on_by_row,
    memory_vectors,
    passed_on,
    passed_on_by_row,
    with_auxiliary_loss,
    with_passed_on,
)
from fam_jax.model.transformer import Transformer

__all__ = [
    "StreamState",
    "Transformer",
    "ablated",
    "auxiliary_loss",
    "count_parameters",
    "create_model",
    "empty_state",
    "from_dict",
    "going_on_by_row",
    "memory_vectors",
    "passed_on",
    "passed_on_by_row",
    "to_dict",
    "with_auxiliary_loss",
    "with_passed_on",
]
