"""A chain of updates: a few vectors that each block updates, for memories whose tokens never enter the recurrence.

The recurrence stays within a layer and passes through M vectors per block. It is the only sequential part: a `lax.scan`
over blocks with M / C of the tokens' work. The backward pass computes the gradients of the weights once, over all
blocks, instead of adding them up block by block: see :func:`scan_updates`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from fam_jax.kernels import KV, UpdateInputs, update_attention
from fam_jax.layers.decoder_layer import PROJECTIONS, Apply, DecoderLayer, FrozenParam, Linear, apply_linear
from fam_jax.layers.fsdp import keep_rows
from fam_jax.layers.rope import Rotation, rotate_tokens

SAVE_PRODUCTS = jax.checkpoint_policies.save_only_these_names(*PROJECTIONS)

# (frozen, weights, rest) -> the layer of these parameters.
Merge = Callable[[Any, Any, Any], DecoderLayer]


# Queries (B, M, H, hd), keys and values (B, S, K, hd) of the memory, not rotated -> attended values (B, M, H, hd). The
# last M keys are those of the vectors; most memories have no others.
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class ChainInputs(NamedTuple):
    """The inputs of a chain of N updates beside the vectors."""

    # (B, T, K * hd) keys of all tokens, rotated, and their values. The chain reads the first N * C.
    keys: jax.Array
    values: jax.Array
    # (N, B or 1, S, 1, hd/2) of the memory's keys before each block, in the frame of the tokens' keys. The last M are
    # those of the vectors, whose queries they rotate as well.
    rotation: Rotation
    # (N, B) bool: True where the vectors carry context; the update then has its residual connection.
    keep: jax.Array
    # (N, B, M, D) added to the new vectors of each block, as a multiple of their root mean square; None: nothing.
    noise: jax.Array | None = None


class ChainAttention(NamedTuple):
    """Static settings of the attention of a chain."""

    block_size: int
    softcap: float
    implementation: str
    # Whether a vector sees itself and earlier vectors only.
    causal: bool = False


# (layer, vectors (B, M, D), keep (B,) bool, attend, apply) -> (new vectors, outputs of the step). An update applies
# each projection of the layer at most once. FAM's is :func:`update_vectors`.
Update = Callable[[DecoderLayer, jax.Array, jax.Array, Attend, Apply], tuple[jax.Array, Any]]


def update_vectors(
    layer: DecoderLayer,
    vectors: jax.Array,
    keep: jax.Array,
    attend: Attend,
    apply: Apply = apply_linear,
    *,
    bound: float = 0.0,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Compute F_tau from F_{tau-1} (B, M, D) and block tau: the FAM path of algorithm 2.

    Args:
      layer: the layer. Vectors use the same weights as tokens.
      vectors: F_{tau-1}.
      keep: (B,) bool: True where the vectors carry context; the update then has its residual connection.
      attend: attention to F_{tau-1} itself and to all tokens of block tau.
      apply: applies a projection to its input.
      bound: largest root mean square of the residual connection; see :func:`bounded`. 0: no bound, as in the paper.

    Returns:
      F_tau, and the unrotated keys and values (B, M, K, hd) of F_{tau-1}, which the tokens of the block see.
    """
    q, k, v = layer.project(vectors, apply)
    residual = jnp.where(keep[:, None, None], vectors, 0)
    if bound:
        residual = bounded(residual, bound)
    return layer.finish(attend(q, k, v), residual, apply), (k, v)


def bounded(x: jax.Array, bound: float) -> jax.Array:
    """Scale each vector of x (..., D) down to a root mean square of at most `bound`; leave smaller ones as they are.

    A memory that adds to itself grows with every block, so a write turns it less and less. With the bound, the map from
    one memory to the next stops changing after a few blocks.
    """
    square = jnp.square(x).mean(axis=-1, keepdims=True)
    return x * (bound * jax.lax.rsqrt(jnp.maximum(square, bound**2)))


def run_chain(
    layer: DecoderLayer,
    vectors: jax.Array,
    inputs: ChainInputs,
    attention: ChainAttention,
    update: Update = update_vectors,
) -> tuple[jax.Array, Any]:
    """Update vectors (B, M, D) over N blocks.

    Returns:
      The last vectors, and the other outputs of `update` at each block, stacked on a first axis: by default the
      unrotated keys and values (N, B, M, K, hd) of the vectors *before* each block.
    """
    linears = layer.linears()

    def of_linear(path: tuple[Any, ...], _: Any) -> bool:
        return path[0] in linears

    graphdef, frozen, weights, rest = nnx.split(layer, FrozenParam, of_linear, ...)  # type: ignore[misc]

    def merge(frozen: nnx.State, weights: nnx.State, rest: nnx.State) -> DecoderLayer:
        return nnx.merge(graphdef, frozen, weights, rest)

    return scan_updates(Chain(merge, update, attention), frozen, weights, rest, vectors, inputs)


class Chain(NamedTuple):
    """Static settings of a chain."""

    merge: Merge
    update: Update
    attention: ChainAttention


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scan_updates(
    chain: Chain,
    frozen: Any,
    weights: Any,
    rest: Any,
    vectors: jax.Array,
    inputs: ChainInputs,
) -> Any:
    """Scan over blocks with a backward pass that computes each weight gradient once, over all blocks.

    A plain scan adds the gradient of every weight, and of all keys and values, to an accumulator at every step: N
    times the traffic of all the layer's weights. Here the backward scan yields only the cotangents of the projections'
    outputs and of each block's keys and values. After it, each projection is differentiated once, at its stacked inputs
    and cotangents.

    Args:
      chain: static settings.
      frozen: parameters of projections that are not trained and get no gradient.
      weights: the other parameters of projections.
      rest: the other parameters, differentiated the usual way.
      vectors: (B, M, D), the carry.
      inputs: keys and values, which get gradients, and positions, which get none.

    Returns:
      (carry, stacked ys), as from `lax.scan`.
    """
    frozen, weights = _cast((frozen, weights), inputs.keys.dtype)
    layer, attention = chain.merge(frozen, weights, rest), chain.attention

    def apply(linear: Linear, h: jax.Array) -> jax.Array:
        return keep_rows(linear(keep_rows(h)))

    def body(vectors: jax.Array, step: Any) -> tuple[jax.Array, Any]:
        block, rotation, keep, noise = step
        attend = _attend_to(inputs, block, rotation, _taps(inputs, attention), attention)
        vectors, y = chain.update(layer, keep_rows(vectors), keep, attend, apply)
        return _disturb(vectors, noise), y

    return jax.lax.scan(body, vectors, _steps(inputs))


def _steps(inputs: ChainInputs) -> tuple[jax.Array, Rotation, jax.Array, jax.Array | None]:
    """Return the number, the rotation, the `keep` flags and the noise of each block."""
    return jnp.arange(len(inputs.keep)), inputs.rotation, inputs.keep, inputs.noise


def _disturb(vectors: jax.Array, noise: jax.Array | None) -> jax.Array:
    if noise is None:
        return vectors
    size = jnp.sqrt(jnp.square(vectors).mean(axis=-1, keepdims=True))
    return vectors + jax.lax.stop_gradient(size) * noise.astype(vectors.dtype)


def _taps(inputs: ChainInputs, attention: ChainAttention) -> KV:
    """Return zeros whose cotangents are those of a block's keys and values."""
    batch, _, width = inputs.keys.shape
    tap = jnp.zeros((batch, attention.block_size, width), inputs.keys.dtype)
    return KV(tap, tap)


def _attend_to(
    inputs: ChainInputs, block: jax.Array, rotation: Rotation, taps: KV, attention: ChainAttention
) -> Attend:
    tokens = KV(inputs.keys, inputs.values)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        extra = k.shape[1] - q.shape[1]
        own = rotation[:, extra:] if extra else rotation
        q, k = (rotate_tokens(x, at, attention.implementation) for x, at in ((q, own), (k, rotation)))
        return update_attention(
            UpdateInputs(q, KV(k, v), tokens, block, taps),
            softcap=attention.softcap,
            causal=attention.causal,
            implementation=attention.implementation,
        )

    return attend


def _scan_forward(
    chain: Chain, frozen: Any, weights: Any, rest: Any, vectors: jax.Array, inputs: ChainInputs
) -> tuple[Any, Any]:
    merge, attention = chain.merge, chain.attention
    cast_frozen, cast = _cast((frozen, weights), inputs.keys.dtype)
    tap = _taps(inputs, attention)

    def tapped(rest: Any, vectors: jax.Array, taps: KV, nudges: dict[str, jax.Array]) -> tuple[Any, Any]:
        """Scan and record the input of every projection.

        The nudges are zeros that are added to the projections' outputs: their cotangents are those of the outputs.
        """
        layer = merge(cast_frozen, cast, rest)

        def body(vectors: jax.Array, x: Any) -> tuple[jax.Array, Any]:
            (block, rotation, keep, noise), tap, nudge = x
            recorded: dict[str, jax.Array] = {}

            def apply(linear: Linear, h: jax.Array) -> jax.Array:
                assert linear.name not in recorded, f"{linear.name} is applied twice in a step"
                recorded[linear.name] = h = keep_rows(h)
                return keep_rows(linear(h) + nudge[linear.name])

            attend = _attend_to(inputs, block, rotation, tap, attention)
            vectors, y = chain.update(layer, keep_rows(vectors), keep, attend, apply)
            return _disturb(vectors, noise), (y, recorded)

        # Keep products only: every array that is kept for the backward pass is stacked over all blocks.
        body = jax.checkpoint(body, policy=SAVE_PRODUCTS, prevent_cse=False)
        vectors, (ys, recorded) = jax.lax.scan(body, vectors, (_steps(inputs), taps, nudges))
        return (vectors, ys), recorded

    count = len(inputs.keep)
    taps = jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), tap)
    nudges = _zeros_like_outputs(chain.update, merge(cast_frozen, cast, rest), vectors, count)
    out, pullback, recorded = jax.vjp(tapped, rest, vectors, taps, nudges, has_aux=True)
    return out, (pullback, recorded, frozen, weights, rest, inputs)


def _scan_backward(chain: Chain, residuals: Any, cotangents: Any) -> Any:
    pullback, recorded, frozen, weights, rest, inputs = residuals
    d_rest, d_vectors, d_taps, d_outputs = pullback(cotangents)

    def batch_first(x: jax.Array) -> jax.Array:
        # Projections merge the leading axes, and a mesh divides the batch: (N, B, M, ...) -> (B, N, M, ...).
        return x.swapaxes(0, 1)

    recorded, d_outputs = jax.tree.map(batch_first, (recorded, d_outputs))

    def outputs(weights: Any) -> dict[str, jax.Array]:
        linears = chain.merge(frozen, weights, rest).linears()
        return {name: linear(recorded[name]) for name, linear in linears.items() if name in recorded}

    (d_weights,) = jax.vjp(outputs, weights)[1](d_outputs)

    def of_tokens(tapped: jax.Array, like: jax.Array) -> jax.Array:
        """Return (N, B, C, K * hd) as (B, T, K * hd), zero where no block was read."""
        read = tapped.swapaxes(0, 1).reshape(like.shape[0], -1, like.shape[2])
        return jnp.pad(read, ((0, 0), (0, like.shape[1] - read.shape[1]), (0, 0)))

    d_keys, d_values = (
        of_tokens(tapped, like) for tapped, like in zip(d_taps, (inputs.keys, inputs.values), strict=True)
    )
    d_inputs = ChainInputs(d_keys, d_values, None, None, None)  # type: ignore[arg-type]
    return None, d_weights, d_rest, d_vectors, d_inputs


scan_updates.defvjp(_scan_forward, _scan_backward)


def _cast(params: Any, dtype: Any) -> Any:
    """Cast parameters once, before the scan, and not in every step."""
    return jax.tree.map(lambda w: w.astype(dtype), params)


def _zeros_like_outputs(
    update: Update, layer: DecoderLayer, vectors: jax.Array, count: int
) -> dict[str, jax.Array]:
    """Return zeros (N, B, M, *out) for every projection that an update applies."""
    outputs: dict[str, jax.Array] = {}

    def apply(linear: Linear, h: jax.Array) -> jax.Array:
        outputs[linear.name] = y = linear(h)
        return y

    keep = jnp.zeros(len(vectors), bool)
    jax.eval_shape(lambda x: update(layer, x, keep, lambda q, k, v: q, apply), vectors)
    return {name: jnp.zeros((count, *y.shape), y.dtype) for name, y in outputs.items()}
