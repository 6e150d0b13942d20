"""Chat templates: messages as text, with loss weight 1 on the assistant's turns and on the tokens that end them.

The template is that of the tokenizer, rendered as transformers does. Control tokens, such as <|im_end|>, come from the
template alone: where a message spells one, it is tokenized as text. Imports no TensorFlow.
"""

import datetime
import itertools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
from etils import epath
from jinja2.parser import Parser
from jinja2.runtime import Macro

from fam_jax.config import ConfigError
from fam_jax.config.data import NAMED_VOCABULARIES
from fam_jax.config.strict_json import dump_json
from fam_jax.data.records import SKIP, RowError
from fam_jax.data.text_files import BOM
from fam_jax.data.tokenizer_folder import CHAT_TEMPLATE, SETTINGS, read_object

Message = dict[str, Any]
# A text that is tokenized at once, in parts with a loss weight each.
Run = list[tuple[str, float]]

# Characters that no text has. They mark where a control token was spelled, and what {% generation %} encloses.
BREAK, BEGIN, END = MARKS = "\ufdd0\ufdd1\ufdd2"
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# What `strftime_now` returns is a part of the training data, so it must be the same whenever a run goes on.
TODAY = datetime.datetime(2025, 1, 1)
# Contents to find out how a template ends a turn.
QUESTION, ANSWER = "Question7", "Answer8"


class Rendered(NamedTuple):
    """A chat as text."""

    # A token that would cross from a run to the next would be a control token that a message spells.
    runs: list[Run]
    # Whether no end token has to follow: the template wrote one, or the last turn is not the assistant's.
    ended: bool


class _Generation(jinja2.ext.Extension):
    """The tag {% generation %}, which encloses what the assistant writes."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it)

    def parse(self, parser: Parser) -> jinja2.nodes.Node:
        """Return a block whose text is put between marks."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Macro) -> str:
        return f"{BEGIN}{caller()}{END}"


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    # jinja2's own filter escapes HTML.
    return dump_json(value, ensure_ascii=ensure_ascii, **options)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _environment() -> jinja2.Environment:
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = _to_json
    made.globals |= {"raise_exception": _raise, "strftime_now": TODAY.strftime}
    return made


def find_template(vocabulary: str, file: str) -> tuple[str, str] | None:
    """Return a chat template and what to call it in messages; None if the tokenizer has none.

    Args:
      vocabulary: data.vocabulary. The template of a file is chat_template.jinja beside it, or else `chat_template` in
        tokenizer_config.json.
      file: data.chat_template, the file of a template to use instead; empty: none.

    Raises:
      ConfigError: the file cannot be read, or the tokenizer has several templates and none is the default.
      UserError: tokenizer_config.json is damaged.
    """
    if not file and vocabulary in ("", *NAMED_VOCABULARIES):
        return None
    beside = epath.Path(vocabulary).expanduser().parent
    path = epath.Path(file).expanduser() if file else beside / CHAT_TEMPLATE
    if file or path.exists():
        try:
            return path.read_text(encoding="utf-8").removeprefix(BOM), str(path)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"config.data.chat_template: {path}: cannot be read ({error}); name the file of a chat template"
            ) from error
    settings = beside / SETTINGS
    found = read_object(settings).get("chat_template")
    if isinstance(found, list):
        named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
        if "default" not in named:
            raise ConfigError(
                f"{settings}: has the chat templates {', '.join(map(str, named))}, but no default; copy one of them to "
                "a file and name it with data.chat_template"
            )
        found = named["default"]
    return (found, f"in {settings}") if isinstance(found, str) else None


class ChatTemplate:
    """A chat template.

    Weights come from the template's {% generation %} tags if it has any. Otherwise, a turn of the assistant is what the
    chat up to it has more than the turns before it with the generation prompt. Both must be beginnings of the whole
    chat.
    """

    def __init__(self, source: str, name: str, *, named: Mapping[str, str], control_tokens: Collection[str]):
        """Compile a template.

        Args:
          source: the template.
          name: what it is called in messages, such as its file.
          named: special tokens by their names in templates, such as "eos_token".
          control_tokens: spellings of all tokens that messages may not contain.

        Raises:
          ConfigError: it is no valid template, or begins a turn of the assistant at the end of every chat.
        """
        self.name, self._named = name, dict(named)
        self._control = control_pattern(control_tokens)
        at_end = "|".join(map(re.escape, sorted(control_tokens, key=len, reverse=True)))
        self._at_end = re.compile(rf"(?:{at_end})\Z" if at_end else r"(?!)")
        self._marks = GENERATION.search(source) is not None
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigError(
                f"chat template {name}: {' '.join(str(error).split())}; correct it, or name another with "
                "data.chat_template"
            ) from error
        # Control token that ends a turn of the assistant; empty: the template has none.
        self.end = self._find_end()
        self._ends = tuple(filter(None, (self.end, self._named.get("eos_token"))))

    def render(
        self, messages: Sequence[Message], *, where: str, first: int = 0, tools: list[Any] | None = None
    ) -> Rendered:
        """Render a chat.

        Args:
          messages: with a role and a content each.
          where: file and line, for messages.
          first: turns of the assistant before this number have weight 0.
          tools: descriptions of tools.

        Raises:
          RowError: there is no turn of the assistant, or the template rejects the chat.
          ConfigError: the template does not tell which tokens are the assistant's.
        """
        turns = [i for i, each in enumerate(messages) if i >= first and each.get("role") == "assistant"]
        if not turns:
            raise RowError(f"{where}: has no turn of the assistant to learn from; correct the row, or {SKIP}")
        if any(mark in dump_json([*messages, tools], ensure_ascii=False, default=str) for mark in MARKS):
            raise RowError(
                f"{where}: has U+FDD0, U+FDD1 or U+FDD2, which are no characters; remove it, or {SKIP}"
            )
        shown, tools = self._broken([*messages]), self._broken(tools)
        text, marked = self._text(shown, tools, where=where)
        if self._marks:
            spans = self._marked_spans(text, marked, shown[:first], tools, where)
        else:
            spans = [self._turn(text, shown, turn, tools, where) for turn in turns]
        spans = [self._with_end(text, span) for span in spans]
        ended = turns[-1] != len(messages) - 1 or self._ends_turn(text[slice(*spans[-1])])
        return Rendered(_runs(text, spans), ended)

    def prompt(self, messages: Sequence[Message], *, answer: bool = True) -> str:
        """Return a chat as a prompt, as transformers renders it: control tokens that messages spell are not broken up.

        Args:
          messages: with a role and a content each.
          answer: whether a turn of the assistant begins at the end; if not, the last message goes on.

        Raises:
          RowError: the template rejects the chat, or does not show the last message, which should go on.
        """
        text, _ = self._text([*messages], None, where="the prompt", prompt=answer)
        if answer:
            return text
        last = str(messages[-1]["content"]).strip()
        before, found, _ = text.rpartition(last)
        if last and not found:
            raise RowError(
                f"the prompt: the chat template {self.name} changes the last message, so it cannot go on; begin a turn "
                "of the assistant instead"
            )
        return before + found

    def around_message(self) -> tuple[str, str]:
        """Return what stands before and behind the only message of a chat, of a user, up to the answer.

        Raises:
          RowError: the template rejects the chat, or shows the message not once.
        """
        text, _ = self._text([{"role": "user", "content": QUESTION}], None, where="the prompt", prompt=True)
        before, *after = text.split(QUESTION)
        if len(after) != 1:
            raise RowError(
                f"the prompt: the chat template {self.name} shows the message of a user {len(after)} times; "
                "name another with data.chat_template"
            )
        return before, after[0]

    def _marked_spans(
        self, text: str, marked: list[tuple[int, int]], given: list[Message], tools: Any, where: str
    ) -> list[tuple[int, int]]:
        """Return the spans that the template marks, behind the turns that are given."""
        if given:
            before, _ = self._text(given, tools, where=where, prompt=True)
            if not text.startswith(before):
                raise self._untold(where)
            marked = [span for span in marked if span[0] >= len(before)]
        if not marked:
            raise ConfigError(
                f"chat template {self.name}: marks nothing of {where} as the assistant's with "
                "{% generation %}; correct it, or name another with data.chat_template"
            )
        return marked

    def _turn(self, text: str, messages: list[Message], turn: int, tools: Any, where: str) -> tuple[int, int]:
        """Return begin and end of a turn of the assistant in the whole text."""
        before, _ = self._text(messages[:turn], tools, where=where, prompt=True)
        after = text
        if turn + 1 < len(messages):
            after, _ = self._text(messages[: turn + 1], tools, where=where)
        if not (text.startswith(after) and after.startswith(before)):
            raise self._untold(where)
        return len(before), len(after)

    def _untold(self, where: str) -> ConfigError:
        return ConfigError(
            f"chat template {self.name}: renders the beginning of a chat in another way once the chat goes on "
            f"({where}), so it does not tell which tokens are the assistant's; enclose them in {{% generation %}} and "
            "{% endgeneration %} in a copy of it, and name that with data.chat_template"
        )

    def _with_end(self, text: str, span: tuple[int, int]) -> tuple[int, int]:
        """Return a span that ends with the control token that ends the turn, if there is one within or behind it."""
        begin, end = span
        within = text[begin:end].rstrip()
        if self._ends_turn(within):
            return begin, begin + len(within)
        behind = text[end:].lstrip()
        for token in self._ends:
            if behind.startswith(token):
                return begin, len(text) - len(behind) + len(token)
        return span

    def _ends_turn(self, text: str) -> bool:
        return self._at_end.search(text) is not None

    def _find_end(self) -> str:
        """Return the control token that ends a turn of the assistant; empty if the template has none.

        Raises:
          ConfigError: the template begins another turn of the assistant behind it, although it was not asked to.
        """
        chat = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
        try:
            asked, _ = self._text(chat[:1], None, where="", prompt=True)
            told, _ = self._text(chat, None, where="")
            going_on, _ = self._text([*chat, chat[0]], None, where="")
        except RowError:  # it wants other chats
            return ""
        begins, ends = (text.rpartition(turn)[2] for text, turn in ((asked, QUESTION), (told, ANSWER)))
        if not self._marks and begins and begins == ends and not going_on.startswith(told):
            raise ConfigError(
                f"chat template {self.name}: begins a turn of the assistant at the end of every chat, asked to or not, "
                "so the model would learn to write it; put it under {% if add_generation_prompt %} in a copy of it, "
                "and name that with data.chat_template"
            )
        found = self._control.match(ends.lstrip()) if self._control else None
        return found[1] if found else ""

    def _text(
        self, messages: list[Message], tools: Any, *, where: str, prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the text of a chat, and begin and end of each part that the template marks."""
        try:
            text = self._template.render(
                **self._named, messages=messages, tools=tools, documents=None, add_generation_prompt=prompt
            )
        # A template may do anything with messages of an unexpected form.
        except Exception as error:
            reason = f"{' '.join(str(error).split()):.200}" or type(error).__name__
            raise RowError(
                f"{where}: the chat template {self.name} rejects the chat ({reason}); correct the row, or {SKIP}"
            ) from error
        spans, kept, length = [], [], 0
        for part in re.split(f"([{BEGIN}{END}])", text):
            if part == BEGIN:
                begin = length
            elif part == END:
                spans.append((begin, length))
            else:
                kept.append(part)
                length += len(part)
        return "".join(kept), spans

    def _broken(self, value: Any) -> Any:
        """Return a value with a mark in every control token that its texts spell."""
        if isinstance(value, str):
            places = [0, *breaks(value, self._control), len(value)]
            return BREAK.join(value[a:b] for a, b in itertools.pairwise(places))
        if isinstance(value, dict):
            return {self._broken(key): self._broken(entry) for key, entry in value.items()}
        return [self._broken(entry) for entry in value] if isinstance(value, list) else value


def control_pattern(tokens: Iterable[str]) -> re.Pattern[str] | None:
    """Return a pattern that matches, without length, before each control token; None if there are none."""
    # A token of one character cannot be divided.
    known = sorted((token for token in tokens if len(token) > 1), key=len, reverse=True)
    return re.compile(f"(?=({'|'.join(map(re.escape, known))}))") if known else None


def breaks(text: str, control: re.Pattern[str] | None) -> list[int]:
    """Return where to divide a text so that no part spells a control token."""
    return [found.start() + 1 for found in control.finditer(text)] if control else []


def without_control_tokens(run: Run, control: re.Pattern[str] | None) -> list[Run]:
    """Return a run as several, none of which spells a control token."""
    return _divided(run, breaks("".join(text for text, _ in run), control))


def _runs(text: str, spans: list[tuple[int, int]]) -> list[Run]:
    """Return a text with marks as runs, with weight 1 within the spans."""
    run: Run = []
    place = 0
    for begin, end in spans:
        run += [(text[place:begin], 0.0), (text[begin:end], 1.0)]
        place = end
    run.append((text[place:], 0.0))
    places, length = [], 0
    for part in text.split(BREAK)[:-1]:
        length += len(part)
        places.append(length)
    return _divided([(part.replace(BREAK, ""), weight) for part, weight in run], places)


def _divided(run: Run, places: Sequence[int]) -> list[Run]:
    """Return a run divided at places in its text, without empty parts."""
    runs: list[Run] = [[]]
    begin, left = 0, [*places]
    for text, weight in run:
        end = begin + len(text)
        while left and left[0] < end:
            cut = left.pop(0)
            runs[-1].append((text[: cut - begin], weight))
            text, begin = text[cut - begin :], cut
            runs.append([])
        runs[-1].append((text, weight))
        begin = end
    return [kept for each in runs if (kept := [(text, weight) for text, weight in each if text])]
