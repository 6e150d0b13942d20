"""Rotary position embedding that stays exact at any position (Su et al. 2021; section B.2 of the paper).

Queries and keys are rotated in *frames*: position zero of a frame is wherever it suits, because scores depend on
differences only. Angles are never formed as a large product in float32: a position is split into base-256 digits
whose rotations, tabulated in float64, are multiplied.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fam_jax.config import ModelConfig
from fam_jax.kernels import rotary, turn

DIGIT = 256
LEVELS = 4  # covers int32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rotation:
    """Cosines and sines of angles, (..., hd / 2), to be broadcast against (..., heads, hd)."""

    cos: jax.Array
    sin: jax.Array

    def __getitem__(self, index: Any) -> "Rotation":
        """Indexes both arrays alike."""
        return self.map(lambda x: x[index])

    def map(self, function: Callable[[jax.Array], jax.Array]) -> "Rotation":
        """Applies a change of shape to both arrays."""
        return Rotation(function(self.cos), function(self.sin))

    def after(self, other: "Rotation") -> "Rotation":
        """The rotation by the sum of both angles."""
        return Rotation(
            self.cos * other.cos - self.sin * other.sin,
            self.sin * other.cos + self.cos * other.sin,
        )

    def inverse(self) -> "Rotation":
        """The rotation by the negated angles."""
        return Rotation(self.cos, -self.sin)


@dataclasses.dataclass(frozen=True)
class Rope:
    """RoPE of one head width: feature pairs (i, i + hd/2) turn at base ** (-2i / hd) radians per position, scaled."""

    head_dim: int
    base: float
    dtype: str  # of the cosines and sines
    scaling: Callable[[np.ndarray], np.ndarray] = lambda frequencies: frequencies

    def frequencies(self) -> np.ndarray:
        """(hd / 2,) radians per position, float64."""
        return self.scaling(self.base ** (-np.arange(0, self.head_dim, 2, dtype=np.float64) / self.head_dim))

    def static(self, positions: np.ndarray) -> Rotation:
        """Rotation at positions known when tracing, whole or fractional; (...,) gives (..., 1, hd / 2)."""
        angles = np.asarray(positions, np.float64)[..., None, None] * self.frequencies()
        return Rotation(jnp.asarray(np.cos(angles), self.dtype), jnp.asarray(np.sin(angles), self.dtype))

    def at(self, positions: jax.Array, *, unit: int = 1) -> Rotation:
        """Rotation at positions * unit, with positions an int32 array; (...,) gives (..., 1, hd / 2)."""
        magnitude = jnp.abs(positions)
        result: Rotation | None = None
        for level in range(LEVELS):
            angles = np.outer(
                np.arange(DIGIT, dtype=np.float64) * float(DIGIT**level * unit), self.frequencies()
            )
            digit = (magnitude // DIGIT**level) % DIGIT
            cos, sin = (jnp.asarray(table(angles), self.dtype)[digit] for table in (np.cos, np.sin))
            result = Rotation(cos, sin) if result is None else Rotation(cos, sin).after(result)
        assert result is not None
        sign = jnp.where(positions < 0, -1, 1)[..., None].astype(self.dtype)
        return Rotation(result.cos[..., None, :], (result.sin * sign)[..., None, :])


def rope_of(config: ModelConfig) -> Rope:
    """The RoPE that `config` describes."""
    dtype = jnp.promote_types(config.dtype, jnp.float32)
    return Rope(config.head_dim, config.rope_base, str(dtype), functools.partial(scale_frequencies, config))


def scale_frequencies(config: ModelConfig, frequencies: np.ndarray) -> np.ndarray:
    """`config.rope_scaling` of unscaled frequencies, in radians per position.

    "linear" divides all of them by rope_factor (Chen et al. 2023). "llama3" divides those of long wavelengths, leaves
    those of short ones, and between the two goes from one to the other linearly in the number of turns that fit in the
    original context (Llama 3.1).
    """
    if config.rope_scaling == "none":
        return frequencies
    if config.rope_scaling == "linear":
        return frequencies / config.rope_factor
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    turns = config.rope_original_length * frequencies / (2 * np.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return frequencies * (kept + (1 - kept) / config.rope_factor)


def rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """Rotates x (..., heads, hd) by `rotation` (..., 1, hd / 2)."""
    return turn(x, rotation.cos, rotation.sin)


def rotate_tokens(x: jax.Array, rotation: Rotation, implementation: str) -> jax.Array:
    """:func:`rotate` of many tokens: x (B, T, heads, hd) by (B or 1, T, 1, hd / 2), by a kernel where there is one."""
    return rotary(x, rotation.cos, rotation.sin, implementation=implementation)
