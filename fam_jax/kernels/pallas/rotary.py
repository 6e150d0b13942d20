"""Rotary position embedding as a kernel, for its layout: heads stay side by side in the lanes.

XLA splits heads in halves, for which it brings them to an axis of their own and back: two copies of all queries and
keys, which take longer than the turning.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from fam_jax.kernels.pallas.partition import division, over_mesh
from fam_jax.kernels.pallas.tiles import LANES, SUBLANES

ROWS = 256  # tokens of a grid step


def can_turn(x: jax.Array) -> bool:
    """Whether the kernel can turn x (B, T, H, hd), on a TPU."""
    is_known = x.dtype in (jnp.bfloat16, jnp.float32)
    return is_known and x.shape[-1] % LANES == 0 and x.shape[1] % SUBLANES == 0


def pallas_rotary(x: jax.Array, cos: jax.Array, sin: jax.Array, *, interpret: bool = False) -> jax.Array:
    """See :func:`fam_jax.kernels.rotary.rotary`; `interpret` is Pallas' plain interpreter."""
    # As key heads are divided: a single one is everywhere.
    rows, _, heads = division(x.shape[0], 0, x.shape[2])
    angles = P(rows if cos.shape[0] > 1 else None)
    tokens = P(rows, None, heads)
    return over_mesh(functools.partial(_turn, interpret), (x, cos, sin), (tokens, angles, angles), tokens)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _turn(interpret: Any, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    batch, length, heads, head_dim = x.shape
    # The first half of a head gets -sin times the second, the second half sin times the first.
    cos, sin = (a[:, :, 0].astype(jnp.float32) for a in (cos, sin))
    factors = jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)
    size = min(ROWS, length)
    tokens = pl.BlockSpec((None, size, heads * head_dim), lambda t, b: (b, t, 0))
    shared = cos.shape[0] == 1
    angles = pl.BlockSpec((None, size, head_dim), lambda t, b: (0 if shared else b, t, 0))
    turned = pl.pallas_call(
        functools.partial(_kernel, heads=heads),
        grid=(pl.cdiv(length, size), batch),  # rows of the batch last: their angles are fetched once
        in_specs=[tokens, angles, angles],
        out_specs=tokens,
        out_shape=jax.ShapeDtypeStruct((batch, length, heads * head_dim), x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
        name="fam_rotary",
    )(x.reshape(batch, length, -1), *factors)
    return turned.reshape(x.shape)


def _kernel(x: Any, cos: Any, sin: Any, out: Any, *, heads: int) -> None:
    head_dim = cos.shape[-1]
    for head in range(heads):
        lanes = pl.ds(head * head_dim, head_dim)
        values = x[:, lanes].astype(jnp.float32)
        halves_swapped = pltpu.roll(values, head_dim // 2, 1)
        out[:, lanes] = (values * cos[...] + halves_swapped * sin[...]).astype(out.dtype)


def _turn_forward(interpret: Any, x: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, Any]:
    return _turn(interpret, x, cos, sin), (cos, sin)


def _turn_backward(interpret: Any, residuals: Any, cotangent: jax.Array) -> tuple[jax.Array, None, None]:
    cos, sin = residuals
    return _turn(interpret, cotangent, cos, -sin), None, None


_turn.defvjp(_turn_forward, _turn_backward)
