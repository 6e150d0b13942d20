"""Questions on long documents: NarrativeQA, Qasper and QuALITY as in SCROLLS, and summaries of XL-Sum."""

import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

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
from fam_jax.evaluation.rouge import DEFAULT, UNICODE, check_rouge, rouge_l

SUITE = "long_context"
YES_NO = ("yes", "no")
LETTERS = "ABCD"
OPTION = re.compile(r"^ ?\(([A-D])\) ?", re.MULTILINE)
LANGUAGES = {
    "ar": "arabic", "bn": "bengali", "en": "english", "id": "indonesian", "ja": "japanese", "ko": "korean",
    "ru": "russian", "sw": "swahili", "te": "telugu", "th": "thai", "tr": "turkish",
}  # fmt: skip


def _grouped(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows of SCROLLS by question: there is one for each reference.

    Raises:
      UserError: rows of one question differ in more than their reference.
    """
    found: dict[str, list[Row]] = {}
    for row in rows:
        same = found.setdefault(str(row["id"]), [])
        if same and same[0]["input"] != row["input"]:
            raise UserError(
                f"{row.where}: has another input than the row before with the same id; correct the file"
            )
        same.append(row)
    return found


def _outputs(rows: Sequence[Row]) -> tuple[str, ...]:
    outputs = tuple(row["output"] for row in rows)
    if not all(outputs):
        raise UserError(f"{rows[0].where}: has no output, as in test splits; use the validation split")
    return outputs


def _asked(request: Request) -> Iterator[tuple[str, str, str, tuple[str, ...]]]:
    """Yield id, document, question and references of every question."""
    rows = request.rows("test")
    if "document" in rows[0]:  # the published Parquet files of NarrativeQA
        for row in rows:
            answers = tuple(answer["text"] for answer in row["answers"])
            yield row.id, row["document"]["text"], row["question"]["text"], answers
        return
    for name, group in _grouped(rows).items():
        question, _, document = group[0]["input"].partition("\n\n")
        yield name, document, question, _outputs(group)


def question_items(request: Request, *, rank_yes_no: bool = False) -> Iterator[Item]:
    """Yield a question per id, behind its document.

    Args:
      request: its rows are those of SCROLLS, `id`, `input` and `output`, or of NarrativeQA's published files.
      rank_yes_no: whether to choose between yes and no where all references are one of them.
    """
    for name, text, question, references in _asked(request):
        context = f"\n\nQuestion: {question.strip()}\nAnswer:"
        document = text_document(text.strip())
        ranked = rank_yes_no and all(scores.normalize(each) in YES_NO for each in references)
        yield Item(
            name,
            CHOOSE if ranked else GENERATE,
            context,
            document,
            question=f"Question: {question.strip()}",
            choices=(" Yes", " No") if ranked else (),
            references=references,
            group=document.key,
        )


def _said(answered: Answered) -> str:
    item = answered.item
    return item.choices[answered.chosen(TOKEN)[0]].strip() if item.kind == CHOOSE else answered.text


def question_values(answered: Answered) -> dict[str, float]:
    """Return the best F1 and ROUGE-L over all references."""
    said, references = _said(answered), answered.item.references
    return {
        "f1": scores.best(scores.token_f1, said, references),
        "rouge_l": scores.best(rouge_l, said, references),
    }


def question_totals(answered: Sequence[Answered]) -> dict[str, float]:
    """Return means over pairs of question and reference, as a row per reference gives them."""
    pairs = [(_said(each), reference) for each in answered for reference in each.item.references]
    return {
        "f1_rows": float(np.mean([scores.token_f1(*pair) for pair in pairs])),
        "rouge_l_rows": float(np.mean([rouge_l(*pair) for pair in pairs])),
    }


def quality_items(request: Request) -> Iterator[Item]:
    """Yield the questions of QuALITY, with four options each: rows of SCROLLS, or of the published files."""
    rows = request.rows("test")
    if "article" in rows[0]:
        for row in rows:
            for number, asked in enumerate(row["questions"]):
                if "gold_label" not in asked:
                    raise UserError(f"{row.where}: has no gold_label, as in test files; use the dev file")
                gold = int(asked["gold_label"]) - 1  # 1 to 4
                name = str(asked.get("question_unique_id", f"{row.id}.{number}"))
                yield _quality(name, row["article"], asked["question"], asked["options"], gold)
        return
    for name, group in _grouped(rows).items():
        question, options, article = _quality_parts(group[0])
        wanted = " ".join(_outputs(group)[0].split())
        same = [number for number, option in enumerate(options) if " ".join(option.split()) == wanted]
        if not same:
            raise UserError(f"{group[0].where}: its output is none of its options; correct the file")
        yield _quality(name, article, question, options, same[0])


def _quality_parts(row: Row) -> tuple[str, list[str], str]:
    """Return question, options and article of an input of SCROLLS."""
    question, _, rest = row["input"].partition("\n\n")
    places = [*OPTION.finditer(rest)][: len(LETTERS)]
    if "".join(place[1] for place in places) != LETTERS:
        raise UserError(f"{row.where}: its input has no options (A) to (D); correct the file")
    end = rest.find("\n\n", places[-1].end())
    ends = [*(place.start() for place in places[1:]), end if end >= 0 else len(rest)]
    options = [rest[place.end() : stop].strip() for place, stop in zip(places, ends, strict=True)]
    return question, options, rest[ends[-1] :].strip()


def _quality(name: str, article: str, question: str, options: Sequence[str], gold: int) -> Item:
    listed = "\n".join(f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=True))
    document = text_document(article.strip())
    asked = f"Question: {question.strip()}\n{listed}"
    return Item(
        name,
        CHOOSE,
        f"\n\n{asked}\nAnswer:",
        document,
        question=asked,
        choices=tuple(f" {option.strip()}" for option in options),
        references=(str(gold),),
        group=document.key,
    )


def summary_items(request: Request, *, language: str) -> Iterator[Item]:
    """Yield the articles of XL-Sum in one language."""
    for row in request.rows("test"):
        name = str(row.values.get("id", row.id))
        facts = {"language": language}
        document = text_document(row["text"].strip(), f"{language}/{name}")
        yield Item(name, GENERATE, "\n\nSummary:", document, references=(row["summary"],), facts=facts)


def summary_values(answered: Answered) -> dict[str, float]:
    """Return ROUGE-L, by words of every script for languages other than English."""
    words = DEFAULT if answered.item.facts["language"] == "en" else UNICODE
    return {"rouge_l": rouge_l(answered.text, answered.item.references[0], words)}


# Scores of BSWA and of FAM by size, those of 1B with three memory segments: tables 1, 10 and 11 of the paper.
OF_THE_PAPER = {
    "isabelle": {"1B": (0.706, 0.736), "8B": (0.821, 0.825), "24B": (0.866, 0.866)},
    "narrative_qa": {"1B": (0.112, 0.135), "8B": (0.184, 0.193), "24B": (0.226, 0.230)},
    "pg19": {"1B": (0.463, 0.470), "8B": (0.524, 0.529), "24B": (0.557, 0.572)},
    "qasper": {"1B": (0.045, 0.072), "8B": (0.124, 0.185), "24B": (0.280, 0.294)},
    "quality": {"1B": (0.261, 0.279), "8B": (0.473, 0.485), "24B": (0.554, 0.580)},
    "xlsum": {"1B": (0.124, 0.159), "8B": (0.220, 0.247), "24B": (0.247, 0.264)},
}
# Where the paper's figure is not that of a task's headline.
DIFFERS = {"qasper": ", ROUGE-L", "xlsum": ", all languages"}


def of_the_paper(name: str) -> dict[str, float]:
    """Return the scores of the paper's models on a task of its tables; none for other tasks."""
    return {
        f"paper's {memory} {size}{DIFFERS.get(name, '')}": score
        for size, scores in OF_THE_PAPER.get(name, {}).items()
        for memory, score in zip(("BSWA", "FAM"), scores, strict=True)
    }


def _scrolls(name: str, doc: str, items: Any, **how: Any) -> ItemTask:
    sources = {"test": (f"tfds:scrolls/{name}:validation", f"{name}/validation")}
    return ItemTask(name, doc, 1, SUITE, sources, items, published=of_the_paper(name), **how)


def _questions(name: str, doc: str, items: Any, headline: str) -> ItemTask:
    return _scrolls(
        name,
        doc,
        items,
        values=question_values,
        totals=question_totals,
        headline=headline,
        rule=TOKEN,
        max_tokens=128,
        check=check_rouge,
    )


def _xlsum(language: str, name: str) -> ItemTask:
    words = DEFAULT if language == "en" else UNICODE
    return ItemTask(
        f"xlsum:{language}",
        f"XL-Sum, summaries in {name.capitalize()}, words by {words}",
        1,
        SUITE,
        {"test": (f"xlsum/{name}_test", f"xlsum/{name}_val")},
        functools.partial(summary_items, language=language),
        summary_values,
        "rouge_l",
        max_tokens=128,
        check=check_rouge,
        published=of_the_paper("xlsum"),
    )


TASKS = (
    _questions("narrative_qa", "NarrativeQA, questions on books and films", question_items, "rouge_l"),
    _questions(
        "qasper", "Qasper, questions on papers", functools.partial(question_items, rank_yes_no=True), "f1"
    ),
    _scrolls(
        "quality",
        "QuALITY, four options on stories",
        quality_items,
        values=choice_values,
        headline="acc_token",
        rule=TOKEN,
        chance=guess,
    ),
    *(_xlsum(language, name) for language, name in LANGUAGES.items()),
)
