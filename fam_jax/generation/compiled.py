"""The model's calls, compiled once per config, mesh and shape. Each takes the parameters as an argument."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fam_jax.config import ModelConfig, ceil_div
from fam_jax.generation.sampling import Sampling, sample
from fam_jax.model import StreamState, Transformer, from_dict
from fam_jax.model.layer_types import memory_of
from fam_jax.sharding import AXES, batch_sharding, replicated, traced_for

Params = dict[str, Any]
BATCH_AXES = cast(tuple[str, ...], AXES["batch"][0])
TIE = -1  # in place of the likeliest token where two are equally likely


class Calls(NamedTuple):
    """Jitted functions. Those that take a state consume it: its buffers become those of the returned state."""

    start: Callable[..., StreamState]
    # Puts one stream and its logits into a row of a batch.
    replace_row: Callable[..., tuple[jax.Array, StreamState]]
    read_blocks: Callable[..., tuple[jax.Array, StreamState]]
    read_piece: Callable[..., tuple[jax.Array, StreamState]]
    logits: Callable[..., jax.Array]
    decode: Callable[..., tuple["Decoded", StreamState]]
    score: Callable[..., tuple["Scored", StreamState]]
    measure_blocks: Callable[..., tuple["Measured", StreamState]]


class Decoded(NamedTuple):
    """The result of one call of `Calls.decode`; columns from `steps` on are unused."""

    # (B, W) int32; 0 in rows that had stopped.
    tokens: jax.Array
    # (B, W)
    logprobs: jax.Array
    # (B,) int32, tokens of this call.
    counts: jax.Array
    # (B,) bool
    stopped: jax.Array
    # (B,) bool; False: the row rests, as the logits of its next token are not finite.
    finite: jax.Array
    # () int32
    steps: jax.Array
    # (B, V) logits of each row's next token.
    logits: jax.Array


class Scored(NamedTuple):
    """How likely given tokens are; entries beyond a row's count mean nothing."""

    # (B, W) int32, the likeliest token in each place, or TIE.
    likeliest: jax.Array
    # (B, W)
    logprobs: jax.Array
    # (B, V) logits of each row's next token.
    logits: jax.Array


class Measured(NamedTuple):
    """How well each token of a batch is predicted from those before it."""

    # (B, T) int32, the likeliest token in each place, or TIE.
    likeliest: jax.Array
    # (B, T)
    logprobs: jax.Array


@functools.lru_cache
def structure(config: ModelConfig) -> tuple[Any, Any]:
    """Return graph definition and abstract state of the model, to merge parameters into."""
    return nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))


def mesh_of(params: Params) -> Mesh | None:
    """Return the mesh (of `fam_jax.sharding`) that the parameters are spread over; None if they are not."""
    for leaf in jax.tree.leaves(params):
        mesh = getattr(getattr(leaf, "sharding", None), "mesh", None)
        if isinstance(mesh, Mesh) and set(BATCH_AXES) <= set(mesh.axis_names):
            return mesh
    return None


def rows_sharding(mesh: Mesh, rows: int) -> NamedSharding:
    """Return the sharding of arrays (B, ...): over the batch axes if they divide the rows, else replicated."""
    return batch_sharding(mesh) if rows % row_ways(mesh) == 0 else replicated(mesh)


def row_ways(mesh: Mesh | None) -> int:
    """Return the number of parts that a mesh divides the rows of a batch into."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def state_sharding(mesh: Mesh, model: ModelConfig, rows: int) -> StreamState:
    """Return the sharding of every array of a state: rows over the batch axes, key heads over tensor, where possible.

    Every device has the positions of all rows, so any process can read them.
    """
    axes = memory_of(model).state_axes()
    batch = next(iter(rows_sharding(mesh, rows).spec), None)

    def place(name: str | None, size: int) -> Any:
        if name is None:
            return None
        if name == "batch":
            return batch
        spread = AXES[name][0]
        assert isinstance(spread, str)
        return spread if size % mesh.shape[spread] == 0 else None

    def of_layers(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        return NamedSharding(mesh, P(None, *map(place, axes[name], leaf.shape[1:])))

    shapes = jax.eval_shape(lambda: _start_shapes(model, rows))
    everywhere = replicated(mesh)
    return dataclasses.replace(
        shapes,
        layers=jax.tree_util.tree_map_with_path(of_layers, shapes.layers),
        shared=jax.tree.map(lambda _: NamedSharding(mesh, P(batch)), shapes.shared),
        position=jax.tree.map(lambda _: everywhere, shapes.position),
    )


def _start_shapes(model: ModelConfig, rows: int) -> StreamState:
    return Transformer(model, rngs=nnx.Rngs(0)).init_state(rows)


@functools.lru_cache(maxsize=32)
def compiled_calls(config: ModelConfig, mesh: Mesh | None, rows: int) -> Calls:
    """Return the calls for batches of `rows` rows; each compiles when it is first called with a shape."""
    graphdef, abstract = structure(config)

    def model(params: Params) -> Transformer:
        return nnx.merge(graphdef, from_dict(abstract, params))

    def start(params: Params) -> StreamState:
        return model(params).init_state(rows)

    def replace_row(
        state: StreamState, logits: jax.Array, row: jax.Array, stream: StreamState, its_logits: jax.Array
    ) -> tuple[jax.Array, StreamState]:
        return jax.lax.dynamic_update_index_in_dim(logits, its_logits[0], row, 0), state.replace_row(
            row, stream
        )

    def read_blocks(params: Params, state: StreamState, tokens: jax.Array) -> tuple[jax.Array, StreamState]:
        hidden, state = model(params).hidden(tokens, state, aligned=True)
        return hidden[:, -1], state

    def read_piece(
        params: Params, state: StreamState, tokens: jax.Array, counts: jax.Array, last: jax.Array
    ) -> tuple[jax.Array, StreamState]:
        hidden, state = model(params).hidden(tokens, state, lengths=counts)
        newest = hidden[np.arange(rows), jnp.maximum(counts - 1, 0)]
        return jnp.where(counts[:, None] > 0, newest, last), state

    def logits(params: Params, hidden: jax.Array) -> jax.Array:
        return model(params).logits(hidden)

    def decode(params: Params, state: StreamState, **kwargs: Any) -> tuple[Decoded, StreamState]:
        return _decode(model(params), state, **kwargs)

    def score(params: Params, state: StreamState, **kwargs: jax.Array) -> tuple[Scored, StreamState]:
        return _score(model(params), state, **kwargs)

    def measure_blocks(params: Params, state: StreamState, **kwargs: Any) -> tuple[Measured, StreamState]:
        return _measure(model(params), state, **kwargs)

    placed: dict[str, dict[str, Any]] = {"state": {}, "both": {}, "one": {}}
    if mesh is not None:
        one, places = replicated(mesh), state_sharding(mesh, config, rows)
        placed = {
            name: {"out_shardings": out}
            for name, out in {"state": places, "both": (one, places), "one": one}.items()
        }
    consuming = functools.partial(jax.jit, donate_argnames="state", **placed["both"])
    return Calls(
        start=jax.jit(start, **placed["state"]),
        replace_row=consuming(replace_row),
        read_blocks=consuming(read_blocks if mesh is None else traced_for(mesh, read_blocks)),
        read_piece=consuming(read_piece),
        logits=jax.jit(logits, **placed["one"]),
        decode=consuming(decode, static_argnames=("sampling", "width")),
        score=consuming(score),
        measure_blocks=consuming(
            measure_blocks if mesh is None else traced_for(mesh, measure_blocks), static_argnames="width"
        ),
    )


def _decode(
    model: Transformer,
    state: StreamState,
    logits: jax.Array,
    stopped: jax.Array,
    keys: jax.Array,
    begin: jax.Array,
    limits: jax.Array,
    stop_tokens: jax.Array,
    *,
    sampling: Sampling,
    width: int,
) -> tuple[Decoded, StreamState]:
    """Generate up to `width` tokens in each row.

    A row rests once it has stopped, has `limits` (B,) new tokens, or has logits that are not finite. It generated
    `begin` (B,) tokens before this call: its next one is sampled with `fold_in(keys[row], begin[row])`.
    """
    rows = logits.shape[0]
    none_yet = Decoded(
        tokens=jnp.zeros((rows, width), jnp.int32),
        logprobs=jnp.zeros((rows, width), logits.dtype),
        counts=jnp.zeros(rows, jnp.int32),
        stopped=stopped,
        finite=_finite(logits),
        steps=jnp.zeros((), jnp.int32),
        logits=logits,
    )

    def active_rows(done: Decoded) -> jax.Array:
        return ~done.stopped & done.finite & (done.counts < limits)

    def unfinished(carry: tuple[Decoded, StreamState]) -> jax.Array:
        return (carry[0].steps < width) & active_rows(carry[0]).any()

    def step(carry: tuple[Decoded, StreamState]) -> tuple[Decoded, StreamState]:
        done, state = carry
        active = active_rows(done)
        token = sample(done.logits, jax.vmap(jax.random.fold_in)(keys, begin + done.counts), sampling)
        token = jnp.where(active, token, 0)
        logprob = jnp.where(active, _logprob(done.logits, token), 0)
        after, state = model(token[:, None], state, lengths=active.astype(jnp.int32))
        logits = jnp.where(active[:, None], after[:, 0], done.logits)
        done = Decoded(
            tokens=done.tokens.at[:, done.steps].set(token),
            logprobs=done.logprobs.at[:, done.steps].set(logprob),
            counts=done.counts + active,
            stopped=done.stopped | (active & (token[:, None] == stop_tokens).any(axis=1)),
            finite=_finite(logits),
            steps=done.steps + 1,
            logits=logits,
        )
        return done, state

    return jax.lax.while_loop(unfinished, step, (none_yet, state))


def _finite(logits: jax.Array) -> jax.Array:
    """Return which rows (B,) can be sampled from: none of their logits is NaN or inf, and not all are -inf."""
    return jnp.isfinite(logits.max(axis=-1))


def _score(
    model: Transformer, state: StreamState, logits: jax.Array, tokens: jax.Array, counts: jax.Array
) -> tuple[Scored, StreamState]:
    """Read the first `counts` (B,) tokens of each row of (B, W), with logits of one token per row at a time."""
    hidden, state = model.hidden(tokens, state, lengths=counts)

    def step(logits: jax.Array, x: Any) -> tuple[jax.Array, Any]:
        hidden, token, read = x
        seen = _likeliest(logits), _logprob(logits, token)
        return jnp.where(read[:, None], model.logits(hidden), logits), seen

    read = np.arange(tokens.shape[1])[:, None] < counts
    logits, (likeliest, logprobs) = jax.lax.scan(step, logits, (hidden.swapaxes(0, 1), tokens.T, read))
    return Scored(likeliest.T, logprobs.T, logits), state


def _measure(
    model: Transformer, state: StreamState, inputs: jax.Array, targets: jax.Array, *, width: int
) -> tuple[Measured, StreamState]:
    """Read inputs (B, T) from a block border on, with logits of `width` tokens per row at a time."""
    hidden, state = model.hidden(inputs, state, aligned=True)
    length = inputs.shape[1]
    count = ceil_div(length, width)

    def split(x: jax.Array) -> jax.Array:  # (B, T, ...) -> (pieces, B, width, ...)
        padded = jnp.pad(x, ((0, 0), (0, count * width - length), *[(0, 0)] * (x.ndim - 2)))
        return padded.reshape(x.shape[0], count, width, *x.shape[2:]).swapaxes(0, 1)

    def piece(x: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        logits = model.logits(x[0])
        chosen = jnp.take_along_axis(logits, x[1][..., None], axis=-1)[..., 0]
        return _likeliest(logits), chosen - jax.nn.logsumexp(logits, axis=-1)

    parts = jax.lax.map(piece, (split(hidden), split(targets)))
    return Measured(*(x.swapaxes(0, 1).reshape(-1, count * width)[:, :length] for x in parts)), state


def _likeliest(logits: jax.Array) -> jax.Array:
    """Return the token with the highest logit (...,) int32, or TIE if several have it."""
    alone = (logits == logits.max(axis=-1, keepdims=True)).sum(axis=-1) == 1
    return jnp.where(alone, jnp.argmax(logits, axis=-1), TIE).astype(jnp.int32)


def _logprob(logits: jax.Array, token: jax.Array) -> jax.Array:
    return jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)[:, 0]
