"""Rotary position embedding that stays exact at any position (Su et al. 2021; section B.2 of the paper).

Queries and keys are rotated in *frames*, each with its own position zero, because scores depend on differences of
positions only. No angle is computed as a large product in float32. Instead, a position is split into base-256 digits,
and the rotations of the digits, tabulated in float64, are multiplied.
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
    """Cosines and sines of angles, (..., hd / 2), that broadcast against (..., heads, hd)."""

    cos: jax.Array
    sin: jax.Array

    def __getitem__(self, index: Any) -> "Rotation":
        """Index both arrays."""
        return self.map(lambda x: x[index])

    def map(self, function: Callable[[jax.Array], jax.Array]) -> "Rotation":
        """Apply `function`, which changes the shape, to both arrays."""
        return Rotation(function(self.cos), function(self.sin))

    def after(self, other: "Rotation") -> "Rotation":
        """Return the rotation by the sum of both angles."""
        return Rotation(
            self.cos * other.cos - self.sin * other.sin,
            self.sin * other.cos + self.cos * other.sin,
        )

    def inverse(self) -> "Rotation":
        """Return the rotation by the negated angles."""
        return Rotation(self.cos, -self.sin)


@dataclasses.dataclass(frozen=True)
class Rope:
    """RoPE for one head width: features (i, i + hd/2) turn by `scaling`(base ** (-2i / hd)) radians per position."""

    head_dim: int
    base: float
    # Dtype of the cosines and sines.
    dtype: str
    # Maps unscaled frequencies to scaled ones.
    scaling: Callable[[np.ndarray], np.ndarray] = lambda frequencies: frequencies

    def frequencies(self) -> np.ndarray:
        """Return the radians per position of each pair of features, (hd / 2,) float64."""
        return self.scaling(self.base ** (-np.arange(0, self.head_dim, 2, dtype=np.float64) / self.head_dim))

    def static(self, positions: np.ndarray) -> Rotation:
        """Return the rotation (..., 1, hd / 2) at positions (...,) that are known when tracing, fractions included."""
        angles = np.asarray(positions, np.float64)[..., None, None] * self.frequencies()
        return Rotation(jnp.asarray(np.cos(angles), self.dtype), jnp.asarray(np.sin(angles), self.dtype))

    def at(self, positions: jax.Array, *, unit: int = 1) -> Rotation:
        """Return the rotation (..., 1, hd / 2) at positions * unit, for an int32 array of positions (...,)."""
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
    """Return the RoPE of a model."""
    dtype = jnp.promote_types(config.dtype, jnp.float32)
    return Rope(config.head_dim, config.rope_base, str(dtype), functools.partial(scale_frequencies, config))


def scale_frequencies(config: ModelConfig, frequencies: np.ndarray) -> np.ndarray:
    """Scale frequencies, in radians per position, as `config.rope_scaling` says.

    "linear" divides all of them by rope_factor (Chen et al. 2023). "llama3" divides those of long wavelengths and keeps
    those of short ones. In between it interpolates linearly in the number of turns that fit into the original context
    (Llama 3.1).
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
    """Rotate x (..., heads, hd) by `rotation` (..., 1, hd / 2)."""
    return turn(x, rotation.cos, rotation.sin)


def rotate_tokens(x: jax.Array, rotation: Rotation, implementation: str, *, begin: int = 0) -> jax.Array:
    """Rotate T tokens of x (B, *, heads, hd), from `begin` on, by (B or 1, T, 1, hd / 2), with a kernel if one can.

    Returns:
      (B, T, heads, hd).
    """
    return rotary(x, rotation.cos, rotation.sin, begin=begin, implementation=implementation)
