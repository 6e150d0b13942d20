"""FLOPs of a train step and model FLOPs utilization (MFU), where the chip's peak is known."""

from typing import Any

import jax

from fam_jax.config import LoraConfig, ModelConfig, ceil_div
from fam_jax.model.layer_types import layer_types

# Peak FLOP/s of one device in bfloat16 with dense matrices, by the start of JAX's name of the device: Cloud TPU
# documentation and NVIDIA's data sheets. Longer names come first.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Return the peak FLOP/s of a device in bfloat16, or None if it is unknown."""
    return next((peak for name, peak in PEAK_FLOPS.items() if device_kind.startswith(name)), None)


def visible_keys(model: ModelConfig, tokens: int) -> float:
    """Return the keys that the tokens of one row see, summed over tokens, for one layer.

    Args:
      model: config by which the layer goes.
      tokens: T, from the beginning of a stream.
    """
    size, window, total = model.block_size, model.memory.window, 0.0
    for block in range(ceil_div(tokens, size)):
        count = min(size, tokens - block * size)
        before = min(block, model.memory_segments) * size
        if window:
            total += sum(min(window, before + place) for place in range(1, count + 1))
        else:
            total += count * (before + (count + 1) / 2)
        total += count * model.memory.extra_keys_of_block(block)
    return total


def step_flops(model: ModelConfig, lora: LoraConfig, params: Any, rows: int, tokens: int) -> float:
    """Return the FLOPs of a train step as MFU counts them (Chowdhery et al. 2022, appendix B).

    6 per parameter and token, including the output product but not the embedding's lookup, and 12 per visible key, head
    feature, layer and token for attention. With LoRA the frozen weights have no gradient: 4 per parameter. What
    rematerialization and the memory's own updates take is left out.

    Args:
      model: config of the model.
      lora: config of its low-rank adaptation.
      params: nested dict of parameters, or of their shapes.
      rows: of the batch.
      tokens: of a row.
    """
    total = 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = str(path[-1].key)
        if name in ("kernel", "lora_a", "lora_b") or (name == "table" and model.tie_embeddings):
            per_token = 4 if lora.rank and name in ("kernel", "table") else 6
            total += per_token * leaf.size * rows * tokens
    types = layer_types(model)
    keys = sum(visible_keys(types.memories[index].model, tokens) for index in types.of_layers.tolist())
    return total + 12 * model.head_dim * model.num_heads * rows * keys
