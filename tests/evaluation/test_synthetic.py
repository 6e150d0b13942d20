"""Synthetic tasks: exact lengths under any vocabulary, answers that a program finds in the text, and even depths."""

import re
from collections import Counter
from typing import Any

import numpy as np
import pytest

from fam_jax.config import UserError
from fam_jax.data.synthetic.sample import depth_of, random_numbers
from fam_jax.evaluation.answering import Answering, HowToAnswer
from fam_jax.evaluation.item import Answered, Encoded, Item, ItemTask
from fam_jax.evaluation.item_tasks import ITEM_TASKS
from fam_jax.evaluation.item_tasks.synthetic import TASKS
from fam_jax.evaluation.joining import Joiner
from fam_jax.evaluation.summary import fingerprint, summarize
from tests.evaluation.fake import FakeStreamer, joiner, request_for, whole_text
from tests.evaluation.test_joining import KINDS, vocabulary

NAMES = [task.name for task in TASKS]
# What needles in real text are hidden in.
BOOK = "\n".join(
    f"{n} men saw the sea, and said: it is wide.\n\n" for n in ("Two", "Three", "Four", "Five", "Six")
)
GO = r"(?:went to|journeyed to|travelled to|moved to|went back to)"
TAKE = r"(?:grabbed|took|got|picked up)"
DROP = r"(?:dropped|put down|left|discarded)"
GIVE = r"(?:gave|handed|passed)"


def items_of(task: ItemTask, own: Joiner, length: int, count: int, **fields: Any) -> list[Item]:
    fields = {"texts": {"books": {"one": BOOK}}.__getitem__, **fields}
    return [*task.items(request_for(joiner=own, lengths=(length,), count=count, **fields))]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_have_exactly_the_length(name: str, kind: str) -> None:
    """And their ids are those of their text, behind the part of a sentence that fills them up."""
    words = vocabulary(kind)
    own = Joiner(words, words.vocab_size, [0], 0)
    for length in (1700, 1701, 2048):
        (item,) = items_of(ITEM_TASKS[name], own, length, 1)
        prefix = own.prefix(item.document)
        ids = [*prefix.ids, *own.prompt(prefix, item.context)]
        assert len(ids) == length and ids[0] == 0
        text = words.decode(ids[1:])
        head = re.search(
            r"(Some special|Memorize the|The following is|Facts about|Memorize who|A list is) ", text
        )
        assert head is not None and text.endswith(item.context.rstrip()[-20:])
        whole = own.encode("." + " " + text[head.start() :])[len(own.encode(".")) :]
        assert ids[-len(whole) :] == whole


def test_needles_in_real_text() -> None:
    """From a random line on; other text makes other items."""
    task = ITEM_TASKS["needle:text"]
    items = items_of(task, joiner(), 900, 6)
    texts = [whole_text(item) for item in items]
    assert all("men saw the sea, and said: it is wide. " in text for text in texts)
    begins = {text.partition("Memorize them. ")[2].split()[0] for text in texts}
    assert len(begins) > 2
    other = items_of(task, joiner(), 900, 6, texts=lambda _: {"one": BOOK + "Seven men.\n"})
    assert fingerprint(items) != fingerprint(other)
    assert [item.references for item in items] == [item.references for item in other]
    with pytest.raises(UserError, match=r"books: its \.txt files are empty"):
        items_of(task, joiner(), 900, 1, texts=lambda _: {"one": " \n"})


def places_of(text: str) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Return where people are, and where things have been, one place after the other."""
    people: dict[str, str] = {}
    holder: dict[str, str] = {}
    things: dict[str, list[str]] = {}
    pattern = rf"(\w+) (?:({GO})|({TAKE})|({DROP})) the (\w+)"
    for person, go, take, _, what in re.findall(pattern, text):
        if go:
            people[person] = what
            for thing in [thing for thing, who in holder.items() if who == person]:
                things[thing].append(what)
        elif take:
            holder[what] = person
            things.setdefault(what, []).append(people.get(person, ""))
        else:
            holder.pop(what)
    return people, {
        thing: [p for n, p in enumerate(way) if way[n - 1 : n] != [p]] for thing, way in things.items()
    }


def solve_facts(text: str, question: str) -> str:
    def asks(pattern: str) -> tuple[str, ...]:
        found = re.search(pattern, question)
        return found.groups() if found else ()

    people, things = places_of(text)
    gifts = re.findall(rf"(\w+) {GIVE} the (\w+) to (\w+)\.", text)
    beside = re.findall(r"The (\w+) is (\w+) of the (\w+)\.", text)
    if found := asks(r"Where was the (\w+) before the (\w+)\?"):
        way = things[found[0]]
        return way[len(way) - 2 - way[::-1].index(found[1])]
    if found := asks(r"Where is the (\w+)\?"):
        return things[found[0]][-1]
    if found := asks(r"Where is (\w+)\?"):
        return people[found[0]]
    if found := asks(r"What is (\w+) of the (\w+)\?"):
        return next(a for a, way, b in beside if (way, b) == found)
    if found := asks(r"What is the (\w+) (\w+) of\?"):
        opposite = dict(
            zip(["north", "south", "east", "west"], ["south", "north", "west", "east"], strict=True)
        )
        return next(a for a, way, b in beside if (b, opposite[way]) == found)
    if found := asks(r"What did (\w+) give to (\w+)\?"):
        return next(thing for giver, thing, taker in reversed(gifts) if (giver, taker) == found)
    if found := asks(r"Who gave the (\w+) to (\w+)\?"):
        return next(giver for giver, thing, taker in reversed(gifts) if (thing, taker) == found)
    found = asks(r"Who did (\w+) give the (\w+) to\?")
    return next(taker for giver, thing, taker in reversed(gifts) if (giver, thing) == found)


def solve(whole: str) -> str:
    """Answer a question from its text, knowing nothing of how it was made."""
    text, _, question = whole.rpartition("\n\n")
    if "special magic" in question:
        keys = re.findall(r"[a-z]+-[a-z]+", question.partition("?")[0])
        pairs = re.findall(r"for (\S+) is (\d+)\.", text)
        return " and ".join(value for key, value in pairs if key in keys)
    if "variables" in question:
        names = {re.findall(r"value (\d+)", question)[0]}
        for _ in range(9):
            names |= {
                name for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", text) if source in names
            }
        return ", ".join(name for name in names if name.isalpha())
    if "common words" in question:
        listed = re.findall(r"\b([a-z]+)\.", text)
        return ", ".join(word for word, _ in Counter(listed).most_common(5))
    if "the list" in question.lower():
        words = re.findall(r"list to remember is: (.*?)\.", text)[0].split(", ")
        return ", ".join(words[::-1] if "reverse" in question else words)
    if "have" in question:
        key = re.findall(r"does (\S+) have", question)[0]
        return re.findall(rf"\b{key} has the (\w+)\.", text)[-1]
    return f"the {solve_facts(text, question)}."


def run(task: ItemTask, items: list[Item], model: FakeStreamer) -> list[Answered]:
    how = HowToAnswer(8, 16, task.max_tokens, task.stop)
    answers = {a.item.id: a for part in Answering(model, joiner(), how, [0]).run(items) for a in part}
    return [answers[item.id] for item in items]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "needle:absent"])
def test_a_program_that_reads_the_text_scores_1(name: str) -> None:
    task = ITEM_TASKS[name]
    items = items_of(task, joiner(), 2000, 20, block_size=64)
    solved = {whole_text(item): f" {solve(whole_text(item))}" for item in items}
    found = summarize(task, run(task, items, FakeStreamer(lambda *_: 0, lambda text: solved.get(text, ""))))
    assert set(found["metrics"].values()) == {1.0} and found["value"] == 1
    assert found["tokens_read"] == 20 * 2000
    assert sum(part["n"] for part in found["by_depth"]) == 20 and found["by_length"][0]["length"] == 2000


def test_what_is_absent_cannot_be_found_and_copying_has_no_precision() -> None:
    task = ITEM_TASKS["needle:absent"]
    for item in items_of(task, joiner(), 900, 3):
        assert not any(answer in whole_text(item) for answer in item.references)
        assert "depth" not in item.facts
    task = ITEM_TASKS["needle:multikey"]
    (item,) = items_of(task, joiner(), 900, 1)
    everything = Answered(item, text=whole_text(item))
    assert task.values(everything) == {"recall": 1, "precision": 0.25, "exact": 0}
    assert task.values(Answered(item, text="nothing")) == {"recall": 0, "precision": 0, "exact": 0}


def test_order_and_first_names_count() -> None:
    (item,) = items_of(ITEM_TASKS["copy"], joiner(), 900, 1)
    values = ITEM_TASKS["copy"].values
    assert values(Answered(item, text=f" {', '.join(item.references)}. the more"))["exact"] == 1
    assert values(Answered(item, text=f" {', '.join(item.references[::-1])}"))["exact"] == 0
    (item,) = items_of(ITEM_TASKS["recall"], joiner(), 900, 1)
    assert ITEM_TASKS["recall"].values(Answered(item, text=f" {item.references[0]}. x has"))["exact"] == 1
    assert ITEM_TASKS["recall"].values(Answered(item, text=f" x {item.references[0]}"))["exact"] == 0


def test_items_are_functions_of_seed_task_length_and_index() -> None:
    task, own = ITEM_TASKS["facts:qa2"], joiner()
    few, more = items_of(task, own, 2000, 3), items_of(task, own, 2000, 6)
    assert [item.id for item in few] == [item.id for item in more[:3]]
    assert [whole_text(item) for item in few] == [whole_text(item) for item in more[:3]]
    texts = [whole_text(item) for item in items_of(task, own, 2000, 3, seeds=(0, 1))]
    texts += [whole_text(item) for item in items_of(task, own, 2001, 3)]
    assert len({*texts}) == 9 and texts[:3] == [whole_text(item) for item in few]
    assert (
        random_numbers(1, "a").random() == random_numbers(1, "a").random() != random_numbers(2, "a").random()
    )


@pytest.mark.parametrize("name", ["needle", "facts:qa1", "recall"])
def test_depths_are_spread_evenly_and_told(name: str) -> None:
    items = items_of(ITEM_TASKS[name], joiner(), 4000, 40, block_size=100)
    depths = np.array([item.facts["depth"] for item in items])
    counts, _ = np.histogram(depths, bins=10, range=(0, 1))
    assert counts.min() >= 1 and counts.max() <= 7  # sentences stand between the depths of the filler
    for item in items:
        document = item.document.load()
        assert isinstance(document, Encoded)
        # The needed sentence begins so many blocks before the question.
        assert item.facts["blocks_back"] == pytest.approx((1 - item.facts["depth"]) * 40, abs=4)
    exact = [depth_of(n, 0, "x") for n in range(50)]
    assert np.histogram(exact, bins=5, range=(0, 1))[0].tolist() == [10] * 5


def test_a_length_that_is_too_short() -> None:
    with pytest.raises(
        UserError, match=r"--lengths: words needs \d+ tokens more than 300; give a larger length"
    ):
        items_of(ITEM_TASKS["words"], joiner(), 300, 1)
