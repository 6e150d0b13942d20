"""What tests that compare a memory with a NumPy loop read, and how."""

from typing import Any

import numpy as np

from fam_jax.config import ModelConfig
from tests.model.tiny import Reader

EXACT = {"rtol": 1e-10, "atol": 1e-11}
LENGTH, ROWS = 14, 2  # three blocks and a half


def some_tokens(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 16, (ROWS, LENGTH)).astype(np.int32)


def read(model: ModelConfig, params: Any) -> np.ndarray:
    """Return the logits (B, T, V) of `some_tokens()`, read in one aligned call."""
    return Reader(model, params, ROWS).read(some_tokens(), aligned=True)
