"""Questions on made-up text of exact lengths: `fam_jax.data.synthetic` as tasks of items."""

import functools
import hashlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from fam_jax.config import UserError
from fam_jax.data.synthetic import TASKS as MAKERS
from fam_jax.data.synthetic import Make, Sample
from fam_jax.data.synthetic.fitting import STOP, fit
from fam_jax.data.synthetic.sample import depth_of, random_numbers
from fam_jax.evaluation.item import GENERATE, Answered, Document, Encoded, Item, ItemTask, Request
from fam_jax.evaluation.joining import Joiner

SUITE = "synthetic"
# The folder with the text around needles.
BOOKS = "books"
VERSION = 1
DOCS = {
    "needle": "number of a key in filler",
    "needle:multikey": "number of one of four keys in filler",
    "needle:multivalue": "four numbers of a key in filler",
    "needle:multiquery": "numbers of four keys in filler",
    "needle:needles": "number of a key among those of other keys",
    "needle:absent": "control: number of a key that is not in the text",
    "needle:near": "control: number of a key right before the question",
    "needle:text": "number of a key in real text, the .txt files of the folder books of a folder of --data",
    "tracking": "variables that are assigned to each other",
    "words": "the most common words of a list",
    "facts:qa1": "where a person is",
    "facts:qa2": "where a thing is that a person carries",
    "facts:qa3": "where a thing was before",
    "facts:qa4": "which place is beside another",
    "facts:qa5": "who gave what to whom",
    "recall": "value of a key among pairs",
    "rewrite": "last value of a key that was written three times",
    "copy": "a list of eight words, in its order",
    "reverse": "a list of eight words, backwards",
}
# Scored by the share of answers that were named; the others have to be right as a whole.
BY_SHARE = ("needle", "tracking", "words")


def synthetic_items(request: Request, *, name: str, make: Make, around: str = "") -> Iterator[Item]:
    """Yield `request.count` items of each length and seed, whose prompts have exactly that many tokens.

    Args:
      request: what to make.
      name: of the task.
      make: makes a sample of it.
      around: changes with the text that samples are hidden in, if it is not their own.

    Raises:
      UserError: a length is too short for the task.
    """
    joiner: Joiner = request.joiner
    begin = len(joiner.start)
    for length in request.lengths:
        for seed in request.seeds:
            for index in range(request.count):
                key = (seed, name, VERSION, length, index)
                sample = _sample(make, key)
                found = fit(sample, length - begin, joiner.encode, name)
                facts: dict[str, Any] = {
                    "length": length,
                    "seed": seed,
                    "named": sample.named,
                    "first": sample.first,
                }
                if found.first is not None:
                    back = len(found.ids) + found.rest - found.first
                    facts["depth"] = round(found.first / max(1, len(found.ids)), 4)
                    facts["blocks_back"] = back // request.block_size
                text = f"{sample.question} {sample.answers}{around}"
                document = Document(
                    "/".join(map(str, key)),
                    text,
                    length,
                    functools.partial(_load, make, key, length - begin, joiner),
                )
                yield Item(
                    f"{length}/{seed}/{index}",
                    GENERATE,
                    sample.question,
                    document,
                    references=sample.answers,
                    facts=facts,
                )


def text_needle_items(request: Request) -> Iterator[Item]:
    """Yield the items of `needle` with the lines of books around, from a random line on.

    Raises:
      MissingDataError: there are no books.
      UserError: a length is too short, or the books are empty.
    """
    texts = request.texts(BOOKS)
    lines = [line.strip() for name in sorted(texts) for line in texts[name].split("\n") if line.strip()]
    if not lines:
        raise UserError(f"{BOOKS}: its .txt files are empty; give others")

    def make(random: np.random.Generator, depth: float) -> Sample:
        begin = int(random.integers(len(lines)))
        sample = MAKERS["needle"](random, depth)
        return sample._replace(filler=lambda number: lines[(begin + number) % len(lines)])

    digest = hashlib.blake2b("\n".join(lines).encode(errors="surrogatepass"), digest_size=8).hexdigest()
    yield from synthetic_items(request, name="needle:text", make=make, around=f" in {digest}")


def _sample(make: Make, key: tuple[Any, ...]) -> Sample:
    *stream, index = key
    return make(random_numbers(*key), depth_of(index, *stream))


def _load(make: Make, key: tuple[Any, ...], tokens: int, joiner: Joiner) -> Encoded:
    found = fit(_sample(make, key), tokens, joiner.encode, key[1])
    return Encoded(found.ids, STOP, found.held)


def synthetic_values(answered: Answered) -> dict[str, float]:
    """Score an answer by what it names.

    Returns:
      recall: share of the right names that it has; precision: share of its names that are right, so that copying the
      text does not score; exact: whether its names are the right ones, in their order if only the first names count.
    """
    item = answered.item
    named = re.findall(item.facts["named"], answered.text)
    first = item.facts["first"]
    if first:
        named = named[:first]
    right = {*item.references}
    return {
        "recall": len(right & {*named}) / len(right),
        "precision": len(right & {*named}) / len({*named}) if named else 0.0,
        "exact": float(named == [*item.references] if first else {*named} == right),
    }


def _task(name: str, items: Callable[[Request], Iterator[Item]]) -> ItemTask:
    share = name.partition(":")[0] in BY_SHARE
    return ItemTask(
        name,
        f"Synthetic: {DOCS[name]}",
        VERSION,
        SUITE,
        {},
        items,
        synthetic_values,
        "recall" if share else "exact",
        max_tokens=128,
    )


TASKS = (
    *(_task(name, functools.partial(synthetic_items, name=name, make=make)) for name, make in MAKERS.items()),
    _task("needle:text", text_needle_items),
)
