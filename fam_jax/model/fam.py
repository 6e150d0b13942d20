"""Feedback Attention Memory: one update, the chain of updates over blocks, and the initial FAM.

The recurrence of FAM stays within a layer and passes through M vectors per block, so it is the only sequential part:
`lax.scan` over blocks, M / C of the tokens' work. Its backward pass is arranged so that the weights' gradients are
formed once, over all blocks, and not added up block by block: see :func:`scan_updates`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fam_jax.config import ModelConfig
from fam_jax.kernels import Part, multi_part_attention, update_attention
from fam_jax.model.fsdp import keep_rows
from fam_jax.model.layers import PROJECTIONS, Apply, DecoderLayer, FrozenParam, Linear, apply_linear
from fam_jax.model.rope import Rope, Rotation, rotate, rotate_tokens

SAVE_PRODUCTS = jax.checkpoint_policies.save_only_these_names(*PROJECTIONS)

# (frozen, weights, rest) -> the layer of these parameters.
Merge = Callable[[Any, Any, Any], DecoderLayer]


def local_rotation(config: ModelConfig, rope: Rope) -> Rotation:
    """Rotation (M, 1, hd/2) of F_{tau-1} in the frame of block tau, which follows it (appendix B.2.1).

    "last": the positions of the last M tokens before the block. "float": spread evenly between the last token before
    the block and its first. "zero": none; the frame of such a FAM is the whole stream's.
    """
    index = np.arange(config.fam_length)
    if config.fam_positions == "last":
        return rope.static(index - config.fam_length)
    if config.fam_positions == "float":
        return rope.static((index + 1) / (config.fam_length + 1) - 1)
    return rope.static(0 * index)


# (queries (B, M, H, hd), keys and values (B, M, K, hd) of a FAM, no RoPE yet) -> (B, M, H, hd).
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class ChainInputs(NamedTuple):
    """What a chain of N updates reads beside the FAM."""

    keys: jax.Array  # (B, T, K * hd) of all tokens, rotated; N * C of them are read
    values: jax.Array  # (B, T, K * hd)
    rotation: Rotation  # (N, B or 1, M, 1, hd/2) of the FAM before each block, in the frame of the keys
    keep: jax.Array  # (N, B) bool: the FAM carries context, so the update has its residual


class ChainAttention(NamedTuple):
    """What is static about the attention of a chain."""

    block_size: int  # C
    softcap: float
    implementation: str


def update_fam(
    layer: DecoderLayer, fam: jax.Array, keep: jax.Array, attend: Attend, apply: Apply = apply_linear
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """F_tau from F_{tau-1} (B, M, D) and block tau: the FAM path of algorithm 2.

    Args:
      layer: whose FAM it is.
      fam: F_{tau-1}.
      keep: (B,) bool: it carries context, so the update has its residual.
      attend: to F_{tau-1} itself and all tokens of block tau.
      apply: how projections are applied.

    Returns:
      F_tau, and the unrotated keys and values (B, M, K, hd) of F_{tau-1}, which the tokens of the block see.
    """
    q, k, v = layer.project(fam, apply)
    residual = jnp.where(keep[:, None, None], fam, 0)
    return layer.finish(attend(q, k, v), residual, apply), (k, v)


def run_chain(
    layer: DecoderLayer, fam: jax.Array, inputs: ChainInputs, attention: ChainAttention
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Updates `fam` (B, M, D) over N blocks.

    Returns:
      The last FAM, and the unrotated keys and values (N, B, M, K, hd) of the FAM *before* each block.
    """
    linears = layer.linears()

    def of_linear(path: tuple[Any, ...], _: Any) -> bool:
        return path[0] in linears

    graphdef, frozen, weights, rest = nnx.split(layer, FrozenParam, of_linear, ...)  # type: ignore[misc]

    def merge(frozen: nnx.State, weights: nnx.State, rest: nnx.State) -> DecoderLayer:
        return nnx.merge(graphdef, frozen, weights, rest)

    return scan_updates(merge, attention, frozen, weights, rest, fam, inputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def scan_updates(
    merge: Merge,
    attention: ChainAttention,
    frozen: Any,
    weights: Any,
    rest: Any,
    fam: jax.Array,
    inputs: ChainInputs,
) -> Any:
    """`lax.scan` of :func:`update_fam` whose backward pass forms each weight gradient once, over all blocks.

    Differentiated as it stands, a scan adds the gradient of every weight, and that of all keys and values, to an
    accumulator at every step: N times the traffic of all the layer's weights. Here the backward scan yields only the
    cotangents of the projections' outputs and of each block's keys and values; after it, each projection is
    differentiated once, at its stacked inputs and cotangents.

    Args:
      merge: (frozen, weights, rest) -> layer.
      attention: what is static about it.
      frozen: parameters of projections that are not trained, and get no gradient.
      weights: the other parameters of projections.
      rest: the other parameters, differentiated the usual way.
      fam: carry.
      inputs: keys and values get gradients, positions do not.

    Returns:
      (carry, stacked ys), as `lax.scan`.
    """
    frozen, weights = _cast((frozen, weights), fam.dtype)
    layer = merge(frozen, weights, rest)

    def apply(linear: Linear, h: jax.Array) -> jax.Array:
        return keep_rows(linear(keep_rows(h)))

    def body(fam: jax.Array, step: Any) -> tuple[jax.Array, Any]:
        block, rotation, keep = step
        attend = _attend_to(inputs, block, rotation, _taps(inputs, attention), attention)
        return update_fam(layer, keep_rows(fam), keep, attend, apply)

    return jax.lax.scan(body, fam, _steps(inputs))


def _steps(inputs: ChainInputs) -> tuple[jax.Array, Rotation, jax.Array]:
    """Number, rotation and residual of each block."""
    return jnp.arange(len(inputs.keep)), inputs.rotation, inputs.keep


def _taps(inputs: ChainInputs, attention: ChainAttention) -> tuple[jax.Array, jax.Array]:
    """Whose cotangents are those of a block's keys and values."""
    batch, _, width = inputs.keys.shape
    tap = jnp.zeros((batch, attention.block_size, width), inputs.keys.dtype)
    return tap, tap


def _attend_to(
    inputs: ChainInputs,
    block: jax.Array,
    rotation: Rotation,
    taps: tuple[jax.Array, jax.Array],
    attention: ChainAttention,
) -> Attend:
    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        q, k = (rotate_tokens(x, rotation, attention.implementation) for x in (q, k))
        return update_attention(
            q,
            k,
            v,
            inputs.keys,
            inputs.values,
            block,
            taps,
            softcap=attention.softcap,
            implementation=attention.implementation,
        )

    return attend


def _scan_forward(
    merge: Merge,
    attention: ChainAttention,
    frozen: Any,
    weights: Any,
    rest: Any,
    fam: jax.Array,
    inputs: ChainInputs,
) -> tuple[Any, Any]:
    cast_frozen, cast = _cast((frozen, weights), fam.dtype)
    tap = _taps(inputs, attention)

    def tapped(
        rest: Any, fam: jax.Array, taps: tuple[jax.Array, jax.Array], nudges: dict[str, jax.Array]
    ) -> tuple[Any, Any]:
        """The scan, with a zero added to every projection's output, to be differentiated by, and inputs recorded."""
        layer = merge(cast_frozen, cast, rest)

        def body(fam: jax.Array, x: Any) -> tuple[jax.Array, Any]:
            (block, rotation, keep), tap, nudge = x
            recorded: dict[str, jax.Array] = {}

            def apply(linear: Linear, h: jax.Array) -> jax.Array:
                assert linear.name not in recorded, f"{linear.name} is applied twice in a step"
                recorded[linear.name] = h = keep_rows(h)
                return keep_rows(linear(h) + nudge[linear.name])

            attend = _attend_to(inputs, block, rotation, tap, attention)
            fam, y = update_fam(layer, keep_rows(fam), keep, attend, apply)
            return fam, (y, recorded)

        # Only products are kept for the way back: what is kept passes through the stacks of all blocks.
        body = jax.checkpoint(body, policy=SAVE_PRODUCTS, prevent_cse=False)
        fam, (ys, recorded) = jax.lax.scan(body, fam, (_steps(inputs), taps, nudges))
        return (fam, ys), recorded

    count = len(inputs.keep)
    taps = jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), tap)
    nudges = _zeros_like_outputs(merge(cast_frozen, cast, rest), fam, count)
    out, pullback, recorded = jax.vjp(tapped, rest, fam, taps, nudges, has_aux=True)
    return out, (pullback, recorded, frozen, weights, rest, inputs)


def _scan_backward(merge: Merge, attention: ChainAttention, residuals: Any, cotangents: Any) -> Any:
    pullback, recorded, frozen, weights, rest, inputs = residuals
    d_rest, d_fam, d_taps, d_outputs = pullback(cotangents)

    def batch_first(x: jax.Array) -> jax.Array:
        # Projections merge the leading axes, and a mesh divides the batch: (N, B, M, ...) -> (B, N, M, ...).
        return x.swapaxes(0, 1)

    recorded, d_outputs = jax.tree.map(batch_first, (recorded, d_outputs))

    def outputs(weights: Any) -> dict[str, jax.Array]:
        linears = merge(frozen, weights, rest).linears()
        return {name: linear(recorded[name]) for name, linear in linears.items()}

    (d_weights,) = jax.vjp(outputs, weights)[1](d_outputs)

    def of_tokens(tapped: jax.Array, like: jax.Array) -> jax.Array:
        """(N, B, C, K * hd) as (B, T, K * hd), zero where no block was read."""
        read = tapped.swapaxes(0, 1).reshape(like.shape[0], -1, like.shape[2])
        return jnp.pad(read, ((0, 0), (0, like.shape[1] - read.shape[1]), (0, 0)))

    d_keys, d_values = (
        of_tokens(tapped, like) for tapped, like in zip(d_taps, (inputs.keys, inputs.values), strict=True)
    )
    d_inputs = ChainInputs(d_keys, d_values, None, None)  # type: ignore[arg-type]
    return None, d_weights, d_rest, d_fam, d_inputs


scan_updates.defvjp(_scan_forward, _scan_backward)


def _cast(params: Any, dtype: Any) -> Any:
    """Once before the scan, not at every step of it."""
    return jax.tree.map(lambda w: w.astype(dtype), params)


def _zeros_like_outputs(layer: DecoderLayer, fam: jax.Array, count: int) -> dict[str, jax.Array]:
    """Zeros (N, B, M, *out) for every projection."""
    shapes: dict[str, tuple[int, ...]] = {}

    def apply(linear: Linear, h: jax.Array) -> jax.Array:
        y = linear(h)
        shapes[linear.name] = y.shape
        return y

    keep = jnp.zeros(len(fam), bool)
    jax.eval_shape(lambda fam: update_fam(layer, fam, keep, lambda q, k, v: q, apply), fam)
    return {name: jnp.zeros((count, *shape), fam.dtype) for name, shape in shapes.items()}


def prompt_step(layer: DecoderLayer, prompt: jax.Array, rotation: Rotation) -> jax.Array:
    """Passes the prompt stream (M, D) up through a layer: full attention among itself, nothing else (appendix B.1).

    It never sees tokens. Were it to, the tokens of the first block would see their own future one layer up.
    """
    stream = prompt[None]
    q, k, v = layer.project(stream)
    itself = Part(rotate(q, rotation), rotate(k, rotation), v)
    attended = multi_part_attention([itself], softcap=layer.attention_softcap)
    return layer.finish(attended, stream)[0]
