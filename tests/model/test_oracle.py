"""The decoder in float64 against the oracle, which reads token by token: every option, every way of reading."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fam_jax.config import ModelConfig
from fam_jax.model import empty_state, with_passed_on
from tests.model.tiny import Reader, params_of, some_tokens, variant
from tests.oracle.naive import initial_fams, naive_forward, random_params

EXACT = {"rtol": 1e-10, "atol": 1e-10}
LENGTH = 14  # three blocks of the tiny model and a half

CONFIGS = {
    "tiny": {},
    "layernorm, gelu, untied, multi-query, no segments": {
        "norm": "layernorm", "activation": "gelu", "tie_embeddings": False, "num_kv_heads": 1, "segments": 0,
        "previous_blocks": 2, "init": "prefix",
    },
    "geglu, scaled, multi-head, float positions": {
        "activation": "geglu", "scale_embeddings": True, "num_kv_heads": 4, "positions": "float",
        "segments": 2, "previous_blocks": 3, "bound": 0.7,
    },
    "zero positions, window, three layers": {
        "positions": "zero", "window": 6, "num_layers": 3, "segments": 2, "init": "prefix",
        "previous_blocks": 2,
    },
    "zero positions, prompt, other constants": {
        "positions": "zero", "previous_blocks": 3, "rope_base": 500.0, "norm_epsilon": 0.1, "length": 3,
    },
    "Transformer-XL, FAM as long as a block, one layer": {"window": 5, "length": 4, "num_layers": 1},
    "BSWA": {"length": 0, "segments": 2},
    "BSWA, window within a block": {"length": 0, "window": 3},
    "BSWA, no segments": {"length": 0, "segments": 0},
    "blocks of one token": {"block_size": 1, "length": 1, "segments": 3, "previous_blocks": 2},
    "segments and FAMs beyond the sequence": {"segments": 5, "previous_blocks": 6},
    "one sequence in half a block": {"block_size": 32},
    "reference attention": {"attention": "reference", "window": 4},
    "biases, q/k norms, llama3 rope": {
        "qkv_bias": True, "qk_norm": True, "rope_scaling": "llama3", "rope_factor": 8.0, "rope_low_freq_factor": 1.5,
        "rope_original_length": 16, "rope_base": 40.0, "query_pre_attn_scalar": 7.0,
    },
    "soft caps, post-norms, norms from 1, linear rope": {
        "attention_softcap": 1.5, "logit_softcap": 2.0, "post_norms": True, "norm_offset": True,
        "scale_embeddings": True, "rope_scaling": "linear", "rope_factor": 4.0,
    },
    "local and global layers, a rest of the pattern": {
        "layer_pattern": ("local", "global", "local"), "local_window": 4, "local_rope_base": 30.0, "num_layers": 4,
        "segments": 2, "rope_scaling": "linear", "rope_factor": 2.0, "previous_blocks": 2,
    },
    "local layers, prefix, layernorm, reference attention": {
        "layer_pattern": ("global", "local"), "local_window": 5, "init": "prefix", "positions": "zero",
        "norm": "layernorm", "norm_offset": True, "qk_norm": True, "attention_softcap": 1.0, "attention": "reference",
    },
    "xla attention, stop-gradient, remat": {"attention": "xla", "stop_gradient": True, "remat": "full"},
}  # fmt: skip


def wide(**changes) -> ModelConfig:
    return variant(dtype="float64", **changes)


def agrees(reader: Reader, logits, want):
    np.testing.assert_allclose(logits, want.logits, **EXACT)
    np.testing.assert_allclose(reader.fam, want.fam, **EXACT)


def check_both_ways(config: ModelConfig, seed: int = 0):
    """Compare with the oracle from an initial state: all blocks at once, and piece by piece."""
    tokens = some_tokens(2, LENGTH, seed=seed)
    want = naive_forward(random_params(config, seed), config, tokens)
    with jax.enable_x64(True):
        for how in ({"aligned": True}, {}):
            reader = Reader(config, params_of(config, seed), 2)
            agrees(reader, reader.read(tokens, **how), want)


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_every_option(changes):
    check_both_ways(wide(**changes))


@st.composite
def configs(draw):
    def pick(*values):
        return draw(st.sampled_from(values))

    size, segments = pick(2, 4, 5), pick(0, 1, 2)
    return wide(
        num_layers=pick(1, 2, 3),
        num_kv_heads=pick(1, 2, 4),
        norm=pick("rmsnorm", "layernorm"),
        activation=pick("swiglu", "geglu", "gelu"),
        tie_embeddings=pick(True, False),
        scale_embeddings=pick(True, False),
        block_size=size,
        segments=segments,
        window=draw(st.integers(0, segments * size + 1)),
        length=draw(st.integers(0, size)),
        init=pick("prompt", "prefix"),
        positions=pick("last", "float", "zero"),
        previous_blocks=pick(1, 2, 3),
        bound=pick(0.0, 0.7),
        attention=pick("reference", "xla"),
        qkv_bias=pick(True, False),
        qk_norm=pick(True, False),
        post_norms=pick(True, False),
        norm_offset=pick(True, False),
        attention_softcap=pick(0.0, 1.5),
        logit_softcap=pick(0.0, 2.0),
        query_pre_attn_scalar=pick(0.0, 7.0),
        rope_scaling=pick("none", "linear", "llama3"),
        rope_factor=4.0,
        rope_original_length=16,
        **pick(
            {},
            {"layer_pattern": ("local",), "local_window": 1},
            {"layer_pattern": ("local", "global")[: pick(1, 2)], "local_window": segments * size + 1},
        ),
    )


@pytest.mark.slow
@hypothesis.settings(max_examples=20, deadline=None, derandomize=True, phases=[hypothesis.Phase.generate])
@hypothesis.given(config=configs(), seed=st.integers(0, 99))
def test_options_together(config, seed):
    check_both_ways(config, seed)


ROWS, WIDTH = 3, 5
STREAMS = {
    "local and global layers, soft-capped": {
        "layer_pattern": ("global", "local"),
        "local_window": 4,
        "attention_softcap": 1.5,
        "segments": 2,
    },
    "tiny": {"segments": 2, "previous_blocks": 2},
    "zero positions in a window": {"positions": "zero", "window": 4, "previous_blocks": 2},
    "BSWA": {"length": 0},
}


@pytest.mark.parametrize("changes", STREAMS.values(), ids=STREAMS)
@hypothesis.settings(max_examples=8, deadline=None, derandomize=True, phases=[hypothesis.Phase.generate])
@hypothesis.given(data=st.data())
def test_any_chunks_with_every_row_at_its_own_place(changes, data):
    """Rows of different lengths, each divided into its own pieces, some of them empty."""
    config = wide(**changes)
    streams = [some_tokens(n, seed=n) for n in (22, 17, 9)]
    counts = data.draw(st.lists(st.tuples(*[st.integers(0, WIDTH)] * ROWS), max_size=9))
    read = [0] * ROWS
    logits: list[list[np.ndarray]] = [[] for _ in streams]
    with jax.enable_x64(True):
        reader = Reader(config, params_of(config), ROWS)
        for count in [*counts, *[(WIDTH,) * ROWS] * 5]:  # the last five read the rest
            pieces = [row[at : at + n] for row, at, n in zip(streams, read, count, strict=True)]
            for b, piece in enumerate(reader.read_ragged(pieces, WIDTH)):
                logits[b].append(piece)
                read[b] += len(piece)
        fam = reader.fam
    for b, row in enumerate(streams):
        want = naive_forward(random_params(config, 0), config, row[None])
        np.testing.assert_allclose(np.concatenate(logits[b]), want.logits[0], **EXACT)
        np.testing.assert_allclose(fam[:, b], want.fam[:, 0], **EXACT)


# Calls (tokens, whether aligned) that take a stream from one block border to another.
STRIDES = {
    "a block at once": [(4, True)],
    "two blocks at once": [(8, True)],
    "one and a half at once, then a half": [(6, True), (2, False)],
    "in pieces across borders": [(7, False), (1, False)],
    "token by token": [(1, False)] * 4,
}


@hypothesis.settings(max_examples=10, deadline=None, derandomize=True, phases=[hypothesis.Phase.generate])
@hypothesis.given(strides=st.lists(st.sampled_from(sorted(STRIDES)), min_size=2, max_size=4))
def test_parallel_and_piecewise_calls_may_follow_each_other(strides):
    config = wide(segments=2, previous_blocks=3, positions="float")
    calls = [call for name in strides for call in STRIDES[name]]
    tokens = some_tokens(2, sum(n for n, _ in calls))
    want = naive_forward(random_params(config, 0), config, tokens)
    with jax.enable_x64(True):
        reader = Reader(config, params_of(config), 2)
        logits, at = [], 0
        for n, aligned in calls:
            logits.append(reader.read(tokens[:, at : at + n], aligned=aligned))
            at += n
        agrees(reader, np.concatenate(logits, axis=1), want)


@pytest.mark.parametrize("init", ["prompt", "prefix"])
def test_starting_from_a_saved_fam(init):
    """Random state passing (appendix B.2.3): some rows start from it, with its residual, the others do not."""
    config = wide(init=init, previous_blocks=2)
    tokens = some_tokens(3, LENGTH)
    saved = np.random.default_rng(5).normal(size=(config.num_layers, config.memory.length, config.model_dim))
    rows = np.array([True, False, True])
    want = naive_forward(random_params(config, 0), config, tokens, start_fam=saved, carries_context=rows)
    with jax.enable_x64(True):
        memory = with_passed_on(empty_state(config, 3), {"fam": jnp.asarray(saved)}, jnp.asarray(rows))
        reader = Reader(config, params_of(config), 3, memory)
        logits = np.concatenate(
            [reader.read(tokens[:, :8], aligned=True), reader.read(tokens[:, 8:])], axis=1
        )
        agrees(reader, logits, want)


def test_first_update_keeps_the_residual_of_a_saved_fam_only():
    """A saved FAM equal to the initial one gives the same logits until the first update."""
    config = wide()
    tokens = some_tokens(2, 4)
    start = np.array(initial_fams(random_params(config, 0), config))
    with jax.enable_x64(True):
        memory = with_passed_on(empty_state(config, 2), {"fam": jnp.asarray(start)}, jnp.array([False, True]))
        saved, fresh = Reader(config, params_of(config), 2, memory), Reader(config, params_of(config), 2)
        logits = saved.read(tokens, aligned=True), fresh.read(tokens, aligned=True)
        np.testing.assert_allclose(*logits, **EXACT)
        np.testing.assert_array_equal(saved.fam[:, 0], fresh.fam[:, 0])
        assert np.abs(saved.fam[:, 1] - fresh.fam[:, 1]).max() > 0.1


@pytest.mark.parametrize("changes", [{}, {"init": "prefix"}, {"positions": "float"}], ids=str)
def test_an_empty_state_holds_the_initial_fam(changes):
    config = wide(**changes)
    with jax.enable_x64(True):
        fam = Reader(config, params_of(config), 2).fam
    want = np.array(initial_fams(random_params(config, 0), config))
    for b in range(2):
        np.testing.assert_allclose(fam[:, b], want, **EXACT)


@pytest.mark.parametrize("positions", ["last", "float", "zero"])
def test_random_position_offset(positions):
    config = wide(positions=positions, previous_blocks=2)
    tokens, offset = some_tokens(2, LENGTH), np.array([0, 60_000], np.int32)
    want = naive_forward(random_params(config, 0), config, tokens, offset=offset)
    with jax.enable_x64(True):
        reader = Reader(config, params_of(config), 2)
        how = {"aligned": True, "position_offset": jnp.asarray(offset)}
        logits = np.concatenate(
            [reader.read(tokens[:, :8], **how), reader.read(tokens[:, 8:], **how)], axis=1
        )
        # The oracle's angles are products of up to 6e4, with rounding errors of 1e-11.
        np.testing.assert_allclose(logits, want.logits, rtol=1e-8, atol=1e-8)


def test_positions_of_a_stream_that_has_run_for_long():
    """With `zero` the absolute position matters: the distance to FAM grows with the stream."""
    config = wide(positions="zero", segments=0)
    tokens, position = some_tokens(2, LENGTH), 10**9
    want = naive_forward(random_params(config, 0), config, tokens, position=position)
    near = naive_forward(random_params(config, 0), config, tokens)
    assert np.abs(want.logits - near.logits).max() > 1e-2
    with jax.enable_x64(True):
        for how in ({"aligned": True}, {}):
            reader = Reader(config, params_of(config), 2)
            blocks = jnp.full(2, position // config.block_size, jnp.int32)
            place = dataclasses.replace(reader.state.position, blocks=blocks)
            reader.state = dataclasses.replace(reader.state, position=place)
            np.testing.assert_allclose(reader.read(tokens, **how), want.logits, rtol=0, atol=1e-5)
