"""Rows of files: the same from every format, by number, and errors that name the row."""

import gzip
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from fam_jax.config import ConfigError
from fam_jax.data.records import Records, Row, RowError, is_rows, read_rows

FIELD = "config.data.train_files"
ROWS: list[dict[str, Any]] = [
    {"inputs": "Grün 😀 漢字?", "targets": "ja\nnein", "n": 1},
    {"inputs": "", "targets": "\u2028 \x85 \r", "n": None},
    {"inputs": "x" * 300, "targets": "y", "n": 3},
]
Files = list[epath.Path]


def lines(rows: list[dict[str, Any]], **options: Any) -> bytes:
    return "".join(json.dumps(row, **options) + "\n" for row in rows).encode()


def write(folder: pathlib.Path, rows: list[dict[str, Any]] = ROWS) -> dict[str, epath.Path]:
    """Write rows in every format; return the files by name."""
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet", row_group_size=2)
    contents = {
        "a.jsonl": lines(rows, ensure_ascii=False),
        "bom.jsonl": b"\xef\xbb\xbf" + lines(rows),
        "crlf.ndjson": b"\r\n" + lines(rows).replace(b"\n", b"\r\n\r\n"),
        "no_end.JSONL": lines(rows)[:-1],
        "array.json": json.dumps(rows, indent=1).encode(),
        "bom.json": b"\xef\xbb\xbf" + json.dumps(rows, ensure_ascii=False).encode(),
        "lines.json": lines(rows),
        "a.parquet": (folder / "a.parquet").read_bytes(),
    }
    contents |= {f"{name}.gz": gzip.compress(content) for name, content in contents.items()}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return {name: epath.Path(folder / name) for name in contents}


def test_every_format_holds_the_same_rows(tmp_path: pathlib.Path) -> None:
    files = write(tmp_path)
    assert all(map(is_rows, files))
    found = {name: Records([path], FIELD) for name, path in files.items()}
    for path in files.values():
        path.unlink()  # what was read is kept
    assert len({records.fingerprint for records in found.values()}) == 1
    for records in found.values():
        assert len(records) == 3 and records.skipped == 0
        assert [records[i] for i in (2, 0, 1)] == [ROWS[2], ROWS[0], ROWS[1]]


@settings(max_examples=15, deadline=None)
@given(rows=st.lists(st.dictionaries(st.text("abc", min_size=1), st.text() | st.none()), max_size=5))
def test_any_rows_come_back(rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = epath.Path(tmp_path_factory.mktemp("rows") / "x.jsonl.gz")
    path.write_bytes(gzip.compress(lines(rows)))
    assert [row.value for row in read_rows(path, FIELD)] == rows


def test_rows_say_where_they_are(tmp_path: pathlib.Path) -> None:
    files = write(tmp_path)
    places = {
        "a.jsonl": "line 3", "crlf.ndjson.gz": "line 6", "array.json": "entry 3", "a.parquet": "row 3",
    }  # fmt: skip
    for name, place in places.items():
        *_, last = read_rows(files[name], FIELD)
        assert last.where == f"{FIELD}: {files[name]}: {place}"


def test_one_object_is_one_row_and_columns_can_be_chosen(tmp_path: pathlib.Path) -> None:
    (tmp_path / "one.json").write_text('{"a": [1, {"b": null}]}')
    assert [row.value for row in read_rows(epath.Path(tmp_path / "one.json"), FIELD)] == [
        {"a": [1, {"b": None}]}
    ]
    files = write(tmp_path)
    assert [row.value for row in read_rows(files["a.parquet"], FIELD, keys=["n", "z"])] == [
        {"n": 1}, {"n": None}, {"n": 3},
    ]  # fmt: skip


def test_a_row_may_become_several_values_or_none(tmp_path: pathlib.Path) -> None:
    def make(row: Row) -> Iterator[Any]:
        yield from [row.value["targets"]] * (row.value["n"] or 0)

    files = write(tmp_path)
    records = Records([files["a.jsonl"], files["a.parquet"]], FIELD, make)
    assert [records[i] for i in range(len(records))] == (["ja\nnein"] + ["y"] * 3) * 2
    other = Records([files["a.parquet"], files["a.jsonl"]], FIELD, make)
    assert other.fingerprint == records.fingerprint != Records([files["a.jsonl"]], FIELD, make).fingerprint


def broken(tmp_path: pathlib.Path) -> epath.Path:
    """Write a file with a good first line, then bad ones, of which the last is torn."""
    bad = [
        b"[1]",
        b"null",
        b'{"a": "\\ud800"}',
        b'{"a": ["\xff"]}',
        b"{'a': 1}",
        b"[" * 9999,
        b'{"a": "x", "b',
    ]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join([b'{"a": "good"}', *bad]))
    return epath.Path(tmp_path / "x.jsonl")


def test_a_bad_row_is_named(tmp_path: pathlib.Path) -> None:
    path, errors = broken(tmp_path), []
    assert len([*read_rows(path, FIELD, bad=errors.append)]) == 1
    says = [
        "expected an object, got list", "expected an object, got null", "a has half a surrogate pair, \\ud800,",
        "not UTF-8 at byte 8 (0xff)", "is not valid JSON", "is not valid JSON", "is not valid JSON",
    ]  # fmt: skip
    for number, (error, wanted) in enumerate(zip(errors, says, strict=True), 2):
        assert str(error).startswith(f"{FIELD}: {path}: line {number}: {wanted}")
        assert "data.skip_bad=true" in str(error) and "\n" not in str(error)
    with pytest.raises(ConfigError, match="line 2: expected an object, got list"):
        Records([path], FIELD)


def test_bad_rows_can_be_left_out_and_are_counted(tmp_path: pathlib.Path) -> None:
    def make(row: Row) -> list[Any]:
        if row.value.get("a") == "good":
            raise RowError(f"{row.where}: not that good")
        return [row.value]

    path = broken(tmp_path)
    records = Records([path], FIELD, skip_bad=True)
    assert (len(records), records.skipped, records[0]) == (1, 7, {"a": "good"})
    with pytest.raises(ConfigError, match="line 1: not that good; no row of 1 files can be used"):
        Records([path], FIELD, make, skip_bad=True)


def test_files_that_are_no_rows_are_rejected(tmp_path: pathlib.Path) -> None:
    parquet = write(tmp_path)["a.parquet"].read_bytes()
    contents = {
        "empty.jsonl": (b"", "there are no rows in 1 files, the first of which is"),
        "blank.json": (b" \n\n", "there are no rows in 1 files"),
        "none.json": (b"[]", "there are no rows in 1 files"),
        "x.csv": (b"a,b\n", ".csv files hold no rows that are read; convert it to JSON Lines"),
        "x.txt": (b"text", ".txt files hold no rows that are read"),
        "utf16.jsonl": (lines(ROWS).decode().encode("utf-16"), "is UTF-16, by its byte-order mark"),
        "plain.jsonl.gz": (lines(ROWS), "is damaged or not a gzip file"),
        "torn.jsonl.gz": (gzip.compress(lines(ROWS))[:-9], "is damaged or not a gzip file"),
        "torn.parquet": (parquet[:-9], "is damaged or not a Parquet file"),
        "torn.json": (json.dumps(ROWS).encode()[:-9], "line 1: is not valid JSON"),
    }
    for name, (content, says) in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError) as caught:
            Records([epath.Path(tmp_path / name)], FIELD)
        assert str(caught.value).startswith(f"{FIELD}: ") and says in str(caught.value), name
    with pytest.raises(ConfigError, match=r"gone\.jsonl: cannot be read"):
        Records([epath.Path(tmp_path / "gone.jsonl")], FIELD)
