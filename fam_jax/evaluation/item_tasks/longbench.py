"""LongBench (arXiv 2308.14508) and LongBench v2 (arXiv 2412.15204): questions, summaries, code and lists of examples.

Put the published files into folders `longbench` (`NAME.jsonl`) and `longbench_v2` (`data.json`). Nothing is cut, and
prompts are ours: without instructions, with the question behind the text. Scores are those of the published code, but
for Chinese text, whose words are single characters here and not those of a dictionary.
"""

import dataclasses
import difflib
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fam_jax.config import UserError
from fam_jax.evaluation import scores
from fam_jax.evaluation.item import (
    CHOOSE,
    GENERATE,
    TOKEN,
    Answered,
    Item,
    ItemTask,
    Request,
    Row,
    choice_values,
    guess,
    text_document,
)
from fam_jax.evaluation.rouge import DEFAULT, UNICODE, check_rouge, rouge_l, unicode_words

SUITE = "longbench"
LETTERS = "ABCD"
# Signs of a line that is no code, as in LongBench.
_NO_CODE = ("`", "#", "//")

# Prediction, reference, facts of the item -> score.
Score = Callable[[str, str, Mapping[str, Any]], float]


def token_f1(prediction: str, reference: str, facts: Mapping[str, Any]) -> float:
    """Return the F1 of shared words; in Chinese, of characters."""
    if facts["language"] != "zh":
        return scores.token_f1(prediction, reference)
    ours, theirs = Counter(unicode_words(prediction)), Counter(unicode_words(reference))
    shared = (ours & theirs).total()
    return 2 * shared / (ours.total() + theirs.total()) if shared else 0.0


def rouge(prediction: str, reference: str, facts: Mapping[str, Any]) -> float:
    """Return ROUGE-L by words; in Chinese, by characters."""
    return rouge_l(prediction, reference, UNICODE if facts["language"] == "zh" else DEFAULT)


def class_score(prediction: str, reference: str, facts: Mapping[str, Any]) -> float:
    """Return 1 / n if the right class is among the n that are named, not counting those that are a part of its name."""
    named = [each for each in facts["classes"] if each in prediction]
    counted = [each for each in named if each == reference or each not in reference]
    return 1 / len(counted) if reference in counted else 0.0


def number_score(prediction: str, reference: str, _: Mapping[str, Any]) -> float:
    """Return the share of the numbers in the prediction that are the (last) one of the reference."""
    said, right = re.findall(r"\d+", prediction), re.findall(r"\d+", reference)
    return said.count(right[-1]) / len(said) if said and right else 0.0


def edit_similarity(prediction: str, reference: str, _: Mapping[str, Any]) -> float:
    """Return how similar the first line of code is: twice the matching characters of both, by Ratcliff/Obershelp."""
    lines = prediction.lstrip("\n").split("\n")
    line = next((each for each in lines if not any(sign in each for sign in _NO_CODE)), "")
    return difflib.SequenceMatcher(None, line, reference).ratio()


@dataclasses.dataclass(frozen=True)
class _Kind:
    """How a task asks and scores. In `asks`, {input} stands for the field of that name."""

    asks: str
    score: Score
    name: str
    stop: tuple[str, ...] = ("\n",)


_QUESTION = _Kind("\n\nQuestion: {input}\nAnswer:", token_f1, "f1")
_QUESTION_ZH = _Kind("\n\n问题：{input}\n回答：", token_f1, "f1")  # noqa: RUF001
_SUMMARY = _Kind("\n\nSummary:", rouge, "rouge_l", stop=())
# Examples stand in the text, and the input is the beginning of the next one.
_EXAMPLES = "\n\n{input}"
_CODE = _Kind("{input}", edit_similarity, "edit_similarity", stop=())

# By name: line for --list, kind, language, tokens to generate as in LongBench.
_TASKS: dict[str, tuple[str, _Kind, str, int]] = {
    "narrativeqa": ("questions on stories", _QUESTION, "en", 128),
    "qasper": ("questions on papers", _QUESTION, "en", 128),
    "multifieldqa_en": ("questions on articles", _QUESTION, "en", 64),
    "multifieldqa_zh": ("questions on articles, in Chinese", _QUESTION_ZH, "zh", 64),
    "hotpotqa": ("questions on several passages", _QUESTION, "en", 32),
    "2wikimqa": ("questions on several passages", _QUESTION, "en", 32),
    "musique": ("questions on several passages", _QUESTION, "en", 32),
    "dureader": (
        "questions on several passages, in Chinese",
        dataclasses.replace(_QUESTION_ZH, score=rouge, name="rouge_l"),
        "zh",
        128,
    ),
    "gov_report": ("summaries of reports", _SUMMARY, "en", 512),
    "qmsum": (
        "summaries of meetings by question",
        _Kind("\n\nQuestion: {input}\nAnswer:", rouge, "rouge_l"),
        "en",
        512,
    ),
    "multi_news": ("summaries of several news", _SUMMARY, "en", 512),
    "vcsum": (
        "summaries of meetings, in Chinese",
        dataclasses.replace(_SUMMARY, asks="\n\n总结："),  # noqa: RUF001
        "zh",
        512,
    ),
    "trec": ("classes of questions, from examples", _Kind(_EXAMPLES, class_score, "accuracy"), "en", 64),
    "triviaqa": ("questions, with examples", _Kind(_EXAMPLES, token_f1, "f1"), "en", 32),
    "samsum": ("summaries of dialogues, with examples", _Kind(_EXAMPLES, rouge, "rouge_l"), "en", 128),
    "lsht": (
        "classes of news, from examples, in Chinese",
        _Kind(_EXAMPLES, class_score, "accuracy"),
        "zh",
        64,
    ),
    "passage_count": (
        "how many paragraphs differ",
        _Kind("\n\nNumber of different paragraphs:", number_score, "accuracy"),
        "en",
        32,
    ),
    "passage_retrieval_en": (
        "which paragraph an abstract is of",
        _Kind("\n\nAbstract: {input}\nThe abstract is of paragraph", number_score, "accuracy"),
        "en",
        32,
    ),
    "passage_retrieval_zh": (
        "which paragraph an abstract is of, in Chinese",
        _Kind("\n\n摘要：{input}\n摘要来自段落", number_score, "accuracy"),  # noqa: RUF001
        "zh",
        32,
    ),
    "lcc": ("next line of code", _CODE, "en", 64),
    "repobench-p": ("next line of code of a repository", _CODE, "en", 64),
}


def longbench_items(request: Request, *, kind: _Kind, language: str) -> Iterator[Item]:
    """Yield the rows: `context`, `input`, `answers`, `length` (words), `all_classes`."""
    for row in request.rows("test"):
        answers = row["answers"]
        if not isinstance(answers, list) or not answers:
            raise UserError(f"{row.where}: answers is no list of texts; correct or remove the row")
        facts: dict[str, Any] = {"language": language, "length": words_of(int(row["length"]))}
        if kind.score is class_score:
            facts["classes"] = [*map(str, row["all_classes"] or ())]
        yield Item(
            str(row.values.get("_id", row.id)),
            GENERATE,
            kind.asks.replace("{input}", row["input"]),
            text_document(row["context"]),
            references=tuple(map(str, answers)),
            facts=facts,
        )


def words_of(count: int) -> int:
    """Return the power of two that so many words do not exceed."""
    return 1 << max(0, count - 1).bit_length()


def best_value(answered: Answered, *, kind: _Kind) -> dict[str, float]:
    """Return the best score over all references."""
    item = answered.item
    said = answered.text.lstrip("\n").split("\n")[0] if kind.stop else answered.text
    return {kind.name: max(kind.score(said, each, item.facts) for each in item.references)}


def choice_items(request: Request) -> Iterator[Item]:
    """Yield the rows of LongBench v2: `context`, `question`, `choice_A` to `choice_D`, `answer` (a letter)."""
    for row in request.rows("test"):
        options = tuple(f" {row[f'choice_{letter}'].strip()}" for letter in LETTERS)
        question = f"Question: {row['question'].strip()}"
        yield Item(
            str(row.values.get("_id", row.id)),
            CHOOSE,
            f"\n\n{question}\nAnswer:",
            text_document(row["context"].strip()),
            choices=options,
            references=(_gold(row),),
            facts={"length": words_of(len(row["context"].split()))},
            question=question,
        )


def _gold(row: Row) -> str:
    answer = str(row["answer"])
    if answer not in LETTERS or len(answer) != 1:
        raise UserError(
            f"{row.where}: answer is {answer!r}, not a letter from A to D; correct or remove the row"
        )
    return str(LETTERS.index(answer))


def _task(name: str, doc: str, kind: _Kind, language: str, max_tokens: int) -> ItemTask:
    return ItemTask(
        f"longbench:{name}",
        f"LongBench, {doc}",
        1,
        SUITE,
        {"test": (f"longbench/{name}", f"longbench/data/{name}")},
        functools.partial(longbench_items, kind=kind, language=language),
        functools.partial(best_value, kind=kind),
        kind.name,
        max_tokens=max_tokens,
        stop=kind.stop,
        check=check_rouge if kind.score is rouge else lambda: None,
    )


TASKS = (
    *(_task(name, *how) for name, how in _TASKS.items()),
    ItemTask(
        "longbench_v2",
        "LongBench v2, four options on texts of up to 2M words",
        1,
        "longbench_v2",
        {"test": ("longbench_v2/data", "longbench_v2/train")},
        choice_items,
        choice_values,
        "acc_token",
        rule=TOKEN,
        chance=guess,
    ),
)
