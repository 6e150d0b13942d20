"""Find files, and read them as documents; an unreadable file is reported before training."""

import json
import pathlib
import subprocess
import sys

import pytest

from fam_jax.config import ConfigError
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


@pytest.mark.parametrize("line", ["text", "[]", "{}", '{"text": 3}', '{"text": "\\ud800"}', '{"text": "cut'])
def test_json_lines_without_text_are_reported(tmp_path: pathlib.Path, line: str) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "fine"}\n\n' + line)
    with pytest.raises(ConfigError, match=r'x\.jsonl: line 3: expected an object with a text under "text"'):
        read(tmp_path / "x.jsonl")


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
