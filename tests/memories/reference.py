"""Parts of NumPy loops, and the toys of toys.py as such loops in float64, one stream and one row at a time."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fam_jax.config import ModelConfig
from tests.oracle.naive import (
    attend,
    feed_forward,
    normalize,
    parameters_of_layer,
    project_output,
    project_vector,
)

Array = np.ndarray
Params = Mapping[str, Any]
# (place of a query, place of a key) among the rows of a layer -> whether the query sees the key.
Sees = Callable[[int, int], bool]


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def silu(x: Array) -> Array:
    return x * sigmoid(x)


def layer_of_rows(layer: Params, config: ModelConfig, rows: Array, positions: list[int], sees: Sees) -> Array:
    """Return the output of a decoder layer for `rows` (n, D) under a mask."""
    projected = [project_vector(layer, config, x, float(p)) for x, p in zip(rows, positions, strict=True)]
    out = []
    for i, x in enumerate(rows):
        seen = [j for j in range(len(rows)) if sees(i, j)]
        attended = attend(
            config, projected[i][0], [projected[j][1] for j in seen], [projected[j][2] for j in seen]
        )
        a = project_output(layer, config, attended) + x
        out.append(feed_forward(layer, config, a) + a)
    return np.array(out)


def read_write_forward(params: Params, config: Any, tokens: Array) -> Array:
    """Return logits (T, V) of one stream with ReadWriteRows, m = 0."""
    memory, size, logits = params["memory"]["rows"], config.block_size, []
    length = len(memory)
    for begin in range(0, len(tokens), size):
        block = params["embedding"]["table"][tokens[begin : begin + size]]
        rows, end = np.concatenate([memory, block, memory]), length + len(block)

        def sees(i: int, j: int, end: int = end) -> bool:
            if i < length:
                return j < length
            return i >= end or j <= i

        positions = list(range(-length, len(block))) + list(range(size, size + length))
        for index in range(config.num_layers):
            rows = layer_of_rows(parameters_of_layer(params, index), config, rows, positions, sees)
        normed = np.array([normalize(config, params["final_norm"], x) for x in rows])
        logits.append(normed[length:end] @ params["unembedding"]["kernel"])
        memory = normed[end:]
    return np.concatenate(logits)


def associative_forward(params: Params, config: Any, tokens: Array) -> Array:
    """Return logits (T, V) of one stream with AssociativeRows, m = 0."""
    width, size, length = config.model_dim, config.block_size, config.memory.length
    matrices, logits = [np.zeros((width, width)) for _ in range(config.num_layers)], []

    def sigmoid(y: Array) -> Array:
        return 1 / (1 + np.exp(-y))

    for begin in range(0, len(tokens), size):
        block = params["embedding"]["table"][tokens[begin : begin + size]]
        rows, end = np.concatenate([block, params["memory"]["rows"]]), len(block)
        positions = list(range(end)) + list(range(size, size + length))
        for index in range(config.num_layers):
            layer = parameters_of_layer(params, index)
            own = layer["memory"]
            rows = rows + sigmoid(rows @ own["ask"]) @ matrices[index]
            rows = layer_of_rows(layer, config, rows, positions, lambda i, j, end=end: i >= end or j <= i)
            written = rows[end:]
            keys = sigmoid(written @ own["store_key"])
            matrices[index] = matrices[index] + keys.T @ np.tanh(written @ own["store_value"])
        normed = np.array([normalize(config, params["final_norm"], x) for x in rows[:end]])
        logits.append(normed @ params["unembedding"]["kernel"])
    return np.concatenate(logits)
