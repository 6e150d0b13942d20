"""Completion of many prompts, from JSON lines to JSON lines. An interrupted batch continues where it stopped."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fam_jax.config import UserError
from fam_jax.generation.text import Completion, TextModel, TextState

# Fields of a line, in the order in which they are read.
TEXTS = ("prompt", "question")


def complete_lines(
    model: TextModel,
    source: Path,
    out: Path,
    complete: Callable[[TextState], Completion],
    *,
    state: TextState | None = None,
    on_line: Callable[[int, int], None] | None = None,
) -> tuple[int, int]:
    """Complete every line of `source`, an object with "prompt_file", "prompt" or "question", read in this order.

    Each result is appended to `out` as soon as it is complete: {"line", "input", "text", "tokens", "tokens_read",
    "ended_by"}, or {"line", "input", "error"} for a line that cannot be completed. Such a line does not affect the
    others. Results that `out` already holds are kept.

    Args:
      model: reads the texts.
      source: file of JSON lines.
      out: file of JSON lines to create or continue.
      complete: generates from the state after a line's texts.
      state: state that every line continues; None: every line starts a new stream.
      on_line: called with the number of lines done and the number of all lines.

    Returns:
      The number of lines, and how many of them have an error in `out`.

    Raises:
      UserError: `source` cannot be read, or `out` cannot be written or holds the results of other lines.
    """
    try:
        lines = source.read_text("utf-8").removesuffix("\n").split("\n")
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror}); give a file of JSON lines") from error
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
            raise UserError(f"has none of prompt_file, {', '.join(TEXTS)}; give at least one")
        if not all(isinstance(text, str) for text in (*texts, given.get("prompt_file", ""))):
            raise UserError("prompt_file, prompt and question must be strings")
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
    counts = {"tokens": found.tokens, "tokens_read": before}
    return {"input": given, "text": found.text, **counts, "ended_by": found.ended_by}


def open_text(path: str) -> io.BufferedReader:
    """Open a file of text.

    Raises:
      UserError: the file cannot be opened.
    """
    try:
        return Path(path).open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a file of UTF-8 text") from error


def _done(out: Path, lines: list[str]) -> list[dict[str, Any]]:
    """Return the results that `out` holds, and remove an incomplete last line, which a killed process leaves."""
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
        raise UserError(f"{out}: does not hold results of these lines; give another --out")
    if len(whole) < len(content):
        with out.open("rb+") as file:
            file.truncate(len(whole))
    return records


def _parse(line: str) -> Any:
    """Return the value of a line of JSON, or the line itself if it is not JSON."""
    try:
        return json.loads(line)
    except ValueError:
        return line
