"""A tiny model for the tests of generation, and its outputs computed without streaming."""

import functools

import jax
import numpy as np

from fam_jax.config import ModelConfig
from fam_jax.generation.streaming import Streamer
from fam_jax.memories.fam import FamConfig
from fam_jax.model import empty_state
from tests.model.tiny import build, params_of

CONFIG = ModelConfig(
    vocab_size=16, num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, ff_dim=16,
    block_size=4, memory=FamConfig(segments=1, length=2),
)  # fmt: skip


@functools.cache
def streamer() -> Streamer:
    return Streamer(CONFIG, params_of(CONFIG))


def texts(*lengths: int, seed: int = 0) -> list[np.ndarray]:
    """Return a row of random token ids for each length."""
    random = np.random.default_rng(seed)
    return [random.integers(0, CONFIG.vocab_size, length).astype(np.int32) for length in lengths]


@jax.jit
def _forward(params: dict, tokens: jax.Array) -> jax.Array:
    return build(CONFIG, params)(tokens, empty_state(CONFIG, tokens.shape[0]), aligned=True)[0]


def forward(text: np.ndarray) -> np.ndarray:
    """Return logits (T, V) of one row, computed in a single aligned call from an empty state."""
    padded = np.zeros((1, 64), np.int32)  # one shape to compile; later tokens do not change logits
    padded[0, : len(text)] = text
    return np.asarray(_forward(params_of(CONFIG), padded))[0, : len(text)]
