"""The tokenizer of a folder gives the ids that AutoTokenizer of transformers gives."""

import pathlib

import pytest

from fam_jax.config import UserError
from fam_jax.data.vocabulary import load_vocabulary
from fam_jax.hf import ConvertError, adds_bos, check_tokenizer, find_tokenizer
from fam_jax.hf.tokenizer import copy_tokenizer
from tests.hf.real_tokenizers import REAL, fetch_tokenizer
from tests.hf.tokenizer_folders import (
    CHATML,
    KINDS,
    NAMED,
    OF_LLAMA,
    byte_level,
    entry,
    llama2,
    sentencepiece_model,
    write,
)

PLAIN = (
    "the capital of France", " leading", "  two blanks", "a  b   c ", "", " ", "\n\n hi\tx\r\n", "Grün 😀 漢字 e\u0301",
    "ﬁ it's 12345, DON'T", "\u2581x \u2581 y", "<0x0A>", "\u00a0x\ufeffy", "the book " * 50,
)  # fmt: skip
SPELLED = (
    "x{0}y{0} z", "{0} a", "a {0}", " {0}{0}", "{0}user\nthe capital{0}\n", "the{0}the",
)  # fmt: skip


def assert_same(folder: pathlib.Path) -> None:
    """Compare ids, special tokens and decoded text, with all added tokens spelled in the texts."""
    transformers = pytest.importorskip("transformers")
    auto = transformers.AutoTokenizer.from_pretrained(folder)
    file = find_tokenizer(folder)
    assert file is not None
    ours = load_vocabulary(str(file))
    before = [ours.bos_id] if adds_bos(file) else []
    spelled = [*auto.get_added_vocab()][:8] + [piece for piece in (auto.bos_token, auto.eos_token) if piece]
    for text in (*PLAIN, *(form.format(piece) for piece in spelled for form in SPELLED)):
        wanted = auto(text)["input_ids"]
        assert [*before, *ours.encode(text)] == wanted, repr(text)
    assert ours.eos_id == auto.eos_token_id
    assert auto.bos_token_id in (ours.bos_id, None)
    assert ours.vocab_size == len(auto)
    ids = auto("the capital of France is Paris")["input_ids"]
    assert ours.decode(ids) == auto.decode(ids, skip_special_tokens=True)
    check_tokenizer(file, len(auto))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_folder(kind: str, tmp_path: pathlib.Path) -> None:
    KINDS[kind](tmp_path)
    assert_same(tmp_path)


def test_a_sentencepiece_model_alone(tmp_path: pathlib.Path) -> None:
    """It divides text by itself. Spelled special tokens stay text, and blanks at the start are kept."""
    settings = OF_LLAMA | {"add_bos_token": True, "legacy": True}
    write(tmp_path, model=sentencepiece_model(), tokenizer_config=settings)
    file = tmp_path / "tokenizer.model"
    auto = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    assert find_tokenizer(tmp_path) == file and adds_bos(file)
    check_tokenizer(file, 400)
    ours = load_vocabulary(str(file))
    assert (ours.bos_id, ours.eos_id) == (auto.bos_token_id, auto.eos_token_id)
    for text in PLAIN:
        if not text.startswith((" ", "\u2581")):
            assert [ours.bos_id, *ours.encode(text)] == auto(text)["input_ids"], repr(text)


MORE = {
    "added_tokens.json": {"added_tokens": CHATML},
    "tokenizer_config.json": {"tokenizer_config": {"added_tokens_decoder": {"400": entry("<|im_end|>")}}},
    "special_tokens_map.json": {"special_tokens_map": {"eos_token": entry("<unk>")}},
}
OTHERS = [
    {"eos_token": "<|im_end|>"}, {"eos_token": "<s>"}, {"bos_token": "</s>"}, {"pad_token": "[PAD]"},
    {"additional_special_tokens": ["<|im_start|>"]}, {"added_tokens_decoder": {"2": entry("<|eot|>")}},
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "files"),
    [*MORE.items(), *[("tokenizer_config.json", {"tokenizer_config": each}) for each in OTHERS]],
)
def test_a_sentencepiece_model_whose_folder_says_more_is_rejected(
    tmp_path: pathlib.Path, name: str, files: dict
) -> None:
    write(tmp_path, model=sentencepiece_model(), **files)
    with pytest.raises(ConvertError) as caught:
        check_tokenizer(tmp_path / "tokenizer.model", 402)
    message = str(caught.value)
    assert f"{name} beside it has" in message and "save_pretrained" in message and "\n" not in message
    llama2().save(str(tmp_path / "tokenizer.json"))
    assert find_tokenizer(tmp_path) == tmp_path / "tokenizer.json"
    check_tokenizer(tmp_path / "tokenizer.json", 402)


def test_a_blank_before_a_text_is_a_part_of_what_a_folder_says(tmp_path: pathlib.Path) -> None:
    own = {prefix: sentencepiece_model(add_dummy_prefix=prefix) for prefix in (True, False)}
    for model in own:
        for said in own:
            write(tmp_path, model=own[model], tokenizer_config=OF_LLAMA | {"add_prefix_space": said})
            if said == model:
                check_tokenizer(tmp_path / "tokenizer.model", 400)
            else:
                with pytest.raises(
                    ConvertError, match=r"puts (a|no) blank before a text, but add_prefix_space"
                ):
                    check_tokenizer(tmp_path / "tokenizer.model", 400)


@pytest.mark.parametrize(
    "settings",
    [{}, OF_LLAMA, {"eos_token": None, "pad_token": "</s>"}, {"added_tokens_decoder": {"2": entry("</s>")}}],
)
def test_a_sentencepiece_model_whose_folder_says_the_same_is_taken(
    tmp_path: pathlib.Path, settings: dict
) -> None:
    write(tmp_path, model=sentencepiece_model(), tokenizer_config=settings, added_tokens={"<s>": 1})
    check_tokenizer(tmp_path / "tokenizer.model", 400)


def test_files_beside_a_tokenizer_may_begin_with_a_byte_order_mark(tmp_path: pathlib.Path) -> None:
    write(tmp_path, tokenizer=byte_level(), tokenizer_config=NAMED)
    before = load_vocabulary(str(tmp_path / "tokenizer.json"))
    for path in tmp_path.iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    check_tokenizer(tmp_path / "tokenizer.json", before.vocab_size)
    after = load_vocabulary(str(tmp_path / "tokenizer.json"))
    assert (after.eos_id, after.encode("the book<|end|>")) == (
        before.eos_id,
        before.encode("the book<|end|>"),
    )


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"added_tokens_decoder": {"1": "<s>"}}},
        {"tokenizer_config": {"added_tokens_decoder": {"one": entry("<s>")}}},
        {"tokenizer_config": {"added_tokens_decoder": ["<s>"]}},
        {"added_tokens": {"<a>": "1", "<b>": 2}},
        {"special_tokens_map": []},
        {"config": "llama"},
    ],
)
def test_damaged_files_beside_a_tokenizer_are_named(tmp_path: pathlib.Path, files: dict) -> None:
    write(tmp_path, tokenizer=byte_level(), **files)
    for read in (check_tokenizer, lambda path, size: load_vocabulary(str(path))):
        with pytest.raises(UserError, match=rf"{next(iter(files))}\.json") as caught:
            read(tmp_path / "tokenizer.json", 363)
        assert "\n" not in str(caught.value)


def test_an_exported_vocabulary_keeps_what_it_is_read_with(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "own", tokenizer=byte_level(), special_tokens_map=NAMED, added_tokens={"<|a|>": 363})
    (tmp_path / "own" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "out").mkdir()
    copy_tokenizer(str(tmp_path / "own" / "tokenizer.json"), tmp_path / "out")
    before, after = (load_vocabulary(str(tmp_path / name / "tokenizer.json")) for name in ("own", "out"))
    text = "the<|a|>book"
    assert (after.eos_id, after.encode(text)) == (before.eos_id, before.encode(text))
    assert after.eos_id is not None and len(after.encode("<|a|>")) == 1
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_tokenizers_of_real_models(name: str, tmp_path: pathlib.Path) -> None:
    assert_same(fetch_tokenizer(name, tmp_path))
