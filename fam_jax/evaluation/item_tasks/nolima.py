"""NoLiMa (arXiv 2502.05167): needles that share no words with the question, in shuffled lines of books.

Put the published needle set and books into a folder `nolima`: `needlesets/needle_set.json` and
`haystack/rand_shuffle/*.txt`. Their licence allows research that is not commercial. Prompts are ours. An item is a
function of seed, length and index alone; the published code draws needles and places in another order.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from fam_jax.config import UserError
from fam_jax.data.synthetic.sample import depth_of
from fam_jax.evaluation.item import (
    GENERATE,
    Answered,
    Item,
    ItemTask,
    Request,
    Row,
    random_for,
    text_document,
)

SUITE = "nolima"
BOOKS = "nolima/haystack/rand_shuffle"
CHARACTER = "{CHAR}"


class _Test(NamedTuple):
    """A needle and a question, with {CHAR} in place of a name."""

    name: str
    needle: str
    question: str
    names: Sequence[str]
    # Right answers; none: the name.
    answers: Sequence[str]


def _tests(rows: Sequence[Row]) -> list[_Test]:
    found = []
    for row in rows:
        for kind, question in row["questions"].items():
            for number, test in row["tests"].items():
                arguments = test["input_args"]
                found.append(
                    _Test(
                        f"{row['id']}_{number}_{kind}",
                        _filled(row["needle"], arguments),
                        _filled(question, arguments),
                        row.values.get("character_set") or (),
                        test.get("gold_answers") or (),
                    )
                )
                if not found[-1].names and not found[-1].answers:
                    raise UserError(f"{row.where}: has neither character_set nor gold_answers; correct it")
    return found


def _filled(text: str, arguments: Sequence[str]) -> str:
    for number, argument in enumerate(arguments, 1):
        text = text.replace(f"{{{number}}}", argument)
    return text


class _Book:
    """A text by lines, with the tokens of each."""

    def __init__(self, text: str, count: Callable[[str], int]):
        self.lines = [line for line in text.split("\n") if line.strip()]
        self._count, self._tokens = count, dict[int, int]()

    def from_line(self, begin: int, tokens: int) -> list[int] | None:
        """Return the lines from one on that fit into so many tokens; None: the book ends before."""
        used, found = 0, list[int]()
        for number in range(begin, len(self.lines)):
            if number not in self._tokens:
                self._tokens[number] = self._count(f"{self.lines[number]}\n")
            used += self._tokens[number]
            if used > tokens:
                return found
            found.append(number)
        return None


def nolima_items(request: Request) -> Iterator[Item]:
    """Yield `request.count` items of each length and seed, whose texts with the needle have at most that many tokens.

    Raises:
      UserError: a length is too short for a needle, or longer than the books.
    """
    tests = _tests(request.rows("test"))
    texts: Mapping[str, str] = request.texts(BOOKS)

    def count(text: str) -> int:
        return len(request.joiner.encode(text))

    books = {name: _Book(text, count) for name, text in texts.items()}
    for length in request.lengths:
        for seed in request.seeds:
            order = random_for("nolima", seed, length).permutation(len(tests))
            for index in range(request.count):
                test = tests[int(order[index % len(tests)])]
                key = ("nolima", seed, length, index)
                yield _item(test, books, length, key, count, depth_of(index, "nolima", seed, length))


def _item(
    test: _Test,
    books: Mapping[str, _Book],
    length: int,
    key: tuple[Any, ...],
    count: Callable[[str], int],
    depth: float,
) -> Item:
    random = random_for(*key)
    book = books[sorted(books)[int(random.integers(len(books)))]]
    name = str(test.names[int(random.integers(len(test.names)))]) if test.names else ""
    needle, question = (text.replace(CHARACTER, name) for text in (test.needle, test.question))
    context = f"\n\nQuestion: {question}\nAnswer:"
    room = length - count(f"{needle}\n") - count(context)
    begin = int(random.integers(max(1, len(book.lines) // 2)))
    numbers = book.from_line(begin, room)
    if numbers is None:
        begin, numbers = 0, book.from_line(0, room)
    if room <= 0 or numbers is None:
        why = "is shorter than a needle and its question" if room <= 0 else "is longer than a book"
        raise UserError(f"task nolima: --lengths={length} {why}; ask for another length")
    place = round(depth * len(numbers))
    lines = [book.lines[number] for number in numbers]
    text = "\n".join([*lines[:place], needle, *lines[place:]])
    _, seed, _, index = key
    return Item(
        f"{length}/{seed}/{index}",
        GENERATE,
        context,
        text_document(text),
        references=tuple(test.answers) or (name,),
        facts={"length": length, "seed": seed, "depth": round(depth, 4), "test": test.name},
        question=f"Question: {question}",
    )


def nolima_values(answered: Answered) -> dict[str, float]:
    """Return whether the text contains a right answer."""
    return {"contains": float(any(reference in answered.text for reference in answered.item.references))}


TASKS = (
    ItemTask(
        "nolima",
        "NoLiMa, needles that share no words with the question",
        1,
        SUITE,
        {"test": ("nolima/needlesets/needle_set",)},
        nolima_items,
        nolima_values,
        "contains",
        max_tokens=32,
    ),
)
