"""FLOPs of a training step, and the peak FLOP/s of chips, for model FLOPs utilization (MFU)."""

from collections.abc import Callable
from typing import Any

import jax

from fam_jax.config import Config, ModelConfig, ceil_div
from fam_jax.model.layer_types import models_of_types

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


def visible_keys(
    tokens: int,
    *,
    block_size: int,
    segments: int,
    extra: Callable[[int], int] = lambda _: 0,
    window: int = 0,
    past: int = 0,
    per_token: int = 0,
) -> float:
    """Return the number of keys that a query sees, summed over `tokens` queries.

    Args:
      tokens: T, counted from a block border.
      block_size: C.
      segments: m.
      extra: returns the number of extra keys that the tokens of a block see, given the block's number.
      window: distance in tokens from which keys are hidden; 0 sets no limit.
      past: blocks of the stream before the first token.
      per_token: keys that a token adds beside its own, for itself and the later tokens of its block.
    """
    total = 0.0
    for block in range(ceil_div(tokens, block_size)):
        count = min(block_size, tokens - block * block_size)
        before = min(past + block, segments) * block_size
        if window:
            total += sum(min(window, before + place) for place in range(1, count + 1))
        else:
            total += count * (before + (count + 1) / 2)
        total += count * (extra(past + block) + per_token * (count + 1) / 2)
    return total


def keys_of_layers(model: ModelConfig, tokens: int, past: int = 0) -> float:
    """Return the number of keys that a token of a row sees, summed over tokens and layers.

    Args:
      model: the model's config.
      tokens: T, counted from a block border.
      past: blocks of the row before the first token.
    """
    return sum(
        layers
        * visible_keys(
            tokens,
            block_size=own.block_size,
            segments=own.memory_segments,
            extra=own.memory.extra_keys_of_block,
            window=own.memory.window,
            past=past,
            per_token=own.memory.keys_per_token,
        )
        for own, layers in models_of_types(model)
    )


def step_flops(config: Config, params: Any, tokens: int) -> float:
    """Return the FLOPs of a training step as MFU counts them (Chowdhery et al. 2022, appendix B).

    A parameter counts 6 per token; the logits' weights are included, the embedding lookup is not. Attention counts 12
    per visible key, head feature, layer and token, and reading a memory by other means 6 per product. Frozen weights of
    LoRA get no gradient and count 4. Recomputation and updates of the memory do not count.

    Args:
      config: the experiment.
      params: nested dict of parameters, or of their shapes.
      tokens: T, length of the rows.
    """
    model, rows, total = config.model, config.train.batch_size, 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = str(path[-1].key)
        if name in ("kernel", "lora_a", "lora_b") or (name == "table" and model.tie_embeddings):
            per_token = 4 if config.lora.rank and name in ("kernel", "table") else 6
            total += per_token * leaf.size * rows * tokens
    read = sum(layers * own.memory.read_products(own) for own, layers in models_of_types(model))
    total += 6 * read * rows * tokens
    return total + 12 * model.head_dim * model.num_heads * rows * keys_of_layers(model, tokens)
