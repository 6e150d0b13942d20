"""Real text from packages: whole documents, an eighth of them held out."""

import json
import pathlib
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from fam_jax.config import UserError
from fam_jax.data.documents import Documents, check_apart, find_files
from launch import demo_data
from launch.demo_data import MIN_CHARACTERS, Part, make_demo_data

SIZES = [MIN_CHARACTERS + i for i in range(19)]


def sized(_: pathlib.Path) -> Iterator[tuple[str, str]]:
    """Yield a document of every size, the longest first, and one that is too short."""
    for size in (*reversed(SIZES), MIN_CHARACTERS - 1):
        yield f"of {size}", "ü" * size


def missing(_: pathlib.Path) -> Iterator[tuple[str, str]]:
    raise UserError("proofs: apt-get cannot be run")
    yield


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> dict[str, Part]:
    parts = {"books": Part(sized, "PyPI x", "MIT"), "proofs": Part(missing, "Debian x", "BSD")}
    monkeypatch.setattr(demo_data, "PARTS", parts)
    return parts


@pytest.mark.usefixtures("parts")
def test_documents_are_whole_and_an_eighth_is_held_out(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo_data.main([f"--out={tmp_path / 'data'}"]) == 0
    printed = capsys.readouterr()
    assert printed.err == "left out: proofs: apt-get cannot be run\n" and "books" in printed.out
    books = tmp_path / "data" / "books"
    train, heldout = (find_files([str(books / which)], [".txt"], "x") for which in ("train", "heldout"))
    check_apart(train, heldout)
    assert [path.name for path in heldout] == [f"of {SIZES[i]}.txt" for i in (4, 12)]
    found = Documents([*train, *heldout], "x")
    assert sorted(len(found[i]) for i in range(len(found))) == SIZES
    record = json.loads((tmp_path / "data" / "sources.json").read_text())
    assert record.keys() == {"books"}
    assert (record["books"]["documents"], record["books"]["heldout_documents"]) == (19, 2)
    assert record["books"]["characters"] == sum(SIZES)
    assert record["books"]["longest_document"] == SIZES[-1]
    # Nothing is left of the work.
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["books", "sources.json"]


def test_parts_that_are_there_are_kept(tmp_path: pathlib.Path, parts: dict[str, Part]) -> None:
    before = make_demo_data(tmp_path, ["books"])
    parts["books"] = Part(missing, "PyPI x", "MIT")
    assert make_demo_data(tmp_path, ["books"]) == before
    with pytest.raises(UserError, match="apt-get cannot be run"):
        make_demo_data(tmp_path, ["books"], fresh=True)
    assert (tmp_path / "books" / "train").is_dir()
    parts["books"] = Part(lambda _: iter([("a", "b" * 4000)]), "PyPI x", "MIT")
    with pytest.raises(UserError, match="books: PyPI x holds 1 documents only"):
        make_demo_data(tmp_path, ["books"], fresh=True)


@pytest.mark.usefixtures("parts")
def test_mistakes(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="--parts=plays: unknown; choose from books, proofs"):
        make_demo_data(tmp_path, ["plays", "books"])
    with pytest.raises(UserError, match="apt-get cannot be run"):
        make_demo_data(tmp_path, ["proofs"])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--out=.*file: cannot be written \(.*\); choose another folder"):
        make_demo_data(tmp_path / "file")


@pytest.mark.usefixtures("parts")
def test_a_folder_of_somebody_else_is_kept(tmp_path: pathlib.Path) -> None:
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "mine.txt").touch()
    for fresh in (False, True):
        for names in ([], ["books"]):
            with pytest.raises(UserError, match="holds books, which did not come from this program"):
                make_demo_data(tmp_path, names, fresh=fresh)
    assert (tmp_path / "books" / "mine.txt").exists()
    (tmp_path / "sources.json").write_text("[]")
    with pytest.raises(UserError, match=r"sources\.json: is damaged; delete it"):
        make_demo_data(tmp_path)


def test_a_command_that_fails_is_one_line(tmp_path: pathlib.Path) -> None:
    with pytest.raises(
        UserError, match=r"books: no-such-program cannot be run \(No such file or directory\)"
    ):
        demo_data._run(["no-such-program"], tmp_path, "books")
    with pytest.raises(UserError, match=r"books: `false` failed \(exit code 1\); connect to a package index"):
        demo_data._run(["false"], tmp_path, "books")


def test_a_folder_is_one_document_and_latin_1_is_read(tmp_path: pathlib.Path) -> None:
    for path, content in {
        "one/b.ml": b"second", "one/a.ml": "\N{LATIN SMALL LETTER E WITH ACUTE}".encode("latin-1"),
        "one/below/c.hl": b"third", "one/no.txt": b"x", "test/a.ml": b"x", "root.ml": b"x",
    }.items():  # fmt: skip
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    [(name, text)] = demo_data._joined(tmp_path, ("*.ml", "*.hl"), leave_out=("test",))
    assert name == "one"
    assert (
        text == "one/a.ml\n\n\N{LATIN SMALL LETTER E WITH ACUTE}\none/b.ml\n\nsecond\none/below/c.hl\n\nthird"
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["books", "proofs", "code"])
def test_the_real_packages(name: str, tmp_path: pathlib.Path) -> None:
    if name == "proofs" and not shutil.which("apt-get"):
        pytest.skip("needs apt-get")
    try:
        found = make_demo_data(tmp_path, [name])[name]
    except UserError as error:
        if isinstance(error.__cause__, (OSError, subprocess.SubprocessError)) or "package index" in str(
            error
        ):
            pytest.skip(f"no package index is reached: {error}")
        raise
    least = {"books": (66, 4_000_000), "proofs": (20, 20_000_000), "code": (100, 4_000_000)}[name]
    documents, characters = found["documents"], found["characters"]
    assert isinstance(documents, int) and isinstance(characters, int)
    assert documents >= least[0] - 10 and characters >= least[1]
    if name == "books":
        texts = [path.read_text() for path in (tmp_path / name).rglob("Genesis.txt")]
        assert len(texts) == 1
        assert texts[0].startswith(
            "Genesis\n\nChapter 1\nIn the beginning God created the heaven and the earth.\n"
        )
