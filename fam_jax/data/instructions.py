"""Instruction data: rows of the usual shapes as texts with loss weights, and those as examples.

A row becomes a list of runs. A run is a text that is tokenized at once, as a list of (text, weight): weight 0 on what a
model is given, 1 on what it is to write. A chat is rendered by a template; see :mod:`fam_jax.data.chat`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fam_jax.config import ConfigError, DataConfig
from fam_jax.config.data import FORMATS
from fam_jax.config.strict_json import parse_json
from fam_jax.data.chat import (
    ChatTemplate,
    Message,
    Run,
    control_pattern,
    find_template,
    without_control_tokens,
)
from fam_jax.data.interface import Example
from fam_jax.data.randomness import random_key, random_words
from fam_jax.data.records import SKIP, ReadRows, Records, Row, RowError, read_rows
from fam_jax.data.token_weights import TokenWeights

if TYPE_CHECKING:
    from fam_jax.data.quiet_seqio import seqio

# Examples tokenized at a time.
TOGETHER = 32
ROLES = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant",
    "assistant": "assistant", "model": "assistant", "tool": "tool",
}  # fmt: skip


class Pair(NamedTuple):
    """A prompt and its answer."""

    prompt: str
    answer: str
    # What stands between them where they are joined as text, with weight 0.
    gap: str = ""


class Chat(NamedTuple):
    """Messages, of which assistant turns have weight 1."""

    messages: list[Message]
    # Turns before this one are given.
    first: int = 0
    # Descriptions of tools, for the template.
    tools: list[Any] | None = None


class Plain(NamedTuple):
    """A text, all of it with weight 1."""

    text: str


Content = Pair | Chat | Plain


class Shape(NamedTuple):
    """How a kind of row is recognized and read."""

    # Keys that every such row has.
    needs: tuple[str, ...]
    # Further keys that are read.
    reads: tuple[str, ...]
    # Returns the contents of a row.
    convert: "Callable[[Fields, Reading], Iterable[Content]]"


class Reading(NamedTuple):
    """What the meaning of a row depends on besides the row."""

    seed: int
    # Text between inputs and targets.
    separator: str = ""
    # Examples in a prompt of Natural Instructions.
    positive_examples: int = 2


@dataclasses.dataclass(frozen=True)
class Fields:
    """The fields of a row, by key. Errors name the file, the line and the key."""

    values: Mapping[str, Any]
    where: str
    shape: str

    def text(self, key: str, *, default: str | None = None) -> str:
        """Return the text under a key; `default` if it is missing or null, unless that is None."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self.error(key, "a text")
        return value

    def list_of(self, key: str, kind: type) -> list[Any]:
        """Return the list under a key."""
        value = self.values.get(key)
        if not isinstance(value, list) or not all(isinstance(entry, kind) for entry in value):
            raise self.error(key, "a list of objects" if kind is dict else "a list of texts")
        return value

    def within(self, value: Mapping[str, Any], place: str) -> "Fields":
        """Return the fields of an object within the row."""
        return Fields(value, f"{self.where}: {place}", self.shape)

    def error(self, key: str, expected: str) -> RowError:
        """Return the error of a value that is not what its shape has there."""
        value = self.values.get(key)
        found = "null" if value is None else type(value).__name__
        found = "missing" if key not in self.values else found
        return RowError(
            f"{self.where}: expected {expected} under {key!r} (format {self.shape}), but it is {found}; correct the "
            f"row, or {SKIP}"
        )


def _pair(prompt: str, answer: str) -> Callable[[Fields, Reading], Iterator[Content]]:
    def convert(row: Fields, reading: Reading) -> Iterator[Content]:
        yield Pair(row.text(prompt), row.text(answer), reading.separator)

    return convert


def _prompt_completion(row: Fields, reading: Reading) -> Iterator[Content]:
    if isinstance(row.values.get("prompt"), str):
        yield Pair(row.text("prompt"), row.text("completion"))
        return
    given = _messages(row, "prompt", "role", "content")
    answer = _messages(row, "completion", "role", "content")
    yield Chat([*given, *answer], len(given), _tools(row))


def _instruction(context: str, answer: str) -> Callable[[Fields, Reading], Iterator[Content]]:
    def convert(row: Fields, reading: Reading) -> Iterator[Content]:
        parts = [row.text("instruction"), row.text(context, default="")]
        yield Pair("\n\n".join(part for part in parts if part), row.text(answer), "\n\n")

    return convert


def _natural_instructions(row: Fields, reading: Reading) -> Iterator[Content]:
    """Yield the instances of a task file, each below the task's definition and its first examples."""
    definition = row.values["Definition"]
    head = definition if isinstance(definition, str) else " ".join(row.list_of("Definition", str))
    shown = row.list_of("Positive Examples", dict) if row.values.get("Positive Examples") else []
    for number, example in enumerate(shown[: reading.positive_examples], 1):
        fields = row.within(example, f"Positive Examples {number}")
        head += f"\n\nInput: {fields.text('input')}\nOutput: {_output(fields, reading)}"
    for number, instance in enumerate(row.list_of("Instances", dict), 1):
        fields = row.within(instance, f"Instances {number}")
        yield Pair(f"{head}\n\nInput: {fields.text('input')}\nOutput:", _output(fields, reading), " ")


def _output(instance: Fields, reading: Reading) -> str:
    """Return the output of an instance, or one of several; the choice depends on the seed and the input."""
    if isinstance(instance.values.get("output"), str):
        return instance.text("output")
    outputs = instance.list_of("output", str)
    if not outputs:
        raise instance.error("output", "a text or several")
    [word] = random_words(random_key("output", reading.seed, instance.text("input")), 0)
    return outputs[word % len(outputs)]


def _sharegpt(row: Fields, reading: Reading) -> Iterator[Content]:
    messages = _messages(row, "conversations", "from", "value")
    if system := row.text("system", default=""):
        messages.insert(0, {"role": "system", "content": system})
    yield Chat(messages, tools=_tools(row))


def _chat(row: Fields, reading: Reading) -> Iterator[Content]:
    yield Chat(_messages(row, "messages", "role", "content"), tools=_tools(row))


def _plain(row: Fields, reading: Reading) -> Iterator[Content]:
    if text := row.text("text"):
        yield Plain(text)


def _messages(row: Fields, key: str, role: str, content: str) -> list[Message]:
    """Return messages with the keys role and content, and whatever other keys they have that are not null."""
    found = row.values.get(key)
    if isinstance(found, dict) and all(isinstance(column, list) for column in found.values()):
        # Parquet files of some writers hold a list of objects as an object of lists.
        found = [dict(zip(found, entries, strict=False)) for entries in zip(*found.values(), strict=False)]
        row = dataclasses.replace(row, values={**row.values, key: found})
    messages = []
    for number, message in enumerate(row.list_of(key, dict), 1):
        fields = row.within(message, f"{key} {number}")
        named = fields.text(role)
        if named.lower() not in ROLES and role == "from":
            raise RowError(
                f"{fields.where}: {role} {named!r} is unknown; expected one of {', '.join(ROLES)}; correct the row, or "
                f"{SKIP}"
            )
        others = {k: _not_null(v) for k, v in message.items() if k not in (role, content) and v is not None}
        text = _content(fields, content, has_calls=bool(others.get("tool_calls")))
        messages.append({"role": ROLES.get(named.lower(), named), **text, **others})
    return messages


def _content(message: Fields, key: str, *, has_calls: bool) -> dict[str, str]:
    """Return the content of a message under "content"; without any if it only calls tools."""
    value = message.values.get(key)
    if value is None and has_calls:
        return {}
    if isinstance(value, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in value
    ):
        return {"content": "".join(part["text"] for part in value)}
    return {"content": message.text(key)}


def _not_null(value: Any) -> Any:
    """Return a value without the null entries of its objects, which Parquet adds and templates do not expect."""
    if isinstance(value, dict):
        return {key: _not_null(entry) for key, entry in value.items() if entry is not None}
    return [_not_null(entry) for entry in value] if isinstance(value, list) else value


def _tools(row: Fields) -> list[Any] | None:
    tools = row.values.get("tools")
    if not tools:
        return None
    if isinstance(tools, str):  # some files have them as JSON
        try:
            tools = parse_json(tools)
        except ValueError:
            raise row.error("tools", "a list, or JSON of one") from None
    if not isinstance(tools, list):
        raise row.error("tools", "a list, or JSON of one")
    return [_not_null(tool) for tool in tools]


_P3 = ("inputs_pretokenized", "targets_pretokenized")
# In the order in which rows are compared with them: P3 has `inputs` too, as ids of another tokenizer.
SHAPES = {
    "natural_instructions": Shape(("Definition", "Instances"), ("Positive Examples",), _natural_instructions),
    "messages": Shape(("messages",), ("tools",), _chat),
    "sharegpt": Shape(("conversations",), ("system", "tools"), _sharegpt),
    "p3": Shape(_P3, (), _pair(*_P3)),
    "flan": Shape(("inputs", "targets"), (), _pair("inputs", "targets")),
    "prompt_completion": Shape(("prompt", "completion"), ("tools",), _prompt_completion),
    "dolly": Shape(("instruction", "response"), ("context",), _instruction("context", "response")),
    "alpaca": Shape(("instruction", "output"), ("input",), _instruction("input", "output")),
    "text": Shape(("text",), (), _plain),
}  # fmt: skip
assert tuple(SHAPES) == FORMATS[1:]
# All keys that a shape reads.
KEYS = tuple(dict.fromkeys(key for shape in SHAPES.values() for key in (*shape.needs, *shape.reads)))


def contents_of(row: Row, format_: str, reading: Reading) -> list[Content]:
    """Return what a row holds: one example in most shapes, all instances of a task in Natural Instructions.

    Args:
      row: of a file.
      format_: a name in :data:`SHAPES`, or "auto", to find the shape by the keys.
      reading: what the meaning depends on besides.

    Raises:
      RowError: the row has another shape, or a key is missing or has a wrong value.
    """
    name = _shape_of(row) if format_ == "auto" else format_
    shape = SHAPES[name]
    if missing := [key for key in shape.needs if key not in row.value]:
        raise RowError(
            f"{row.where}: format {name} needs the key {missing[0]!r}, got {_names(row)}; correct the row, or {SKIP}"
        )
    return [*shape.convert(Fields(row.value, row.where, name), reading)]


def _shape_of(row: Row) -> str:
    filled = {key for key, value in row.value.items() if value is not None}
    for keys in (filled, row.value.keys()):
        for name, shape in SHAPES.items():
            if keys >= {*shape.needs}:
                return name
    lacking = [
        f"{', '.join(sorted({*shape.needs} - row.value.keys()))} ({name})"
        for name, shape in SHAPES.items()
        if row.value.keys() & {*shape.needs}
    ]
    if lacking:
        raise RowError(f"{row.where}: lacks {' or '.join(lacking)}, got {_names(row)}; add it, or {SKIP}")
    known = ", ".join(f"{name} ({' + '.join(shape.needs)})" for name, shape in SHAPES.items())
    raise RowError(
        f"{row.where}: expected the keys of one of {known}, got {_names(row)}; rename them, or {SKIP}"
    )


def _names(row: Row) -> str:
    return f"{', '.join(row.value) or 'no keys':.200}"


class InstructionSource:
    """Instructions as examples, by number; implements :class:`~fam_jax.data.interface.IndexedSource`.

    All rows are converted once at the start, so that one that cannot be used stops the program before training begins.
    A run of texts is tokenized as one, so tokens are those of the joined text; a token has the larger weight of the
    texts that it has characters of. The end token of an answer has weight 1.
    """

    def __init__(
        self,
        paths: Sequence[Any],
        field: str,
        data: DataConfig,
        vocabulary: "seqio.Vocabulary",
        template: ChatTemplate | None,
        seed: int,
        read: ReadRows = read_rows,
    ):
        """Read and check the files.

        Args:
          paths: files, of :func:`fam_jax.data.documents.find_files`, or whatever `read` reads.
          field: the config field or flag that names them, for messages.
          data: format, skip_bad, as_chat, separator, positive_examples, add_bos.
          vocabulary: with an end-of-sequence id.
          template: renders chats; None: there is none.
          seed: of the choice among several outputs.
          read: yields the rows of a path.

        Raises:
          ConfigError: a file or a row cannot be used, or there are chats and no template.
        """
        self.vocabulary, self._data, self._template = vocabulary, data, template
        self._reading = Reading(seed, data.separator, data.positive_examples)
        self._weights = TokenWeights(vocabulary)
        self._control = control_pattern(self._weights.control_tokens)
        self.records = Records(paths, field, self._convert, keys=KEYS, skip_bad=data.skip_bad, read=read)

    @property
    def fingerprint(self) -> str:
        """Return a hash of the texts and their weights, whatever files and rows they come from."""
        return self.records.fingerprint

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        return next(self.read([index]))

    def read(self, indices: Iterable[int]) -> Iterator[Example]:
        """Yield the examples with these numbers; tokenize :data:`TOGETHER` at a time."""
        numbers = [*indices]
        for begin in range(0, len(numbers), TOGETHER):
            records = [self.records[number] for number in numbers[begin : begin + TOGETHER]]
            found = self._weights.encode([record["runs"] for record in records])
            for record, (ids, weights) in zip(records, found, strict=True):
                yield self._example(ids, weights, ended=record["ended"])

    def _example(self, ids: np.ndarray, weights: np.ndarray, *, ended: bool) -> Example:
        """Return an example: with an end token, unless its template wrote one, and without BOS.

        Packing puts the start token before every example where data.add_bos asks for it.
        """
        if self._data.add_bos and len(ids) and ids[0] == self.vocabulary.bos_id:
            ids, weights = ids[1:], weights[1:]
        if not ended:
            ids, weights = np.append(ids, self.vocabulary.eos_id), np.append(weights, 1.0)
        return Example(ids.astype(np.int32), weights.astype(np.float32), 0)

    def _convert(self, row: Row) -> Iterator[dict[str, Any]]:
        """Yield the runs of each example of a row, as JSON values, and whether they end with an end token."""
        for content in contents_of(row, self._data.format, self._reading):
            if isinstance(content, Pair) and self._data.as_chat:
                turns = (("user", content.prompt), ("assistant", content.answer))
                content = Chat([{"role": role, "content": text} for role, text in turns])
            if isinstance(content, Chat):
                yield self._rendered(content, row.where)
            else:
                run = [(content.text, 1.0)] if isinstance(content, Plain) else pair_run(content)
                yield {"runs": without_control_tokens(run, self._control), "ended": False}

    def _rendered(self, chat: Chat, where: str) -> dict[str, Any]:
        if self._template is None:
            raise ConfigError(
                f"{where}: is a chat, but the vocabulary {self._data.vocabulary!r} has no chat template beside it; set "
                "data.chat_template to the file of one"
            )
        found = self._template.render(chat.messages, first=chat.first, tools=chat.tools, where=where)
        return {"runs": found.runs, "ended": found.ended}


def chat_template(data: DataConfig, vocabulary: "seqio.Vocabulary") -> ChatTemplate | None:
    """Return the chat template of a config; None if there is none.

    Raises:
      ConfigError: it is no template, or does not tell which tokens are the assistant's.
      UserError: tokenizer_config.json is damaged.
    """
    found = find_template(data.vocabulary, data.chat_template)
    if found is None:
        return None
    tokens = TokenWeights(vocabulary)
    return ChatTemplate(*found, named=tokens.named, control_tokens=tokens.control_tokens)


def pair_run(pair: Pair) -> Run:
    """Return prompt and answer as a run; blanks before the answer belong to it, as most tokens begin with one."""
    given = pair.prompt + pair.gap
    kept = given.rstrip(" ")
    return [(kept, 0.0), (given[len(kept) :] + pair.answer, 1.0)]
