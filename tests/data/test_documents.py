"""Find files, and read them as documents; an unreadable file is reported before training."""

import gzip
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

from fam_jax.config import ConfigError, UserError
from fam_jax.config.overrides import parse_value
from fam_jax.data.documents import Documents, check_apart, find_files

FIELD = "config.data.train_files"


@pytest.fixture
def corpus(tmp_path: pathlib.Path) -> pathlib.Path:
    """Make folders with files, not all of which have the usual ending or a text."""
    for name, text in {
        "a.txt": "alpha\n",
        "b.md": "beta",
        "empty.txt": "",
        "deep/er/c.txt": "gämma 😀",
        "other/d.txt": "delta",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def names(corpus: pathlib.Path, *entries: str, suffixes: tuple[str, ...] = (".txt",)) -> list[str]:
    found = find_files([str(corpus / entry) for entry in entries], suffixes, FIELD)
    return [str(path.relative_to(corpus)) for path in found]


def test_files_folders_and_patterns(corpus: pathlib.Path) -> None:
    everything = ["a.txt", "deep/er/c.txt", "empty.txt", "other/d.txt"]
    assert names(corpus, "") == everything
    assert names(corpus, "", suffixes=(".md", ".txt")) == sorted([*everything, "b.md"])
    assert names(corpus, "b.md") == ["b.md"], "suffixes are for folders"
    assert names(corpus, "*.txt") == ["a.txt", "empty.txt"]
    assert names(corpus, "*/d.txt", "deep") == ["deep/er/c.txt", "other/d.txt"]
    assert names(corpus, "other", "a.txt", "*.txt", "a.txt") == ["a.txt", "empty.txt", "other/d.txt"]


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("missing", "missing: no such file or folder"),
        ("deep/*.txt", "no file matches"),
        ("**/c.txt", "** is not supported; name the folder"),
        ("other", "has no files that end in .md; set config.data.file_suffixes"),
    ],
)
def test_entries_that_name_no_file(corpus: pathlib.Path, entry: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        names(corpus, entry, suffixes=(".md",))
    assert str(caught.value).startswith(f"{FIELD}: ") and says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["exp [v1]", "a*b", "w?", "{x,y}", "**", "a, b", "[ab]", "(1, 2)"])
def test_a_path_that_exists_is_never_a_pattern(tmp_path: pathlib.Path, name: str) -> None:
    """Neither as a folder, nor as a file, nor as the folder of a pattern."""
    for folder in (name, "exp v", "axb", "wx", "a"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "t.txt").write_text("text")
    (tmp_path / name / name).write_text("text")
    for entry, found in ((name, "t.txt"), (f"{name}/{name}", name), (f"{name}/t*.txt", "t.txt")):
        assert names(tmp_path, entry) == [f"{name}/{found}"]
        assert (
            parse_value(tuple[str, ...], f"{tmp_path}/{entry}", "x") == (f"{tmp_path}/{entry}",)
            or "*" in entry
        )


def test_each_file_counts_once_whatever_links_lead_to_it(tmp_path: pathlib.Path) -> None:
    books = tmp_path / "books"
    (books / "deep").mkdir(parents=True)
    (books / "deep" / "a.txt").write_text("text")
    for link, target in {"latest": ".", "up": "..", "deep/loop": "..", "b.txt": "deep/a.txt"}.items():
        (books / link).symlink_to(target)
    (tmp_path / "other").symlink_to("books")
    for entries in (["books"], ["other", "books"], ["books/*.txt", "other/deep/a.txt"], ["."]):
        found = find_files([str(tmp_path / entry) for entry in entries], (".txt",), FIELD)
        assert [os.path.realpath(path) for path in found] == [os.path.realpath(books / "deep" / "a.txt")]


def test_pipes_and_devices_are_refused(tmp_path: pathlib.Path) -> None:
    """Opening a pipe would wait for a writer for ever."""
    (tmp_path / "a.txt").write_text("text")
    os.mkfifo(tmp_path / "b.txt")
    for entry in (tmp_path, tmp_path / "b.txt", f"{tmp_path}/*.txt", "/dev/null"):
        with pytest.raises(ConfigError, match="is a pipe or a device, which cannot be read again"):
            find_files([str(entry)], (".txt",), FIELD)


def test_hidden_files_count_only_if_they_are_named(tmp_path: pathlib.Path) -> None:
    for name in ("a.txt", "._a.txt", ".ipynb_checkpoints/a.txt", "deep/.git/b.txt", ".texts/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert names(tmp_path, "") == ["a.txt"]
    assert names(tmp_path, "*.txt") == ["a.txt"]
    assert names(tmp_path, "de*/../*.txt") == ["deep/../a.txt"]
    assert names(tmp_path, "._a.txt", ".texts", ".t*/c.txt") == ["._a.txt", ".texts/c.txt"]


def test_endings_do_not_depend_on_case_or_blanks(tmp_path: pathlib.Path) -> None:
    for name in ("a.TXT", "b.txt", "c.Md", "d.md5"):
        (tmp_path / name).write_text(name)
    assert names(tmp_path, "") == ["a.TXT", "b.txt"]
    assert names(tmp_path, "", suffixes=(".TxT", " .MD")) == ["a.TXT", "b.txt", "c.Md"]


def test_a_folder_that_cannot_be_read_is_reported(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(type(find_files([__file__], (), FIELD)[0]), "iterdir", denied)
    with pytest.raises(ConfigError, match=r"cannot be read \(Permission denied\); check its permissions"):
        names(tmp_path, "")


def texts_of(path: pathlib.Path, content: bytes) -> list[str]:
    path.write_bytes(content)
    documents = read(path)
    return [documents[i] for i in range(len(documents))]


ROWS = ["one", "zwei\n\ufeffzwei", "", "三", "x" * 70_000]
LINES = "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in ROWS).encode()
BOM = "\ufeff".encode()
FORMATS = {
    "a.jsonl": LINES,
    "a.JSONL": LINES.replace(b"\n", b"\r\n\r\n"),
    "a.ndjson": BOM + LINES,
    "a.jsonlines": LINES.rstrip(b"\n"),
    "a.ldjson.gz": gzip.compress(LINES),
    "two_marks.jsonl": BOM + LINES.replace(b"\n", b"\n" + BOM, 1),
    "a.json": LINES,
    "array.json": BOM + json.dumps([{"text": text} for text in ROWS], indent=1).encode(),
    "a.jsonl.gz": gzip.compress(LINES),
    "a.NDJSON.GZ": gzip.compress(BOM + LINES),
    "array.json.gz": gzip.compress(json.dumps([{"text": text} for text in ROWS]).encode()),
}


@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_every_format_are_the_same_documents(tmp_path: pathlib.Path, name: str) -> None:
    assert texts_of(tmp_path / name, FORMATS[name]) == [text for text in ROWS if text]
    (tmp_path / "plain.jsonl").write_bytes(LINES)
    assert read(tmp_path / name).fingerprint == read(tmp_path / "plain.jsonl").fingerprint


def test_parquet_has_a_column_of_texts(tmp_path: pathlib.Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    many = [f"{text} {i}" for i in range(300) for text in ROWS[:2]]
    parquet.write_table(pyarrow.table({"id": range(600), "text": many}), tmp_path / "a.parquet")
    documents = read(tmp_path / "a.parquet")
    assert [documents[i] for i in range(len(documents))] == many
    assert documents[599] == many[599] and documents[0] == many[0]
    parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "null.parquet")
    assert 'row 2: expected an object with a text under "text", but "text" is null' in mistake(
        tmp_path / "null.parquet"
    )
    parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "other.parquet")
    assert "got body; write each document as" in mistake(tmp_path / "other.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    assert "is damaged or not a Parquet file" in mistake(tmp_path / "cut.parquet")


@pytest.mark.parametrize("text", ["one\nline", "\r\n windows\r\n", "a\ufeffb", "{}"])
@pytest.mark.parametrize("name", ["a.txt", "a.TXT", "a", "a.md", "a.py"])
def test_plain_text_is_one_document_without_a_leading_mark(
    tmp_path: pathlib.Path, name: str, text: str
) -> None:
    for content in (text.encode(), BOM + text.encode()):
        assert texts_of(tmp_path / name, content) == [text]
    assert texts_of(tmp_path / "a.txt.gz", gzip.compress(BOM + text.encode())) == [text]


def test_json_lines_under_another_name_are_told(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, content in (
        ("part-00000", LINES), ("a.txt", b"\n" + LINES), ("b.txt", b"{}"), ("c.txt", b"{ a set }\n"), ("d", b"{"),
    ):  # fmt: skip
        caplog.clear()
        [text] = texts_of(tmp_path / name, content)
        assert text.encode() == content
        told = [f"{tmp_path / name}: holds JSON, but counts as one text" in each for each in caplog.messages]
        assert told == ([True] if LINES in content else [])


def mistake(path: pathlib.Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{FIELD}: {path}: ") and "\n" not in message
    return message


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.txt.gz", "a.jsonl.gz"])
def test_other_encodings_are_named(tmp_path: pathlib.Path, name: str) -> None:
    text = '{"text": "some Русский text"}\n'
    for encoding, says in {
        "utf-16": "is UTF-16, by its byte-order mark; convert it to UTF-8",
        "utf-32": "is UTF-32, by its byte-order mark",
        "utf-16-le": "holds zero bytes, as UTF-16 and binary files do",
        "utf-16-be": "holds zero bytes",
        "cp1251": "not UTF-8 at byte 15 (0xd0)",
    }.items():
        raw = text.encode(encoding)
        (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
        assert says in mistake(tmp_path / name)


@pytest.mark.parametrize(
    "name",
    ["a.csv", "a.TSV", "a.zip", "a.jsonl.zst", "a.arrow", "a.csv.gz", "a.tar.gz", "a.gz.gz", "a.ipynb"],
)
def test_formats_that_are_not_read_are_named(tmp_path: pathlib.Path, name: str) -> None:
    content = b"text\nprose\n"
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert "not read" in mistake(tmp_path / name) and ".jsonl" in mistake(tmp_path / name)


def test_damaged_gzip_files_are_named(tmp_path: pathlib.Path) -> None:
    for content in (b"plain", gzip.compress(LINES)[:-9], gzip.compress(LINES)[:40] + b"xx"):
        (tmp_path / "a.jsonl.gz").write_bytes(content)
        assert "is damaged or not a gzip file" in mistake(tmp_path / "a.jsonl.gz")


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("a.txt", b"the text", b"the test"),
        ("a.txt", b"the text", b"the"),
        ("a.txt", b"the text", b"the text goes on"),
        ("a.txt", b"the text", b"\xff\xfet\0"),
        ("a.jsonl", b'{"text": "one"}\n', b'{"text": "two"}\n'),
        ("a.jsonl", b'{"text": "one"}\n', b'\n{"text": "one"}\n'),
        ("a.jsonl", b'{"text": "one"}\n', b'{"text": "one"}\n{"text": "two"}\n'),
        ("a.jsonl", b'{"text": "one"}\n', b"{"),
    ],
)  # fmt: skip
def test_a_file_that_changes_later_is_noticed(
    name: str, before: bytes, after: bytes, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / name
    path.write_bytes(before)
    documents = read(path)
    text = documents[0]
    path.touch()
    assert documents[0] == text
    path.write_bytes(after)
    with pytest.raises(UserError, match=rf"{name}: has changed since .*put the old file back") as caught:
        documents[0]
    assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(UserError, match=rf"{name}: can no longer be read \(No such file"):
        documents[0]
    path.write_bytes(before)
    assert documents[0] == text


@pytest.mark.parametrize("name", ["a.json", "a.jsonl.gz", "array.json.gz"])
def test_documents_that_were_copied_stay_as_they_are(name: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / name
    path.write_bytes(FORMATS[name])
    documents = read(path)
    path.write_bytes(b"other")
    assert documents[0] == ROWS[0]
    path.unlink()
    assert documents[1] == ROWS[1]


def read(*paths: pathlib.Path) -> Documents:
    return Documents(find_files([str(path) for path in paths], (".txt",), FIELD), FIELD)


def test_documents_of_files_and_lines(corpus: pathlib.Path) -> None:
    texts = ["one\nline two", "zwölf", "", "three"]
    lines = [json.dumps({"id": 3, "text": text}, ensure_ascii=len(text) > 5) for text in texts]
    (corpus / "lines.jsonl").write_text("\n".join([*lines[:2], "  ", *lines[2:]]))
    documents = read(corpus, corpus / "lines.jsonl")
    assert [documents[i] for i in range(len(documents))] == [
        "alpha\n",
        "gämma 😀",
        "one\nline two",
        "zwölf",
        "three",
        "delta",
    ]


def test_the_fingerprint_depends_on_contents_not_on_paths(
    corpus: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    before = read(corpus / "a.txt", corpus / "other").fingerprint
    (corpus / "a.txt").rename(corpus / "aa.txt")
    assert read(corpus / "aa.txt", corpus / "other").fingerprint == before
    (corpus / "aa.txt").write_text("alphA\n")
    assert read(corpus / "aa.txt", corpus / "other").fingerprint != before
    (corpus / "aa.txt").write_text("alpha\nd")
    (corpus / "other" / "d.txt").write_text("elta")
    assert read(corpus / "aa.txt", corpus / "other").fingerprint != before


def test_bytes_that_are_not_utf8_are_reported(corpus: pathlib.Path) -> None:
    (corpus / "other" / "z.txt").write_bytes("ä".encode() + b"bc\xff..")
    with pytest.raises(
        ConfigError, match=r"z\.txt: not UTF-8 at byte 4 \(0xff\); convert the file"
    ) as caught:
        read(corpus)
    assert str(caught.value).startswith(f"{FIELD}: ")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("text", "but it is not valid JSON"),
        ('{"text": "cut', "but it is not valid JSON"),
        ("[]", "got list; correct or remove it"),
        ("{}", "got no fields; write each document as"),
        ('{"text": 3}', 'but "text" is int'),
        ('{"text": null}', 'but "text" is null'),
        ('{"text": "ab\\ud83d"}', 'but "text" has half a surrogate pair, \\ud83d, at character 2'),
        (
            '{"inputs": "a", "targets": "b"}',
            'got inputs, targets; write each document as {"text": "..."}, or, if',
        ),
        ('{"messages": []}', "these are prompts and answers or chats, set data.task=instructions"),
        ("[" * 100_000, "but it is not valid JSON"),
    ],
)
@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.jsonl.gz"])
def test_json_lines_without_text_are_reported(
    tmp_path: pathlib.Path, name: str, line: str, says: str
) -> None:
    content = f'{{"text": "fine"}}\n\n{line}'.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    message = mistake(tmp_path / name)
    assert 'line 3: expected an object with a text under "text"' in message and says in message


def test_empty_files_alone_are_rejected(corpus: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no text in 1 files, the first of which is .*empty\.txt"):
        read(corpus / "empty.txt")


def test_training_on_a_held_out_file_is_rejected(corpus: pathlib.Path) -> None:
    (corpus / "link.txt").symlink_to(corpus / "a.txt")
    train = find_files([str(corpus / "a.txt"), str(corpus / "other")], (".txt",), FIELD)
    check_apart(train, find_files([str(corpus / "deep")], (".txt",), FIELD))
    check_apart(train, [])
    for heldout, says in (
        (["link.txt"], "a.txt is in train_files too"),
        (["a.txt", "other"], " and 1 more is in "),
    ):
        with pytest.raises(ConfigError, match=says) as caught:
            check_apart(train, find_files([str(corpus / name) for name in heldout], (".txt",), FIELD))
        assert str(caught.value).startswith("config.data.heldout_files: ")


def test_these_modules_do_not_import_tensorflow() -> None:
    names = ("documents", "interface", "mixture", "packing", "sources", "vocabulary")
    modules = ", ".join(f"fam_jax.data.{name}" for name in names)
    code = f"import sys, {modules}; print('tensorflow' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "False"
