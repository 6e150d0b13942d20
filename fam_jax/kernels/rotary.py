"""Rotary position embedding of queries and keys (Su et al. 2021), in XLA and as a TPU kernel.

The kernel leaves heads side by side in the lanes, where the attention kernels read them. XLA splits every head in
halves. To do that, it moves heads to an axis of their own and back: two copies of all queries and keys, which take
longer than the rotation itself.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from fam_jax.kernels.pallas.devices import division, over_mesh, wants_kernels
from fam_jax.kernels.pallas.tiles import LANES, SUBLANES

# Tokens of a grid step.
ROWS = 256


def rotary(
    x: jax.Array, cos: jax.Array, sin: jax.Array, *, begin: int = 0, implementation: str = "auto"
) -> jax.Array:
    """Rotate feature pairs (i, i + hd/2) of every head, of T tokens in a row.

    Args:
      x: (B, at least begin + T, H, hd).
      cos: (B or 1, T, 1, hd/2) cosines of the angles, float32 or float64. The kernel gives them no gradient.
      sin: sines of the angles, like `cos`.
      begin: the first of the tokens. The kernel reads them where they stand, and no copy is made.
      implementation: as in `block_attention`. The kernel needs whole tiles (:func:`can_rotate`); other shapes always
        use XLA.

    Returns:
      (B, T, H, hd) in the dtype of `x`, computed in the dtype of the angles.
    """
    length = cos.shape[1]
    tokens_of = x[:, begin : begin + length]
    if not (wants_kernels(implementation) and can_rotate(tokens_of)):
        return turn(tokens_of, cos, sin)
    if begin % min(ROWS, length):
        x, begin = tokens_of, 0
    # Heads are divided like key heads: a single one stays whole on every device.
    rows, _, heads = division(x.shape[0], 0, x.shape[2])
    angles = P(rows if cos.shape[0] > 1 else None)
    tokens = P(rows, None, heads)
    part = _Rows(begin, x.shape[1], implementation == "pallas_interpret")
    return over_mesh(lambda arrays: _rotate(part, *arrays), (x, cos, sin), (tokens, angles, angles), tokens)


def turn(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Compute :func:`rotary` in XLA; the angles may have any shape that broadcasts against x (..., heads, hd)."""
    first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def can_rotate(x: jax.Array) -> bool:
    """Return whether the kernel can rotate x (B, T, H, hd) on a TPU."""
    is_known = x.dtype in (jnp.bfloat16, jnp.float32)
    return is_known and x.shape[-1] % LANES == 0 and x.shape[1] > 0 and x.shape[1] % SUBLANES == 0


class _Rows(NamedTuple):
    """Static settings of a call."""

    # The first token to rotate, and all tokens of x.
    begin: int
    total: int
    interpret: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rotate(rows: _Rows, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    batch, total, heads, head_dim = x.shape
    length = cos.shape[1]
    # The first half of a head gets -sin times the second half; the second half gets sin times the first.
    cos, sin = (a[:, :, 0].astype(jnp.float32) for a in (cos, sin))
    factors = jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)
    size = min(ROWS, length)
    first = rows.begin // size
    read = pl.BlockSpec((None, size, heads * head_dim), lambda t, b: (b, first + t, 0))
    tokens = pl.BlockSpec((None, size, heads * head_dim), lambda t, b: (b, t, 0))
    shared = cos.shape[0] == 1
    angles = pl.BlockSpec((None, size, head_dim), lambda t, b: (0 if shared else b, t, 0))
    rotated = pl.pallas_call(
        functools.partial(_kernel, heads=heads),
        # The rows of the batch vary fastest: shared angles are fetched once for all of them.
        grid=(pl.cdiv(length, size), batch),
        in_specs=[read, angles, angles],
        out_specs=tokens,
        out_shape=jax.ShapeDtypeStruct((batch, length, heads * head_dim), x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=rows.interpret,
        name="rotary_embedding",
    )(x.reshape(batch, total, -1), *factors)
    return rotated.reshape(batch, length, heads, head_dim)


def _kernel(x: Any, cos: Any, sin: Any, out: Any, *, heads: int) -> None:
    head_dim = cos.shape[-1]
    for head in range(heads):
        lanes = pl.ds(head * head_dim, head_dim)
        values = x[:, lanes].astype(jnp.float32)
        halves_swapped = pltpu.roll(values, head_dim // 2, 1)
        out[:, lanes] = (values * cos[...] + halves_swapped * sin[...]).astype(out.dtype)


def _rotate_forward(rows: _Rows, x: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, Any]:
    return _rotate(rows, x, cos, sin), (cos, sin)


def _rotate_backward(rows: _Rows, residuals: Any, cotangent: jax.Array) -> tuple[jax.Array, None, None]:
    cos, sin = residuals
    length = cos.shape[1]
    turned = _rotate(_Rows(0, length, rows.interpret), cotangent, cos, -sin)
    around = (rows.begin, rows.total - rows.begin - length)
    return jnp.pad(turned, ((0, 0), around, (0, 0), (0, 0))), None, None


_rotate.defvjp(_rotate_forward, _rotate_backward)
