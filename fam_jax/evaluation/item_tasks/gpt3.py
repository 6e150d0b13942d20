"""GPT-3's evaluation set as a table: data, prompts, scoring rules and numbers of shots (arXiv 2005.14165)."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from fam_jax.evaluation import scores
from fam_jax.evaluation.item import (
    CHOOSE,
    GENERATE,
    METRIC_OF_RULE,
    PARTIAL,
    TOKEN,
    UNCONDITIONAL,
    Answered,
    Item,
    ItemTask,
    Request,
    Row,
    Values,
    choice_values,
    guess,
    random_for,
)
from fam_jax.evaluation.item_tasks import gpt3_rows as prompts
from fam_jax.evaluation.item_tasks.gpt3_rows import Example
from fam_jax.evaluation.rows import MissingDataError

SUITE = "gpt3"
Convert = Callable[[Row, int], Iterator[Example]]
Gather = Callable[[Sequence[Row]], list[Row]]


def few_shot_items(
    request: Request,
    convert: Convert,
    *,
    header: str = "",
    gather: Gather | None = None,
    split: str = "test",
    shots_from: str = "train",
) -> Iterator[Item]:
    """Yield an item per example, behind solved examples that are joined by blank lines.

    The solved examples of an item depend on the seed and the item's id alone.

    Args:
      request: rows, number of shots and seed.
      convert: makes the examples of a row.
      header: comes once, before everything.
      gather: joins rows that belong together.
      split: the rows to ask about.
      shots_from: the rows to solve; if it is `split` too, an item is not shown itself.

    Raises:
      MissingDataError: there are fewer rows to solve than shots.
    """

    def rows(name: str) -> Sequence[Row]:
        found = request.rows(name)
        return found if gather is None else gather(found)

    asked, own = rows(split), shots_from == split
    pool = asked if own else rows(shots_from) if request.shots else []
    if request.shots > len(pool) - own and request.shots:
        raise MissingDataError(
            f"--shots={request.shots}: {pool[0].where.partition(': ')[0] if pool else shots_from} has only "
            f"{len(pool) - own} examples to show; ask for fewer"
        )
    for place, row in enumerate(asked):
        for number, example in enumerate(convert(row, request.shots)):
            name = row.id if number == 0 else f"{row.id}.{number}"
            shown = _shown(request, convert, pool, place if own else None, name)
            yield _item(name, example, header + "".join(f"{text}\n\n" for text in shown))


def _shown(
    request: Request, convert: Convert, pool: Sequence[Row], without: int | None, name: str
) -> list[str]:
    """Return solved examples for the item `name`."""
    if not request.shots:
        return []
    random = random_for("shots", request.seed, name)
    drawn: dict[int, None] = {}
    while len(drawn) < request.shots:  # few of many, so that a permutation of all would cost more
        number = int(random.integers(len(pool)))
        if number != without:
            drawn[number] = None
    rows = [pool[number] for number in drawn]
    return [[*convert(row, request.shots)][-1].shown() for row in rows]


def _item(name: str, example: Example, before: str) -> Item:
    kind = GENERATE if example.gold is None else CHOOSE
    return Item(
        name,
        kind,
        before + example.context,
        choices=example.choices,
        contexts=tuple(before + context for context in example.contexts),
        unconditional=example.unconditional,
        references=example.answers if example.gold is None else (str(example.gold),),
        group=example.group,
        facts=example.facts,
    )


def _multirc_values(answered: Answered) -> dict[str, float]:
    return {"acc_answer": float(answered.chosen(TOKEN)[0] == answered.item.gold)}


def _multirc_totals(answered: Sequence[Answered]) -> dict[str, float]:
    return scores.multirc_scores(
        [scores.Judged(each.item.group, each.chosen(TOKEN)[0] == 0, each.item.gold == 0) for each in answered]
    )


def _cb_totals(answered: Sequence[Answered]) -> dict[str, float]:
    chosen = [each.chosen(TOKEN)[0] for each in answered]
    return {"macro_f1": scores.macro_f1(chosen, [each.item.gold for each in answered])}


def _record_values(answered: Answered) -> dict[str, float]:
    facts = answered.item.facts
    entity = facts["entities"][answered.chosen(TOKEN)[0]]
    return {
        "exact_match": scores.best(scores.exact_match, entity, facts["answers"]),
        "f1": scores.best(scores.token_f1, entity, facts["answers"]),
    }


def _last_word(answered: Answered) -> dict[str, float]:
    """Return whether the first word is the right one, with or without punctuation at its end."""
    word, wanted = (answered.text.split() or [""])[0].lower(), answered.item.references[0].lower()
    return {"exact_match": float(wanted in (word, word.strip(".,;:!?\"'")))}


def _exact_values(answered: Answered) -> dict[str, float]:
    return {"exact_match": scores.best(scores.exact_match, answered.text, answered.item.references)}


def _trivia_values(answered: Answered) -> dict[str, float]:
    said = scores.normalize_trivia(answered.text)
    return {"exact_match": float(said in map(scores.normalize_trivia, answered.item.references))}


def _squad_values(answered: Answered) -> dict[str, float]:
    return scores.squad_scores(answered.text, answered.item.references)._asdict()


def _squad_totals(answered: Sequence[Answered]) -> dict[str, float]:
    """Return the scores of questions with an answer (HasAns) and of those without (NoAns)."""
    found = {}
    for name, answerable in (("has_answer", True), ("no_answer", False)):
        part = [_squad_values(each) for each in answered if each.item.facts["answerable"] == answerable]
        for metric in ("exact_match", "f1") if part else ():
            found[f"{metric}_{name}"] = float(np.mean([each[metric] for each in part]))
    return found


def _choose(name: str, doc: str, rule: str, shots: int, data: str, convert: Convert, **how: Any) -> ItemTask:
    """Return a task whose answer is the likeliest of several by a rule."""
    fields: dict[str, Any] = {
        "values": choice_values,
        "headline": METRIC_OF_RULE[rule],
        "chance": guess,
    } | how
    return _task(name, doc, shots, data, convert, rule=rule, **fields)


def _generate(
    name: str, doc: str, shots: int, data: str, convert: Convert, values: Values, **how: Any
) -> ItemTask:
    """Return a task whose answer is text."""
    fields: dict[str, Any] = {"headline": "exact_match", "max_tokens": 32} | how
    return _task(name, doc, shots, data, convert, values=values, **fields)


def _task(
    name: str,
    doc: str,
    shots: int,
    data: str,
    convert: Convert,
    *,
    split: str = "validation",
    train: str = "train",
    header: str = "",
    gather: Gather | None = None,
    **fields: Any,
) -> ItemTask:
    """Return a task whose rows TFDS has as `data` (empty: it has none), and files as NAME/SPLIT."""
    own = train == split

    def items(request: Request) -> Iterator[Item]:
        shots_from = "test" if own else "train"
        return few_shot_items(request, convert, header=header, gather=gather, shots_from=shots_from)

    splits = {"test": split} if own else {"test": split, "train": train}
    sources = {
        role: (*([f"tfds:{data}:{each}"] if data else []), f"{name}/{each}") for role, each in splits.items()
    }
    told = zip((0, 1, shots), PUBLISHED.get(name, ()), strict=False)
    published = {f"GPT-3 175B, {number} shots": value for number, value in told if value is not None}
    return ItemTask(name, doc, 1, SUITE, sources, items, published_shots=shots, published=published, **fields)


# Of GPT-3 with 175B parameters at 0, 1 and many shots, from the text and table 3.3 of the paper; None: not told there.
PUBLISHED = {
    "hellaswag": (None, 0.781, 0.793),
    "natural_questions": (0.146, 0.230, 0.299),
    "storycloze": (0.832, None, 0.877),
    "trivia_qa": (0.643, 0.680, 0.712),
    "web_questions": (0.144, 0.253, 0.415),
}
# Tasks over which tables 2 and 12 of the FAM paper take means: those of choices, and those of texts.
MEANS = {
    "ranked": (
        "anli_r1", "anli_r2", "anli_r3", "arc_challenge", "arc_easy", "boolq", "cb", "copa", "hellaswag", "multirc",
        "openbookqa", "piqa", "race_high", "race_middle", "record", "rte", "storycloze", "wic", "winograd",
        "winogrande", "wsc285",
    ),
    "generated": ("lambada", "natural_questions", "squad_v2", "trivia_qa", "web_questions"),
}  # fmt: skip
# These means of the paper's models with BSWA and with FAM, by size.
MEANS_OF_THE_PAPER = {
    "ranked": {"1B": (0.602, 0.610), "8B": (0.728, 0.740), "24B": (0.782, 0.785)},
    "generated": {"1B": (0.339, 0.347), "8B": (0.543, 0.549), "24B": (0.626, 0.634)},
}
GLUE = "super_glue"
TEST: dict[str, Any] = {"split": "test"}


def _anli(number: int) -> ItemTask:
    doc = f"ANLI round {number}, inference"
    return _choose(f"anli_r{number}", doc, TOKEN, 50, f"anli/r{number}", prompts.anli, **TEST)


def _arc(name: str, doc: str, data: str) -> ItemTask:
    return _choose(name, f"ARC, {doc} questions of science", UNCONDITIONAL, 50, data, prompts.arc, **TEST)


def _winograd(name: str, doc: str, data: str) -> ItemTask:
    return _choose(name, doc, PARTIAL, 7, data, prompts.winograd, split="test", train="test")


def _race(name: str, schools: str) -> ItemTask:
    doc = f"RACE, exams of {schools} schools"
    return _choose(name, doc, UNCONDITIONAL, 10, f"race/{schools}", prompts.race, **TEST)


TASKS = (
    *map(_anli, (1, 2, 3)),
    _arc("arc_challenge", "hard", "ai2_arc/ARC-Challenge"),
    _arc("arc_easy", "easy", "ai2_arc/ARC-Easy"),
    _choose("boolq", "BoolQ, yes or no", TOKEN, 32, f"{GLUE}/boolq", prompts.boolq),
    _choose("cb", "CB, inference, with macro F1", TOKEN, 32, f"{GLUE}/cb", prompts.cb, totals=_cb_totals),
    _choose("copa", "COPA, cause and effect", TOKEN, 32, f"{GLUE}/copa", prompts.copa),
    _choose("hellaswag", "HellaSwag, endings of scenes", TOKEN, 20, "hellaswag", prompts.hellaswag),
    _choose(
        "multirc",
        "MultiRC, which answers are right",
        TOKEN,
        32,
        f"{GLUE}/multirc",
        prompts.multirc,
        values=_multirc_values,
        totals=_multirc_totals,
        headline="acc_answer",
        header=prompts.HEADER_OF_MULTIRC,
        gather=prompts.questions_of_multirc,
    ),
    _choose(
        "openbookqa", "OpenbookQA, no book", UNCONDITIONAL, 100, "openbookqa", prompts.openbookqa, **TEST
    ),
    _choose("piqa", "PIQA, how to do things", TOKEN, 50, "piqa", prompts.piqa),
    _race("race_high", "high"),
    _race("race_middle", "middle"),
    _choose(
        "record",
        "ReCoRD, entities in news",
        TOKEN,
        32,
        f"{GLUE}/record",
        prompts.record,
        values=_record_values,
        headline="exact_match",
        chance=None,
    ),
    _choose("rte", "RTE, inference", TOKEN, 32, f"{GLUE}/rte", prompts.rte),
    _choose(
        "storycloze",
        "StoryCloze 2016, endings of stories",
        TOKEN,
        70,
        "story_cloze/2016",
        prompts.storycloze,
        split="test",
        train="validation",
    ),
    _choose("wic", "WiC, words in context", TOKEN, 32, f"{GLUE}/wic", prompts.wic),
    _winograd("winograd", "Winograd's schemas, the 273 of GPT-3", "wsc273"),
    _winograd(
        "wsc285", "Winograd's schemas, all 285 of the collection, with the fields of wsc273 of TFDS", ""
    ),
    _choose(
        "winogrande",
        "Winogrande, gaps in sentences",
        PARTIAL,
        50,
        "winogrande",
        prompts.winogrande,
        train="train_xl",
    ),
    _generate(
        "lambada", "LAMBADA, last words", 15, "lambada", prompts.lambada, _last_word, max_tokens=12, **TEST
    ),
    _generate(
        "natural_questions",
        "Natural Questions, closed book",
        64,
        "natural_questions_open",
        prompts.question_answer,
        _exact_values,
    ),
    _generate(
        "web_questions",
        "WebQuestions, closed book",
        64,
        "web_questions",
        prompts.question_answer,
        _exact_values,
        **TEST,
    ),
    _generate(
        "trivia_qa",
        "TriviaQA, closed book",
        64,
        "trivia_qa/unfiltered.nocontext",
        prompts.question_answer,
        _trivia_values,
    ),
    _generate(
        "squad_v2",
        "SQuAD v2, with questions without an answer",
        16,
        "squad/v2.0",
        prompts.squad,
        _squad_values,
        headline="f1",
        totals=_squad_totals,
        gather=prompts.paragraphs_of_squad,
    ),
)
