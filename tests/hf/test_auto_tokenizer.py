"""The tokenizer of a folder gives the ids that AutoTokenizer of transformers gives."""

import contextlib
import pathlib
import sys
import types
from typing import Any

import pytest
import sentencepiece

from fam_jax.config import ModelConfig, UserError
from fam_jax.data.vocabulary import load_vocabulary
from fam_jax.hf import (
    ConvertError,
    adds_bos,
    check_tokenizer,
    export_folder,
    export_model,
    find_tokenizer,
    hf_config,
    import_model,
)
from fam_jax.hf.converted_tokenizer import converted_tokenizer, needs_conversion
from fam_jax.hf.tokenizer import copy_tokenizer
from fam_jax.memories.window import FullConfig
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
from tests.model.tiny import params_of

PLAIN = (
    "the capital of France", " leading", "  two blanks", "a  b   c ", "", " ", "\n\n hi\tx\r\n", "Grün 😀 漢字 e\u0301",
    "ﬁ it's 12345, DON'T", "\u2581x \u2581 y", "<0x0A>", "\u00a0x\ufeffy", "the book " * 50,
)  # fmt: skip
SPELLED = (
    "x{0}y{0} z", "{0} a", "a {0}", " {0}{0}", "{0}user\nthe capital{0}\n", "the{0}the",
)  # fmt: skip


def assert_same(folder: pathlib.Path, auto: Any = None) -> None:
    """Compare ids, special tokens and decoded text, with all added tokens spelled in the texts."""
    auto = auto or pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)
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


OF_MAP = {"bos_token": "<s>", "eos_token": entry("</s>"), "unk_token": "<unk>"}
OF_GEMMA = OF_LLAMA | {"tokenizer_class": "GemmaTokenizer"}
TINY = ModelConfig(
    vocab_size=400, num_layers=1, model_dim=8, num_heads=2, num_kv_heads=2, head_dim=4, ff_dim=8, block_size=8,
    activation="swiglu", tie_embeddings=False, memory=FullConfig(context=64),
)  # fmt: skip


def write_tiny_model(folder: pathlib.Path) -> None:
    export_folder(folder, TINY, params_of(TINY), hf_config(TINY))


# Folders with a tokenizer.model alone: files beside it, and options of the model.
ALONE: dict[str, tuple[dict, dict]] = {
    "no files": ({}, {}),
    "Llama": ({"tokenizer_config": OF_LLAMA}, {}),
    "Llama, legacy": ({"tokenizer_config": OF_LLAMA | {"legacy": True, "add_bos_token": True}}, {}),
    "Llama without prefix": ({"tokenizer_config": OF_LLAMA | {"add_prefix_space": False}}, {}),
    "Llama without start token": ({"tokenizer_config": OF_LLAMA | {"add_bos_token": False}}, {}),
    "Gemma": ({"model_type": "gemma2"}, {}),
    "Gemma's class": ({"model_type": "gemma2", "tokenizer_config": OF_GEMMA}, {}),
    "Mistral": ({"model_type": "mistral", "tokenizer_config": OF_LLAMA}, {}),
    "Qwen": ({"model_type": "qwen2"}, {}),
    "ChatML": ({"tokenizer_config": OF_LLAMA | {"eos_token": "<|im_end|>"}, "added_tokens": CHATML}, {}),
    "a map": ({"special_tokens_map": OF_MAP}, {}),
    "Unigram": ({}, {"model_type": "unigram", "vocab_size": 330}),
    "Unigram, Llama": ({"tokenizer_config": OF_LLAMA}, {"model_type": "unigram", "vocab_size": 330}),
    "normalized": ({}, {"normalization_rule_name": "nmt_nfkc"}),
    "own symbols": ({"tokenizer_config": OF_LLAMA}, {"user_defined_symbols": "<|x|>,<|y|>"}),
    "without bytes": ({}, {"byte_fallback": False}),
}


@pytest.mark.parametrize("kind", ALONE)
def test_a_sentencepiece_model_alone(kind: str, tmp_path: pathlib.Path) -> None:
    files, options = ALONE[kind]
    write(tmp_path, model=sentencepiece_model(**options), **files)
    auto = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    assert needs_conversion(tmp_path)
    with converted_tokenizer(tmp_path) as folder:
        assert_same(folder, auto)
    assert not folder.exists()
    assert sorted(tmp_path.iterdir()) == sorted(
        {tmp_path / name for name in ("config.json", "tokenizer.model")}
        | {tmp_path / f"{name}.json" for name in files if name != "model_type"}
    )


def test_an_import_converts_a_sentencepiece_model_alone(tmp_path: pathlib.Path) -> None:
    transformers = pytest.importorskip("transformers")
    write_tiny_model(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.model").write_bytes(sentencepiece_model())
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    config = import_model(tmp_path / "hf", tmp_path / "run").config
    file = tmp_path / "run" / "huggingface" / "tokenizer.json"
    assert config.data.vocabulary == str(file)
    assert config.data.add_bos == (auto("a")["input_ids"][0] == auto.bos_token_id)
    ours = load_vocabulary(str(file))
    for text in PLAIN:
        assert ours.encode(text) == auto(text, add_special_tokens=False)["input_ids"], repr(text)
    # An export of it has both files, and its import needs no conversion.
    export_model(tmp_path / "run", tmp_path / "out")
    assert find_tokenizer(tmp_path / "out") == tmp_path / "out" / "tokenizer.json"
    assert not needs_conversion(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == sentencepiece_model()


def test_sentencepiece_reads_what_a_run_was_trained_with(tmp_path: pathlib.Path) -> None:
    """A tokenizer.model that is named by itself, and that of an export of such a run."""
    write_tiny_model(tmp_path / "hf")
    file = tmp_path / "hf" / "tokenizer.model"
    file.write_bytes(sentencepiece_model())
    config = import_model(tmp_path / "hf", tmp_path / "run", tokenizer=str(file)).config
    assert config.data.vocabulary == str(file)
    export_model(tmp_path / "run", tmp_path / "out")
    assert not needs_conversion(tmp_path / "out")
    again = import_model(tmp_path / "out", tmp_path / "again").config
    assert again.data.vocabulary == str(tmp_path / "again" / "huggingface" / "tokenizer.model")
    own = sentencepiece.SentencePieceProcessor(model_file=str(file))
    for text in PLAIN:
        assert load_vocabulary(again.data.vocabulary).encode(text) == own.encode(text)
    export_model(tmp_path / "again", tmp_path / "more")
    assert not needs_conversion(tmp_path / "more")


def test_without_transformers_a_sentencepiece_model_alone_is_refused(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_model(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.model").write_bytes(sentencepiece_model())

    def refused() -> str:
        with pytest.raises(ConvertError) as caught:
            import_model(tmp_path / "hf", tmp_path / "run")
        assert not (tmp_path / "run").exists()
        message = str(caught.value)
        assert message.startswith(f"{tmp_path}/hf/tokenizer.model: ") and "\n" not in message
        assert f"--tokenizer={tmp_path}/hf/tokenizer.model" in message
        return message

    old = types.ModuleType("transformers")
    vars(old)["__version__"] = "4.57.1"
    for module, says in ((None, "pip install"), (old, "transformers 5, but 4.57.1 is installed")):
        monkeypatch.setitem(sys.modules, "transformers", module)
        assert says in refused()


@pytest.mark.parametrize("content", [b"", b"nothing", b"IQ== 0\nIg== 1\n"])
def test_what_transformers_cannot_read_is_named(tmp_path: pathlib.Path, content: bytes) -> None:
    pytest.importorskip("transformers")
    write(tmp_path, model=content)
    with pytest.raises(ConvertError, match=r"tokenizer\.model: .*transformers cannot read it") as caught:
        converted_tokenizer(tmp_path).__enter__()
    assert "\n" not in str(caught.value)


def test_a_folder_that_names_code_runs_none(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("transformers")
    code = f"open({str(tmp_path / 'ran')!r}, 'w')"
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "evil.py").write_text(code)
    own = OF_LLAMA | {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    write(tmp_path / "hf", model=sentencepiece_model(), tokenizer_config=own)
    with contextlib.suppress(ConvertError):
        converted_tokenizer(tmp_path / "hf").__enter__()
    assert not (tmp_path / "ran").exists()


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
