"""BABILong (arXiv 2406.10149): the facts of bAbI among sentences of books, in its published rows.

Put `LENGTH/TASK.jsonl`, such as `4k/qa1.jsonl`, into a folder `babilong`. Prompts are ours, without solved examples.
"""

import functools
import re
from collections.abc import Iterator, Sequence

from fam_jax.evaluation.item import GENERATE, Answered, Item, ItemTask, Request, text_document
from fam_jax.evaluation.item_tasks.lengths import length_of

SUITE = "babilong"
_PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
_YES_NO = ("no", "yes")
_PATHS = ("e,e", "e,n", "e,s", "n,e", "n,n", "n,w", "s,e", "s,s", "s,w", "w,n", "w,s", "w,w")
# What the answers of a task can be, as in BABILong.
LABELS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("qa1", "qa2", "qa3", "qa4", "qa11", "qa12", "qa13"), _PLACES),
    "qa5": ("bill", "fred", "jeff", "mary", "apple", "football", "milk"),
    **dict.fromkeys(("qa6", "qa9", "qa17", "qa18"), _YES_NO),
    "qa7": ("none", "one", "three", "two"),
    "qa8": ("apple", "football", "milk", "nothing"),
    "qa10": ("maybe", *_YES_NO),
    "qa14": ("bedroom", "cinema", "kitchen", "office", "park", "school"),
    "qa15": ("cat", "mouse", "sheep", "wolf"),
    "qa16": ("gray", "green", "white", "yellow"),
    "qa19": _PATHS,
    "qa20": ("bedroom", "bored", "garden", "hungry", "kitchen", "thirsty", "tired"),
}
DOCS = {
    "qa1": "where a person is",
    "qa2": "where a thing is that a person carries",
    "qa3": "where a thing was before",
    "qa4": "which place is beside another",
    "qa5": "who gave what to whom",
    "qa6": "whether a person is somewhere",
    "qa7": "how many things a person has",
    "qa8": "which things a person has",
    "qa9": "facts that deny",
    "qa10": "facts that leave it open",
    "qa11": "who is meant by a pronoun",
    "qa12": "two persons at once",
    "qa13": "who is meant by they",
    "qa14": "what happened before",
    "qa15": "what follows from kinds",
    "qa16": "what follows from others of a kind",
    "qa17": "what is beside what",
    "qa18": "what fits into what",
    "qa19": "the way from a place to another",
    "qa20": "why a person goes somewhere",
}


def babilong_items(request: Request) -> Iterator[Item]:
    """Yield the rows: `input`, `question` and `target`."""
    for row in request.rows("test"):
        question = row["question"].strip()
        length = length_of(row.part)
        yield Item(
            row.id,
            GENERATE,
            f"\n\nQuestion: {question}\nAnswer:",
            text_document(row["input"].strip()),
            references=(str(row["target"]),),
            facts={"question": question} | ({} if length is None else {"length": length}),
            question=f"Question: {question}",
        )


def babilong_values(answered: Answered, *, labels: Sequence[str]) -> dict[str, float]:
    """Score the first sentence by the answers that it names, without those that the question names.

    Returns:
      exact: whether they are the right ones, by whole words; official: the same as BABILong counts, by parts of words.
      There, "none" is never right, because "one" is a part of it, and "north" says "no".
    """
    item = answered.item
    said = answered.text.lower().split(".")[0]
    target, question = item.references[0].lower(), item.facts["question"].lower()
    wanted = {target} if target in labels else {each.strip() for each in target.split(",")}
    words = re.sub(r"\s*,\s*", ",", said)
    named = {label for label in labels if _names(words, label)}
    asked = {label for label in labels if _names(question, label)}
    inside = {label for label in labels if label in said} - {label for label in labels if label in question}
    several = "," in target and len(target) > 3
    official = {*target.split(",")} if several else {target}
    return {"exact": float(named - asked == wanted), "official": float(inside == official)}


def _names(text: str, label: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(label)}(?!\w)", text) is not None


def _task(name: str) -> ItemTask:
    places = (f"babilong/*/{name}", f"babilong/{name}/*", f"babilong/*/{name}-00000-of-00001")
    return ItemTask(
        f"babilong:{name}",
        f"BABILong, {DOCS[name]}",
        1,
        SUITE,
        {"test": places},
        babilong_items,
        functools.partial(babilong_values, labels=LABELS[name]),
        "exact",
        max_tokens=20,
    )


TASKS = tuple(_task(name) for name in sorted(LABELS, key=lambda name: int(name[2:])))
