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
from fam_jax.kernels import Part, joint_attention
from fam_jax.model.gather import keep_rows
from fam_jax.model.layers import Apply, DecoderLayer, FrozenParam, Linear, apply_linear
from fam_jax.model.rope import Rope, Rotation, rotate

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


class BlockInputs(NamedTuple):
    """What one FAM update reads beside the FAM; in a chain every array has a leading N axis."""

    keys: jax.Array  # (B, C, K, hd) of the block's tokens, rotated
    values: jax.Array  # (B, C, K, hd)
    rotation: Rotation  # (B or 1, M, 1, hd/2) of the FAM, in the frame of the keys
    keep: jax.Array  # (B,) bool: the FAM carries context, so the update has its residual


def update_fam(
    layer: DecoderLayer, fam: jax.Array, block: BlockInputs, apply: Apply = apply_linear
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """F_tau from F_{tau-1} (B, M, D) and block tau: the FAM path of algorithm 2.

    Returns:
      F_tau, and the unrotated keys and values (B, M, K, hd) of F_{tau-1}, which the tokens of the block see.
    """
    q, k, v = layer.project(fam, apply)
    q = rotate(q, block.rotation)
    attended = joint_attention(
        [Part(q, rotate(k, block.rotation), v), Part(q, block.keys, block.values)],
        softcap=layer.attention_softcap,
    )
    residual = jnp.where(block.keep[:, None, None], fam, 0)
    return layer.finish(attended, residual, apply), (k, v)


def run_chain(
    layer: DecoderLayer, fam: jax.Array, blocks: BlockInputs
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

    return scan_updates(merge, frozen, weights, rest, fam, blocks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scan_updates(merge: Merge, frozen: Any, weights: Any, rest: Any, fam: jax.Array, blocks: Any) -> Any:
    """`lax.scan` of :func:`update_fam` whose backward pass forms each weight gradient once, over all blocks.

    Differentiated as it stands, a scan adds the gradient of every weight to an accumulator at every step: N times the
    traffic of all the layer's weights. Here the backward scan yields only the cotangents of the projections' outputs;
    after it, each projection is differentiated once, at its stacked inputs and cotangents.

    Args:
      merge: (frozen, weights, rest) -> layer.
      frozen: parameters of projections that are not trained, and get no gradient.
      weights: the other parameters of projections.
      rest: the other parameters, differentiated the usual way.
      fam: carry.
      blocks: xs of the scan.

    Returns:
      (carry, stacked ys), as `lax.scan`.
    """
    frozen, weights = _cast((frozen, weights), fam.dtype)

    def apply(linear: Linear, h: jax.Array) -> jax.Array:
        return keep_rows(linear(keep_rows(h)))

    def body(fam: jax.Array, block: Any) -> tuple[jax.Array, Any]:
        return update_fam(merge(frozen, weights, rest), keep_rows(fam), block, apply)

    return jax.lax.scan(body, fam, blocks)


def _scan_forward(
    merge: Merge, frozen: Any, weights: Any, rest: Any, fam: jax.Array, blocks: Any
) -> tuple[Any, Any]:
    cast_frozen, cast = _cast((frozen, weights), fam.dtype)

    def tapped(rest: Any, fam: jax.Array, blocks: Any, nudges: dict[str, jax.Array]) -> tuple[Any, Any]:
        """The scan, with a zero added to every projection's output, to be differentiated by, and inputs recorded."""

        def body(fam: jax.Array, x: Any) -> tuple[jax.Array, Any]:
            block, nudge = x
            inputs: dict[str, jax.Array] = {}

            def apply(linear: Linear, h: jax.Array) -> jax.Array:
                assert linear.name not in inputs, f"{linear.name} is applied twice in a step"
                inputs[linear.name] = h = keep_rows(h)
                return keep_rows(linear(h) + nudge[linear.name])

            fam, y = update_fam(merge(cast_frozen, cast, rest), keep_rows(fam), block, apply)
            return fam, (y, inputs)

        fam, (ys, inputs) = jax.lax.scan(body, fam, (blocks, nudges))
        return (fam, ys), inputs

    nudges = _zeros_like_outputs(merge(cast_frozen, cast, rest), fam, blocks)
    out, pullback, inputs = jax.vjp(tapped, rest, fam, blocks, nudges, has_aux=True)
    return out, (pullback, inputs, frozen, weights, rest)


def _scan_backward(merge: Merge, residuals: Any, cotangents: Any) -> Any:
    pullback, inputs, frozen, weights, rest = residuals
    d_rest, d_fam, d_blocks, d_outputs = pullback(cotangents)

    def batch_first(
        x: jax.Array,
    ) -> jax.Array:  # projections merge the leading axes; a mesh divides the batch
        return x.swapaxes(0, 1)

    inputs, d_outputs = jax.tree.map(batch_first, (inputs, d_outputs))  # (N, B, M, ...) -> (B, N, M, ...)

    def outputs(weights: Any) -> dict[str, jax.Array]:
        linears = merge(frozen, weights, rest).linears()
        return {name: linear(inputs[name]) for name, linear in linears.items()}

    (d_weights,) = jax.vjp(outputs, weights)[1](d_outputs)
    return None, d_weights, d_rest, d_fam, d_blocks


scan_updates.defvjp(_scan_forward, _scan_backward)


def _cast(params: Any, dtype: Any) -> Any:
    """Once before the scan, not at every step of it."""
    return jax.tree.map(lambda w: w.astype(dtype), params)


def _zeros_like_outputs(layer: DecoderLayer, fam: jax.Array, blocks: Any) -> dict[str, jax.Array]:
    """Zeros (N, B, M, *out) for every projection."""
    shapes: dict[str, tuple[int, ...]] = {}

    def apply(linear: Linear, h: jax.Array) -> jax.Array:
        y = linear(h)
        shapes[linear.name] = y.shape
        return y

    # Shapes only, so that a chain of no blocks has them too.
    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), blocks)
    jax.eval_shape(lambda fam, block: update_fam(layer, fam, block, apply), fam, first)
    count = jax.tree.leaves(blocks)[0].shape[0]
    return {name: jnp.zeros((count, *shape), fam.dtype) for name, shape in shapes.items()}


def prompt_step(layer: DecoderLayer, prompt: jax.Array, rotation: Rotation) -> jax.Array:
    """Passes the prompt stream (M, D) up through a layer: full attention among itself, nothing else (appendix B.1).

    It never sees tokens. Were it to, the tokens of the first block would see their own future one layer up.
    """
    stream = prompt[None]
    q, k, v = layer.project(stream)
    itself = Part(rotate(q, rotation), rotate(k, rotation), v)
    attended = joint_attention([itself], softcap=layer.attention_softcap)
    return layer.finish(attended, stream)[0]
