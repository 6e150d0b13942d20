"""The parts of a task of items: documents, questions on them, what a model answered, and how it is scored."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fam_jax.config import UserError

CHOOSE, GENERATE = "choose", "generate"
# Rules to choose by: the sum of log probabilities, their mean per token or byte, the sum less the choice's own
# (unconditional) one, and the sum over what comes behind each of several contexts.
SUM, TOKEN, BYTE, UNCONDITIONAL, PARTIAL = "sum", "token", "byte", "unconditional", "partial"
# The accuracy that belongs to a rule.
METRIC_OF_RULE = {
    SUM: "acc",
    TOKEN: "acc_token",
    BYTE: "acc_byte",
    UNCONDITIONAL: "acc_uncond",
    PARTIAL: "acc",
}

OnItems = Callable[[int, int], None]


class Encoded(NamedTuple):
    """A document that is given as token ids."""

    # (n,) int32, without the start token.
    ids: np.ndarray
    # The last words of the text of `ids`. What follows is encoded behind them.
    behind: str
    # The rest of its text, which is encoded together with what follows.
    held: str = ""


@dataclasses.dataclass(frozen=True)
class Document:
    """A text that is read once, before all questions on it. Items with equal keys share it."""

    key: str
    # Changes when the contents change.
    fingerprint: str
    # Rough length, in any unit that is the same in all documents of a task. Longer ones are read first.
    size: int
    # Make the text, or its token ids. Called when it is read.
    load: Callable[[], str | Encoded] = dataclasses.field(compare=False)


NO_DOCUMENT = Document("", "", 0, str)


def text_document(text: str, key: str = "") -> Document:
    """Return a text as a document; by default, equal texts share one."""
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).hexdigest()
    return Document(key or digest, digest, len(text), functools.partial(str, text))


@dataclasses.dataclass(frozen=True)
class Item:
    """A question."""

    # Stable across runs, and unique in its task.
    id: str
    # CHOOSE: the likeliest of several texts; GENERATE: a text.
    kind: str
    # Few-shot examples and question, behind the document.
    context: str = ""
    document: Document = NO_DOCUMENT
    # Continuations of the context.
    choices: tuple[str, ...] = ()
    # If not empty: contexts, one per answer, of the one continuation in `choices`.
    contexts: tuple[str, ...] = ()
    # The context of the unconditional probability of every choice; None: it is not needed.
    unconditional: str | None = None
    # Right answers; for CHOOSE the number of the right choice.
    references: tuple[str, ...] = ()
    # Items of one group are scored together, and drawn together by a limit.
    group: str = ""
    # What results are broken down by, and what the scorer needs: length, depth, language and so on. JSON values.
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # What is asked about the document, to be put before it too; empty: it cannot be.
    question: str = ""

    @property
    def answers(self) -> int:
        """Return how many answers can be chosen."""
        return len(self.contexts or self.choices)

    @property
    def gold(self) -> int:
        """Return the number of the right choice."""
        return int(self.references[0])


def question_first(item: Item) -> Item:
    """Return an item whose question stands before its document too, which is then read for it alone."""
    if not item.question:
        return item

    def load(document: Document = item.document) -> str:
        found = document.load()
        assert isinstance(found, str)  # documents with a question are texts
        return f"{item.question}\n\n{found}"

    digest = hashlib.blake2b(
        repr((item.question, item.document.fingerprint)).encode(errors="surrogatepass"), digest_size=8
    )
    document = Document(
        f"{item.document.key}/{digest.hexdigest()}",
        digest.hexdigest(),
        item.document.size + len(item.question),
        load,
    )
    return dataclasses.replace(item, document=document)


class Likelihood(NamedTuple):
    """How likely a choice is."""

    # Log probability of its tokens, in nats.
    sum: float
    tokens: int
    # In UTF-8, without blanks at the ends.
    bytes: int
    # Log probability behind `Item.unconditional`; None: not measured.
    unconditional: float | None = None
    # Whether greedy decoding would generate these tokens. A tie counts as not.
    greedy: bool = False

    def by(self, rule: str) -> float:
        """Return what the rule compares."""
        if rule == TOKEN:
            return self.sum / self.tokens
        if rule == BYTE:
            return self.sum / max(self.bytes, 1)
        if rule == UNCONDITIONAL:
            assert self.unconditional is not None
            return self.sum - self.unconditional
        return self.sum


@dataclasses.dataclass(frozen=True)
class Answered:
    """An item, and what the model made of it."""

    item: Item
    # For CHOOSE, in the order of the choices.
    likelihoods: tuple[Likelihood, ...] = ()
    # For GENERATE: without what ended it.
    text: str = ""
    # For GENERATE: "end", "length" or the stop string.
    ended_by: str = ""
    # Tokens before the answers as the states counted them, summed over the item's contexts, and as they should be.
    tokens_read: int = 0
    tokens_expected: int = 0
    # For GENERATE.
    tokens_generated: int = 0

    def chosen(self, rule: str) -> tuple[int, bool]:
        """Return the choice that is best by a rule, the first of several, and whether there were several."""
        values = [likelihood.by(rule) for likelihood in self.likelihoods]
        top = max(values)
        return values.index(top), values.count(top) > 1


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a task's data."""

    # Stable across runs: its number in the split, behind the part if there is one.
    id: str
    values: Mapping[str, Any]
    # File and row, for messages.
    where: str
    # What the * in the name of its file stands for, such as a length; empty: the name has none.
    part: str = ""

    def __getitem__(self, name: str) -> Any:
        """Return a field.

        Raises:
          UserError: the row lacks it.
        """
        if name not in self.values:
            raise UserError(
                f"{self.where}: has no field {name!r}, but {', '.join(self.values) or 'none'}; give the data of this "
                "task in its published format"
            )
        return self.values[name]

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def first(self, *names: str) -> Any:
        """Return the first of several fields that the row has; formats name them differently.

        Raises:
          UserError: it has none of them.
        """
        return self[next((name for name in names if name in self), names[0])]


@dataclasses.dataclass(frozen=True)
class Request:
    """What the items of a task are made from."""

    # Rows of a split, by the name that the task gives it, such as "test" or "train".
    rows: Callable[[str], Sequence[Row]]
    # Text files of a folder of --data, by their names without ending.
    texts: Callable[[str], Mapping[str, str]] = lambda _: {}
    # Examples that are shown solved before each question.
    shots: int = 0
    seed: int = 0
    # For tasks that make their own text: exact lengths of the prompts in tokens; items of each length and seed.
    lengths: tuple[int, ...] = ()
    count: int = 0
    seeds: tuple[int, ...] = (0,)
    # Tokens of a block of the model.
    block_size: int = 1
    # Encodes text as the model will read it; a `fam_jax.evaluation.joining.Joiner`.
    joiner: Any = None


Values = Callable[[Answered], dict[str, float]]
Totals = Callable[[Sequence[Answered]], dict[str, float]]


@dataclasses.dataclass(frozen=True)
class ItemTask:
    """A task of items: data and functions without state, which `fam_jax.evaluation.answering` runs.

    To add one, write `items` and `values`, and add it to a table of `fam_jax.evaluation.item_tasks`.
    """

    name: str
    # One line for `launch.evaluate --list`.
    doc: str
    # Of prompt and scoring. Results of different versions do not compare.
    version: int
    # Such as "gpt3": what `--suite` runs together.
    suite: str
    # Where the rows of each split come from, best first: "tfds:NAME:SPLIT", or a file name without ending. A * in it
    # stands for any name; the rows are then those of all such files.
    sources: Mapping[str, tuple[str, ...]]
    items: Callable[[Request], Iterator[Item]]
    # Scores of an answer by name. The results are their means over all items.
    values: Values
    # Name of the main score, of `values` or `totals`.
    headline: str
    # Scores that are no means over items.
    totals: Totals | None = None
    # The rule that the headline chooses by, for CHOOSE.
    rule: str = SUM
    # For GENERATE.
    max_tokens: int = 0
    stop: tuple[str, ...] = ("\n",)
    # Examples that the published few-shot result shows.
    published_shots: int = 0
    # Headlines of other models by name and shots, for reports.
    published: Mapping[str, float] = dataclasses.field(default_factory=dict)
    # Expected headline of a guesser, from the items; None: none.
    chance: Callable[[Sequence[Item]], float] | None = None
    # Check that what the scores need is installed.
    check: Callable[[], None] = lambda: None

    @property
    def synthetic(self) -> bool:
        """Return whether the task makes its own text."""
        return not self.sources


def choice_values(answered: Answered) -> dict[str, float]:
    """Return whether the right choice is the likeliest, by every rule that applies."""
    rules = [SUM] if answered.item.contexts else [SUM, TOKEN, BYTE]
    if all(each.unconditional is not None for each in answered.likelihoods):
        rules.append(UNCONDITIONAL)
    gold = answered.item.gold
    return {METRIC_OF_RULE[rule]: float(answered.chosen(rule)[0] == gold) for rule in rules}


def guess(items: Iterable[Item]) -> float:
    """Return the expected accuracy of guessing among the choices."""
    return float(np.mean([1 / item.answers for item in items]))


def random_for(*key: object) -> np.random.Generator:
    """Return random numbers that depend on `key` alone, the same on every machine."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(digest)))
