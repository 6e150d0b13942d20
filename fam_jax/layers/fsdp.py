"""Fully sharded data parallelism: gather the weights of a layer where they are used, and scatter their gradients.

Left alone, the compiler may move activations instead, or sum a whole gradient on every device before each takes its
part. Here each layer's weights are gathered once, in the dtype of activations, and their gradients leave as a
reduce-scatter. Nothing happens without a mesh in use (see `fam_jax.sharding.traced_for`), or if its fsdp axis has one
device.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from fam_jax.config import ModelConfig
from fam_jax.sharding import ROW_AXES, parameter_spec

FSDP = "fsdp"


def is_spread() -> bool:
    """Return whether the mesh in use divides weights over its fsdp axis."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.shape.get(FSDP, 1) > 1


def gather_layer(state: Any, config: ModelConfig) -> Any:
    """Return the parameters of one layer, without the layer axis, with whole kernels in the dtype of the model.

    Parameters that are not divided over fsdp keep their own dtype.
    """
    if not is_spread():
        return state
    mesh = jax.sharding.get_abstract_mesh()

    def gather(path: Any, x: jax.Array) -> jax.Array:
        name = "layers/" + jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        spec = P(*parameter_spec(name, (1, *x.shape), mesh)[1:])
        return gather_weight(x, spec, config.dtype) if FSDP in spec else x

    return jax.tree_util.tree_map_with_path(gather, state)


def gather_weight(x: jax.Array, spec: P, dtype: str) -> jax.Array:
    """Gather a weight (two or three axes), divided as `spec` says, onto every device of the fsdp axis.

    It is gathered in the form in which it is multiplied: a matrix, with heads and their features on one axis. Otherwise
    the compiler would compute its gradient with a separate axis of heads and transpose activations for it.
    """
    axes = list(spec)
    matrix = x
    if x.ndim == 3:
        # Of the two axes that become one, only the first is divided.
        first = 1 if spec[0] == FSDP else 0
        axes.pop(first + 1)
        matrix = x.reshape(*x.shape[:first], -1, *x.shape[first + 2 :])
    whole = [None if axis == FSDP else axis for axis in axes]
    return _gather(P(*axes), P(*whole), matrix.astype(dtype)).reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather(spec: P, whole: P, x: jax.Array) -> jax.Array:
    # The barrier keeps the compiler from moving the gather into the loop over blocks, where it would run in every step.
    # The second constraint keeps it from dividing the weight again for that loop.
    gathered = jax.lax.optimization_barrier(jax.lax.with_sharding_constraint(x, whole))
    return jax.lax.with_sharding_constraint(gathered, whole)


def _gather_forward(spec: P, whole: P, x: jax.Array) -> tuple[jax.Array, None]:
    return _gather(spec, whole, x), None


def _gather_backward(spec: P, whole: P, _: None, cotangent: jax.Array) -> tuple[jax.Array]:
    # Without this constraint every device would sum the whole gradient.
    return (jax.lax.with_sharding_constraint(cotangent, spec),)


_gather.defvjp(_gather_forward, _gather_backward)


def keep_rows(x: jax.Array) -> jax.Array:
    """Return `x` (B, ...), kept on the devices that have its rows.

    Left alone, the compiler may divide the width of memory rows over the devices, because that is how the gradients of
    the weights are divided. It would then gather the weights in every step of the loop over blocks.
    """
    if not divides_rows(x.shape[0]):
        return x
    return jax.lax.with_sharding_constraint(x, P(ROW_AXES, *[P.UNCONSTRAINED] * (x.ndim - 1)))


def divides_rows(rows: int) -> bool:
    """Return whether weights are divided over fsdp and the batch axes of the mesh divide `rows`."""
    mesh = jax.sharding.get_abstract_mesh()
    return is_spread() and rows % math.prod(mesh.shape[axis] for axis in ROW_AXES) == 0


def embed(table: jax.Array, tokens: jax.Array, dtype: str) -> jax.Array:
    """Look up tokens (B, T) in the embedding table (V, D); return (B, T, D) in `dtype`.

    Each device gathers the table and looks up its own rows of the batch. In the backward pass each device sums the
    gradients of its rows in the dtype of the table, and a reduce-scatter adds and divides them.
    """
    if not divides_rows(tokens.shape[0]):
        return table[tokens].astype(dtype)
    return _embed_sharded(dtype, table, tokens)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _embed_sharded(dtype: str, table: jax.Array, tokens: jax.Array) -> jax.Array:
    def local(table: jax.Array, tokens: jax.Array) -> jax.Array:
        return jax.lax.all_gather(table.astype(dtype), FSDP, axis=1, tiled=True)[tokens]

    return on_rows(local, (P(None, FSDP), P(ROW_AXES)), P(ROW_AXES))(table, tokens)


def _embed_forward(dtype: str, table: jax.Array, tokens: jax.Array) -> tuple[jax.Array, Any]:
    # An empty array carries the table's shape and dtype.
    return _embed_sharded(dtype, table, tokens), (tokens, jnp.empty((*table.shape, 0), table.dtype))


def _embed_backward(dtype: str, residuals: Any, cotangent: jax.Array) -> tuple[jax.Array, None]:
    tokens, like = residuals

    def local(tokens: jax.Array, cotangent: jax.Array) -> jax.Array:
        zeros = jnp.zeros(like.shape[:2], like.dtype)
        summed = zeros.at[tokens].add(cotangent.astype(like.dtype))
        return spread(summed, axis=1)

    return on_rows(local, (P(ROW_AXES), P(ROW_AXES)), P(None, FSDP))(tokens, cotangent), None


_embed_sharded.defvjp(_embed_forward, _embed_backward)


def on_rows(function: Any, in_specs: Any, out_specs: Any) -> Any:
    """Let each device call `function` for its own rows of the batch; the compiler handles other mesh axes."""
    return jax.shard_map(
        function, in_specs=in_specs, out_specs=out_specs, axis_names=set(ROW_AXES), check_vma=False
    )


def spread(x: jax.Array, axis: int) -> jax.Array:
    """Sum `x` over devices and keep this device's part along `axis`; for use inside :func:`on_rows`."""
    x = jax.lax.psum_scatter(x, FSDP, scatter_dimension=axis, tiled=True)
    return jax.lax.psum(x, tuple(axis for axis in ROW_AXES if axis != FSDP))
