"""Scores equal those of naive second versions, and the edge cases of the published tasks."""

import itertools
import math
import re
import string

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fam_jax.evaluation import scores
from fam_jax.evaluation.scores import Judged

WORDS = st.lists(
    st.sampled_from(["a", "The", "an", "cat", "Cat.", "U.S.", "don't", "é", "x_y", "-", "42", "theory"]),
    max_size=6,
)
TEXTS = WORDS.map(" ".join)
FEW = settings(max_examples=60, deadline=None)


def naive_normal(text: str) -> str:
    text = text.lower()
    for mark in string.punctuation:
        text = text.replace(mark, "")
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def naive_f1(prediction: str, reference: str) -> float:
    ours, theirs = naive_normal(prediction).split(), naive_normal(reference).split()
    if not ours or not theirs:
        return float(ours == theirs)
    left, same = [*theirs], 0
    for word in ours:
        if word in left:
            left.remove(word)
            same += 1
    if not same:
        return 0.0
    precision, recall = same / len(ours), same / len(theirs)
    return 2 * precision * recall / (precision + recall)


@FEW
@given(TEXTS, TEXTS)
def test_exact_match_and_f1(prediction: str, reference: str) -> None:
    assert scores.normalize(prediction) == naive_normal(prediction)
    assert scores.exact_match(prediction, reference) == (naive_normal(prediction) == naive_normal(reference))
    assert scores.token_f1(prediction, reference) == pytest.approx(naive_f1(prediction, reference))
    assert scores.token_f1(prediction, reference) == pytest.approx(scores.token_f1(reference, prediction))


@FEW
@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=4))
def test_the_best_of_several_references(prediction: str, references: list[str]) -> None:
    assert scores.best(scores.token_f1, prediction, references) == pytest.approx(
        max(naive_f1(prediction, each) for each in references)
    )


def test_normalisation_of_squad_and_of_trivia_qa_differ() -> None:
    assert scores.normalize("The U.S. of  A!") == "us of"
    assert scores.normalize_trivia("The U.S.") == "u s"
    assert scores.normalize_trivia("x_y ‘quoted’ don't") == "x y quoted don t"  # noqa: RUF001
    assert scores.normalize("theory another man") == "theory another man"
    assert scores.token_f1("", "the") == 1 and scores.token_f1("the cat", "a") == 0
    assert scores.best(scores.exact_match, "b", ["a", "b", "c"]) == 1


def test_squad_knows_questions_without_an_answer() -> None:
    for said in ("", "the", "unanswerable", "Unanswerable."):
        assert scores.squad_scores(said, [""]) == scores.squad_scores(said, []) == (1, 1)
    assert scores.squad_scores("a cat", [""]) == (0, 0)
    assert scores.squad_scores("black cat", ["dog", "cat"]) == (0, pytest.approx(2 / 3))


def naive_class_f1(predicted: list, wanted: list, of: object) -> float:
    true = sum(p == w == of for p, w in zip(predicted, wanted, strict=True))
    false = sum(p == of != w for p, w in zip(predicted, wanted, strict=True))
    missed = sum(w == of != p for p, w in zip(predicted, wanted, strict=True))
    return 1.0 if true + false + missed == 0 else true / (true + (false + missed) / 2)


@FEW
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=30))
def test_macro_f1(pairs: list[tuple[int, int]]) -> None:
    predicted, wanted = map(list, zip(*pairs, strict=True))
    classes = sorted({*predicted, *wanted})
    expected = sum(naive_class_f1(predicted, wanted, each) for each in classes) / len(classes)
    assert scores.macro_f1(predicted, wanted) == pytest.approx(expected)


@FEW
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_multirc(answers: list[tuple[int, bool, bool]]) -> None:
    found = scores.multirc_scores([Judged(*answer) for answer in answers])
    groups = [[*group] for _, group in itertools.groupby(sorted(answers), key=lambda answer: answer[0])]
    assert found["acc_answer"] == pytest.approx(sum(p == r for _, p, r in answers) / len(answers))
    assert found["em"] == pytest.approx(sum(all(p == r for _, p, r in g) for g in groups) / len(groups))
    parts = [naive_class_f1([p for _, p, _ in g], [r for _, _, r in g], True) for g in groups]
    assert found["f1m"] == pytest.approx(sum(parts) / len(parts))
    assert found["f1a"] == pytest.approx(
        naive_class_f1([p for _, p, _ in answers], [r for _, _, r in answers], True)
    )


def test_multirc_of_one_question() -> None:
    answers = [Judged("q", True, True), Judged("q", True, False), Judged("q", False, False)]
    found = scores.multirc_scores(answers)
    assert found == pytest.approx({"acc_answer": 2 / 3, "em": 0, "f1a": 2 / 3, "f1m": 2 / 3})


@FEW
@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_where_the_score_test_is_at_its_limit(trial: tuple[int, int]) -> None:
    """The interval holds the p with |k/n - p| <= z sqrt(p (1 - p) / n)."""
    successes, count = trial
    low, high = scores.wilson(successes, count)
    assert 0 <= low <= successes / count <= high <= 1
    for p in (low, high):
        if 0 < p < 1:
            assert abs(successes / count - p) == pytest.approx(scores.Z95 * math.sqrt(p * (1 - p) / count))


def test_a_bootstrap_draws_documents() -> None:
    """Ten equal questions on each document say no more than one."""
    random = np.random.default_rng(0)
    values = random.random(60)
    alone = scores.bootstrap(values, range(60))
    assert scores.bootstrap(np.repeat(values, 10), np.repeat(np.arange(60), 10)) == pytest.approx(alone)
    assert alone == scores.bootstrap(values, range(60)) != scores.bootstrap(values, range(60), seed=1)
    spread = 1.96 * values.std() / math.sqrt(60)
    assert alone == pytest.approx((values.mean() - spread, values.mean() + spread), abs=0.03)
    apart = scores.bootstrap(np.repeat(values, 10), range(600))
    assert apart[1] - apart[0] < (alone[1] - alone[0]) / 2


def test_paired_differences() -> None:
    first = {str(n): float(n % 2) for n in range(40)}
    second = {**{name: min(1.0, value + (name == "0")) for name, value in first.items()}, "other": 1.0}
    found = scores.paired_difference(first, second, {})
    assert (found.mean, found.higher, found.lower, found.items) == (1 / 40, 1, 0, 40)
    assert found.low <= found.mean <= found.high
    assert scores.paired_difference(second, first, {}).mean == -1 / 40


@pytest.mark.parametrize(
    "call",
    [
        lambda: scores.best(scores.exact_match, "a", []),
        lambda: scores.multirc_scores([]),
        lambda: scores.macro_f1([1], [1, 2]),
        lambda: scores.wilson(3, 2),
        lambda: scores.wilson(0, 0),
        lambda: scores.bootstrap([], []),
        lambda: scores.paired_difference({"a": 1}, {"b": 1}, {}),
    ],
)
def test_nothing_to_score(call: object) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        call()  # type: ignore[operator]
