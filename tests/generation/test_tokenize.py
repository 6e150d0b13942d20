"""Text encoded in pieces has the ids of the whole text, and ids are decoded as they come."""

import io
import itertools
import random
from collections.abc import Callable

import pytest
import sentencepiece

from fam_jax.config import UserError
from fam_jax.data.vocabulary import load_vocabulary
from fam_jax.generation import tokenize
from fam_jax.generation.tokenize import Detokenizer, encode_pieces, read_text

WORDS = [
    "the", "pass", "key", "is", "grass", "", "blue\n\nsky\t12345", "é", "naïve", "日本語テキスト", "🙂🙂", "e\u0301",
    "ﬁ",
]  # fmt: skip
KINDS = {
    "unigram": {"model_type": "unigram"},
    "bpe, spaces kept": {
        "model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
    },
    "pieces of several words": {"model_type": "unigram", "split_by_whitespace": False},
}  # fmt: skip


def some_text(words: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    return "".join(rng.choice(WORDS) + rng.choice([" ", "  ", "\n", ", ", " "]) for _ in range(words))


@pytest.fixture(scope="module", params=[*KINDS, "bytes", "passkey"])
def vocabulary(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> object:
    if request.param in ("bytes", "passkey"):
        return load_vocabulary(request.param)
    path = tmp_path_factory.mktemp("vocabulary") / "some.model"
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(some_text(2000, seed=1).split("\n")), model_writer=model, vocab_size=330,
        hard_vocab_limit=False, byte_fallback=True, minloglevel=2, num_threads=1, **KINDS[request.param],
    )  # fmt: skip
    path.write_bytes(model.getvalue())
    return load_vocabulary(str(path))


@pytest.mark.parametrize("piece", [16, 100])
def test_pieces_are_encoded_as_the_whole(vocabulary, piece: int) -> None:
    text = some_text(400)
    parts = [text[i : i + 37] for i in range(0, len(text), 37)]  # as a file may be read
    found = [*encode_pieces(vocabulary.encode, parts, piece=piece, context=64)]
    assert len(found) > len(text) // (2 * piece)
    assert [*itertools.chain(*found)] == vocabulary.encode(text)


def test_a_text_without_borders() -> None:
    """No text is lost, and pieces do not grow with the text."""
    vocabulary = load_vocabulary("bytes")
    text = "x" * 1000
    found = [*encode_pieces(vocabulary.encode, [text], piece=50, context=10)]
    assert [*itertools.chain(*found)] == vocabulary.encode(text)
    assert max(map(len, found)) <= 60


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_characters_may_straddle_reads(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize, "BYTES", size)
    text = some_text(50)
    assert "".join(read_text(io.BytesIO(text.encode()), "some")) == text


@pytest.mark.parametrize("size", [1, 2, 1000])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"abc\xff", "book.txt: is not valid UTF-8 at byte 3 (0xff: invalid start byte)"),
        ("aé日".encode() + b"\xe6\x97x", "book.txt: is not valid UTF-8 at byte 6 (0xe6: invalid continuation"),
        ("aé".encode()[:-1], "book.txt: is not valid UTF-8 at byte 1 (0xc3: unexpected end of data)"),
        (b"", "book.txt: is empty"),
    ],
)  # fmt: skip
def test_files_that_are_not_text(
    size: int, content: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenize, "BYTES", size)
    with pytest.raises(UserError) as caught:
        [*read_text(io.BytesIO(content), "book.txt")]
    assert str(caught.value).startswith(message)


def test_text_comes_as_its_ids_do(vocabulary) -> None:
    ids = vocabulary.encode(some_text(60))
    detokenizer = Detokenizer(vocabulary.decode)
    parts = [detokenizer.add([i]) for i in ids] + [detokenizer.finish()]
    assert "".join(parts) == vocabulary.decode(ids)
    assert sum(map(bool, parts)) > 50


def test_a_character_waits_until_it_is_complete() -> None:
    def decode(ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")

    add: Callable[[list[int]], str] = (detokenizer := Detokenizer(decode)).add
    assert [add([byte]) for byte in "aé".encode()] == ["a", "", "é"]
    assert add([0xC3]) == "" and detokenizer.finish() == "\N{REPLACEMENT CHARACTER}"
