"""The types of layers that a decoder mixes, each with its memory.

Parameters and states of all layers are stacked alike, whatever their type, and one scan goes over all of them.
`jax.lax.switch` chooses the code that differs between types, so compile time grows with the number of types and not
with depth. Types are static: a local layer spends no time on a memory that it does not have, or on keys beyond its
window.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fam_jax.config import ConfigError, ModelConfig
from fam_jax.layers.decoder_layer import DecoderLayer
from fam_jax.memories import inspection
from fam_jax.memories.inspection import Attention, WriteAttention
from fam_jax.memories.interface import Memory, Stream, Tail
from fam_jax.memories.registry import memory_class
from fam_jax.memories.window import Window, local_model
from fam_jax.memories.window_cache import Position
from fam_jax.model.parameters import flatten


def memory_of(model: ModelConfig) -> Memory:
    """Return the memory of a model's global layers."""
    return memory_class(model.memory.kind)(model)


def is_memory(path: str) -> bool:
    """Return whether a parameter, such as layers/memory/gate, belongs to the memory."""
    return path.removeprefix("layers/").startswith("memory/")


def start_of_memory(model: ModelConfig, table: jax.Array, seed: int) -> dict[str, jax.Array]:
    """Return initial parameters of the memory by path, for a model that continues one with another memory.

    Args:
      model: the config, with the new memory.
      table: (V, D) embeddings of the other model.
      seed: seed of random values.
    """
    memory, rngs = memory_of(model), nnx.Rngs(seed)
    keys = jax.random.split(rngs.params(), model.num_layers)
    layers = jax.vmap(lambda key: _arrays(memory.layer_parameters(nnx.Rngs(key))))(keys)
    fresh = {f"memory/{path}": leaf for path, leaf in _arrays(memory.model_parameters(rngs)).items()}
    fresh |= {f"layers/memory/{path}": leaf for path, leaf in layers.items()}
    return fresh | dict(memory.initial_parameters(table, seed))


def _arrays(module: nnx.Module | None) -> dict[str, jax.Array]:
    return {} if module is None else flatten(nnx.to_pure_dict(nnx.state(module)))


class LayerTypes(NamedTuple):
    """The memories of a model's layers."""

    # The memory of the global layers. All layers have its type of state.
    main: Memory
    # One per type, in the order of their first layers.
    memories: tuple[Memory, ...]
    # (L,) int32 index of each layer's type.
    of_layers: np.ndarray

    def enter_at(self) -> Any:
        """Return the results of `Memory.enter_at` for each layer, stacked (L, ...)."""
        each = [self.main.enter_at(memory.rope) for memory in self.memories]
        return jax.tree.map(lambda *x: jnp.stack(x)[jnp.asarray(self.of_layers)], *each)


def layer_types(model: ModelConfig, parameters: Any = None) -> LayerTypes:
    """Return the types of a model's layers.

    Args:
      model: the model's config.
      parameters: what the memory has once (`Memory.parameters`), for those who read or write.

    Raises:
      ConfigError: the model has local layers, but its memory has to pass through all layers.
    """
    main = memory_of(model)
    main.parameters = parameters
    models = [_model_of_layer(model, index) for index in range(model.num_layers)]
    types = list(dict.fromkeys(models))
    memories = tuple(main if each == model else memory_of(each) for each in types)
    if len(memories) > 1 and main.order == "segment":
        raise ConfigError(
            f"config.model.layer_pattern: {model.memory.kind} needs global layers only, got {model.layer_pattern}; "
            "choose another memory, or the pattern ('global',)"
        )
    return LayerTypes(main, memories, np.array([types.index(each) for each in models], np.int32))


def _model_of_layer(model: ModelConfig, index: int) -> ModelConfig:
    """Return the config by which a layer attends: that of the model, but for the memory and RoPE of its type."""
    if model.layer_pattern[index % len(model.layer_pattern)] == "local":
        return local_model(model)
    memory = model.memory.of_layer(index, model)
    return model if memory == model.memory else dataclasses.replace(model, memory=memory)


def models_of_types(model: ModelConfig) -> list[tuple[ModelConfig, int]]:
    """Return the config and the number of layers of each layer type, in the order of the branches in programs."""
    types = layer_types(model)
    counts = np.bincount(types.of_layers, minlength=len(types.memories)).tolist()
    return [(memory.model, count) for memory, count in zip(types.memories, counts, strict=True)]


def layers_with_memory(model: ModelConfig) -> list[int]:
    """Return the numbers of the layers that have the model's memory: by default all but local ones, or none."""
    types = layer_types(model)
    if not model.memory.has_state:
        return []
    return [n for n, which in enumerate(types.of_layers) if types.memories[which] is types.main]


def _only_attends(memory: Memory) -> bool:
    """Return whether a memory differs from others only between a layer's projections and its output."""
    kind = type(memory)
    return isinstance(memory, Window) and (kind.read_blocks, kind.read_piece) == (
        Window.read_blocks,
        Window.read_piece,
    )


def read_blocks(
    memories: Sequence[Memory],
    at: Sequence[Any],
    which: jax.Array,
    layer: DecoderLayer,
    x: jax.Array,
    state: Any,
    streams: Stream,
) -> tuple[jax.Array, Any, Stream]:
    """Read a chunk through a layer of type `which` (): see :meth:`Memory.read_blocks`."""
    if len(memories) == 1:
        return memories[0].read_blocks(layer, x, state, streams, at[0])
    if all(map(_only_attends, memories)):
        # Put attention alone into the branches: all branches' residuals of the backward pass are kept, used or not.
        windows = cast(Sequence[Window], memories)
        branches = _branches([memory.attend_blocks for memory in windows], layer, at)
        attended, state = jax.lax.switch(which, branches, *layer.project(x), state)
        return layer.finish(attended, x), state, streams
    whole = _branches([memory.read_blocks for memory in memories], layer, at)
    return jax.lax.switch(which, whole, x, state, streams)


def read_piece(
    memories: Sequence[Memory],
    at: Sequence[Any],
    which: jax.Array,
    layer: DecoderLayer,
    x: jax.Array,
    state: Any,
) -> tuple[jax.Array, Tail]:
    """Read a piece through a layer of type `which` (): see :meth:`Memory.read_piece`."""
    if len(memories) == 1:
        return memories[0].read_piece(layer, x, state, at[0])
    if all(map(_only_attends, memories)):
        branches = _branches([memory.attend_piece for memory in memories], layer, at)
        q, k, v = layer.project(x)
        attended, tail = jax.lax.switch(which, _with_one_tail(branches, q, k, v, state), q, k, v, state)
        return layer.finish(attended, x), tail
    whole = _branches([memory.read_piece for memory in memories], layer, at)
    return jax.lax.switch(which, _with_one_tail(whole, x, state), x, state)


def _branches(
    methods: Sequence[Callable[..., Any]], layer: DecoderLayer, at: Sequence[Any]
) -> list[Callable[..., Any]]:
    """Return functions of arrays alone: each method, with the layer before the arrays and its own `at` behind them."""
    return [
        lambda *arrays, method=method, own=own: method(layer, *arrays, own)
        for method, own in zip(methods, at, strict=True)
    ]


def _with_one_tail(branches: Sequence[Callable[..., Any]], *args: Any) -> list[Callable[..., Any]]:
    """Let all branches return entries of the unfinished block for the same fields: zeros where a layer has none.

    Args:
      branches: functions of `args` whose second result is a `Tail`.
      args: their arguments.
    """
    tails = [jax.eval_shape(branch, *args)[1] for branch in branches]
    fields = {name: entries for tail in tails for name, entries in tail.items()}

    def complete(branch: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            y, tail, *rest = branch(*args)
            none = {name: jnp.zeros(x.shape, x.dtype) for name, x in fields.items() if name not in tail}
            return (y, tail | none, *rest)

        return call

    return [complete(branch) for branch in branches]


def close_block(
    memories: Sequence[Memory],
    which: jax.Array,
    layer: DecoderLayer,
    state: Any,
    stream: Stream,
    position: Position,
) -> tuple[Any, Stream]:
    """Write a complete block into the state of a layer of type `which` (): see :meth:`Memory.close_block`."""
    if len(memories) == 1:
        return memories[0].close_block(layer, state, stream, position)
    branches = [
        lambda *args, memory=memory: memory.close_block(layer, *args, position) for memory in memories
    ]
    return jax.lax.switch(which, branches, state, stream)


def inspect_block(
    memories: Sequence[Memory],
    at: Sequence[Any],
    which: jax.Array,
    layer: DecoderLayer,
    x: jax.Array,
    state: Any,
) -> tuple[jax.Array, Tail, Attention]:
    """Read a block through a layer of type `which` () and watch it: see :func:`fam_jax.memories.inspection`."""
    inspecting = [functools.partial(inspection.inspect_block, memory) for memory in memories]
    branches = _with_one_tail(_branches(inspecting, layer, at), x, state)
    # Layers that have no memory see no keys of one; the results of all types need one shape.
    seen = max(jax.eval_shape(branch, x, state)[2].memory.shape[-1] for branch in branches)

    def padded(branch: Any) -> Any:
        def call(x: jax.Array, state: Any) -> Any:
            y, tail, found = branch(x, state)
            missing = ((0, 0), (0, 0), (0, 0), (0, seen - found.memory.shape[-1]))
            return y, tail, found._replace(memory=jnp.pad(found.memory, missing))

        return call

    return jax.lax.switch(which, [padded(branch) for branch in branches], x, state)


def inspect_close(
    memories: Sequence[Memory],
    which: jax.Array,
    layer: DecoderLayer,
    state: Any,
    stream: Stream,
    position: Position,
) -> tuple[Any, Stream, WriteAttention | None]:
    """Write a block into the state of a layer of type `which` () and watch it. Layers that write nothing have 0."""
    branches: list[Callable[..., Any]] = [
        lambda state, stream, memory=memory: inspection.inspect_close(memory, layer, state, stream, position)
        for memory in memories
    ]
    written = [jax.eval_shape(branch, state, stream)[2] for branch in branches]
    like = next((each for each in written if each is not None), None)

    def padded(branch: Any) -> Any:
        def call(state: Any, stream: Stream) -> Any:
            state, stream, found = branch(state, stream)
            nothing = jax.tree.map(lambda each: jnp.zeros(each.shape, each.dtype), like)
            return state, stream, nothing if found is None else found

        return call

    return jax.lax.switch(which, [padded(branch) for branch in branches], state, stream)
