"""SentencePiece models of text, and the command that trains them."""

import pathlib

import pytest

from fam_jax.config import UserError
from fam_jax.data.text_vocabulary import train_text_vocabulary
from fam_jax.data.vocabulary import load_vocabulary
from launch import train_vocabulary

TEXT = "def read(path):\n    return path.read_text()  # 1234 times\n" * 20
STRANGE = [
    TEXT,
    "  two  spaces, \ttabs\n\n\n",
    "ünseen 😀 \u3000 ﬁ ①",
    " begins and ends ",
    "\n",
    "▁",
    "no\0null",
    "\r\n",
    "x" * 20_000,
    "é" * 9_000,
]


def test_all_text_decodes_to_itself(tmp_path: pathlib.Path) -> None:
    (tmp_path / "x.model").write_bytes(train_text_vocabulary([TEXT, "y" * 50_000], 300))
    vocabulary = load_vocabulary(str(tmp_path / "x.model"))
    assert vocabulary.vocab_size == 300
    assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id) == (0, 1, 2)
    for text in STRANGE:
        ids = vocabulary.encode(text)
        assert vocabulary.unk_id not in ids
        assert vocabulary.tokenizer.decode(ids) == text.replace("▁", " ")  # SentencePiece's own sign for one
    assert len(vocabulary.encode(TEXT)) < 0.7 * len(TEXT)
    assert len(vocabulary.encode("1234")) == 4


def test_the_same_text_gives_the_same_model() -> None:
    assert train_text_vocabulary([TEXT], 300) == train_text_vocabulary(iter([TEXT]), 300)


@pytest.mark.parametrize(
    ("text", "size", "says"),
    [
        (TEXT, 259, "size: expected more than 259"),
        (TEXT, 9000, "size: SentencePiece cannot make 9000 pieces of this text (Vocabulary size too high"),
        (
            "".join(map(chr, range(0x4E00, 0x4F00))),
            260,
            "cannot make 260 pieces of this text (Vocabulary size is sm",
        ),
        ("", 300, "cannot make 300 pieces of this text"),
    ],
)
def test_sizes_that_cannot_be(text: str, size: int, says: str) -> None:
    with pytest.raises(UserError) as caught:
        train_text_vocabulary([text], size)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_the_command(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").mkdir()
    for i in range(4):
        (tmp_path / "text" / f"{i}.py").write_text(TEXT)
    out = tmp_path / "new.model"
    files, where = f"--files={tmp_path / 'text'}", f"--out={out}"
    assert train_vocabulary.main([files, "--suffixes=.py", "--size=300", where]) == 0
    assert load_vocabulary(str(out)).vocab_size == 300
    assert capsys.readouterr().err == f"300 pieces written to {out}\n"
    for arguments, says in {
        (files, "--size=300", where): "--files: the folder",
        (files, "--suffixes=.py", "--size=20", where): "size: expected more than 259, the pieces",
        (files, "--suffixes=.py", "--size=x", where): "argument --size: expected a whole number, got 'x'",
        (files, "--suffixes=.py", "--size=300", "--out=/proc/none/x"): "cannot be written",
        ("--size=300", where): "missing --files",
    }.items():
        with pytest.raises(UserError) as caught:
            train_vocabulary.main(arguments)
        assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_sample_is_from_all_over_the_files() -> None:
    documents = [f"{i:04}" * 250 for i in range(2000)]  # two million characters
    found = [text[:4] for text in train_vocabulary.sample(documents, 1)]  # type: ignore[arg-type]
    assert found == [f"{i:04}" for i in range(0, 2000, 2)]
    assert (
        sorted(text[:4] for text in train_vocabulary.sample(documents, 9))
        == sorted(  # type: ignore[arg-type]
            text[:4] for text in documents
        )
    )
