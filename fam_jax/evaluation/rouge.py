"""ROUGE-L by the package rouge-score, which is imported when it is needed, with words of every script.

rouge-score's own words are runs of a-z and 0-9. With them, two equal texts in Russian, Thai or Japanese score 0, so
languages other than English use :func:`unicode_words`.
"""

import functools
import unicodedata
from typing import Any

from fam_jax.config import UserError

# Names of the two ways to divide a text into words, for results.
DEFAULT, UNICODE = "rouge-score", "unicode-1"
# Scripts that write no blanks between words: each of their characters is a word. Named as in Unicode's character names.
_SINGLE = ("CJK UNIFIED", "CJK COMPATIBILITY IDEOGRAPH", "HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA", "THAI")
# They change the shape of the letters beside them, and do not end a word.
_JOINERS = "\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}"


def rouge_l(prediction: str, reference: str, words: str = DEFAULT) -> float:
    """Return the F1 of the longest common subsequence of words, without stemming; newlines are blanks.

    Args:
      prediction: the text of the model.
      reference: the right text.
      words: "rouge-score", or "unicode-1" for texts that are not in English.

    Raises:
      UserError: the package rouge-score is not installed.
    """
    return float(_scorer(words).score(reference, prediction)["rougeL"].fmeasure)


def check_rouge() -> None:
    """Raise :class:`UserError` if ROUGE cannot be computed. Call it before hours of work."""
    _scorer(DEFAULT)


@functools.cache
def _scorer(words: str) -> Any:
    try:
        from rouge_score import rouge_scorer
    except ImportError as error:
        raise UserError(
            "rouge-score: is not installed, and ROUGE needs it; install fam-jax[eval], or leave the task out"
        ) from error
    if words == DEFAULT:
        return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False, tokenizer=_Words())


class _Words:
    """The interface of rouge-score's tokenizers."""

    def tokenize(self, text: str) -> list[str]:
        """Return the words of a text."""
        return unicode_words(text)


def unicode_words(text: str) -> list[str]:
    """Return the words of a text in any script, in lower case.

    A word is a run of letters, digits and the marks on them. Han, Kana and Thai are written without blanks: there, a
    character with its marks is a word.
    """
    words, word = [], ""
    for character in unicodedata.normalize("NFC", text.lower()):
        kind = unicodedata.category(character)[0]
        if kind == "M" or character in _JOINERS:
            word += character if word else ""
        elif kind in "LN":
            if word and (_alone(character) or _alone(word[0])):
                words.append(word)
                word = ""
            word += character
        elif word:
            words.append(word)
            word = ""
    return [*words, word] if word else words


@functools.lru_cache(maxsize=1 << 14)
def _alone(character: str) -> bool:
    return unicodedata.name(character, "").startswith(_SINGLE)
