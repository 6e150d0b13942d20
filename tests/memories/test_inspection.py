"""What attends to what: equal to the weights of the NumPy loops, and watching changes nothing."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fam_jax.config import ModelConfig
from fam_jax.memories.fam import FamConfig
from fam_jax.memories.inspection import Attention, WriteAttention
from fam_jax.model import StreamState, memory_vectors
from fam_jax.model.layer_types import layers_with_memory
from tests.memories import reference
from tests.memories.cases import BLOCKS, CASES, LAYERS, SIZE, random_parameters
from tests.model.tiny import Reader, build, params_of
from tests.oracle import naive
from tests.variants import rest_slow

pytestmark = pytest.mark.usefixtures("float64")

EXACT = {"rtol": 1e-9, "atol": 1e-10}
ROWS = 2
READ = 3  # blocks

every_memory = pytest.mark.parametrize("name", rest_slow(CASES, ["fam, prefix, R=2"]))


def tokens_of(model: ModelConfig, blocks: int = READ) -> np.ndarray:
    random = np.random.default_rng(0)
    return random.integers(0, model.vocab_size, (ROWS, blocks * model.block_size)).astype(np.int32)


@functools.cache
def inspect(model: ModelConfig) -> Any:
    @jax.jit
    def call(params: Any, tokens: jax.Array, state: StreamState) -> Any:
        return build(model, params).inspect(tokens, state, lambda read: read, lambda written: written)

    return call


def watch(model: ModelConfig, params: Any) -> tuple[list[Attention], list[WriteAttention], StreamState]:
    """Return what every block of `tokens_of` attends to, and the state after them."""
    state, tokens, size = Reader(model, params, ROWS).state, tokens_of(model), model.block_size
    reads, writes = [], []
    for block in range(READ):
        part = jnp.asarray(tokens[:, block * size : (block + 1) * size])
        read, written, state = inspect(model)(params, part, state)
        reads.append(jax.tree.map(np.asarray, read))
        writes.append(jax.tree.map(np.asarray, written))
    return reads, writes, state


@functools.cache
def watched(name: str) -> tuple[list[Attention], list[WriteAttention], StreamState]:
    return watch(CASES[name].model, random_parameters(CASES[name].model))


@every_memory
def test_watching_changes_nothing(name: str) -> None:
    """T9: the state after watched blocks is that of reading them."""
    model = CASES[name].model
    one = Reader(model, random_parameters(model), ROWS)
    one.read(tokens_of(model), aligned=True)
    _, _, state = watched(name)
    # A closed block may leave anything in the slots of the unfinished one.
    plain, found = (
        dataclasses.replace(
            each,
            layers=dataclasses.replace(
                each.layers, **{name: None for name in vars(each.layers) if name.startswith("block_")}
            ),
        )
        for each in (one.state, state)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **EXACT), found, plain)


@every_memory
def test_shares_of_attention(name: str) -> None:
    """T10: shares sum to 1, no token attends to its future, and as many keys are the memory's as the config says."""
    reads, writes, _ = watched(name)
    model, future = CASES[name].model, np.triu(np.ones((SIZE, SIZE), bool), 1)
    for block, (read, written) in enumerate(zip(reads, writes, strict=True)):
        keys = model.memory.extra_keys + model.memory.keys_per_token * SIZE
        assert read.memory.shape == (LAYERS, ROWS, SIZE, model.num_heads, keys)
        total = read.memory.sum(axis=-1) + read.past + read.own.sum(axis=-1)
        np.testing.assert_allclose(total, 1, **EXACT)
        np.testing.assert_array_equal(np.moveaxis(read.own, 3, 2)[..., future], 0)
        assert (read.past.max() > 0) == (block > 0 and model.memory_segments > 0)
        if written is not None:
            total = written.memory.sum(axis=-1) + written.block.sum(axis=-1)
            np.testing.assert_allclose(total, 1, **EXACT)


@every_memory
def test_vectors_hold_what_was_written(name: str) -> None:
    """T11: they differ between streams that read different tokens, and there are none without a memory."""
    model, (_, _, state) = CASES[name].model, watched(name)
    vectors = memory_vectors(model, state)
    if not model.memory.has_state:
        assert vectors is None and layers_with_memory(model) == []
        return
    assert vectors is not None and vectors.ndim == 4 and vectors.shape[1] == ROWS
    own = layers_with_memory(model)
    assert len(vectors) in (1, LAYERS)
    assert own == [n for n in range(LAYERS) if model.memory.of_layer(n, model) == model.memory]
    differences = np.abs(vectors[:, 0] - vectors[:, 1]).max(axis=(1, 2))
    assert differences[own if len(vectors) == LAYERS else 0].min() > 1e-6


def at(tree: Any, *place: int) -> Any:
    """Return the entries of all arrays at one place."""
    return jax.tree.map(lambda x: x[place], tree)


class Recorder:
    """Records the weights (H, keys) of every call of `attend`, under the name of the function that makes it."""

    def __init__(self, patch: pytest.MonkeyPatch, module: Any, *functions: str):
        self.calls: dict[str, list[np.ndarray]] = {name: [] for name in functions}
        self.now: list[np.ndarray] = []
        attend = naive.attend

        def recording(config: Any, q: np.ndarray, keys: list, values: list) -> np.ndarray:
            self.now.append(weights(config, q, keys))
            return attend(config, q, keys, values)

        patch.setattr(module, "attend", recording)
        for name in functions:
            patch.setattr(module, name, self._within(name, getattr(module, name)))

    def _within(self, name: str, function: Any) -> Any:
        def call(*args: Any, **how: Any) -> Any:
            self.now = self.calls[name]
            result = function(*args, **how)
            self.now = []
            return result

        return call


def weights(config: Any, q: np.ndarray, keys: list[np.ndarray]) -> np.ndarray:
    """Return the softmax (H, keys) of one query, head by head."""
    group = len(q) // len(keys[0])
    scores = np.array([[q[h] @ k[h // group] for k in keys] for h in range(len(q))]) / np.sqrt(q.shape[1])
    shares = np.exp(scores - scores.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)


def compare_with_oracle(
    patch: pytest.MonkeyPatch, model: ModelConfig, *, local: tuple[int, ...] = ()
) -> None:
    params = params_of(model)
    recorder = Recorder(patch, naive, "_token_step", "_next_fam")
    naive.naive_forward(jax.tree.map(np.asarray, params), model, tokens_of(model))
    reads, writes, _ = watch(model, params)
    size, layers, memory = model.block_size, model.num_layers, model.memory
    assert isinstance(memory, FamConfig)
    read, written = iter(recorder.calls["_token_step"]), iter(recorder.calls["_next_fam"])
    for row in range(ROWS):
        for block in range(READ):
            fams = min(memory.previous_blocks, block + 1) * memory.length
            for place in range(size):
                for layer in range(layers):
                    expected, found = next(read), at(reads[block], layer, row, place)
                    own = 0 if layer in local else fams
                    keys = expected.shape[1] - own
                    np.testing.assert_allclose(found.memory[:, :own], expected[:, keys:], **EXACT)
                    np.testing.assert_array_equal(found.memory[:, own:], 0)
                    before = max(keys - (place + 1), 0)
                    np.testing.assert_allclose(found.past, expected[:, :before].sum(axis=1), **EXACT)
                    visible = keys - before
                    shown = found.own[:, place + 1 - visible : place + 1]
                    np.testing.assert_allclose(shown, expected[:, before:keys], **EXACT)
            for layer in range(layers):
                for slot in range(memory.length if layer not in local else 0):
                    expected, found = next(written), at(writes[block], layer, row, slot)
                    both = np.concatenate([found.memory, found.block], axis=-1)
                    np.testing.assert_allclose(both, expected, **EXACT)
    assert next(read, None) is None is next(written, None)


@pytest.mark.parametrize("name", rest_slow(["fam", "fam, prefix, R=2", "fam, zero"], ["fam, prefix, R=2"]))
def test_fam_attends_as_in_the_oracle(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of tokens and of feedback vectors are those of algorithm 2, computed key by key."""
    compare_with_oracle(monkeypatch, CASES[name].model)


def test_local_layers_attend_to_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = FamConfig(length=2, segments=1)
    changes = {"memory": memory, "layer_pattern": ("local", "global"), "local_window": 3}
    model = dataclasses.replace(CASES["fam"].model, **changes)
    compare_with_oracle(monkeypatch, model, local=(0,))
    assert layers_with_memory(model) == [1]


@pytest.mark.slow
def test_rows_that_pass_through_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of a memory in "segment" order are those of its NumPy loop."""
    model = CASES["read_write"].model
    params = random_parameters(model)
    recorder = Recorder(monkeypatch, reference, "layer_of_rows")
    for row in tokens_of(model):
        reference.read_write_forward(jax.tree.map(np.asarray, params), model, row)
    reads, writes, _ = watched("read_write")
    calls, length = iter(recorder.calls["layer_of_rows"]), 2
    for row in range(ROWS):
        for block in range(READ):
            for layer in range(LAYERS):
                rows = [next(calls) for _ in range(length + SIZE + length)]
                read, written = at(reads[block], layer, row), at(writes[block], layer, row)
                for place in range(SIZE):
                    expected = rows[length + place]
                    np.testing.assert_allclose(read.memory[place], expected[:, :length], **EXACT)
                    np.testing.assert_allclose(read.own[place, :, : place + 1], expected[:, length:], **EXACT)
                for slot in range(length):
                    expected = rows[length + SIZE + slot]
                    block_part = expected[:, length : length + SIZE]
                    np.testing.assert_allclose(written.block[slot], block_part, **EXACT)
                    itself = np.delete(expected, slice(length, length + SIZE), axis=1)
                    np.testing.assert_allclose(written.memory[slot], itself, **EXACT)
    assert next(calls, None) is None and BLOCKS >= READ
