"""InfiniteBench (arXiv 2402.13718): twelve tasks on texts of about 100,000 tokens and more, in its published files.

Put `TASK.jsonl` into a folder `infinitebench`. Prompts are ours; scores count what the published ones count, but a
number or a name has to be the first, or the last, that the text names, whatever stands around it.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
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
from fam_jax.evaluation.item_tasks.longbench import token_f1
from fam_jax.evaluation.rouge import check_rouge, rouge_l

SUITE = "infinitebench"
# Text, right answers -> score.
Score = Callable[[str, tuple[str, ...]], float]
_NUMBER = re.compile(r"\d+\.\d+|\d+")


def first_number(text: str, answers: tuple[str, ...]) -> float:
    """Return whether the first number of the text is the right one, as a value."""
    found = _NUMBER.search(text)
    return float(found is not None and float(found[0]) == float(answers[0]))


def first_digits(text: str, answers: tuple[str, ...]) -> float:
    """Return whether the first digits of the text are the right ones, character by character."""
    found = re.search(r"\d+", text)
    return float(found is not None and found[0] == answers[0])


def last_number(text: str, answers: tuple[str, ...]) -> float:
    """Return whether the last whole number of the text is the right one."""
    found = re.findall(r"-?\d+", text)
    return float(bool(found) and int(found[-1]) == int(answers[0]))


def has_word(text: str, answers: tuple[str, ...]) -> float:
    """Return whether a right answer is among the words of the text, in any case."""
    words = {*re.split(r"[\s:\"'.,?!{}]+", text.upper())}
    return float(any(answer.upper() in words for answer in answers))


def numbers_in_order(text: str, answers: tuple[str, ...]) -> float:
    """Return the share of the right numbers that the text begins with."""
    right = 0
    for said, wanted in zip(re.findall(r"-?\d+", text), answers, strict=False):
        if int(said) != int(wanted):
            break
        right += 1
    return right / len(answers)


def best_f1(text: str, answers: tuple[str, ...]) -> float:
    """Return the best F1 of shared words."""
    return scores.best(scores.token_f1, text, answers)


def best_f1_zh(text: str, answers: tuple[str, ...]) -> float:
    """Return the best F1 of shared characters."""
    return max(token_f1(text, answer, {"language": "zh"}) for answer in answers)


def best_rouge(text: str, answers: tuple[str, ...]) -> float:
    """Return the best ROUGE-L."""
    return scores.best(rouge_l, text, answers)


@dataclasses.dataclass(frozen=True)
class _Kind:
    """How a task asks and scores. In `asks`, {input} stands for the field of that name."""

    asks: str
    # None: the likeliest of the options counts.
    score: Score | None
    name: str = "accuracy"
    max_tokens: int = 0
    stop: tuple[str, ...] = ("\n",)


_OPTIONS = _Kind("\n\nQuestion: {input}\nAnswer:", None, "acc_token")
# By name: line for --list, kind, with the tokens to generate of InfiniteBench.
_TASKS = {
    "passkey": (
        "a number in repeated sentences",
        _Kind("\n\n{input} The pass key is", first_digits, max_tokens=6),
    ),
    "number_string": (
        "a number with repeated digits",
        _Kind("\n\n{input} The sequence of digits is", first_digits, max_tokens=12),
    ),
    "kv_retrieval": ("a value of a JSON object", _Kind("\n\n{input}", has_word, max_tokens=50)),
    "longbook_sum_eng": (
        "summaries of novels",
        _Kind("\n\nSummary:", best_rouge, "rouge_l", max_tokens=1200, stop=()),
    ),
    "longbook_choice_eng": ("four options on novels", _OPTIONS),
    "longbook_qa_eng": (
        "questions on novels",
        _Kind("\n\nQuestion: {input}\nAnswer:", best_f1, "f1", max_tokens=40),
    ),
    "longbook_qa_chn": (
        "questions on novels, in Chinese",
        _Kind("\n\n问题：{input}\n答案：", best_f1_zh, "f1", max_tokens=40),  # noqa: RUF001
    ),
    "longdialogue_qa_eng": (
        "a name that is masked in a script",
        _Kind("\n\nThe name behind $$MASK$$ is", has_word, max_tokens=40),
    ),
    "math_find": (
        "the largest or smallest of many numbers",
        _Kind("\n\n{input}", first_number, max_tokens=3),
    ),
    "math_calc": (
        "values within a long sum",
        _Kind("\n\nValues after each operation:", numbers_in_order, "share", max_tokens=30_000, stop=()),
    ),
    "code_run": ("the result of nested functions", _Kind("\n\n{input}\nAnswer:", last_number, max_tokens=5)),
    "code_debug": ("which function has an error", _OPTIONS),
}


def infinitebench_items(request: Request, *, kind: _Kind) -> Iterator[Item]:
    """Yield the rows: `id`, `context`, `input`, `answer` and, for choices, `options`."""
    for row in request.rows("test"):
        answers = _answers(row)
        context = kind.asks.replace("{input}", row["input"].strip())
        document = text_document(row["context"].rstrip())
        options: tuple[str, ...] = ()
        if kind.score is None:
            options = tuple(f" {option.strip()}" for option in row["options"])
            answers = (_gold(row, answers),)
        yield Item(
            str(row.values.get("id", row.id)),
            GENERATE if kind.score else CHOOSE,
            context,
            document,
            choices=options,
            references=answers,
        )


def _answers(row: Row) -> tuple[str, ...]:
    found: Any = row["answer"]
    while isinstance(found, list) and len(found) == 1 and isinstance(found[0], list):
        found = found[0]
    answers = tuple(map(str, found if isinstance(found, list) else [found]))
    if not answers:
        raise UserError(f"{row.where}: answer is empty; correct or remove the row")
    return answers


def _gold(row: Row, answers: tuple[str, ...]) -> str:
    """Return the number of the right option, which the row gives as a text, perhaps with its letter behind it."""
    if answers[0] in row["options"]:
        return str(row["options"].index(answers[0]))
    if answers[0] in [*"ABCD"][: len(row["options"])]:
        return str("ABCD".index(answers[0]))
    raise UserError(
        f"{row.where}: the answer {answers[0]!r} is none of the options; correct or remove the row"
    )


def _task(name: str, doc: str, kind: _Kind) -> ItemTask:
    score = kind.score
    how: dict[str, Any] = {"rule": TOKEN, "chance": guess}
    if score is not None:
        how = {"max_tokens": kind.max_tokens, "stop": kind.stop}

    def values(answered: Answered) -> dict[str, float]:
        if score is None:
            return choice_values(answered)
        return {kind.name: score(answered.text, answered.item.references)}

    return ItemTask(
        f"infinitebench:{name}",
        f"InfiniteBench, {doc}",
        1,
        SUITE,
        {"test": (f"infinitebench/{name}",)},
        functools.partial(infinitebench_items, kind=kind),
        values,
        kind.name,
        check=check_rouge if score is best_rouge else lambda: None,
        **how,
    )


TASKS = tuple(_task(name, *how) for name, how in _TASKS.items())
