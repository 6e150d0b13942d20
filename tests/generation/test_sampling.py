"""Sampling draws from the distribution that its options define, and from nothing else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fam_jax.config import UserError
from fam_jax.config.training import LARGEST_SEED
from fam_jax.generation.sampling import GREEDY, Sampling, check_seed, sample

LOGITS = np.log(np.array([0.05, 0.4, 0.1, 0.25, 0.2], np.float32))
DRAWS = 20_000

keys = jax.jit(lambda seed, count: jax.random.split(jax.random.key(seed), count), static_argnums=1)
jitted = jax.jit(sample, static_argnames="sampling")


def frequencies(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (DRAWS, len(logits)))
    tokens = jitted(rows, keys(0, DRAWS), sampling=sampling)
    assert tokens.shape == (DRAWS,) and tokens.dtype == jnp.int32
    return np.bincount(np.asarray(tokens), minlength=len(logits)) / DRAWS


def normalised(*weights: float) -> np.ndarray:
    return np.array(weights) / np.sum(weights)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, normalised(0.05, 0.4, 0.1, 0.25, 0.2)),
        ({"temperature": 0.5}, normalised(0.05**2, 0.4**2, 0.1**2, 0.25**2, 0.2**2)),
        ({"top_k": 2}, normalised(0, 0.4, 0, 0.25, 0)),
        ({"top_k": 1}, normalised(0, 1, 0, 0, 0)),
        ({"top_k": 9}, normalised(0.05, 0.4, 0.1, 0.25, 0.2)),  # more than the vocabulary has
        ({"top_p": 0.5}, normalised(0, 0.4, 0, 0.25, 0)),  # 0.4 is not enough, 0.65 is
        ({"top_p": 0.3}, normalised(0, 1, 0, 0, 0)),
        ({"top_p": 1e-9}, normalised(0, 1, 0, 0, 0)),  # one token always stays
        # top_p applies to the probabilities after top_k: 0.4 / 0.65 is enough for 0.6, 0.4 alone is not.
        ({"top_k": 2, "top_p": 0.6}, normalised(0, 1, 0, 0, 0)),
        ({"top_p": 0.6}, normalised(0, 0.4, 0, 0.25, 0)),
        # It also applies after the temperature: 0.16 / 0.275 of the squares.
        ({"temperature": 0.5, "top_p": 0.55}, normalised(0, 1, 0, 0, 0)),
    ],
    ids=str,
)
def test_frequencies(options: dict, expected: np.ndarray) -> None:
    found = frequencies(LOGITS, Sampling(**{"temperature": 1.0} | options))
    np.testing.assert_array_equal(found[expected == 0], 0)
    deviation = np.sqrt(expected * (1 - expected) / DRAWS)
    np.testing.assert_array_less(np.abs(found - expected), 5 * deviation + 1e-9)


def test_greedy_takes_the_first_of_equals() -> None:
    logits = jnp.array([[0.0, 2.0, 2.0], [3.0, 3.0, -1.0]])
    np.testing.assert_array_equal(jitted(logits, keys(0, 2), sampling=GREEDY), [1, 0])


def test_top_k_keeps_k_of_equals() -> None:
    found = frequencies(np.zeros(5), Sampling(temperature=1.0, top_k=2))
    np.testing.assert_array_equal(found > 0, [True, True, False, False, False])


def test_top_p_of_equals() -> None:
    found = frequencies(np.zeros(4), Sampling(temperature=1.0, top_p=0.5))
    np.testing.assert_array_equal(found > 0, [True, True, False, False])


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.99}], ids=str)
def test_forbidden_tokens_are_never_drawn(options: dict) -> None:
    found = frequencies(np.array([-np.inf, 0.0, -np.inf, 1.0]), Sampling(temperature=2.0, **options))
    np.testing.assert_array_equal(found > 0, [False, True, False, True])


def test_tiny_temperature_is_greedy() -> None:
    found = frequencies(1e4 * LOGITS, Sampling(temperature=1e-37))
    np.testing.assert_array_equal(found, [0, 1, 0, 0, 0])


def test_rows_are_independent() -> None:
    logits = jnp.zeros((2000, 2))
    tokens = np.asarray(jitted(logits, keys(3, 2000), sampling=Sampling(temperature=1.0)))
    assert abs(tokens.mean() - 0.5) < 0.06
    again = np.asarray(jitted(logits, keys(4, 2000), sampling=Sampling(temperature=1.0)))
    assert abs((tokens == again).mean() - 0.5) < 0.06


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.9}], ids=str)
def test_a_row_depends_on_its_own_logits_and_key(options: dict) -> None:
    sampling = Sampling(temperature=1.0, **options)
    logits, its_keys = jax.random.normal(jax.random.key(1), (50, 5)), keys(2, 50)
    together = jitted(logits, its_keys, sampling=sampling)
    for chosen in (np.array([7]), np.array([30, 7, 8])):
        alone = jitted(logits[chosen], its_keys[chosen], sampling=sampling)
        np.testing.assert_array_equal(alone, together[chosen])


@pytest.mark.parametrize("seed", [-1, 1 << 32, 10**20])
def test_seeds_that_are_none(seed: int) -> None:
    with pytest.raises(UserError, match=rf"seed: must be from 0 to 4294967295, got {seed}"):
        check_seed(seed)
    assert [check_seed(seed) for seed in (0, LARGEST_SEED)] == [0, LARGEST_SEED]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature: must be"),
        ({"temperature": float("nan")}, "temperature: must be"),
        ({"temperature": float("inf")}, "temperature: must be"),
        ({"temperature": 1e-40}, "temperature: must be 0 .greedy. or from 1e-37 to 1e.37, got 1e-40"),
        ({"temperature": 1e39}, "temperature: must be"),
        ({"temperature": 1.0, "top_k": -1}, "top_k: must be"),
        ({"temperature": 1.0, "top_k": 1.5}, "top_k: must be"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p: must be"),
        ({"temperature": 1.0, "top_p": 1.1}, "top_p: must be"),
        ({"top_k": 3}, "greedy and ignores"),
        ({"top_p": 0.5}, "greedy and ignores"),
    ],
    ids=str,
)
def test_bad_values(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        functools.partial(Sampling, **options)()
