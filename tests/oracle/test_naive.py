"""Checks of the oracle that need no other model."""

import numpy as np
import pytest

from fam_jax.config import ModelConfig
from fam_jax.memories.fam import FamConfig
from tests.model import tiny
from tests.oracle.dense import dense_forward
from tests.oracle.naive import fam_positions, initial_fams, naive_forward, random_params

TINY = ModelConfig(
    vocab_size=11,
    num_layers=2,
    model_dim=8,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    ff_dim=12,
    block_size=4,
    memory=FamConfig(segments=1, length=2),
)
TOKENS = np.random.default_rng(0).integers(0, TINY.vocab_size, (2, 14))
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def variant(**changes):
    return tiny.variant(TINY, **changes)


@pytest.mark.parametrize(
    ("segments", "window", "see"),
    [
        (9, 0, lambda q, k: k <= q),
        (1, 0, lambda q, k: (k <= q) & (q // 4 - k // 4 <= 1)),
        (0, 0, lambda q, k: (k <= q) & (q // 4 == k // 4)),
        (1, 5, lambda q, k: (k <= q) & (q - k < 5)),
    ],
    ids=["full causal", "m=1", "m=0", "sliding window"],
)
def test_no_fam_is_dense_attention_under_a_mask(segments, window, see):
    config = variant(length=0, segments=segments, window=window)
    params = random_params(config, 1)
    steps = np.arange(TOKENS.shape[1])
    dense = dense_forward(params, config, TOKENS, see(steps[:, None], steps[None, :]))
    np.testing.assert_allclose(naive_forward(params, config, TOKENS).logits, dense, **EXACT)


@pytest.mark.parametrize("init", ["prompt", "prefix"])
@pytest.mark.parametrize("positions", ["last", "float"])
def test_rope_sees_differences_only(positions, init):
    config = variant(positions=positions, init=init, previous_blocks=2)
    params = random_params(config, 2)
    plain = naive_forward(params, config, TOKENS)
    for shifted in (
        naive_forward(params, config, TOKENS, position=4 * 25),
        naive_forward(params, config, TOKENS, offset=np.array([3, 1000])),
    ):
        np.testing.assert_allclose(shifted.logits, plain.logits, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(shifted.fam, plain.fam, rtol=1e-9, atol=1e-9)


def test_a_fam_at_zero_is_left_behind_by_an_offset():
    config = variant(positions="zero")
    params = random_params(config, 2)
    plain = naive_forward(params, config, TOKENS)
    shifted = naive_forward(params, config, TOKENS, offset=np.array([0, 1000]))
    np.testing.assert_array_equal(shifted.logits[0], plain.logits[0])
    assert np.abs(shifted.logits[1] - plain.logits[1]).max() > 1e-3


OPTIONS = [
    {"norm": "layernorm"},
    {"activation": "gelu"},
    {"activation": "geglu"},
    {"tie_embeddings": False},
    {"scale_embeddings": True},
    {"segments": 0},
    {"segments": 2},
    {"window": 3},
    {"length": 0},
    {"length": 3},
    {"init": "prefix"},
    {"positions": "float"},
    {"positions": "zero"},
    {"previous_blocks": 2},
    {"rope_base": 500.0},
    {"norm_epsilon": 0.1},
    {"num_kv_heads": 1},
    {"num_kv_heads": 4},
]


@pytest.mark.parametrize("changes", OPTIONS, ids=str)
def test_every_option_changes_something_but_the_past(changes):
    config = variant(**changes)
    params = random_params(config, 3)
    other = TOKENS.copy()
    other[:, 6] = (other[:, 6] + 1) % config.vocab_size
    result, changed = naive_forward(params, config, TOKENS), naive_forward(params, config, other)
    assert result.logits.shape == (2, 14, 11) and result.fam.shape == (2, 2, config.memory.length, 8)
    np.testing.assert_array_equal(result.logits[:, :6], changed.logits[:, :6])
    assert np.abs(result.logits[:, 6] - changed.logits[:, 6]).min() > 0
    base = naive_forward(random_params(TINY, 3), TINY, TOKENS)
    assert np.abs(result.logits - base.logits).max() > 1e-4


def test_first_update_keeps_the_residual_of_a_saved_fam_only():
    params = random_params(TINY, 4)
    start = np.array(initial_fams(params, TINY))
    fresh = naive_forward(params, TINY, TOKENS[:, :4])
    mixed = naive_forward(
        params, TINY, TOKENS[:, :4], start_fam=start, carries_context=np.array([False, True])
    )
    np.testing.assert_array_equal(mixed.logits, fresh.logits)  # same F_{-1}, so tokens see no difference
    np.testing.assert_array_equal(mixed.fam[:, 0], fresh.fam[:, 0])
    assert np.abs(mixed.fam[:, 1] - fresh.fam[:, 1]).max() > 0.1


def test_fam_stays_until_the_block_is_complete():
    params = random_params(TINY, 4)
    start = np.stack([np.array(initial_fams(params, TINY))] * 2, axis=1)
    np.testing.assert_array_equal(naive_forward(params, TINY, TOKENS[:, :3]).fam, start)
    full = naive_forward(params, TINY, TOKENS[:, :8]).fam
    np.testing.assert_array_equal(naive_forward(params, TINY, TOKENS[:, :11]).fam, full)


def test_last_positions_are_those_of_the_last_tokens_of_the_block():
    """The paper's example (appendix B.2.1): a block of 4 at p..p+3 and M = 2."""
    p = 20
    assert fam_positions(TINY, 5, 0.0) == [p + 2, p + 3]
    assert fam_positions(TINY, -1, 0.0) == [-2, -1]
    np.testing.assert_allclose(
        fam_positions(variant(positions="float"), 5, 0.0), [p + 3 + 1 / 3, p + 3 + 2 / 3]
    )
