"""Tests of every memory in float64: splits, decoding, causality, gradient reach, independent rows, state passing."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fam_jax.config.memory import memory_parameter_axes
from fam_jax.layers.decoder_layer import DecoderLayer
from fam_jax.memories.interface import Memory, choose_rows
from fam_jax.memories.window_cache import LARGEST_BLOCKS, start_position
from fam_jax.model import StreamState, ablated, empty_state, from_dict, passed_on, with_passed_on
from fam_jax.model.layer_types import memory_of
from fam_jax.model.parameters import flatten
from tests.memories.cases import ALWAYS, BLOCKS, CASES, IN_FULL, SIZE, class_of, random_parameters
from tests.memories.reference import associative_forward, read_write_forward
from tests.model.tiny import Reader, build
from tests.variants import rest_slow

pytestmark = pytest.mark.usefixtures("float64")

EXACT = {"rtol": 1e-10, "atol": 1e-11}
LENGTH = 14  # three blocks and a half
ROWS = 2
WIDTH = 5  # of pieces that are not aligned: longer than a block

every_memory = pytest.mark.parametrize("name", rest_slow(CASES, ALWAYS))
some_memories = pytest.mark.parametrize("name", rest_slow(CASES, IN_FULL))
WITH_STATE = [name for name, case in CASES.items() if case.memory.has_state]
with_state = pytest.mark.parametrize("name", rest_slow(WITH_STATE, {*WITH_STATE} & {*IN_FULL}))


def some_tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, SIZE * BLOCKS, shape).astype(np.int32)


@functools.cache
def parameters(name: str) -> Any:
    return random_parameters(CASES[name].model)


def reader(name: str, state: StreamState | None = None) -> Reader:
    """Return a reader of ROWS streams."""
    return Reader(CASES[name].model, parameters(name), ROWS, state)


def used(state: StreamState) -> Any:
    """Return the state with the unused slots of unfinished blocks set to zero: they may hold anything."""
    filled = np.arange(SIZE) < np.asarray(state.position.filled)[:, None]

    def clear(x: jax.Array) -> np.ndarray:
        return np.where(filled.reshape(1, *filled.shape, *[1] * (x.ndim - 3)), x, 0)

    own = {
        key: clear(x) if key.startswith("block_") else np.asarray(x)
        for key, x in vars(state.layers).items()
        if x is not None
    }
    return own, state.shared, state.position


def assert_close(found: Any, expected: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **EXACT), found, expected)


@functools.cache
def whole(name: str) -> tuple[np.ndarray, StreamState]:
    """Return the logits of one aligned call, and the state after it."""
    one = reader(name)
    return one.read(some_tokens(ROWS, LENGTH), aligned=True), one.state


def read_split(one: Reader, tokens: np.ndarray, counts: list[tuple[int, ...]]) -> np.ndarray:
    """Read tokens (B, T) unaligned, `counts` of each row at a time; return logits (B, T, V)."""
    begin, parts = [0] * ROWS, [[] for _ in range(ROWS)]
    for each in counts:
        pieces = [tokens[row, begin[row] : begin[row] + n] for row, n in enumerate(each)]
        for row, logits in enumerate(one.read_ragged(pieces, WIDTH)):
            parts[row].append(logits)
            begin[row] += each[row]
    assert begin == [tokens.shape[1]] * ROWS
    return np.stack([np.concatenate(part) for part in parts])


RAGGED = [[(5, 3), (2, 5), (0, 1), (5, 5), (2, 0)], [(1, 4), (4, 5), (4, 1), (5, 4)]]


@every_memory
def test_any_split_into_calls_reads_alike(name: str) -> None:
    """T1: all splits give the same logits and state, also with rows at different places in their blocks."""
    tokens, (logits, state) = some_tokens(ROWS, LENGTH), whole(name)
    for counts in RAGGED:
        one = reader(name)
        np.testing.assert_allclose(read_split(one, tokens, counts), logits, **EXACT)
        assert_close(used(one.state), used(state))
        np.testing.assert_array_equal(one.state.tokens_read, LENGTH)
    two = reader(name)
    begun = two.read(tokens[:, :8], aligned=True)
    ended = read_split(two, tokens[:, 8:], [(5, 2), (1, 4)])
    np.testing.assert_allclose(np.concatenate([begun, ended], axis=1), logits, **EXACT)
    assert_close(used(two.state), used(state))
    three = reader(name)
    read_split(three, tokens[:, :4], [(3, 4), (1, 0)])
    three.read(tokens[:, 4:12], aligned=True)
    np.testing.assert_allclose(read_split(three, tokens[:, 12:], [(2, 2)]), logits[:, 12:], **EXACT)


@some_memories
def test_token_by_token_is_aligned(name: str) -> None:
    """T2: decoding gives the results of an aligned call."""
    one, tokens = reader(name), some_tokens(ROWS, LENGTH)
    steps = [one.read(tokens[:, at : at + 1]) for at in range(LENGTH)]
    logits, state = whole(name)
    np.testing.assert_allclose(np.concatenate(steps, axis=1), logits, **EXACT)
    assert_close(used(one.state), used(state))


@every_memory
def test_no_token_sees_its_future(name: str) -> None:
    """T3: this holds bit for bit, on either side of block borders, in aligned and other calls."""
    tokens = some_tokens(ROWS, LENGTH)

    def aligned(tokens: np.ndarray) -> np.ndarray:
        return reader(name).read(tokens, aligned=True)

    def anywhere(tokens: np.ndarray) -> np.ndarray:
        return read_split(reader(name), tokens, RAGGED[0])

    for read in (aligned, anywhere):
        before = read(tokens)
        for changed in (0, 3, 4, 6, 11, 12, 13):
            other = tokens.copy()
            other[:, changed] = (other[:, changed] + 1) % (SIZE * BLOCKS)
            after = read(other)
            np.testing.assert_array_equal(after[:, :changed], before[:, :changed])
            assert np.abs(after[:, changed] - before[:, changed]).max() > 1e-6


@pytest.mark.parametrize("aligned", rest_slow([True, False], [False]))
@pytest.mark.parametrize("name", rest_slow(CASES, IN_FULL))
def test_gradients_reach_what_they_should(name: str, aligned: bool) -> None:
    """T4: the gradient of a block's loss with respect to a block's embeddings is zero exactly where it must be."""
    case, params = CASES[name], parameters(name)
    tokens = jnp.arange(SIZE * BLOCKS, dtype=jnp.int32)[None]  # each once, so a row of the table is one place

    def losses(table: jax.Array) -> jax.Array:
        model = build(case.model, {**params, "embedding": {"table": table}})
        logits, _ = model(tokens, model.init_state(1), aligned=aligned)
        return jnp.square(logits).reshape(BLOCKS, -1).sum(axis=1)

    slopes = np.asarray(jax.jit(jax.jacrev(losses))(params["embedding"]["table"]))  # (N, V, D)
    reached = np.abs(slopes[:, : SIZE * BLOCKS]).reshape(BLOCKS, BLOCKS, -1).max(axis=2)
    expected = np.array([[case.reach(i, j) for j in range(BLOCKS)] for i in range(BLOCKS)])
    np.testing.assert_array_equal(reached[~expected], 0)
    assert reached[expected].min() > 1e-9


@every_memory
def test_rows_do_not_mix(name: str) -> None:
    """T5: a row is the same whatever is beside it, and a reset row is a fresh one."""
    own = [some_tokens(n, seed=n) for n in (5, 4)]
    results = []
    for others in (([5, 2], 1), ([0, 3], 2)):
        one = reader(name)
        beside = [some_tokens(n, seed=20 + others[1]) for n in others[0]]
        results.append(
            ([one.read_ragged([a, b], WIDTH)[0] for a, b in zip(own, beside, strict=True)], one.state)
        )
    np.testing.assert_array_equal(np.concatenate(results[0][0]), np.concatenate(results[1][0]))
    first, second = (used(state.select([0])) for _, state in results)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    # The second row is reset; the first goes on.
    fresh, old = reader(name), results[0][1]
    reset = reader(name, StreamState.join([old.select([0]), fresh.state.select([1])]))
    more, going_on = some_tokens(ROWS, WIDTH, seed=7), reader(name, old)
    logits = reset.read_ragged([*more], WIDTH)
    np.testing.assert_array_equal(logits[0], going_on.read_ragged([*more], WIDTH)[0])
    np.testing.assert_array_equal(logits[1], fresh.read_ragged([*more], WIDTH)[1])


@every_memory
def test_padding_leaves_no_trace(name: str) -> None:
    tokens = some_tokens(ROWS, WIDTH)
    other = tokens.copy()
    other[0, 3:], other[1] = 1, 2
    states = []
    for each in (tokens, other):
        one = reader(name)
        one.read(each, lengths=[3, 0])
        states.append(used(one.state))
    jax.tree.map(np.testing.assert_array_equal, *states)


def filled(create: Callable[[nnx.Rngs], Any], values: Any) -> Any:
    """Return a module with given parameters."""
    graphdef, like = nnx.split(nnx.eval_shape(lambda: create(nnx.Rngs(0))))
    return nnx.merge(graphdef, from_dict(like, values))


FASTER = [
    name for name, case in CASES.items() if class_of(case.memory.kind).read_blocks is not Memory.read_blocks
]


# ARMT's gradients are JAX's own, and T2 compares its results.
@pytest.mark.parametrize("name", rest_slow(FASTER, {*FASTER} & {*IN_FULL} - {"armt"}))
def test_whole_blocks_are_read_as_block_by_block(name: str) -> None:
    """A faster `read_blocks` equals the default, which uses `read_piece` and `close_block`.

    Compares outputs, states, rows that rise, and gradients with respect to input and parameters, over two chunks. The
    second chunk starts with one fresh row and ends within a block.
    """
    model = CASES[name].model
    memory, params = memory_of(model), parameters(name)
    one_layer = jax.tree.map(lambda x: x[0], params["layers"])
    shared = params.get("memory", {})
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(ROWS, 3 * SIZE - 1, model.model_dim)))
    fresh = jnp.asarray([False, True])

    def read(tree: Any, shared: Any, x: jax.Array, *, default: bool) -> Any:
        own = memory.parameters = filled(memory.model_parameters, shared) if shared else None
        layer = filled(lambda rngs: DecoderLayer(model, rngs=rngs, memory=memory.layer_parameters), tree)
        stream, closing = memory.enter_stream(own, None), memory.close_stream(own, None, ROWS)
        start, _ = memory.enter(layer, memory.empty(ROWS), stream, memory.enter_at(memory.rope))
        state, position, out, risen = start, start_position(ROWS, SIZE), [], []
        for chunk in (x[:, :SIZE], x[:, SIZE:]):
            at = position if default else memory.blocks_at(position, chunk.shape[1], model.memory_segments)
            how = Memory.read_blocks if default else type(memory).read_blocks
            rows = jax.tree.map(lambda x, n=chunk.shape[1] // SIZE: jnp.stack([x] * n), closing)
            y, state, rows = how(memory, layer, chunk, state, rows, at)
            out.append(y)
            risen.append(rows)
            if len(out) == 1:
                state = choose_rows(fresh, start, state)
                position = choose_rows(fresh, position, position.next_block(writes=model.memory.has_state))
        of_block = {name: x[:, : SIZE - 1] for name, x in vars(state).items() if name.startswith("block_")}
        return jnp.concatenate(out, axis=1), dataclasses.replace(state, **of_block), risen

    def score(tree: Any, shared: Any, x: jax.Array, *, default: bool) -> Any:
        result = read(tree, shared, x, default=default)
        return sum(jnp.sin(leaf).sum() for leaf in jax.tree.leaves(result)), result

    @jax.jit
    def both(*args: Any) -> Any:
        slope = functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
        return [slope(functools.partial(score, default=default))(*args) for default in (False, True)]

    fast, slow = both(one_layer, shared, x)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(slow[1])) > 1e-2
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10), fast, slow)


@some_memories
def test_training_starts_as_an_initial_state_does(name: str) -> None:
    """From an empty state without past slots, an aligned call computes the initial state itself."""
    empty = empty_state(CASES[name].model, ROWS, past_slots=False)
    logits, state = whole(name)
    one = reader(name, empty)
    np.testing.assert_allclose(one.read(some_tokens(ROWS, LENGTH), aligned=True), logits, **EXACT)
    assert_close(used(one.state), used(state))


@with_state
def test_state_passing(name: str) -> None:
    """Rows may start from the state of another batch's first row (appendix B.2.3); the others start without context."""
    model, before = CASES[name].model, reader(name)
    before.read(some_tokens(ROWS, 8), aligned=True)
    passed = passed_on(model, before.state)
    tokens, rows = some_tokens(ROWS, 8, seed=5), np.array([False, True])
    start = with_passed_on(empty_state(model, ROWS), passed, jnp.asarray(rows))
    mixed = reader(name, start)
    logits = mixed.read(tokens, aligned=True)
    fresh = reader(name)
    expected = fresh.read(tokens, aligned=True)
    np.testing.assert_allclose(logits[0], expected[0], **EXACT)
    assert np.abs(logits[1] - expected[1]).max() > 1e-6
    assert mixed.state.position.carries_context.all()
    # If no past block is visible, a row that starts from a passed state equals one that continues. FAM is left out,
    # because it may keep keys of several past FAMs, which it does not pass on.
    if model.memory_segments == 0 and model.memory.kind != "fam":
        state = StreamState.join([before.state.select([0])] * ROWS)
        np.testing.assert_allclose(reader(name, state).read(tokens, aligned=True)[1], logits[1], **EXACT)


@with_state
@pytest.mark.parametrize("how", ["zeroed", "shuffled", "frozen"])
def test_ablation_changes_what_is_read_next(name: str, how: str) -> None:
    model, one = CASES[name].model, reader(name)
    start = one.state
    one.read(some_tokens(ROWS, 8), aligned=True)
    state = ablated(model, one.state, start, how)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, one.state)
    for field in set(vars(state.layers)) - {*memory_of(model).learned_fields}:
        assert getattr(state.layers, field) is getattr(one.state.layers, field)
    more, untouched = some_tokens(ROWS, 8, seed=9), reader(name, one.state).read
    expected = untouched(more, aligned=True)
    logits = reader(name, state).read(more, aligned=True)
    assert np.abs(logits - expected).max(axis=(1, 2)).min() > 1e-6
    if how == "frozen" and model.memory_segments == 0:
        np.testing.assert_allclose(logits, reader(name).read(more, aligned=True), **EXACT)


@some_memories
def test_the_count_of_blocks_never_wraps_around(name: str) -> None:
    """Near the largest int32, reading goes on as it did before, and the count stays there."""
    one, more = reader(name), some_tokens(ROWS, 8, seed=3)
    one.read(some_tokens(ROWS, 8), aligned=True)
    results = []
    for blocks in (1_000, LARGEST_BLOCKS - 1):
        position = dataclasses.replace(one.state.position, blocks=jnp.full(ROWS, blocks, jnp.int32))
        for how in ({"aligned": True}, {}):
            far = reader(name, dataclasses.replace(one.state, position=position))
            results.append(far.read(more, **how))
    assert (far.state.position.blocks == LARGEST_BLOCKS).all()
    # Only positions that are counted from the start of the stream depend on the count.
    if getattr(CASES[name].memory, "positions", "") != "zero":
        for other in results[1:]:
            np.testing.assert_allclose(other, results[0], **EXACT)


@every_memory
def test_states_and_parameters_have_logical_axes(name: str) -> None:
    memory = memory_of(CASES[name].model)
    state, axes = memory.empty(ROWS), memory.state_axes()
    assert axes.keys() == vars(state).keys()
    assert state.auxiliary_loss is None
    for field, value in vars(state).items():
        assert axes[field][0] == "batch"
        assert value is None or len(axes[field]) == value.ndim
    for module in (memory.layer_parameters(nnx.Rngs(0)), memory.model_parameters(nnx.Rngs(0))):
        found = {} if module is None else flatten(nnx.to_pure_dict(nnx.state(module)))
        for path, leaf in found.items():
            assert len(memory_parameter_axes(path) or ()) == leaf.ndim


@pytest.mark.parametrize(
    ("name", "forward"), [("read_write", read_write_forward), ("associative", associative_forward)]
)
def test_toys_compute_what_they_say(name: str, forward: Any) -> None:
    """T7: the results equal those in NumPy, one stream at a time."""
    params = jax.tree.map(np.asarray, parameters(name))
    expected = [forward(params, CASES[name].model, row) for row in some_tokens(ROWS, LENGTH)]
    np.testing.assert_allclose(whole(name)[0], expected, **EXACT)


def test_the_orders_are_both_there() -> None:
    assert {memory_of(case.model).order for case in CASES.values()} == {"layer", "segment"}
