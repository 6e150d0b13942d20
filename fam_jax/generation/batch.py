"""Completion of many prompts, from JSON lines to JSON lines. An interrupted batch continues where it stopped."""

import codecs
import contextlib
import dataclasses
import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from fam_jax.checkpoint.lock import WriterLock
from fam_jax.checkpoint.new_file import output_file
from fam_jax.config import UserError
from fam_jax.config.strict_json import dump_json, finite, parse_json
from fam_jax.data.text_files import BEGINNING, check_encoding
from fam_jax.generation.endings import TextWriter
from fam_jax.generation.rows import Rows, RowTokens
from fam_jax.generation.sampling import GREEDY, Sampling, check_seed
from fam_jax.generation.streaming import NotFiniteError
from fam_jax.generation.text import TextModel, TextState
from fam_jax.generation.turn import Turn

# Fields of a line, in the order in which they are read.
TEXTS = ("prompt", "question")
# Named in a message about other settings, but not a reason for it: a run may be moved.
INFORMATION = ("checkpoint",)

# Products with few rows are rounded otherwise than those with many. In float32 one more row, which stays empty, makes a
# line's text alone that among others. In narrower types, up to this many streams run the same program. On a TPU, rows
# up to a tile's height cost no more time than one.
LEAST_ROWS = 2
LEAST_NARROW_ROWS = 8
# A line that is nested deeper is not taken for JSON: how deep Python can go depends on where it is.
LEVELS = 50

NO_TURN = Turn()
Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class HowToComplete:
    """What decides how a text is completed.

    Raises:
      UserError: the seed is out of range.
    """

    max_tokens: int
    sampling: Sampling = GREEDY
    # Line n is sampled with `fold_in(key(seed), n)`.
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_seed(self.seed)


@dataclasses.dataclass(frozen=True)
class BatchProgress:
    """How far a call of :meth:`Batch.complete` is; results of earlier calls do not count."""

    # Lines completed, and lines to complete.
    done: int
    lines: int
    # Tokens generated.
    tokens: int


class Batch:
    """The lines of a file, and the file of their results.

    A line is a JSON object with "prompt_file", "prompt" or "question", read in this order. Its result is {"line",
    "input", "text", "tokens", "tokens_read", "ended_by"}, or {"line", "input", "error"} if it cannot be completed. Such
    a line does not affect the others. Results are in the order of the lines; each is written as soon as those before it
    are.
    """

    def __init__(self, source: Path, out: Path, settings: Mapping[str, Any]):
        """Read the lines, and the results that an earlier call left.

        Args:
          source: file of JSON lines.
          out: file of JSON lines to create or continue.
          settings: what the results depend on, by name. They are stored in `out`.settings.json.

        Raises:
          UserError: `source` cannot be read, is empty or UTF-16; `out` cannot be written, or holds results of other
            lines or settings.
        """
        try:
            content = source.read_bytes().removeprefix(codecs.BOM_UTF8)
        except OSError as error:
            raise UserError(
                f"{source}: cannot be read ({error.strerror}); give a file of JSON lines"
            ) from error
        check_encoding(content[:BEGINNING], str(source))
        if not content:
            raise UserError(f"{source}: is empty; give a file of JSON lines")
        if out.exists() and out.samefile(source):
            raise UserError(f"{out}: holds the lines to complete; give another --out")
        self._lines = content.removesuffix(b"\n").split(b"\n")
        self._results = _Results(out, self._lines, settings)

    def complete(
        self,
        model: TextModel,
        how: HowToComplete,
        *,
        state: TextState | None = None,
        turn: Turn = NO_TURN,
        streams: int = 1,
        chunk_blocks: int = 16,
        on_progress: Callable[[BatchProgress], None] | None = None,
    ) -> tuple[int, int]:
        """Complete the lines that have no result yet, or an error.

        A result depends on its line, its place and `how`. It does not depend on the other lines, nor on `streams` up to
        8. Programs for more rows may add numbers in another order, and rounding may then change a text.

        Args:
          model: reads and writes the texts.
          how: how each text is completed.
          state: state that every line continues; None: every line starts a new stream.
          turn: what stands around the texts of a line: `before` unless it continues a state, and `after`.
          streams: lines that generate together.
          chunk_blocks: blocks to read at once.
          on_progress: called when lines are done or tokens generated.

        Returns:
          The number of lines, and how many of them have an error.

        Raises:
          UserError: the results cannot be written, or another process writes them.
        """
        results, done, tokens = self._results, 0, 0

        def read(line: Mapping[str, Any]) -> TextState:
            return _read_line(model, line, state, turn, chunk_blocks)

        pending = results.pending()
        if not pending:
            return len(self._lines), 0
        lines = ((number, self._lines[number - 1]) for number in pending)
        # Not the pending lines: a batch that continues runs the program that it began with.
        count = max(least_rows(model.config.model.dtype), min(streams, len(self._lines)))
        with results.alone():
            for event in _completions(model, lines, how, count, read):
                if isinstance(event, int):
                    tokens += event
                else:
                    results.put(event)
                    done += 1
                if on_progress is not None:
                    on_progress(BatchProgress(done, len(pending), tokens))
        return len(self._lines), results.failed


def least_rows(dtype: str) -> int:
    """Return the number of rows that generate together at least, for activations of a dtype."""
    return LEAST_ROWS if jnp.finfo(dtype).bits >= 32 else LEAST_NARROW_ROWS


@dataclasses.dataclass
class _Stream:
    """A line that generates."""

    number: int
    given: Any
    tokens_read: int
    writer: TextWriter
    tokens: int = 0

    def add(self, new: RowTokens) -> Record | None:
        """Add tokens; return the result if the text has ended."""
        self.tokens += self.writer.add(new.tokens, stopped=new.stopped)
        head = {"line": self.number, "input": self.given}
        if self.writer.ended_by is None and not new.complete:
            if new.finite:
                return None
            return {**head, "error": NotFiniteError.reason(self.tokens_read + self.tokens)}
        text = self.writer.finish()
        counts = {"tokens": self.tokens, "tokens_read": self.tokens_read}
        return {**head, "text": text, **counts, "ended_by": self.writer.ended_by}


def _completions(
    model: TextModel,
    lines: Iterator[tuple[int, bytes]],
    how: HowToComplete,
    count: int,
    read: Callable[[Mapping[str, Any]], TextState],
) -> Iterator[Record | int]:
    """Yield the result of each line when it is complete, and after each call the number of tokens that it generated.

    The other rows wait while a prompt is read. That costs no time: reading alone keeps the device busy.
    """
    endings, key = model.endings(how.stop), jax.random.key(how.seed)
    rows = Rows(
        model.streamer,
        count,
        max_tokens=how.max_tokens,
        sampling=how.sampling,
        stop_tokens=endings.tokens,
    )
    running: dict[int, _Stream] = {}
    while True:
        for row in rows.free:
            for number, line in lines:
                given, problem = _parse(line)
                try:
                    if problem:
                        raise UserError(problem)
                    state = read(given)
                except UserError as error:
                    yield {"line": number, "input": given, "error": str(error)}
                    continue
                assert state.logits is not None
                rows.fill(row, state.streams, state.logits, jax.random.fold_in(key, number))
                writer = TextWriter(model.vocabulary.decode, endings)
                running[row] = _Stream(number, given, state.tokens_read, writer)
                break
        if not running:
            return
        generated = rows.generate()
        yield sum(len(new.tokens) for new in generated)
        for new in generated:
            record = running[new.row].add(new)
            if record is not None:
                yield record
                rows.release(new.row)
                del running[new.row]


def _read_line(
    model: TextModel, line: Mapping[str, Any], state: TextState | None, turn: Turn, chunk_blocks: int
) -> TextState:
    texts = [line[name] for name in TEXTS if name in line]
    if "prompt_file" not in line and not texts:
        raise UserError(f"has none of prompt_file, {', '.join(TEXTS)}; give at least one")
    if not all(isinstance(text, str) for text in (*texts, line.get("prompt_file", ""))):
        raise UserError("prompt_file, prompt and question must be strings")
    with contextlib.ExitStack() as stack:
        if "prompt_file" in line:
            texts.insert(0, stack.enter_context(open_text(line["prompt_file"])))
        for left, text in zip(reversed(range(len(texts))), texts, strict=True):
            before, after = (turn.before if state is None else ""), ("" if left else turn.after)
            state = model.read(text, state, before=before, after=after, chunk_blocks=chunk_blocks)
    assert state is not None
    return state


def open_text(path: str) -> io.BufferedReader:
    """Open a file of text.

    Raises:
      UserError: the file cannot be opened.
    """
    try:
        return Path(path).open("rb")
    except (OSError, ValueError) as error:  # ValueError: no file can have such a name
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path}: cannot be read ({reason}); give a file of UTF-8 text") from error


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn an OSError into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); give another --out") from error


def _parse(line: bytes) -> tuple[Any, str]:
    """Return what a line holds, as it comes back from the file of results, and what is wrong with it, if anything."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        return line.decode(errors="backslashreplace"), f"is not valid UTF-8 at byte {error.start}"
    try:
        value = parse_json(text)
        value = text if _is_deeper(value, LEVELS) else finite(value)
    except ValueError:
        value = text
    if not isinstance(value, dict):
        return value, "expected a JSON object with prompt, prompt_file or question"
    return value, ""


def _is_deeper(value: Any, levels: int) -> bool:
    """Return whether a value of JSON is nested more than `levels` deep."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return parts is not None and (levels == 0 or any(_is_deeper(part, levels - 1) for part in parts))


class _Results:
    """The file of results, in the order of the lines, and the file that says with which settings they were made."""

    def __init__(self, out: Path, lines: list[bytes], settings: Mapping[str, Any]):
        self._out, self._count = out, len(lines)
        self._settings_file = out.with_name(f"{out.name}.settings.json")
        # Results in the file, by place, and those that wait for the result of a line before them, by line.
        self._written: list[str] = []
        self._waiting: dict[int, str] = {}
        self._failed: set[int] = set()
        if out.exists() and out.stat().st_size:
            self._check_settings(settings)
            self._load(lines)
        else:
            self._replace(self._settings_file, dump_json(settings, indent=1) + "\n")

    @property
    def failed(self) -> int:
        """Return the number of lines with an error."""
        return len(self._failed)

    def pending(self) -> list[int]:
        """Return the lines to complete: those with an error first, then those without a result."""
        return [*sorted(self._failed), *range(len(self._written) + 1, self._count + 1)]

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes from writing to the file while the block runs.

        Raises:
          UserError: another process is writing to it, or has written since it was read.
        """
        with contextlib.ExitStack() as stack:
            with _writing(self._out):
                stack.enter_context(WriterLock(epath.Path(self._out.parent), self._out.name))
                found = self._out.read_bytes() if self._out.exists() else b""
            if found != "".join(self._written).encode():
                raise UserError(
                    f"{self._out}: another process has written to it; run the same command again to continue"
                )
            yield

    def put(self, record: Record) -> None:
        """Write the result of a line."""
        number, text = record["line"], dump_json(record, ensure_ascii=False) + "\n"
        (self._failed.add if "error" in record else self._failed.discard)(number)
        if number <= len(self._written):
            if text != self._written[number - 1]:
                self._written[number - 1] = text
                self._replace(self._out, "".join(self._written))
            return
        self._waiting[number] = text
        ready: list[str] = []
        while (following := len(self._written) + len(ready) + 1) in self._waiting:
            ready.append(self._waiting.pop(following))
        if ready:
            self._written += ready
            with _writing(self._out), self._out.open("a", encoding="utf-8", newline="") as file:
                file.write("".join(ready))

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        try:
            before = parse_json(self._settings_file.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self._settings_file}: cannot be read, so the settings of {self._out} are unknown; give another --out"
            ) from error
        now = json.loads(dump_json(settings))
        before = before if isinstance(before, dict) else {}
        differing = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
        if {*differing} - {*INFORMATION}:
            changes = (
                f"{name} was {dump_json(before.get(name))}, is {dump_json(now.get(name))}"
                for name in differing
            )
            raise UserError(
                f"{self._out}: was made with other settings ({'; '.join(changes)}); set them back, or give another "
                "--out"
            )

    def _load(self, lines: list[bytes]) -> None:
        """Read the results, and remove an incomplete last line, which a killed process leaves."""
        with _writing(self._out):
            content = self._out.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        try:
            self._written = [f"{line}\n" for line in whole.decode().split("\n")[:-1]]
            records = [parse_json(text) for text in self._written]
            same = len(records) <= len(lines) and all(
                record["line"] == number
                and record["input"] == _parse(line)[0]
                and ("error" in record or "text" in record)
                for number, (record, line) in enumerate(zip(records, lines, strict=False), 1)
            )
        except (ValueError, KeyError, TypeError):
            same = False
        if not same:
            raise UserError(f"{self._out}: does not hold results of these lines; give another --out")
        self._failed = {record["line"] for record in records if "error" in record}
        if len(whole) < len(content):
            with _writing(self._out), self._out.open("rb+") as file:
                file.truncate(len(whole))

    def _replace(self, path: Path, text: str) -> None:
        """Write a file that appears when it is complete."""
        with output_file(path) as file:
            file.write(text.encode())
