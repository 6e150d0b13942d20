"""Intervals of paired differences: equal to Student's for documents of one length, and right as often as they say."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from fam_jax.evaluation.paired import Difference, difference_per_token

FINITE = st.floats(-5, 5, allow_nan=False)


@given(st.lists(FINITE, min_size=2, max_size=20), st.integers(1, 50))
def test_documents_of_one_length_give_the_interval_of_a_paired_t_test(
    means: list[float], length: int
) -> None:
    found = difference_per_token(np.array(means) * length, np.full(len(means), length))
    assert found.mean == pytest.approx(np.mean(means), abs=1e-9)
    error = scipy.stats.sem(means)
    if error > 1e-9:
        low, high = scipy.stats.t.interval(0.95, len(means) - 1, np.mean(means), error)
        assert (found.low, found.high) == (pytest.approx(low, abs=1e-9), pytest.approx(high, abs=1e-9))


@given(st.lists(st.tuples(FINITE, st.integers(0, 30)), min_size=1, max_size=20))
def test_documents_without_tokens_do_not_count(documents: list[tuple[float, int]]) -> None:
    sums, tokens = (np.array(part) for part in zip(*documents, strict=True))
    sums = np.where(tokens > 0, sums, 0)
    if not tokens.any():
        with pytest.raises(ValueError, match="no document"):
            difference_per_token(sums, tokens)
        return
    found = difference_per_token(sums, tokens)
    assert found == difference_per_token(sums[tokens > 0], tokens[tokens > 0])
    assert found.mean == pytest.approx(sums.sum() / tokens.sum(), abs=1e-9)
    assert (found.low is None) == ((tokens > 0).sum() == 1)


def test_95_of_100_intervals_hold_the_truth_when_lengths_differ() -> None:
    random, held, trials = np.random.default_rng(0), 0, 4000
    for _ in range(trials):
        tokens = random.integers(50, 500, 30)
        sums = tokens * random.normal(0.02, 0.05, 30) + random.normal(0, 1, 30) * np.sqrt(tokens)
        found = difference_per_token(sums, tokens)
        assert found.low is not None and found.high is not None
        held += found.low <= 0.02 <= found.high
    assert 0.92 < held / trials < 0.97


def test_what_is_shown() -> None:
    assert str(Difference(0.019, 0.01, 0.028)) == "+0.0190, 95 % interval +0.0100 to +0.0280"
    assert Difference(0.019, 0.01, 0.028).distinct and not Difference(0.01, -0.01, 0.03).distinct
    assert str(Difference(-0.5, None, None)) == "-0.5000, no interval from one document"
    assert not Difference(-0.5, None, None).distinct
