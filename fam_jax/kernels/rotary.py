"""Rotary position embedding of queries and keys (Su et al. 2021), in XLA and as a TPU kernel.

The kernel leaves heads side by side in the lanes, where the attention kernels read them. XLA splits every head in
halves. To do that, it moves heads to an axis of their own and back: two copies of all queries and keys, which take
longer than the rotation itself.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from fam_jax.kernels.pallas.devices import division, over_mesh, wants_kernels
from fam_jax.kernels.pallas.tiles import LANES, SUBLANES

# Tokens of a grid step.
ROWS = 256


def rotary(x: jax.Array, cos: jax.Array, sin: jax.Array, *, implementation: str = "auto") -> jax.Array:
    """Rotate feature pairs (i, i + hd/2) of every head.

    Args:
      x: (B, T, H, hd).
      cos: (B or 1, T, 1, hd/2) cosines of the angles, float32 or float64. The kernel gives them no gradient.
      sin: sines of the angles, like `cos`.
      implementation: as in `block_attention`. The kernel needs whole tiles (:func:`can_rotate`); other shapes always
        use XLA.

    Returns:
      An array like `x`, computed in the dtype of the angles.
    """
    if not (wants_kernels(implementation) and can_rotate(x)):
        return turn(x, cos, sin)
    # Heads are divided like key heads: a single one stays whole on every device.
    rows, _, heads = division(x.shape[0], 0, x.shape[2])
    angles = P(rows if cos.shape[0] > 1 else None)
    tokens = P(rows, None, heads)
    interpret = implementation == "pallas_interpret"
    return over_mesh(
        lambda arrays: _rotate(interpret, *arrays), (x, cos, sin), (tokens, angles, angles), tokens
    )


def turn(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Compute :func:`rotary` in XLA; the angles may have any shape that broadcasts against x (..., heads, hd)."""
    first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def can_rotate(x: jax.Array) -> bool:
    """Return whether the kernel can rotate x (B, T, H, hd) on a TPU."""
    is_known = x.dtype in (jnp.bfloat16, jnp.float32)
    return is_known and x.shape[-1] % LANES == 0 and x.shape[1] % SUBLANES == 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rotate(interpret: bool, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    batch, length, heads, head_dim = x.shape
    # The first half of a head gets -sin times the second half; the second half gets sin times the first.
    cos, sin = (a[:, :, 0].astype(jnp.float32) for a in (cos, sin))
    factors = jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)
    size = min(ROWS, length)
    tokens = pl.BlockSpec((None, size, heads * head_dim), lambda t, b: (b, t, 0))
    shared = cos.shape[0] == 1
    angles = pl.BlockSpec((None, size, head_dim), lambda t, b: (0 if shared else b, t, 0))
    rotated = pl.pallas_call(
        functools.partial(_kernel, heads=heads),
        # The rows of the batch vary fastest: shared angles are fetched once for all of them.
        grid=(pl.cdiv(length, size), batch),
        in_specs=[tokens, angles, angles],
        out_specs=tokens,
        out_shape=jax.ShapeDtypeStruct((batch, length, heads * head_dim), x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
        name="rotary_embedding",
    )(x.reshape(batch, length, -1), *factors)
    return rotated.reshape(x.shape)


def _kernel(x: Any, cos: Any, sin: Any, out: Any, *, heads: int) -> None:
    head_dim = cos.shape[-1]
    for head in range(heads):
        lanes = pl.ds(head * head_dim, head_dim)
        values = x[:, lanes].astype(jnp.float32)
        halves_swapped = pltpu.roll(values, head_dim // 2, 1)
        out[:, lanes] = (values * cos[...] + halves_swapped * sin[...]).astype(out.dtype)


def _rotate_forward(interpret: bool, x: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, Any]:
    return _rotate(interpret, x, cos, sin), (cos, sin)


def _rotate_backward(interpret: bool, residuals: Any, cotangent: jax.Array) -> tuple[jax.Array, None, None]:
    cos, sin = residuals
    return _rotate(interpret, cotangent, cos, -sin), None, None


_rotate.defvjp(_rotate_forward, _rotate_backward)
