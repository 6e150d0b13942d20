"""The memories by name: one line each. `config.model.memory.kind` chooses one."""

import importlib
from typing import Any

# Modules are imported on first use.
MEMORIES: dict[str, Any] = {
    "full": "fam_jax.memories.window:FullAttention",
    "swa": "fam_jax.memories.window:SlidingWindowAttention",
    "bswa": "fam_jax.memories.window:BlockSlidingWindowAttention",
    "transformer_xl": "fam_jax.memories.window:TransformerXL",
    "fam": "fam_jax.memories.fam:FeedbackAttentionMemory",
    "fam_losses": "fam_jax.memories.fam_losses:FamWithLosses",
    "sum_fam": "fam_jax.memories.sum_fam:SummaryFam",
    "fm": "fam_jax.memories.fm:FeedbackMemory",
    "titans_mag": "fam_jax.memories.titans:MemoryAsGate",
    "titans_mal": "fam_jax.memories.titans:MemoryAsLayer",
    "titans_mac": "fam_jax.memories.titans_mac:MemoryAsContext",
    "infini": "fam_jax.memories.infini:InfiniAttention",
    "armt": "fam_jax.memories.armt:AssociativeRecurrentMemory",
    "prmt": "fam_jax.memories.prmt:ParallelRecurrentMemory",
    "rmt": "fam_jax.memories.rmt:RecurrentMemoryTransformer",
    "autocompressor": "fam_jax.memories.autocompressor:AutoCompressor",
    "feedback": "fam_jax.memories.feedback:FeedbackTransformer",
    "compressive": "fam_jax.memories.compressive:CompressiveTransformer",
    "block_recurrent": "fam_jax.memories.block_recurrent:BlockRecurrentTransformer",
    "longformer": "fam_jax.memories.longformer:Longformer",
}


def memory_kinds() -> tuple[str, ...]:
    """Return the names of all memories."""
    return tuple(MEMORIES)


def memory_class(kind: str) -> Any:
    """Return the subclass of :class:`fam_jax.memories.interface.Memory` that `kind` names.

    Raises:
      KeyError: there is no such kind.
    """
    found = MEMORIES[kind]
    if isinstance(found, str):
        module, _, name = found.partition(":")
        found = MEMORIES[kind] = getattr(importlib.import_module(module), name)
    return found


def register_memory(kind: str, memory: Any) -> None:
    """Add a memory under a new name, for configs of this process.

    Args:
      kind: the name.
      memory: a subclass of :class:`fam_jax.memories.interface.Memory`, or "module:Class".

    Raises:
      ValueError: the name is taken by another memory.
    """
    if MEMORIES.setdefault(kind, memory) != memory:
        raise ValueError(f"memory kind {kind!r} is already registered; choose another name")
