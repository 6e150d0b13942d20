"""A decoder without memory in NumPy float64, with whole matrices and any attention mask."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fam_jax.config import ModelConfig


def dense_forward(
    params: Mapping[str, Any], config: ModelConfig, tokens: np.ndarray, visible: np.ndarray
) -> np.ndarray:
    """Return logits (B, T, V) of a decoder without FAM; `visible` (T, T) says which keys a query sees.

    It supports RMSNorm, SwiGLU and tied embeddings only, which is enough to test masks.
    """
    x = params["embedding"]["table"][tokens]
    steps = np.arange(tokens.shape[1])
    half = config.head_dim // 2
    angles = steps[:, None] * config.rope_base ** (-2.0 * np.arange(half) / config.head_dim)
    turn = np.exp(1j * angles)[:, None, :]

    def rope(y):
        z = (y[..., :half] + 1j * y[..., half:]) * turn
        return np.concatenate([z.real, z.imag], -1)

    def norm(y, scale):
        return y / np.sqrt((y * y).mean(-1, keepdims=True) + config.norm_epsilon) * scale

    group = config.num_heads // config.num_kv_heads
    layers = params["layers"]
    for n in range(config.num_layers):
        y = norm(x, layers["attention_norm"]["scale"][n])
        q = rope(np.einsum("btd,dhk->bthk", y, layers["query"]["kernel"][n]))
        k = np.repeat(rope(np.einsum("btd,dhk->bthk", y, layers["key"]["kernel"][n])), group, 2)
        v = np.repeat(np.einsum("btd,dhk->bthk", y, layers["value"]["kernel"][n]), group, 2)
        scores = np.einsum("bthk,bshk->bhts", q, k) / math.sqrt(config.head_dim)
        weights = np.where(visible, np.exp(scores), 0.0)
        weights /= weights.sum(-1, keepdims=True)
        x = x + np.einsum("bhts,bshk,hkd->btd", weights, v, layers["output"]["kernel"][n])
        y = norm(x, layers["ff_norm"]["scale"][n])
        gate = y @ layers["gate"]["kernel"][n]
        x = x + (gate / (1 + np.exp(-gate)) * (y @ layers["up"]["kernel"][n])) @ layers["down"]["kernel"][n]
    return norm(x, params["final_norm"]["scale"]) @ params["embedding"]["table"].T
