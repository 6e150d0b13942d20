"""No JSON of ours holds NaN: one function writes it, with null for numbers that are not finite."""

import ast
import json
import math
import pathlib
from typing import Any

import numpy as np
import pytest
from etils import epath

from fam_jax.config.strict_json import dump_json, parse_json
from fam_jax.evaluation.record import Evaluation, read_evaluation
from fam_jax.training.metrics import MetricsWriter

ROOT = pathlib.Path(__file__).resolve().parents[1]
WRITER = "fam_jax/config/strict_json.py"
# Writes configs, which hold finite numbers only, and digests.
CHECKPOINT = "fam_jax/checkpoint"
NAN, INF = math.nan, math.inf
VALUE = {
    "a": NAN,
    "b": [1.5, (INF, {"c": -INF})],
    "d": np.float64(NAN),
    "e": 3,
    "f": "NaN",
    "g": None,
    "h": True,
}
NULLED = {"a": None, "b": [1.5, [None, {"c": None}]], "d": None, "e": 3, "f": "NaN", "g": None, "h": True}


def strict(text: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize(
    "how", [{}, {"indent": 1}, {"sort_keys": True}, {"ensure_ascii": False}, {"default": str}], ids=str
)
def test_numbers_that_are_not_finite_are_null(how: dict[str, Any]) -> None:
    assert strict(dump_json(VALUE, **how)) == NULLED
    assert dump_json({"b": "é", "a": [0.1, 1e300]}, **how) == json.dumps({"b": "é", "a": [0.1, 1e300]}, **how)


def test_half_a_surrogate_pair_can_be_written() -> None:
    text = dump_json({"é": "\ud83d"}, ensure_ascii=False)
    assert strict(text.encode().decode()) == {"é": "\ud83d"}


def calls_of_json(path: pathlib.Path) -> list[int]:
    """Return the lines that call json.dump or json.dumps, but not within json.loads, which copies a value."""
    tree = ast.parse(path.read_text())

    def calls(node: ast.AST, *names: str) -> bool:
        return isinstance(node, ast.Call) and ast.unparse(node.func) in names

    copies = {node.args[0] for node in ast.walk(tree) if calls(node, "json.loads") and node.args}  # type: ignore[attr-defined]
    return [
        node.lineno  # type: ignore[attr-defined]
        for node in ast.walk(tree)
        if calls(node, "json.dump", "json.dumps", "dumps", "json.JSONEncoder") and node not in copies
    ]


def test_json_is_written_by_one_function() -> None:
    paths = [
        path
        for part in ("fam_jax", "launch", "benchmarks", "examples")
        for path in (ROOT / part).rglob("*.py")
    ]
    names = {str(path.relative_to(ROOT)): path for path in paths}
    found = {name: calls_of_json(path) for name, path in names.items() if not name.startswith(CHECKPOINT)}
    assert [name for name, lines in found.items() if lines] == [WRITER]
    assert len(found) > 100


def test_json_of_others() -> None:
    assert parse_json(b'\xef\xbb\xbf{"a": "\xc3\xa9"}') == {"a": "é"}
    for content in (b"", b"{", b"\xff", '{"a": 1}'.encode("utf-16"), b"[" * 100_000, b'{"a":' * 100_000):
        with pytest.raises(ValueError, match=r"\S"):
            parse_json(content)


def test_records_of_evaluations(tmp_path: pathlib.Path) -> None:
    record = Evaluation(
        "passkey", 3, "python", {}, {}, "1 x cpu", {"exact_match": NAN}, {"loss": INF},
        {"groups": {}, "by_position": [0.5, NAN]}, str(tmp_path / "passkey.json"),
    )  # fmt: skip
    record.write()
    found = strict((tmp_path / "passkey.json").read_text())
    assert (found["metrics"], found["scalars"]) == ({"exact_match": None}, {"loss": None})
    assert found["details"]["by_position"] == [0.5, None]
    assert read_evaluation(tmp_path / "passkey.json").step == 3


def test_metrics(tmp_path: pathlib.Path) -> None:
    with MetricsWriter(epath.Path(tmp_path), resume_step=0) as writer:
        writer.write(1, {"loss": NAN, "lists": [INF, 1.0], "heldout": {"loss": -INF}})
    assert strict((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 1, "loss": None, "lists": [None, 1.0], "heldout": {"loss": None},
    }  # fmt: skip
