"""Rows of every task in the fields of the published data, about facts of our own."""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]
NAMES = ("Ada", "Bert", "Cleo", "Dora", "Egon", "Fritz", "Gaia", "Hugo", "Ines", "Jonas")
THINGS = ("lamp", "boat", "kite", "drum", "cup", "rope", "bell", "map", "coat", "key")
PLACES = ("harbour", "mill", "tower", "market", "bridge", "garden", "cellar", "attic", "forest", "station")


def _many(make: Callable[[str, str, str, int], Row], count: int = 10) -> list[Row]:
    return [
        make(NAMES[n % 10], THINGS[(3 * n + n // 10) % 10], PLACES[(7 * n + 1) % 10], n) for n in range(count)
    ]


def _nli(kinds: Sequence[Any], premise: str = "premise") -> list[Row]:
    return _many(
        lambda name, thing, place, n: {
            premise: f"{name} left the {thing} at the {place}.",
            "hypothesis": f"The {thing} is at the {place if n % 2 else 'moon'}",
            "label": kinds[n % len(kinds)],
        }
    )


def _arc() -> list[Row]:
    return _many(
        lambda name, thing, place, n: {
            "id": f"q{n}",
            "question": f"Where is the {thing} of {name}?",
            "choices": {
                "text": [f"at the {place}", "on the moon", "under the sea"],
                "label": ["A", "B", "C"] if n % 2 else ["1", "2", "3"],
            },
            "answerKey": ("A", "B", "C")[n % 3],
        }
    )


def _hellaswag() -> list[Row]:
    return _many(
        lambda name, thing, place, n: {
            "activity_label": f"Finding a {thing}",
            "ctx": f"[header] How to find a {thing} [title] Look in the {place}. [step] {name} opens the door",
            "endings": [
                f"and sees the {thing}.",
                "and flies away.",
                "and [substeps] sings to it.",
                "and sleeps.",
            ],
            "label": str(n % 4),
        }
    )


def _multirc() -> list[Row]:
    rows = []
    for n, (name, thing) in enumerate(zip(NAMES, THINGS, strict=True)):
        for number, (answer, right) in enumerate([(name, 1), ("nobody", 0), (f"{name}, the finder", 1)]):
            index = {"paragraph": n // 2, "question": n, "answer": number}
            first = n // 2 * 2
            text = f"{NAMES[first]} and {NAMES[first + 1]} went out. They found a {THINGS[first]} and more."
            rows.append(
                {
                    "paragraph": text,
                    "question": f"Who found the {thing}?",
                    "answer": answer,
                    "label": right,
                    "idx": index,
                }
            )
    return rows


def _race() -> list[Row]:
    return _many(
        lambda name, thing, place, n: {
            "article": f"{name} lost a {thing}. It lay in the {place}.",
            "questions": [f"What did {name} lose?", "Where did it lie?"],
            "options": [
                ["a dog", f"a {thing}", "a hat", "a day"],
                ["at home", "nowhere", f"in the {place}", "in bed"],
            ],
            "answers": ["B", "C"],
            "example_id": f"{n}.txt",
        }
    )


def _record() -> list[Row]:
    return _many(
        lambda name, thing, place, n: {
            "passage": f"{name} showed Zoe a {thing}.\n@highlight\nIt came from the {place}\n@highlight\nZoe was glad",
            "query": f"The {thing} of @placeholder was old.",
            "entities": sorted([name, "Zoe"]),
            "answers": [name],
            "idx": {"passage": n, "query": n},
        }
    )


def _storycloze() -> list[Row]:
    return _many(
        lambda name, thing, place, n: {
            "context": f"{name} went to the {place}. There was a {thing}. It was broken. {name} had tools.",
            "endings": [f"{name} repaired it.", f"{name} became a fish."],
            "label": n % 2 + 1,
        }
    )


def _winograd() -> list[Row]:
    def make(name: str, thing: str, place: str, n: int) -> Row:
        pronoun = "her" if n % 2 else "she"
        text = f"The {thing} fell on the {place} because {pronoun} {'hands were' if n % 2 else 'was'} small."
        begin = text.index(f" {pronoun} ") + 1
        return {
            "text": text,
            "pronoun_text": pronoun,
            "pronoun_start": begin,
            "pronoun_end": begin + len(pronoun),
            "option1_normalized": name,
            "option2_normalized": "Zoe",
            "label": n // 2 % 2,
        }

    return _many(make)


def _questions(answers: Callable[[str, int], Any], field: str) -> list[Row]:
    return _many(
        lambda name, thing, place, n: {
            "question": f"Who owns the {thing} at the {place}?",
            field: answers(name, n),
        }
    )


def _squad() -> list[Row]:
    rows = []
    for n, (name, thing, place) in enumerate(zip(NAMES, THINGS, PLACES, strict=True)):
        context = f"{name} keeps a {thing} in the {place}."
        for number, (question, answers) in enumerate(
            [
                ("Who keeps it?", [name, f"the {name}"]),
                ("When was it bought?", []),
                ("Where is it?", [f"the {place}"]),
            ]
        ):
            texts = {"text": answers, "answer_start": [0] * len(answers)}
            rows.append(
                {
                    "id": f"{n}-{number}",
                    "title": f"Things_{n}",
                    "context": context,
                    "question": question,
                    "answers": texts,
                }
            )
    return rows


# Rows by task of the suite "gpt3".
GPT3: dict[str, list[Row]] = {
    **{f"anli_r{n}": _nli((0, 1, 2), "context") for n in (1, 2, 3)},
    "arc_challenge": _arc(),
    "arc_easy": _arc(),
    "boolq": _many(
        lambda name, thing, place, n: {
            "passage": f"{name} keeps a {thing} in the {place}.",
            "question": f"does {name} keep a {thing}",
            "label": n % 2,
        }
    ),
    "cb": _nli((0, 1, 2)),
    "copa": _many(
        lambda name, thing, place, n: {
            "premise": f"The {thing} of {name} fell.",
            "choice1": "The wind blew.",
            "choice2": "It broke.",
            "question": ("cause", "effect")[n % 2] if n < 5 else n % 2,
            "label": n // 2 % 2,
        }
    ),
    "hellaswag": _hellaswag(),
    "multirc": _multirc(),
    "openbookqa": _many(
        lambda name, thing, place, n: {
            "question_stem": f"{name} uses a {thing} to",
            "choices": {"text": ["see", "swim", "sing", "sleep"], "label": [*"ABCD"]},
            "answerKey": "ABCD"[n % 4],
        }
    ),
    "piqa": _many(
        lambda name, thing, place, n: {
            "goal": f"To carry a {thing} to the {place},",
            "sol1": "use both hands.",
            "sol2": "wait for the tide.",
            "label": n % 2,
        }
    ),
    "race_high": _race(),
    "race_middle": _race(),
    "record": _record(),
    "rte": _nli(("entailment", "not_entailment")),
    "storycloze": _storycloze(),
    "wic": _many(
        lambda name, thing, place, n: {
            "word": thing,
            "sentence1": f"{name} has a {thing}.",
            "sentence2": f"The {thing} is in the {place}.",
            "label": bool(n % 2),
        }
    ),
    "winograd": _winograd(),
    "wsc285": _winograd(),
    "winogrande": _many(
        lambda name, thing, place, n: {
            "sentence": f"{name} gave Zoe the {thing} because _ was leaving the {place}.",
            "option1": name,
            "option2": "Zoe",
            "answer": str(n % 2 + 1),
        }
    ),
    "lambada": _many(
        lambda name, thing, place, n: {
            "passage": f"{name} had a {thing} . the {place} was closed to {name.lower()}\n"
        }
    ),
    "natural_questions": _questions(lambda name, n: [name, f"Old {name}"], "answer"),
    "web_questions": _questions(lambda name, n: [name], "answers"),
    "trivia_qa": _questions(
        lambda name, n: {"value": name, "normalized_aliases": [name.lower(), "u s"]}, "answer"
    ),
    "squad_v2": _squad(),
}


def write_rows(folder: pathlib.Path, name: str, split: str, rows: Sequence[Row]) -> None:
    """Write rows as FOLDER/NAME/SPLIT.jsonl."""
    path = folder / name / f"{split}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))
