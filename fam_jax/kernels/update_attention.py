"""Attention of memory rows to themselves and to all keys of one block of a longer sequence, in XLA and as a TPU kernel.

The work is small, M / C of the tokens' attention. The kernel saves copies: in every step of a chain of updates, XLA
cuts the keys of a block out of the sequence and moves their heads to an axis of their own.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from fam_jax.kernels.multi_part_attention import Part, multi_part_attention
from fam_jax.kernels.pallas.blocks import KV, product, scratch
from fam_jax.kernels.pallas.devices import division, over_mesh, wants_kernels
from fam_jax.kernels.pallas.geometry import LOG2_E
from fam_jax.kernels.pallas.tiles import LANES, SUBLANES

# The grid: rows of the batch, key heads, and the query heads of each. Gradients of keys are summed over the last.
PARAMS = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))


class UpdateInputs(NamedTuple):
    """The arrays of one call of :func:`update_attention`.

    The heads of `tokens` and `taps` lie side by side, as the kernel reads them: no step of a loop has to move them.

    Attributes:
      q: (B, M, H, hd) queries of the memory rows, RoPE applied.
      own: (B, S, K, hd) keys of the memory, RoPE applied in the same frame, and their values; the last M are those of
        the rows.
      tokens: (B, T, K * hd) keys of the tokens of all blocks, RoPE applied in the same frame, and their values.
      block: () int32, number of the block, less than T // C.
      taps: (B, C, K * hd) for keys and values, in the dtype of `tokens`. Their shape sets C.
    """

    q: Any
    own: KV
    tokens: KV
    block: Any
    taps: KV


def update_attention(
    inputs: UpdateInputs, *, softcap: float = 0.0, causal: bool = False, implementation: str = "auto"
) -> jax.Array:
    """Attend, in one softmax, to the memory's own keys and to all keys of block `inputs.block`.

    With S = M and without `causal`, this is the memory path of algorithm 2. In a loop over blocks, every step would add
    a gradient of all of `tokens`. So `tokens` gets no gradient here. The gradient of the block's keys and values is
    returned as the cotangent of `taps` instead; the values of `taps` do not matter.

    Args:
      inputs: queries, keys and values; :class:`UpdateInputs` gives the shapes.
      softcap: as in `block_attention`.
      causal: whether rows see themselves and earlier rows only; they see all other keys.
      implementation: as in `block_attention`. The kernel needs whole tiles (:func:`can_update`), S = M and no causal
        mask; otherwise XLA is used.

    Returns:
      (B, M, H, hd).
    """
    q, own, taps = inputs.q, inputs.own, inputs.taps
    plain = not causal and own.k.shape[1] == q.shape[1]
    if plain and wants_kernels(implementation) and can_update(q, taps.k.shape[1], softcap):
        return _by_kernel(inputs, interpret=implementation == "pallas_interpret")
    keys, values = (
        _read_block(x, inputs.block, tap).reshape(*tap.shape[:2], *own.k.shape[2:])
        for x, tap in zip(inputs.tokens, taps, strict=True)
    )
    mask = causal_rows(q.shape[1], own.k.shape[1]) if causal else None
    return multi_part_attention([Part(q, *own, mask), Part(q, keys, values)], softcap=softcap)


def causal_rows(rows: int, keys: int) -> jax.Array:
    """Return a mask (1, rows, keys), the last keys being those of the rows: a row sees all but those of later rows."""
    return jnp.asarray(np.tri(rows, keys, keys - rows, dtype=bool))[None]


@jax.custom_vjp
def _read_block(x: jax.Array, block: jax.Array, tap: jax.Array) -> jax.Array:
    """Return block number `block` (B, C, W) of x (B, T, W); the tap gets its cotangent, x gets none."""
    return jax.lax.dynamic_slice_in_dim(x, block * tap.shape[1], tap.shape[1], axis=1)


def _read_forward(x: jax.Array, block: jax.Array, tap: jax.Array) -> tuple[jax.Array, None]:
    return _read_block(x, block, tap), None


def _read_backward(_: None, cotangent: jax.Array) -> tuple[None, None, jax.Array]:
    return None, None, cotangent


_read_block.defvjp(_read_forward, _read_backward)


def can_update(q: jax.Array, block_size: int, softcap: float) -> bool:
    """Return whether the kernel can compute the attention of q (B, M, H, hd) on a TPU."""
    is_known = q.dtype in (jnp.bfloat16, jnp.float32) and not softcap
    return is_known and not (q.shape[1] % SUBLANES or q.shape[-1] % LANES or block_size % LANES)


def _by_kernel(inputs: UpdateInputs, *, interpret: bool) -> jax.Array:
    """Run the kernel on every device of the mesh in use; `interpret` selects Pallas' plain interpreter."""
    rows, heads, kv_heads = division(inputs.q.shape[0], inputs.q.shape[2], inputs.own.k.shape[2])
    queries, keys = P(rows, None, heads), P(rows, None, kv_heads)
    both = KV(keys, keys)
    return over_mesh(
        functools.partial(_attend, interpret),
        inputs._replace(block=inputs.block.reshape(1)),
        UpdateInputs(queries, both, both, P(), both),
        queries,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(interpret: bool, inputs: UpdateInputs) -> jax.Array:
    return kernel_forward(interpret, inputs)[0]


def _grid(inputs: UpdateInputs) -> tuple[int, int, int]:
    """Return the number of rows, of key heads, and of query heads per key head."""
    heads, kv_heads = inputs.q.shape[2], inputs.own.k.shape[2]
    return inputs.q.shape[0], kv_heads, heads // kv_heads


class _Blocks(NamedTuple):
    """What a grid step reads, or the gradients that it writes: arrays, their block specs, or references."""

    # (M, hd)
    q: Any
    own: KV
    # (C, hd)
    tokens: KV


def _specs(inputs: UpdateInputs) -> tuple[_Blocks, _Blocks]:
    """Return the block specs of the inputs and of their gradients."""
    length, group, head_dim = inputs.q.shape[1], _grid(inputs)[-1], inputs.q.shape[3]

    def spec(rows: int, index: Any) -> pl.BlockSpec:
        return pl.BlockSpec((None, rows, head_dim), index)

    size = inputs.taps.k.shape[1]
    queries = spec(length, lambda b, h, g, at: (b, 0, h * group + g))
    own = spec(length, lambda b, h, g, at: (b, 0, h))
    tokens = spec(size, lambda b, h, g, at: (b, at[0], h))
    taps = spec(size, lambda b, h, g, at: (b, 0, h))
    read = _Blocks(queries, KV(own, own), KV(tokens, tokens))
    return read, read._replace(tokens=KV(taps, taps))


def _flat(x: jax.Array) -> jax.Array:
    """Return x with its heads side by side."""
    return x.reshape(*x.shape[:2], -1)


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def kernel_forward(interpret: bool, inputs: UpdateInputs) -> tuple[jax.Array, UpdateInputs]:
    """Compute attention with the kernel; also return the residuals of its derivative."""
    specs, _ = _specs(inputs)
    q, own = jax.tree.map(_flat, (inputs.q, inputs.own))
    out = pl.pallas_call(
        _forward_kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=_grid(inputs),
            in_specs=[specs],
            out_specs=specs.q,
        ),
        out_shape=_like(q),
        compiler_params=PARAMS,
        interpret=interpret,
        name="update_attention_forward",
    )(inputs.block, _Blocks(q, own, inputs.tokens))
    return out.reshape(inputs.q.shape), inputs


def _softmax(read: _Blocks) -> tuple[jax.Array, jax.Array]:
    """Return float32 probabilities (M, M) of the rows' own keys and (M, C) of the block's."""
    factor = read.q.shape[-1] ** -0.5 * LOG2_E
    scores = [product(read.q[...], keys[...], "nt") * factor for keys in (read.own.k, read.tokens.k)]
    top = functools.reduce(jnp.maximum, [s.max(axis=1, keepdims=True) for s in scores])
    own, tokens = (jnp.exp2(s - top) for s in scores)
    scale = 1 / (own.sum(axis=1, keepdims=True) + tokens.sum(axis=1, keepdims=True))
    return own * scale, tokens * scale


def _forward_kernel(block: Any, read: _Blocks, out: Any) -> None:
    p_own, p = _softmax(read)
    own_v, v = read.own.v, read.tokens.v
    result = product(p_own.astype(v.dtype), own_v[...], "nn") + product(p.astype(v.dtype), v[...], "nn")
    out[...] = result.astype(out.dtype)


def kernel_backward(interpret: bool, inputs: UpdateInputs, d_out: jax.Array) -> tuple[UpdateInputs]:
    """Compute the cotangent of `inputs` with the kernel; that of the block's keys and values belongs to the taps."""
    specs, gradient_specs = _specs(inputs)
    q, own, d_out = jax.tree.map(_flat, (inputs.q, inputs.own, d_out))
    head_dim = inputs.q.shape[3]
    own_sum, sum_ = (scratch(x.shape[1], head_dim) for x in (inputs.q, inputs.taps.k))
    ((d_q, d_own, d_taps),) = pl.pallas_call(
        _backward_kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=_grid(inputs),
            in_specs=[specs.q, specs.q, specs.own, specs.tokens],
            out_specs=[gradient_specs],
            scratch_shapes=[(KV(own_sum, own_sum), KV(sum_, sum_))],
        ),
        out_shape=[jax.tree.map(_like, _Blocks(q, own, inputs.taps))],
        compiler_params=PARAMS,
        interpret=interpret,
        name="update_attention_backward",
    )(inputs.block, q, d_out, own, inputs.tokens)
    d_q, d_own = jax.tree.map(lambda g, x: g.reshape(x.shape), (d_q, d_own), (inputs.q, inputs.own))
    return (UpdateInputs(d_q, d_own, KV(None, None), None, d_taps),)


_attend.defvjp(kernel_forward, kernel_backward)


def _backward_kernel(
    block: Any, q: Any, d_out: Any, own: KV, tokens: KV, gradients: _Blocks, sums: tuple[KV, KV]
) -> None:
    scale = q.shape[-1] ** -0.5
    probabilities = _softmax(_Blocks(q, own, tokens))
    d_probabilities = [product(d_out[...], values[...], "nt") for values in (own.v, tokens.v)]
    weighted = [
        (p * d).sum(axis=1, keepdims=True) for p, d in zip(probabilities, d_probabilities, strict=True)
    ]
    delta = weighted[0] + weighted[1]
    d_scores = [
        (p * (d - delta) * scale).astype(q.dtype) for p, d in zip(probabilities, d_probabilities, strict=True)
    ]
    d_q = product(d_scores[0], own.k[...], "nn") + product(d_scores[1], tokens.k[...], "nn")
    gradients.q[...] = d_q.astype(gradients.q.dtype)
    # The query heads of a group share their keys and values, so the gradients of these are summed over the group.
    parts = []
    for p, d in zip(probabilities, d_scores, strict=True):
        parts += [product(d, q[...], "tn"), product(p.astype(q.dtype), d_out[...], "tn")]
    heads, last = pl.program_id(2), pl.num_programs(2) - 1
    outs = (*gradients.own, *gradients.tokens)
    for part, total, out in zip(parts, (*sums[0], *sums[1]), outs, strict=True):

        @pl.when(heads == 0)
        def _(part: Any = part, total: Any = total) -> None:
            total[...] = part

        @pl.when(heads > 0)
        def _(part: Any = part, total: Any = total) -> None:
            total[...] += part

        @pl.when(heads == last)
        def _(total: Any = total, out: Any = out) -> None:
            out[...] = total[...].astype(out.dtype)
