"""A model of written answers: it knows texts, how likely each is and what comes next, and fails at any other text."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fam_jax.evaluation.item import Item, ItemTask, Request, Row
from fam_jax.evaluation.joining import Joiner


class Bytes:
    """A vocabulary of bytes without TensorFlow; 0 ends a text and 1 begins one."""

    eos_id, bos_id, unk_id = 0, 1, None
    vocab_size = 258

    def encode(self, text: str) -> list[int]:
        return [2 + byte for byte in text.encode()]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(token - 2 for token in ids if token > 1).decode(errors="replace")


def joiner(*begin: int) -> Joiner:
    return Joiner(Bytes(), 258, begin, 0)


class State(NamedTuple):
    """The tokens that each stream has read."""

    streams: tuple[tuple[int, ...], ...]

    @property
    def batch_size(self) -> int:
        return len(self.streams)

    @property
    def tokens_read(self) -> np.ndarray:
        return np.array([*map(len, self.streams)])

    def select(self, rows: Sequence[int]) -> "State":
        return State(tuple(self.streams[row] for row in rows))

    @staticmethod
    def join(states: Sequence["State"]) -> "State":
        return State(tuple(stream for state in states for stream in state.streams))

    def replace_row(self, row: int, stream: "State") -> "State":
        return State((*self.streams[:row], stream.streams[0], *self.streams[row + 1 :]))


class Generated(NamedTuple):
    tokens: np.ndarray
    lengths: np.ndarray
    stopped: np.ndarray
    logits: np.ndarray
    state: State


@dataclasses.dataclass
class FakeStreamer:
    """The interface of `Streamer`, as far as tasks of items use it."""

    # Log probability of a continuation behind a text.
    likelihood: Callable[[str, str], float]
    # What is generated behind a text, without an end token.
    answer: Callable[[str], str] = lambda _: ""
    block_size: int = 16
    mesh: None = None
    # Tokens of every call, in all rows together.
    calls: list[int] = dataclasses.field(default_factory=list)

    @property
    def config(self) -> Any:
        return self

    def start(self, rows: int) -> State:
        return State(((),) * rows)

    def read(self, prompts: Sequence[np.ndarray], state: State, **_: Any) -> tuple[np.ndarray, State]:
        assert len(prompts) == state.batch_size and all(map(len, prompts))
        self.calls.append(sum(map(len, prompts)))
        streams = [(*old, *new.tolist()) for old, new in zip(state.streams, prompts, strict=True)]
        return np.zeros((len(prompts), 1)), State(tuple(streams))

    def measure(
        self, inputs: np.ndarray, targets: np.ndarray, state: State, **_: Any
    ) -> tuple[np.ndarray, np.ndarray, State]:
        """Call every token right and certain."""
        self.calls.append(inputs.size)
        _, state = self.read([*inputs], state)
        self.calls.pop()
        return targets, np.zeros(targets.shape, np.float32), state

    def score(
        self, texts: Sequence[np.ndarray], logits: np.ndarray, state: State
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        assert len(texts) == len(logits) == state.batch_size
        found = []
        for ids, stream in zip(texts, state.streams, strict=True):
            total = self.likelihood(Bytes().decode(stream), Bytes().decode(ids.tolist()))
            found.append((ids, np.full(len(ids), total / len(ids))))
        return found

    def generate(
        self, logits: np.ndarray, state: State, *, max_tokens: int, stop_tokens: Sequence[int], **_: Any
    ) -> Generated:
        tokens, lengths, stopped, streams = [], [], [], []
        for stream in state.streams:
            text = Bytes().decode(stream)
            known = [place for place in range(len(text) + 1) if self.answer(text[:place])]
            place = known[-1] if known else len(text)
            rest = Bytes().encode(self.answer(text[:place]))[len(Bytes().encode(text[place:])) :]
            ended = len(rest) < max_tokens and 0 in stop_tokens
            part = [*rest, 0][:max_tokens] if ended else (rest + [2 + 32] * max_tokens)[:max_tokens]
            tokens.append(part + [0] * (max_tokens - len(part)))
            lengths.append(len(part))
            stopped.append(ended)
            streams.append((*stream, *part))
        return Generated(
            np.array(tokens), np.array(lengths), np.array(stopped), logits, State(tuple(streams))
        )


def rows_of(**splits: Sequence[Mapping[str, Any]]) -> Callable[[str], list[Row]]:
    """Return what gives the rows of splits to a task."""
    return lambda split: [
        Row(str(number), row, f"{split}: row {number + 1}") for number, row in enumerate(splits[split])
    ]


def request_for(rows: Callable[[str], Sequence[Row]] | None = None, **fields: Any) -> Request:
    return Request(**{"rows": rows or rows_of(), "joiner": joiner(), "block_size": 16, **fields})


def whole_text(item: Item) -> str:
    """Return the text before the answer of an item."""
    found = item.document.load()
    text = found if isinstance(found, str) else Bytes().decode(found.ids.tolist()) + found.held
    return text.rstrip() + item.context


def model_for(task: ItemTask, items: Sequence[Item], how: Callable[[Item, int], float]) -> FakeStreamer:
    """Return a model that knows the texts of items, and no others.

    Args:
      task: whose items they are.
      items: the items.
      how: log probability per token of a choice of an item.
    """
    texts: dict[str, float] = {}
    answers: dict[str, str] = {}
    for item in items:
        if item.kind == "generate":
            answers[whole_text(item).rstrip()] = f" {item.references[0] or 'unanswerable'}\n\nmore"
            continue
        for number in range(item.answers):
            if item.contexts:
                before, rest = item.contexts[number], item.choices[0]
            else:
                before, rest = whole_text(item), item.choices[number]
            # Blanks between context and choice belong to the choice.
            moved = len(before) - len(before.rstrip())
            texts[before + rest] = how(item, number) * (len(rest.encode()) + moved)
            if item.unconditional is not None:
                texts[item.unconditional + rest] = -float(len(rest))
    return FakeStreamer(lambda text, more: texts[text + more], lambda text: answers.get(text, ""))
