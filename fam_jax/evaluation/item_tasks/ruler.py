"""RULER (arXiv 2404.06654): needles, variables, words and questions, in rows that its scripts made for a tokenizer.

Its scripts write `LENGTH/data/TASK/validation.jsonl`; put LENGTH into a folder `ruler`. Scores are those of RULER: a
right answer counts if it stands anywhere in the text, in any case. So a text that names everything scores 1.
"""

from collections.abc import Iterator
from typing import Any

from fam_jax.config import UserError
from fam_jax.evaluation.item import GENERATE, Answered, Item, ItemTask, Request, Row, text_document
from fam_jax.evaluation.item_tasks.lengths import length_of

SUITE = "ruler"
# Tokens to generate, as in RULER.
MAX_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
DOCS = {
    "niah_single_1": "a number in repeated sentences",
    "niah_single_2": "a number in essays",
    "niah_single_3": "a UUID in essays",
    "niah_multikey_1": "one of four numbers in essays",
    "niah_multikey_2": "one number among others",
    "niah_multikey_3": "one UUID among others",
    "niah_multivalue": "four numbers of a key",
    "niah_multiquery": "numbers of four keys",
    "vt": "variables that are assigned to each other",
    "cwe": "the most common words of a list",
    "fwe": "the most frequent of made-up words",
    "qa_1": "questions on paragraphs of SQuAD",
    "qa_2": "questions on paragraphs of HotpotQA",
}


def ruler_items(request: Request) -> Iterator[Item]:
    """Yield the rows: `input`, `outputs`, `length` and, if there are, `answer_prefix` and `token_position_answer`."""
    for row in request.rows("test"):
        length = length_of(row.part)
        facts: dict[str, Any] = {"length": _rounded(row["length"]) if length is None else length}
        if (place := row.values.get("token_position_answer")) is not None and row["length"]:
            facts["depth"] = min(1.0, place / row["length"])
        prefix = row.values.get("answer_prefix") or ""
        yield Item(
            row.id, GENERATE, prefix, text_document(row["input"]), references=_outputs(row), facts=facts
        )


def _outputs(row: Row) -> tuple[str, ...]:
    outputs = row["outputs"]
    found = tuple(map(str, outputs if isinstance(outputs, list) else [outputs]))
    if not found:
        raise UserError(f"{row.where}: outputs is empty; correct or remove the row")
    return found


def _rounded(tokens: int) -> int:
    """Return the power of two that a row was made for: rows of one length differ by some tokens."""
    return 1 << max(0, tokens - 1).bit_length()


def ruler_values(answered: Answered) -> dict[str, float]:
    """Return the share of right answers that the text names, and whether it names any."""
    text = answered.text.lower()
    named = [reference.lower() in text for reference in answered.item.references]
    return {"recall": sum(named) / len(named), "any": float(any(named))}


def _task(name: str, doc: str) -> ItemTask:
    kind = name.partition("_")[0]
    sources = (f"ruler/*/data/{name}/validation", f"ruler/*/{name}/validation", f"ruler/{name}/validation")
    return ItemTask(
        f"ruler:{name}",
        f"RULER, {doc}",
        1,
        SUITE,
        {"test": sources},
        ruler_items,
        ruler_values,
        "any" if kind == "qa" else "recall",
        max_tokens=MAX_TOKENS[kind],
        stop=(),
    )


TASKS = tuple(_task(name, doc) for name, doc in DOCS.items())
