"""The file OUT.items.jsonl: what a model answered, item by item, so that a killed evaluation goes on where it stopped.

The first line, the head, says what the answers depend on. Every other line is the answer to an item of a task.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fam_jax.config import UserError
from fam_jax.config.strict_json import dump_json, parse_json
from fam_jax.evaluation.item import Answered, Item, Likelihood

# Named in a message about another head, but not a reason to refuse: a run may be moved.
INFORMATION = ("checkpoint",)


class Journal:
    """The answers of an evaluation in a file. Each is on disk as soon as :meth:`add` returns."""

    def __init__(self, path: Path | None, head: Mapping[str, Any], *, fresh: bool = False):
        """Open or create a journal, and cut off a torn last line, which a killed process leaves.

        Args:
          path: of the file; None: keep the answers in memory, in processes that write nothing.
          head: what the answers depend on, as JSON values.
          fresh: whether to begin again if there is a journal.

        Raises:
          UserError: the file cannot be written, is no journal, or has another head; the message says what differs.
        """
        self._path, self._lines = path, dict[tuple[str, str], dict[str, Any]]()
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            content = b"" if fresh or not path.exists() else path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if whole:
                self._load(whole, head)
            if len(whole) < len(content) or not whole:
                path.write_bytes(whole)
            if not whole:
                self._append([{"head": head}])
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}); give another --out") from error

    def _load(self, content: bytes, head: Mapping[str, Any]) -> None:
        wrong = UserError(f"{self._path}: is not a journal of answers; remove it, or give another --out")
        try:
            first, *others = (parse_json(line) for line in content.decode().split("\n")[:-1])
            before = first["head"]
            self._lines = {(line["task"], line["id"]): line for line in others}
        except (ValueError, KeyError, TypeError) as error:
            raise wrong from error
        if not isinstance(before, dict):
            raise wrong
        now = json.loads(dump_json(head))
        changes = _differences(before, now)
        if {name.partition(".")[0] for name in changes} - {*INFORMATION}:
            told = "; ".join(f"{name} was {old}, is {new}" for name, (old, new) in changes.items())
            raise UserError(
                f"{self._path}: holds answers of another evaluation ({told:.600}); set it back, give another --out, or "
                "begin again with --fresh"
            )

    def _append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        assert self._path is not None
        with self._path.open("a", encoding="utf-8", newline="") as file:
            file.write("".join(f"{dump_json(line, ensure_ascii=False)}\n" for line in lines))

    def add(self, task: str, answers: Iterable[Answered]) -> None:
        """Write answers.

        Raises:
          UserError: the file cannot be written.
        """
        self._put([{"task": task, "id": each.item.id, **_record(each)} for each in answers])

    def add_result(self, task: str, result: Mapping[str, Any]) -> None:
        """Write the result of a task that has no items."""
        self._put([{"task": task, "id": "", "result": result}])

    def _put(self, lines: list[dict[str, Any]]) -> None:
        self._lines |= {(line["task"], line["id"]): line for line in lines}
        if self._path is not None and lines:
            try:
                self._append(lines)
            except OSError as error:
                raise UserError(
                    f"{self._path}: cannot be written ({error.strerror}); give another --out"
                ) from error

    def lines(self) -> list[dict[str, Any]]:
        """Return all lines behind the head, as JSON values."""
        return [*self._lines.values()]

    @classmethod
    def of(cls, lines: Iterable[dict[str, Any]]) -> "Journal":
        """Return a journal that keeps its answers in memory and begins with lines of another one."""
        journal = cls(None, {})
        journal._put([*lines])
        return journal

    def find(self, task: str, item: Item) -> Answered | None:
        """Return the answer to an item, if there is one."""
        line = self._lines.get((task, item.id))
        return None if line is None else _answered(item, line)

    def find_result(self, task: str) -> dict[str, Any] | None:
        """Return the result of a task that has no items, if there is one."""
        line = self._lines.get((task, ""))
        return None if line is None else line["result"]


def _record(answered: Answered) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if answered.likelihoods:
        found["likelihoods"] = [[*each] for each in answered.likelihoods]
    else:
        found |= {"text": answered.text, "ended_by": answered.ended_by}
    for name in ("tokens_read", "tokens_expected", "tokens_generated"):
        found[name] = getattr(answered, name)
    return found | {"facts": dict(answered.item.facts)}


def _answered(item: Item, line: Mapping[str, Any]) -> Answered:
    # null is how JSON has the log probability of the impossible.
    likelihoods = tuple(
        Likelihood(float("-inf") if total is None else total, *others)
        for total, *others in line.get("likelihoods", ())
    )
    counts = {name: line[name] for name in ("tokens_read", "tokens_expected", "tokens_generated")}
    return Answered(item, likelihoods, line.get("text", ""), line.get("ended_by", ""), **counts)


def _differences(before: Any, now: Any, path: str = "") -> dict[str, tuple[str, str]]:
    """Return what differs between two JSON values, by the names on the way to it."""
    if isinstance(before, dict) and isinstance(now, dict):
        found: dict[str, tuple[str, str]] = {}
        for name in sorted({*before, *now}):
            found |= _differences(before.get(name), now.get(name), f"{path}.{name}" if path else name)
        return found
    return {} if before == now else {path: (dump_json(before), dump_json(now))}
