"""Computations that must agree in float32, and computations that must differ."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.model.tiny import Reader, params_of, some_tokens, variant
from tests.oracle.dense import dense_forward
from tests.oracle.naive import random_params
from tests.variants import rest_slow

SINGLE = {"rtol": 2e-5, "atol": 2e-5}  # logits of the order of 1 after some hundred float32 operations each
BASE = variant(segments=2, previous_blocks=2)


def test_parallel_is_block_by_block_is_token_by_token():
    tokens = some_tokens(2, 16)
    results = []
    for step, aligned in ((16, True), (4, True), (16, False), (1, False)):
        reader = Reader(BASE, params_of(BASE), 2)
        chunks = [reader.read(tokens[:, at : at + step], aligned=aligned) for at in range(0, 16, step)]
        # The unfinished block is empty now; its unused slots may hold anything.
        used = dataclasses.replace(reader.state.layers, block_keys=None, block_values=None)
        results.append((np.concatenate(chunks, axis=1), dataclasses.replace(reader.state, layers=used)))
    want, *others = results
    for got in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **SINGLE), got, want)


def test_rows_at_different_positions_are_each_row_alone():
    rows = [some_tokens(n, seed=n) for n in (5, 0, 3, 1)]
    more = [some_tokens(n, seed=n) for n in (2, 5, 1, 4)]
    together = Reader(BASE, params_of(BASE), 4)
    first, second = together.read_ragged(rows, 5), together.read_ragged(more, 5)
    for b in range(4):
        alone = Reader(BASE, params_of(BASE), 1)
        for logits, piece in ((first[b], rows[b]), (second[b], more[b])):
            np.testing.assert_allclose(logits, alone.read_ragged([piece], 5)[0], **SINGLE)


def test_padding_leaves_no_trace():
    tokens = some_tokens(2, 7)
    other = tokens.copy()
    other[0, 3:], other[1] = 10 - other[0, 3:], 10 - other[1]
    readers = [Reader(BASE, params_of(BASE), 2) for _ in range(2)]
    before = readers[0].state
    a, b = (reader.read(t, lengths=[3, 0]) for reader, t in zip(readers, (tokens, other), strict=True))
    np.testing.assert_array_equal(a[0, :3], b[0, :3])
    jax.tree.map(np.testing.assert_array_equal, readers[0].state, readers[1].state)
    for old, new in zip(
        jax.tree.leaves(before.layers), jax.tree.leaves(readers[0].state.layers), strict=True
    ):
        np.testing.assert_array_equal(old[:, 1], new[:, 1])  # a row that read nothing


MASKS = {
    "full causal": ({"segments": 3}, lambda q, k: k <= q),
    "own block": ({"segments": 0}, lambda q, k: (k <= q) & (q // 4 == k // 4)),
    "one segment": ({"segments": 1}, lambda q, k: (k <= q) & (q // 4 - k // 4 <= 1)),
    "sliding window": ({"segments": 2, "window": 6}, lambda q, k: (k <= q) & (q - k < 6)),
    "Transformer-XL": (
        {"segments": 1, "window": 5},
        lambda q, k: (k <= q) & (q - k < 5) & (q // 4 - k // 4 <= 1),
    ),
}


@pytest.mark.parametrize(("changes", "see"), MASKS.values(), ids=MASKS)
def test_without_fam_it_is_dense_attention_under_a_mask(changes, see):
    """FAM's other options are set, but have no effect with M = 0."""
    config = variant(length=0, previous_blocks=3, init="prefix", positions="zero", **changes)
    tokens, steps = some_tokens(2, 14), np.arange(14)
    want = dense_forward(random_params(config, 0), config, tokens, see(steps[:, None], steps[None, :]))
    for how in ({"aligned": True}, {}):
        logits = Reader(config, params_of(config), 2).read(tokens, **how)
        np.testing.assert_allclose(logits, want, **SINGLE)


@pytest.mark.parametrize("positions", rest_slow(["last", "float"], ["last"]))
def test_a_random_position_offset_changes_nothing_but_roundings(positions):
    config = variant(positions=positions)
    tokens = some_tokens(3, 14)
    plain = Reader(config, params_of(config), 3).read(tokens, aligned=True)
    how = {"aligned": True, "position_offset": jnp.array([1, 62_831, 2**30], jnp.int32)}
    reader = Reader(config, params_of(config), 3)
    moved = np.concatenate([reader.read(tokens[:, :8], **how), reader.read(tokens[:, 8:], **how)], axis=1)
    np.testing.assert_allclose(moved, plain, **SINGLE)


def test_an_offset_shows_where_a_fam_stands_at_zero():
    config = variant(positions="zero")
    tokens = some_tokens(2, 14)
    plain = Reader(config, params_of(config), 2).read(tokens, aligned=True)
    offset = jnp.array([0, 1000], jnp.int32)
    moved = Reader(config, params_of(config), 2).read(tokens, aligned=True, position_offset=offset)
    np.testing.assert_allclose(moved[0], plain[0], **SINGLE)
    assert np.abs(moved[1] - plain[1]).max() > 1e-2


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("positions", ["last", "zero"])
def test_a_stream_may_run_for_ever(positions, aligned):
    """The same text over the same state reads the same 10^9 tokens later; `zero` positions stay finite."""
    config = variant(positions=positions, segments=2, previous_blocks=2)
    tokens = some_tokens(2, 20)
    near, far = (Reader(config, params_of(config), 2) for _ in range(2))
    for reader in (near, far):
        reader.read(tokens[:, :12], aligned=True)
    position = far.state.position
    position = dataclasses.replace(position, blocks=position.blocks + 10**9 // config.block_size)
    far.state = dataclasses.replace(far.state, position=position)
    logits = [reader.read(tokens[:, 12:], aligned=aligned) for reader in (near, far)]
    assert np.isfinite(logits[1]).all() and np.isfinite(far.fam).all()
    if positions == "last":
        np.testing.assert_array_equal(*logits)
    else:
        assert np.abs(logits[0] - logits[1]).max() > 1e-3


LENGTH = 13


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_no_token_sees_its_future(num_layers, aligned):
    """Row t differs from row T in token t alone, on either side of every block border."""
    config = variant(dtype="float64", num_layers=num_layers, previous_blocks=2)
    tokens = np.repeat(some_tokens(1, LENGTH), LENGTH + 1, axis=0)
    changed = np.arange(LENGTH)
    tokens[changed, changed] = (tokens[changed, changed] + 1) % config.vocab_size
    with jax.enable_x64(True):
        logits = Reader(config, params_of(config), LENGTH + 1).read(tokens, aligned=aligned)
    difference = np.abs(logits[:-1] - logits[-1]).max(axis=-1)  # (changed token, place)
    before = changed[None, :] < changed[:, None]
    assert difference[before].max() < 1e-12
    # With FAM every change affects every later place.
    assert difference[~before].min() > 1e-9


def test_fam_is_not_updated_before_its_block_is_complete():
    reader = Reader(BASE, params_of(BASE), 2)
    tokens, seen = some_tokens(2, 9), []
    for at in range(9):
        reader.read(tokens[:, at : at + 1])
        seen.append(reader.fam)
    changes = [bool((a != b).any()) for a, b in itertools.pairwise(seen)]
    assert changes == [False, False, True, False, False, False, True, False]
