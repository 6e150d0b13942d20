"""Infini-attention equals a NumPy loop written from the paper, and its limits are the known ones."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fam_jax.memories.infini import InfiniAttention, InfiniConfig, Sums
from fam_jax.memories.window import BlockSlidingWindowConfig
from tests.memories.cases import CASES, SIZE, random_parameters
from tests.memories.reading import EXACT, LENGTH, read, some_tokens
from tests.oracle.naive import (
    attend,
    feed_forward,
    normalize,
    parameters_of_layer,
    project_output,
    project_vector,
)
from tests.variants import rest_slow

pytestmark = pytest.mark.usefixtures("float64")

VARIANTS = [name for name in CASES if name.startswith("infini")]

Array = np.ndarray


def sigma(y: Array) -> Array:
    """Return ELU + 1."""
    return np.where(y > 0, y, np.exp(y) - 1) + 1


class Memory:
    """The memory of one key/value head (equations 3 to 6 of the paper)."""

    def __init__(self, width: int, update: str):
        self.update = update
        self.m, self.z = np.zeros((width, width)), np.zeros(width)

    def retrieve(self, q: Array) -> Array | None:
        """Return A_mem, or None while nothing was written."""
        return None if not self.z.any() else sigma(q) @ self.m / (sigma(q) @ self.z)

    def write(self, keys: list[Array], values: list[Array]) -> None:
        """Write a segment; the delta rule retrieves from the memory before it."""
        m, z = self.m.copy(), self.z.copy()
        for k, v in zip(keys, values, strict=True):
            old = self.retrieve(k) if self.update == "delta" else None
            m += np.outer(sigma(k), v if old is None else v - old)
            z += sigma(k)
        self.m, self.z = m, z


def infini_forward(params: Any, config: Any, tokens: Array) -> Array:
    """Return logits (T, V) of one stream, token by token."""
    size, group = config.block_size, config.num_heads // config.num_kv_heads
    update, reach = config.memory.update, config.memory.window or LENGTH
    memories = [
        [Memory(config.head_dim, update) for _ in range(config.num_kv_heads)]
        for _ in range(config.num_layers)
    ]
    seen: list[list[Any]] = [[] for _ in range(config.num_layers)]
    logits = []
    for t, token in enumerate(tokens):
        x, first = params["embedding"]["table"][token], max(t // size - config.memory.segments, 0) * size
        for index, (memory, rows) in enumerate(zip(memories, seen, strict=True)):
            layer = parameters_of_layer(params, index)
            plain_q, plain_k, v = project_vector(layer, config, x, 0.0)
            q, k, _ = project_vector(layer, config, x, float(t))
            rows.append((k, v, plain_k))
            visible = rows[max(first, t - reach + 1) :]
            mixed = attend(config, q, [row[0] for row in visible], [row[1] for row in visible])
            for head in range(config.num_heads):
                recalled = memory[head // group].retrieve(plain_q[head])
                if recalled is not None:
                    gate = 1 / (1 + np.exp(-layer["memory"]["gate"][head]))
                    mixed[head] = gate * recalled + (1 - gate) * mixed[head]
            a = project_output(layer, config, mixed) + x
            x = feed_forward(layer, config, a) + a
            if t % size == size - 1:
                for head, own in enumerate(memory):
                    own.write([row[2][head] for row in rows[-size:]], [row[1][head] for row in rows[-size:]])
        logits.append(normalize(config, params["final_norm"], x) @ params["unembedding"]["kernel"])
    return np.array(logits)


@pytest.mark.parametrize("name", rest_slow(VARIANTS, ["infini", "infini, delta"]))
def test_logits_are_those_of_the_loop(name: str) -> None:
    model = CASES[name].model
    params = random_parameters(model)
    plain = jax.tree.map(np.asarray, params)
    expected = [infini_forward(plain, model, row) for row in some_tokens()]
    np.testing.assert_allclose(read(model, params), expected, **EXACT)


def with_gates(params: Any, logit: float) -> Any:
    layers = params["layers"]
    gate = jnp.full_like(layers["memory"]["gate"], logit)
    return params | {"layers": layers | {"memory": {"gate": gate}}}


def test_closed_gates_leave_block_attention() -> None:
    """With a gate of zero, nothing is recalled: Block Sliding Window Attention with m = 0."""
    model = CASES["infini"].model
    params = random_parameters(model)
    shut, open_ = (read(model, with_gates(params, logit)) for logit in (-1e4, 0.0))
    plain = dataclasses.replace(model, memory=BlockSlidingWindowConfig(segments=0))
    layers = {name: leaf for name, leaf in params["layers"].items() if name != "memory"}
    expected = read(plain, params | {"layers": layers})
    np.testing.assert_allclose(shut, expected, **EXACT)
    np.testing.assert_array_equal(open_[:, :SIZE], shut[:, :SIZE])  # nothing to recall in the first block
    assert np.abs(open_ - shut)[:, SIZE:].max() > 1e-3


def test_open_gates_leave_linear_attention() -> None:
    """With a gate of one, a token reads sum_j s(q) s(k_j) v_j / sum_j s(q) s(k_j) over all tokens of past blocks."""
    model = CASES["infini"].model
    memory, rng = InfiniAttention(model), np.random.default_rng(0)
    heads, kv_heads, width = model.num_heads, model.num_kv_heads, model.head_dim
    q = rng.normal(size=(1, 2, heads, width))
    k, v = rng.normal(size=(2, 1, 3 * SIZE, kv_heads, width))

    class Layer:
        class memory:
            gate = jnp.full(heads, 1e4)

    empty = memory.empty(1)
    blocks = (jnp.asarray(x).reshape(1, 3, SIZE, kv_heads, width) for x in (k, v))
    sums = memory.sums_by_block(*blocks, empty)
    last = Sums(sums.key_values[:, -1], sums.keys[:, -1])
    found = memory.mix(Layer, jnp.asarray(q), jnp.full(q.shape, 100.0), last)
    for place in range(2):
        for head in range(heads):
            own = head // (heads // kv_heads)
            weights = [sigma(q[0, place, head]) @ sigma(k[0, j, own]) for j in range(3 * SIZE)]
            expected = sum(w * x for w, x in zip(weights, v[0, :, own], strict=True)) / sum(weights)
            np.testing.assert_allclose(found[0, place, head], expected, **EXACT)


def test_the_delta_rule_does_not_write_a_known_pair_again() -> None:
    """A memory that holds one pair recalls its value exactly, so the pair adds nothing; linear adds it again."""
    model = dataclasses.replace(CASES["infini"].model, block_size=1)
    rng = np.random.default_rng(0)
    k, v = (jnp.asarray(x) for x in rng.normal(size=(2, 1, 1, model.num_kv_heads, model.head_dim)))
    for update, expected in (("delta", 0.0), ("linear", 1.0)):
        memory = InfiniAttention(dataclasses.replace(model, memory=InfiniConfig(update=update)))
        start = memory.empty(1)
        once = memory.added(k, v, Sums(start.key_value_sums, start.key_sums))
        again = memory.added(k, v, once)
        np.testing.assert_allclose(again.key_values, expected * once.key_values, **EXACT)
        np.testing.assert_array_equal(again.keys, once.keys)
        assert np.abs(once.key_values).max() > 0.1


def test_gates_start_at_one_half() -> None:
    model = CASES["infini"].model
    np.testing.assert_array_equal(InfiniAttention(model).layer_parameters(None).gate[...], 0)
