"""Documents read in refilled rows are those read alone, and questions on them branch one memory."""

from typing import Any

import numpy as np
import pytest

from fam_jax.evaluation.answering import Answering, HowToAnswer
from fam_jax.evaluation.item import CHOOSE, GENERATE, Answered, Document, Encoded, Item
from fam_jax.evaluation.joining import Joiner
from fam_jax.evaluation.reading import Cost, Unread, read_documents, rows_to_use
from fam_jax.generation.streaming import NotFiniteError
from tests.evaluation.fake import FakeStreamer, State, joiner
from tests.generation import tiny


class Numbers:
    """A vocabulary of the letters a to p, one token each: that of the tiny model."""

    eos_id, bos_id = 0, 0
    vocab_size = 16

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") for letter in text]

    def decode(self, ids: Any) -> str:
        return "".join(chr(ord("a") + token) for token in ids)


def spell(ids: np.ndarray) -> str:
    return Numbers().decode(ids.tolist())


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_every_document_is_read_in_full_and_once(rows: int, chunk: int) -> None:
    streamer: Any = FakeStreamer(lambda *_: 0.0, block_size=4)
    lengths = (5, 90, 4, 1, 33, 34, 8, 9, 0, 17)
    texts = {str(n): np.arange(length, dtype=np.int32) % 250 for n, length in enumerate(lengths)}
    cost, loaded = Cost(), []

    def load(key: str) -> np.ndarray:
        loaded.append(key)
        return texts[key]

    unread = [Unread(key, (lambda key=key: load(key)), len(text)) for key, text in texts.items()]
    found = [*read_documents(streamer, unread, rows=rows, chunk_blocks=chunk, cost=cost)]
    assert sorted(read.key for read in found) == sorted(texts)
    assert loaded == sorted(texts, key=lambda key: -len(texts[key]))
    for read in found:
        state: State | None = read.state
        seen = [] if state is None else [*state.streams[0]]
        assert [*seen, *read.rest] == texts[read.key].tolist() and read.tokens == len(texts[read.key])
        assert len(seen) % 4 == 0 and (1 <= len(read.rest) <= 4 or read.tokens == 0)
    assert cost.needed == sum((max(n, 1) - 1) // 4 * 4 for n in lengths) <= cost.paid


def test_no_more_rows_than_the_documents_keep_busy() -> None:
    assert rows_to_use([100, 10, 10], 8) == 1
    assert rows_to_use([10] * 20, 8) == 8
    assert rows_to_use([10, 10, 10], 8) == 3
    assert rows_to_use([], 8) == rows_to_use([0], 8) == 1


def test_rows_are_divided_over_devices() -> None:
    """A device that gets no whole share of the rows would compute all of them."""
    assert [rows_to_use([10] * n, 16, ways=4) for n in (1, 3, 4, 7, 9, 40)] == [4, 4, 4, 4, 8, 16]
    assert rows_to_use([10] * 5, 3, ways=4) == 3  # cannot be divided anyway
    assert rows_to_use([10] * 40, 18, ways=4) == 16


def test_refilled_rows_cost_little() -> None:
    """Lengths as those of books: sorted batches of 16 cost more than one and a half times the documents."""
    random = np.random.default_rng(0)
    lengths = np.exp(random.normal(11, 0.8, 50)).astype(int)
    streamer: Any = FakeStreamer(lambda *_: 0.0, block_size=1024)
    cost = Cost()
    unread = [Unread(str(n), (lambda n=n: np.zeros(n, np.int32)), int(n)) for n in lengths]
    assert len([*read_documents(streamer, unread, rows=16, chunk_blocks=16, cost=cost)]) == 50
    # Rows that are busy at the end are few, as the longest documents come first.
    assert cost.paid / cost.needed < 1.1
    batches = np.sort(lengths)[::-1]
    in_batches = sum(len(part) * part.max() for part in np.split(batches, range(16, 50, 16)))
    assert cost.paid < in_batches


def items_on(documents: list[np.ndarray]) -> list[Item]:
    """Return two questions on each document, and two without one."""
    random, items = np.random.default_rng(1), []
    for n, ids in enumerate([*documents, None]):
        text = "" if ids is None else spell(ids)
        document = (
            Document(f"d{n}", "", len(text), (lambda text=text: text)) if text else Item("", "").document
        )
        drawn = [spell(random.integers(0, 16, length)) for length in (3, 8, 3, 4)]
        choices = tuple(drawn[2:])
        items.append(
            Item(f"c{n}", CHOOSE, drawn[0], document, choices, unconditional=drawn[1], references=("0",))
        )
        items.append(Item(f"g{n}", GENERATE, drawn[1], document, references=("a",)))
    return items


def run(
    streamer: Any, items: list[Item], batch_size: int, chunk: int, own: Joiner, max_tokens: int = 20
) -> dict[str, Answered]:
    how = HowToAnswer(batch_size, chunk, max_tokens, stop=("bc",), waiting=2)
    return {each.item.id: each for part in Answering(streamer, own, how, [0]).run(items) for each in part}


@pytest.mark.parametrize(
    ("kinds", "chunk"), [((CHOOSE,), 1), pytest.param((CHOOSE, GENERATE), 4, marks=pytest.mark.slow)]
)
def test_a_real_model_answers_in_refilled_rows_as_without_any_state(
    kinds: tuple[str, ...], chunk: int
) -> None:
    """Likelihoods and texts are those of calls over the whole text."""
    streamer, own = tiny.streamer(), Joiner(Numbers(), 16, [], 0)
    items = [item for item in items_on(tiny.texts(5, 33, 21, 4)) if item.kind in kinds]
    found = run(streamer, items, 2, chunk, own, 16)
    assert found.keys() == {item.id for item in items}
    for item in items:
        answered = found[item.id]
        text = item.document.load()
        assert isinstance(text, str) and answered.tokens_read == answered.tokens_expected
        if item.kind == GENERATE:
            assert answered.text == greedy(text + item.context, answered)
        for number, likelihood in enumerate(answered.likelihoods):
            choice = item.choices[number]
            assert likelihood.sum == pytest.approx(logprob(text + item.context, choice), rel=1e-4)
            assert item.unconditional is not None and likelihood.unconditional is not None
            assert likelihood.unconditional == pytest.approx(logprob(item.unconditional, choice), rel=1e-4)
            assert (likelihood.tokens, likelihood.bytes) == (len(choice), len(choice))


def greedy(context: str, answered: Answered) -> str:
    """Generate from the logits of the whole text, and check why and when the answer ended."""
    text = ""
    for count in range(1, answered.tokens_generated + 1):
        ids = np.array(Numbers().encode(context + text), np.int32)
        token = int(tiny.forward(ids)[-1].argmax())
        if token == 0:
            assert (count, answered.ended_by) == (answered.tokens_generated, "end")
            return text
        text += Numbers().decode([token])
    assert answered.ended_by == ("bc" if text.endswith("bc") else "length")
    return text.removesuffix("bc")


@pytest.mark.slow
def test_an_item_alone_and_among_others() -> None:
    streamer, own = tiny.streamer(), Joiner(Numbers(), 16, [], 0)
    items = items_on(tiny.texts(5, 40, 21, 4, 17, 30))
    together = run(streamer, items, 3, 4, own)
    for item in items:
        found, expected = together[item.id], run(streamer, [item], 2, 1, own)[item.id]
        assert (found.text, found.ended_by) == (expected.text, expected.ended_by)
        assert found.tokens_read == expected.tokens_read
        for one, other in zip(found.likelihoods, expected.likelihoods, strict=True):
            assert one == pytest.approx(other, rel=1e-5)


def logprob(context: str, continuation: str) -> float:
    """Return a log probability from the logits of the whole text."""
    ids = np.array(Numbers().encode(context + continuation))
    logits = tiny.forward(ids.astype(np.int32)).astype(np.float64)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    places = np.arange(len(context), len(ids))
    return float(logits[places - 1, ids[places]].sum())


def test_a_document_is_read_once_for_all_its_questions() -> None:
    document = Document("d", "", 100, lambda: "word " * 20)
    items = [
        Item(str(n), CHOOSE, f" question {n}?", document, (" yes", " no"), references=("0",))
        for n in range(6)
    ]
    streamer = FakeStreamer(lambda *_: -1.0, block_size=16)
    found = run(streamer, items, 6, 2, joiner())
    assert len(found) == 6
    # 94 characters before the last word: 5 blocks in one row, then what is left of it with 6 questions.
    assert streamer.calls == [32, 32, 16, 6 * (94 - 80 + len(" word question 0?"))]


def test_a_document_of_token_ids() -> None:
    ids = np.array([2 + byte for byte in b"some words."], np.int32)
    document = Document("d", "", 11, lambda: Encoded(ids, "words."))
    streamer = FakeStreamer(lambda text, more: -float(text == "some words. So?"), block_size=4)
    items = [Item("0", CHOOSE, " So?", document, (" a", " b"), references=("0",))]
    found = run(streamer, items, 2, 1, joiner(1))["0"]
    assert [each.sum for each in found.likelihoods] == [-1, -1] and found.tokens_read == 1 + 15


def test_a_model_that_reads_something_else_is_found_out() -> None:
    class Deaf(FakeStreamer):
        def read(self, prompts: Any, state: State, **how: Any) -> Any:
            return super().read([prompt[:-1] if len(prompt) > 5 else prompt for prompt in prompts], state)

    items = [Item("0", CHOOSE, "a question", choices=(" a", " b"), references=("0",))]
    with pytest.raises(RuntimeError, match="read 9 tokens of a prompt with 10"):
        run(Deaf(lambda *_: -1.0), items, 2, 1, joiner())


def test_logits_that_are_no_numbers() -> None:
    items = [Item("x", CHOOSE, "a question", choices=(" a", " b"), references=("0",))]
    with pytest.raises(NotFiniteError, match="item x: the model's logits are not finite"):
        run(FakeStreamer(lambda *_: float("nan")), items, 2, 1, joiner())


def test_generation_stops_at_strings_end_tokens_and_lengths() -> None:
    answers = {"q1:": " one bc two", "q2:": " three", "q3:": " a very long answer that goes on"}
    items = [Item(name, GENERATE, name, references=("x",)) for name in answers]
    streamer = FakeStreamer(lambda *_: 0.0, lambda text: answers.get(text, ""))
    found = run(streamer, items, 2, 1, joiner())
    assert {name: (each.text, each.ended_by, each.tokens_generated) for name, each in found.items()} == {
        "q1:": (" one ", "bc", 7),
        "q2:": (" three", "end", 7),
        "q3:": (" a very long answer ", "length", 20),
    }
