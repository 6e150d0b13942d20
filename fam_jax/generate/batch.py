"""Completions of many prompts, JSON lines to JSON lines; taken up again where it was stopped."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fam_jax.config import UserError
from fam_jax.generate.text import Completion, TextModel, TextState

TEXTS = ("prompt", "question")  # fields of a line, in the order in which they are read


def complete_lines(
    model: TextModel,
    source: Path,
    out: Path,
    complete: Callable[[TextState], Completion],
    *,
    state: TextState | None = None,
    on_line: Callable[[int, int], None] | None = None,
) -> tuple[int, int]:
    """Completes every line of `source`, an object with "prompt_file", "prompt" or "question", read in this order.

    Each gets a line of `out` as soon as it is done: {"line", "input", "text", "tokens", "tokens_read", "ended_by"}, or
    {"line", "input", "error"} if it cannot be done; the others are not affected. Lines that `out` has already are left
    as they are.

    Args:
      model: that reads.
      source: file of JSON lines.
      out: file of JSON lines, made or continued.
      complete: generates from the state after a line's texts.
      state: that every line continues; None: each begins a stream.
      on_line: called with the number of lines done, and of all.

    Returns:
      How many lines there are, and how many of them have an error in `out`.

    Raises:
      UserError: `source` cannot be read; `out` cannot be written, or holds results of other lines.
    """
    try:
        lines = source.read_text("utf-8").removesuffix("\n").split("\n")
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: is not valid UTF-8 at byte {error.start}; convert it to UTF-8") from error
    done = _done(out, lines)
    failed = sum("error" in record for record in done)
    try:
        with out.open("a", encoding="utf-8") as file:
            for number, line in enumerate(lines[len(done) :], len(done) + 1):
                record = {"line": number, **_complete_line(model, line, complete, state)}
                failed += "error" in record
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                file.flush()
                if on_line is not None:
                    on_line(number, len(lines))
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); give another --out") from error
    return len(lines), failed


def _complete_line(
    model: TextModel, line: str, complete: Callable[[TextState], Completion], state: TextState | None
) -> dict[str, Any]:
    given = _parse(line)
    try:
        if not isinstance(given, dict):
            raise UserError("expected a JSON object with prompt, prompt_file or question")
        texts = [given[name] for name in TEXTS if name in given]
        if "prompt_file" not in given and not texts:
            raise UserError(f"has none of prompt_file, {', '.join(TEXTS)}")
        if not all(isinstance(text, str) for text in (*texts, given.get("prompt_file", ""))):
            raise UserError("prompt_file, prompt and question must be text")
        if "prompt_file" in given:
            with open_text(given["prompt_file"]) as file:
                state = model.read(file, state)
        for text in texts:
            state = model.read(text, state)
        assert state is not None
        before = state.tokens_read
        found = complete(state)
    except UserError as error:
        return {"input": given, "error": str(error)}
    return {
        "input": given, "text": found.text, "tokens": found.tokens, "tokens_read": before, "ended_by": found.ended_by,
    }  # fmt: skip


def open_text(path: str) -> io.BufferedReader:
    """A file to be read as text.

    Raises:
      UserError: it cannot be opened.
    """
    try:
        return Path(path).open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a file of UTF-8 text") from error


def _done(out: Path, lines: list[str]) -> list[dict[str, Any]]:
    """The results that `out` holds; what a killed process left of a last line is cut off."""
    if not out.exists():
        return []
    try:
        content = out.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        records = [json.loads(line) for line in whole.splitlines()]
        same = len(records) <= len(lines) and all(
            record["line"] == number and record["input"] == _parse(line)
            for number, (record, line) in enumerate(zip(records, lines, strict=False), 1)
        )
    except OSError as error:
        raise UserError(f"{out}: cannot be read ({error.strerror}); give another --out") from error
    except (ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise UserError(f"{out}: holds something other than results of these lines; give another --out")
    if len(whole) < len(content):
        with out.open("rb+") as file:
            file.truncate(len(whole))
    return records


def _parse(line: str) -> Any:
    """The value of a line; the line itself if it is no JSON."""
    try:
        return json.loads(line)
    except ValueError:
        return line
