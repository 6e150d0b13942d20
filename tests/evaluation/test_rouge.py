"""ROUGE-L in any script, by rouge-score where it is installed."""

import importlib.util
import sys

import pytest

from fam_jax.config import UserError
from fam_jax.evaluation import rouge
from fam_jax.evaluation.rouge import UNICODE, rouge_l, unicode_words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The U.S. café, 3.5!", ["the", "u", "s", "café", "3", "5"]),
        ("Cafe\u0301 non-stop", ["café", "non", "stop"]),  # a decomposed accent
        ("Привет, мир", ["привет", "мир"]),
        ("東京タワー 2024年", [*"東京タワー", "2024", "年"]),
        ("หนังสือ", ["ห", "นั", "ง", "สื", "อ"]),  # vowels and tones stay on their letters
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("می‌خواهم", ["می‌خواهم"]),
        ("한국어 뉴스", ["한국어", "뉴스"]),
        ("a漢b", ["a", "漢", "b"]),
        ("\u0301 - _ ", []),
        ("", []),
    ],
)
def test_words_of_any_script(text: str, words: list[str]) -> None:
    assert unicode_words(text) == words


def test_rouge_score_is_asked_for_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    rouge._scorer.cache_clear()
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    with pytest.raises(UserError, match=r"^rouge-score: is not installed.*install fam-jax\[eval\]"):
        rouge_l("a", "a")
    rouge._scorer.cache_clear()


def naive_lcs(left: list[str], right: list[str]) -> int:
    if not left or not right:
        return 0
    if left[-1] == right[-1]:
        return 1 + naive_lcs(left[:-1], right[:-1])
    return max(naive_lcs(left[:-1], right), naive_lcs(left, right[:-1]))


@pytest.mark.skipif(importlib.util.find_spec("rouge_score") is None, reason="needs rouge-score")
@pytest.mark.parametrize(
    ("prediction", "reference"),
    [
        ("the cat sat", "a cat\nsat down"),
        ("привет новый мир", "привет мир"),
        ("東京に行く", "東京へ行く"),
        ("same", "same"),
        ("", "x"),
    ],
)
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(prediction: str, reference: str) -> None:
    ours, theirs = unicode_words(prediction), unicode_words(reference)
    shared = naive_lcs(ours, theirs)
    expected = 2 * shared / (len(ours) + len(theirs)) if shared else 0
    assert rouge_l(prediction, reference, UNICODE) == pytest.approx(expected)
    if prediction.isascii():
        assert rouge_l(prediction, reference) == pytest.approx(expected)
    else:
        assert rouge_l(prediction, reference) == 0  # the default words are ASCII
