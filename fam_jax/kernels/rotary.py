"""Rotary position embedding of queries and keys (Su et al. 2021)."""

import jax
import jax.numpy as jnp

from fam_jax.kernels.pallas.rotary import can_turn, pallas_rotary
from fam_jax.kernels.platform import asks_for_kernels


def rotary(x: jax.Array, cos: jax.Array, sin: jax.Array, *, implementation: str = "auto") -> jax.Array:
    """Turns feature pairs (i, i + hd/2) of every head.

    Args:
      x: (B, T, H, hd).
      cos: (B or 1, T, 1, hd/2) cosines of the angles, float32 or float64. They get no gradient from the kernel.
      sin: likewise the sines.
      implementation: as of `block_attention`. The kernel takes heads that fill whole lanes and leaves them where the
        attention kernels want them; other heads are turned by XLA under any name.

    Returns:
      Like `x`; computed in the dtype of the angles.
    """
    if asks_for_kernels(implementation) and can_turn(x):
        return pallas_rotary(x, cos, sin, interpret=implementation == "pallas_interpret")
    return turn(x, cos, sin)


def turn(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """:func:`rotary` by XLA, for angles that broadcast against any x (..., heads, hd)."""
    first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
