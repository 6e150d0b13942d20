"""Scores of answers: exact match, F1 and their intervals, by the rules of the published tasks.

All scores lie between 0 and 1. Nothing here knows a model.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

Score = Callable[[str, str], float]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = frozenset(string.punctuation)
# TriviaQA treats these quotes as punctuation too.
_QUOTES = "‘’´`"  # noqa: RUF001
# What a model may say in place of an answer where there is none.
UNANSWERABLE = "unanswerable"
# Resamples of a bootstrap.
RESAMPLES = 1000
# Standard deviations on either side of the mean that hold 95 % of a normal distribution.
Z95 = 1.959963984540054


def normalize(text: str) -> str:
    """Normalize an answer as SQuAD does: lower case, no punctuation, no words a, an, the, single blanks."""
    bare = "".join(c for c in text.lower() if c not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def normalize_trivia(text: str) -> str:
    """Normalize an answer as TriviaQA does: punctuation and underscores become blanks, so U.S. is "u s"."""
    away = _PUNCTUATION | set(_QUOTES)
    bare = "".join(" " if c in away else c for c in text.lower())
    return " ".join(_ARTICLES.sub(" ", bare).split())


def exact_match(prediction: str, reference: str, normal: Callable[[str], str] = normalize) -> float:
    """Return 1 if both texts are equal once normalized, else 0."""
    return float(normal(prediction) == normal(reference))


def token_f1(prediction: str, reference: str) -> float:
    """Return the F1 of the words that both texts share, normalized as in SQuAD.

    If neither has a word, the score is 1; if only one has none, it is 0.
    """
    ours, theirs = normalize(prediction).split(), normalize(reference).split()
    return _f1(sum((Counter(ours) & Counter(theirs)).values()), len(ours), len(theirs))


def _f1(shared: int, predicted: int, wanted: int) -> float:
    """Return F1 from counts; 1 if nothing was wanted and nothing predicted."""
    if predicted == wanted == 0:
        return 1.0
    return 2 * shared / (predicted + wanted)


def best(score: Score, prediction: str, references: Iterable[str]) -> float:
    """Return the largest score over all references.

    Raises:
      ValueError: there are no references.
    """
    return max(score(prediction, reference) for reference in references)


class Squad(NamedTuple):
    """Scores of one answer to a question of SQuAD v2."""

    exact_match: float
    f1: float


def squad_scores(prediction: str, references: Sequence[str]) -> Squad:
    """Score an answer that may rightly be that there is none.

    Args:
      prediction: the answer; "unanswerable" and an empty one both say that there is none.
      references: right answers; none, or only "", for a question without an answer.
    """
    said = "" if normalize(prediction) == UNANSWERABLE else prediction
    wanted = [*references] or [""]
    return Squad(best(exact_match, said, wanted), best(token_f1, said, wanted))


class Judged(NamedTuple):
    """A candidate answer to a question of MultiRC."""

    question: Hashable
    predicted: bool
    right: bool


def multirc_scores(answers: Sequence[Judged]) -> dict[str, float]:
    """Score candidate answers that a model called right or wrong.

    Returns:
      acc_answer: fraction of all answers judged rightly.
      em: fraction of questions with all answers judged rightly.
      f1a: F1 of "right", over all answers.
      f1m: mean over questions of the F1 of "right" among the answers of each. A question without a right answer of
        which none is called right counts 1.

    Raises:
      ValueError: there are no answers.
    """
    if not answers:
        raise ValueError("MultiRC: there are no answers to score")
    questions: dict[Hashable, list[Judged]] = {}
    for answer in answers:
        questions.setdefault(answer.question, []).append(answer)
    groups = [*questions.values()]
    return {
        "acc_answer": float(np.mean([answer.predicted == answer.right for answer in answers])),
        "em": float(np.mean([all(a.predicted == a.right for a in group) for group in groups])),
        "f1a": _f1_of_right(answers),
        "f1m": float(np.mean([_f1_of_right(group) for group in groups])),
    }


def _f1_of_right(answers: Sequence[Judged]) -> float:
    both = sum(answer.predicted and answer.right for answer in answers)
    return _f1(both, sum(a.predicted for a in answers), sum(a.right for a in answers))


def macro_f1(predicted: Sequence[Hashable], wanted: Sequence[Hashable]) -> float:
    """Return the mean, over the classes that occur in either, of the F1 of each class.

    Raises:
      ValueError: there are no answers, or not one for each.
    """
    if not predicted or len(predicted) != len(wanted):
        raise ValueError(f"macro F1: got {len(predicted)} answers for {len(wanted)} questions")
    pairs = [*zip(predicted, wanted, strict=True)]
    scores = []
    for each in {*predicted, *wanted}:
        hits = sum(a == b == each for a, b in pairs)
        scores.append(_f1(hits, sum(a == each for a, _ in pairs), sum(b == each for _, b in pairs)))
    return float(np.mean(scores))


def wilson(successes: float, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a proportion (Wilson, 1927). It is never empty and stays within 0 and 1.

    Raises:
      ValueError: there are no trials, or more successes than trials.
    """
    if count < 1 or not 0 <= successes <= count:
        raise ValueError(f"Wilson interval: got {successes} successes in {count} trials")
    share, square = successes / count, Z95 * Z95
    middle = share + square / (2 * count)
    spread = Z95 * math.sqrt(share * (1 - share) / count + square / (4 * count * count))
    whole = 1 + square / count
    low, high = (middle - spread) / whole, (middle + spread) / whole
    # Rounding must not exclude the proportion itself at the ends of the range.
    return (0.0 if successes == 0 else max(0.0, low)), (1.0 if successes == count else min(1.0, high))


def bootstrap(values: Sequence[float], documents: Sequence[Hashable], seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of a mean, by resampling documents: questions on one document are not independent.

    Args:
      values: a score per question.
      documents: the document of each question; those of one document are drawn together.
      seed: of the resamples.

    Raises:
      ValueError: there are no values, or not one document for each.
    """
    if len(values) == 0 or len(values) != len(documents):
        raise ValueError(f"bootstrap: got {len(values)} values of {len(documents)} documents")
    names = {name: number for number, name in enumerate(dict.fromkeys(documents))}
    which = np.array([names[name] for name in documents])
    sums = np.bincount(which, weights=np.asarray(values, np.float64), minlength=len(names))
    counts = np.bincount(which, minlength=len(names))
    random = np.random.Generator(np.random.Philox(seed))
    means = np.empty(RESAMPLES)
    for number in range(RESAMPLES):  # one at a time: all at once would need RESAMPLES * documents numbers
        drawn = random.integers(0, len(names), len(names))
        means[number] = sums[drawn].sum() / counts[drawn].sum()
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


class Difference(NamedTuple):
    """How the scores of two runs differ on the items that both answered."""

    # Mean of the second run minus that of the first.
    mean: float
    # 95 % interval of the mean, by a bootstrap over documents.
    low: float
    high: float
    # Items on which the second run scores higher, and lower.
    higher: int
    lower: int
    items: int


def paired_difference(
    first: Mapping[str, float], second: Mapping[str, float], documents: Mapping[str, Hashable]
) -> Difference:
    """Compare two runs item by item.

    Args:
      first: scores by id of the item.
      second: scores of the other run. Items that only one run has are left out.
      documents: the document of each item; an item without one stands alone.

    Raises:
      ValueError: the runs have no item in common.
    """
    shared = [name for name in first if name in second]
    if not shared:
        raise ValueError("paired difference: the runs have no item in common")
    changes = [second[name] - first[name] for name in shared]
    low, high = bootstrap(changes, [documents.get(name, name) for name in shared])
    higher, lower = (sum(change * sign > 0 for change in changes) for sign in (1, -1))
    return Difference(float(np.mean(changes)), low, high, higher, lower, len(shared))
