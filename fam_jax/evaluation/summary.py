"""Figures of a task of items: scores with intervals, broken down by what the items say about themselves."""

import hashlib
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import rich.table

from fam_jax.evaluation import scores
from fam_jax.evaluation.item import CHOOSE, Answered, Item, ItemTask
from fam_jax.evaluation.task import make_table

# Facts that results are broken down by.
BROKEN_DOWN_BY = ("length", "depth", "blocks_back", "language", "seed")


def fingerprint(items: Sequence[Item]) -> str:
    """Return a short text that changes when an item, or its document, changes."""
    digest = hashlib.blake2b(digest_size=8)
    for item in items:
        fields = (item.id, item.kind, item.context, item.document.fingerprint, item.choices, item.contexts)
        digest.update(repr((*fields, item.unconditional, item.references, item.group)).encode())
    return digest.hexdigest()


def limited(items: Sequence[Item], limit: int, seed: int) -> list[Item]:
    """Return at most `limit` groups of items, drawn by the seed, in their own order; 0: all.

    The draw of a group depends on its name alone, so a larger limit holds the items of a smaller one.
    """
    if not limit:
        return [*items]
    groups = dict.fromkeys(item.group or item.id for item in items)
    chosen = {*sorted(groups, key=lambda name: draw(seed, name))[:limit]}
    return [item for item in items if (item.group or item.id) in chosen]


def draw(seed: int, name: str) -> bytes:
    """Return a random value that a draw by the seed sorts names by."""
    return hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()


def summarize(task: ItemTask, answered: Sequence[Answered]) -> dict[str, Any]:
    """Return the figures of a task as JSON values.

    Args:
      task: says how answers are scored.
      answered: at least one, in the order of the items.

    Returns:
      headline: the name of the main score, value: its value, ci95: its 95 % interval (None if it is no mean over
      items), metrics: all scores, chance: expected headline of a guesser, or None; n: items, documents: what they are
      about; ties: items with several likeliest choices; tokens_read, tokens_expected, tokens_generated: sums;
      by_length and so on: scores and number of items for each value of a fact (depths by tenths, blocks back by powers
      of two, each named by its beginning); items and document_of: headline score and document by id of the item.

    Raises:
      RuntimeError: the model did not read what it should have read.
    """
    read, expected = (sum(getattr(a, f"tokens_{name}") for a in answered) for name in ("read", "expected"))
    if read != expected:
        raise RuntimeError(f"{task.name}: the model read {read} tokens of {expected}; the results mislead")
    values = [task.values(each) for each in answered]
    metrics = _scores(task, answered, values)
    own = [each[task.headline] for each in values] if task.headline in values[0] else None
    items = [each.item for each in answered]
    documents = [_document(item) for item in items]
    found: dict[str, Any] = {
        "headline": task.headline,
        "value": metrics[task.headline],
        "ci95": None if own is None else interval(own, documents),
        "chance": None if task.chance is None else task.chance(items),
        "metrics": metrics,
        "n": len(items),
        "documents": len({*documents}),
        "ties": sum(each.chosen(task.rule)[1] for each in answered if each.item.kind == CHOOSE),
        "tokens_read": read,
        "tokens_expected": expected,
        "tokens_generated": sum(each.tokens_generated for each in answered),
    }
    for fact in BROKEN_DOWN_BY:
        if any(fact in item.facts for item in items):
            found[f"by_{fact}"] = _by_fact(task, answered, values, fact)
    if own is not None:
        found["items"] = {item.id: value for item, value in zip(items, own, strict=True)}
        found["document_of"] = {item.id: name for item, name in zip(items, documents, strict=True)}
    return found


def _scores(
    task: ItemTask, answered: Sequence[Answered], values: Sequence[Mapping[str, float]]
) -> dict[str, float]:
    means = {name: float(np.mean([each[name] for each in values])) for name in values[0]}
    return means | ({} if task.totals is None else task.totals(answered))


def _document(item: Item) -> Hashable:
    # With its question before it, a document has a key per question; its group is the document itself.
    return item.group or item.document.key or item.id


def interval(own: Sequence[float], documents: Sequence[Hashable]) -> list[float]:
    """Return the interval of a mean: Wilson's where items are independent and right or wrong, else by bootstrap.

    If all are right, or all wrong, a bootstrap would say that there is no doubt. Then each document counts as one item.
    """
    if {*own} <= {0.0, 1.0}:
        count = len({*documents})
        if count == len(documents):
            return [*scores.wilson(sum(own), count)]
        if len({*own}) == 1:
            return [*scores.wilson(own[0] * count, count)]
    return [*scores.bootstrap(own, documents)]


def _by_fact(
    task: ItemTask, answered: Sequence[Answered], values: Sequence[Mapping[str, float]], fact: str
) -> list[dict[str, Any]]:
    places: dict[Any, list[int]] = {}
    for place, each in enumerate(answered):
        if fact in each.item.facts:
            places.setdefault(_bucket(fact, each.item.facts[fact]), []).append(place)
    found = []
    for value in sorted(places):
        part = places[value]
        metrics = _scores(task, [answered[i] for i in part], [values[i] for i in part])
        found.append({fact: value, "n": len(part), "metrics": metrics})
    return found


def _bucket(fact: str, value: Any) -> Any:
    """Return where a value begins to count: depths by tenths, blocks back by powers of two."""
    if fact == "depth":
        return math.floor(10 * min(value, 0.999)) / 10
    if fact == "blocks_back":
        return 1 << (value.bit_length() - 1) if value else 0
    return value


def result_table(results: Mapping[str, Mapping[str, Any]], title: str) -> rich.table.Table:
    """Return a table with a row per task."""
    table = make_table(title, ("task", "score", "value", "95 % interval", "chance", "items", "tokens read"))
    for name, found in results.items():
        interval = found.get("ci95")
        table.add_row(
            name,
            found["headline"],
            f"{found['value']:.4f}",
            "" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}",
            "" if found.get("chance") is None else f"{found['chance']:.4f}",
            f"{found['n']:,}" if "n" in found else "",
            f"{found['tokens_read']:,}" if "tokens_read" in found else "",
        )
    return table
