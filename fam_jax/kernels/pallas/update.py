"""FAM's own attention as a kernel, which reads a block of keys where the attention kernels have it.

The work is small, M / C of the tokens'. What it saves are copies: XLA cuts the keys of a block out of the sequence and
brings their heads to an axis of their own, in every step of the chain.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from fam_jax.kernels.pallas.geometry import LOG2_E, product
from fam_jax.kernels.pallas.partition import division, over_mesh
from fam_jax.kernels.pallas.tiles import LANES, SUBLANES

# The grid: rows of the batch, key heads, and the query heads of each, over which gradients of keys are summed.
PARAMS = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))


def can_update(q: jax.Array, block_size: int, softcap: float) -> bool:
    """Whether the kernels can compute the attention of q (B, M, H, hd), on a TPU."""
    is_known = q.dtype in (jnp.bfloat16, jnp.float32) and not softcap
    return is_known and not (q.shape[1] % SUBLANES or q.shape[-1] % LANES or block_size % LANES)


def pallas_update_attention(
    q: jax.Array,
    fam_k: jax.Array,
    fam_v: jax.Array,
    k: jax.Array,
    v: jax.Array,
    block: jax.Array,
    taps: tuple[jax.Array, jax.Array],
    *,
    interpret: bool = False,
) -> jax.Array:
    """See :func:`fam_jax.kernels.update_attention.update_attention`; `interpret` is Pallas' plain interpreter."""
    rows, heads, kv_heads = division(q.shape[0], q.shape[2], fam_k.shape[2])
    queries, keys = P(rows, None, heads), P(rows, None, kv_heads)
    return over_mesh(
        functools.partial(_attend, interpret),
        (q, fam_k, fam_v, k, v, block.reshape(1), *taps),
        (queries, keys, keys, keys, keys, P(), keys, keys),
        queries,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(interpret: Any, *arrays: jax.Array) -> jax.Array:
    return forward(interpret, *arrays)[0]


def _grid(q: jax.Array, fam_k: jax.Array) -> tuple[int, int, int]:
    """Rows, key heads, and query heads of each."""
    return q.shape[0], fam_k.shape[2], q.shape[2] // fam_k.shape[2]


def _specs(q: jax.Array, group: int, size: int) -> tuple[pl.BlockSpec, pl.BlockSpec, pl.BlockSpec]:
    """Of queries, of FAM's keys, and of the block's keys."""
    length, head_dim = q.shape[1], q.shape[3]
    queries = pl.BlockSpec((None, length, head_dim), lambda b, h, g, at: (b, 0, h * group + g))
    fam_keys = pl.BlockSpec((None, length, head_dim), lambda b, h, g, at: (b, 0, h))
    keys = pl.BlockSpec((None, size, head_dim), lambda b, h, g, at: (b, at[0], h))
    return queries, fam_keys, keys


def _flat(x: jax.Array) -> jax.Array:
    """Heads side by side."""
    return x.reshape(*x.shape[:2], -1)


def forward(interpret: Any, *arrays: jax.Array) -> tuple[jax.Array, Any]:
    """The attention, and what its derivative needs: q, fam_k, fam_v, k, v, (1,) the block's number, two taps."""
    q, fam_k, fam_v, k, v, block, tap, _ = arrays
    grid = _grid(q, fam_k)
    queries, fam_keys, keys = _specs(q, grid[-1], tap.shape[1])
    out = pl.pallas_call(
        _forward_kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[queries, fam_keys, fam_keys, keys, keys],
            out_specs=queries,
        ),
        out_shape=jax.ShapeDtypeStruct(_flat(q).shape, q.dtype),
        compiler_params=PARAMS,
        interpret=interpret,
        name="fam_update_forward",
    )(block, *map(_flat, (q, fam_k, fam_v)), k, v)
    return out.reshape(q.shape), arrays


def _softmax(q: Any, fam_k: Any, k: Any) -> tuple[jax.Array, jax.Array]:
    """Probabilities (M, M) of the FAM's own keys and (M, C) of the block's, float32."""
    factor = q.shape[-1] ** -0.5 * LOG2_E
    scores = [product(q[...], keys[...], "nt") * factor for keys in (fam_k, k)]
    top = functools.reduce(jnp.maximum, [s.max(axis=1, keepdims=True) for s in scores])
    own, tokens = (jnp.exp2(s - top) for s in scores)
    scale = 1 / (own.sum(axis=1, keepdims=True) + tokens.sum(axis=1, keepdims=True))
    return own * scale, tokens * scale


def _forward_kernel(block: Any, q: Any, fam_k: Any, fam_v: Any, k: Any, v: Any, out: Any) -> None:
    own, tokens = _softmax(q, fam_k, k)
    result = product(own.astype(v.dtype), fam_v[...], "nn") + product(tokens.astype(v.dtype), v[...], "nn")
    out[...] = result.astype(out.dtype)


def backward(interpret: Any, residuals: Any, d_out: jax.Array) -> tuple[Any, ...]:
    """The cotangents of the arguments of :func:`forward`; of keys and values as those of the taps."""
    q, fam_k, fam_v, k, v, block, tap, _ = residuals
    grid = _grid(q, fam_k)
    queries, fam_keys, keys = _specs(q, grid[-1], tap.shape[1])
    tapped = pl.BlockSpec(keys.block_shape, lambda b, h, g, at: (b, 0, h))
    shapes = [(x.shape, x.dtype) for x in (*map(_flat, (q, fam_k, fam_v)), tap, tap)]
    lengths = (q.shape[1], q.shape[1], tap.shape[1], tap.shape[1])
    sums = [pltpu.VMEM((length, q.shape[3]), jnp.float32) for length in lengths]
    gradients = pl.pallas_call(
        _backward_kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[queries, queries, fam_keys, fam_keys, keys, keys],
            out_specs=[queries, fam_keys, fam_keys, tapped, tapped],
            scratch_shapes=sums,
        ),
        out_shape=[jax.ShapeDtypeStruct(*shape) for shape in shapes],
        compiler_params=PARAMS,
        interpret=interpret,
        name="fam_update_backward",
    )(block, *map(_flat, (q, d_out, fam_k, fam_v)), k, v)
    dq, dfk, dfv, dk, dv = (
        g.reshape(x.shape) for g, x in zip(gradients, (q, fam_k, fam_v, tap, tap), strict=True)
    )
    return dq, dfk, dfv, None, None, None, dk, dv


_attend.defvjp(forward, backward)


def _backward_kernel(
    block: Any, q: Any, d_out: Any, fam_k: Any, fam_v: Any, k: Any, v: Any, *refs: Any
) -> None:
    dq, (*outs,), (*sums,) = refs[0], refs[1:5], refs[5:]
    scale = q.shape[-1] ** -0.5
    probabilities = _softmax(q, fam_k, k)
    d_probabilities = [product(d_out[...], values[...], "nt") for values in (fam_v, v)]
    weighted = [
        (p * d).sum(axis=1, keepdims=True) for p, d in zip(probabilities, d_probabilities, strict=True)
    ]
    delta = weighted[0] + weighted[1]
    d_scores = [
        (p * (d - delta) * scale).astype(q.dtype) for p, d in zip(probabilities, d_probabilities, strict=True)
    ]
    dq[...] = (product(d_scores[0], fam_k[...], "nn") + product(d_scores[1], k[...], "nn")).astype(dq.dtype)
    # Of keys and values, summed over the query heads of a group: fam_k, fam_v, k, v.
    parts = []
    for p, d in zip(probabilities, d_scores, strict=True):
        parts += [product(d, q[...], "tn"), product(p.astype(q.dtype), d_out[...], "tn")]
    heads, last = pl.program_id(2), pl.num_programs(2) - 1
    for part, total, out in zip(parts, sums, outs, strict=True):

        @pl.when(heads == 0)
        def _(part: Any = part, total: Any = total) -> None:
            total[...] = part

        @pl.when(heads > 0)
        def _(part: Any = part, total: Any = total) -> None:
            total[...] += part

        @pl.when(heads == last)
        def _(total: Any = total, out: Any = out) -> None:
            out[...] = total[...].astype(out.dtype)
