"""The start token (BOS): which one it is, and that it stands before every text and nowhere else."""

import dataclasses
import io
import itertools
import json
import pathlib
import shutil
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers

from fam_jax.checkpoint import read_config
from fam_jax.config import Config, ConfigError, DataConfig, EvaluateConfig, UserError, resolve
from fam_jax.data import build
from fam_jax.data.interface import BatchSpec, Example
from fam_jax.data.packing import PackedBatches
from fam_jax.data.passkey import passkey_examples
from fam_jax.data.passkey_curriculum import PasskeyCurriculum
from fam_jax.data.passkey_text import example_text
from fam_jax.data.vocabulary import bos_ids, first_input, load_vocabulary
from fam_jax.evaluation.task import Setting
from fam_jax.evaluation.tasks import text_documents
from fam_jax.evaluation.text import measure_documents
from fam_jax.generation.streaming import Streamer
from fam_jax.generation.text import TextModel
from fam_jax.hf import ConvertError, adds_bos
from launch import import_hf
from tests.generation.tiny import CONFIG
from tests.hf.recorded import DATA, VOCABULARY
from tests.model.tiny import params_of

BOS, EOS = 1, 2
TEXT = example_text("0 1 2 3 4 5 6 7 8 9", 1)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Make a tokenizer.json that puts <s> before a text; no other file mentions <s>."""
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([TEXT], vocab_size=270, special_tokens=["<pad>", "<s>", "</s>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", None, [("<s>", BOS)])
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return path


@pytest.fixture(scope="module")
def data(folder: pathlib.Path) -> DataConfig:
    return DataConfig(vocabulary=str(folder / "tokenizer.json"), add_bos=True, stage_blocks=(2,))


def with_settings(folder: pathlib.Path, tmp_path: pathlib.Path, **settings: Any) -> pathlib.Path:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path / "tokenizer.json"


def sentencepiece_model(path: pathlib.Path, bos: int) -> pathlib.Path:
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([TEXT]),
            model_writer=file,
            vocab_size=60,
            bos_id=bos,
            unk_id=0,
            eos_id=2,
            model_type="char",
            minloglevel=2,
        )
    return path


def test_the_tokenizer_decides_whether_a_text_begins_with_bos(
    folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    assert adds_bos(folder / "tokenizer.json")
    for decides in (True, False, None):  # not where a tokenizer.json has a template
        assert adds_bos(with_settings(folder, tmp_path, add_bos_token=decides))
        assert adds_bos(sentencepiece_model(tmp_path / "a.model", bos=1)) is (decides is not False)
    (tmp_path / "tokenizer_config.json").unlink()
    assert adds_bos(sentencepiece_model(tmp_path / "a.model", bos=1))
    assert not adds_bos(sentencepiece_model(tmp_path / "b.model", bos=-1))


def test_two_tokens_before_a_text_are_rejected(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    special = [("<s>", BOS), ("<pad>", 0)]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> <pad> $A", None, special)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConvertError, match="puts <s> <pad> before a text"):
        adds_bos(tmp_path / "tokenizer.json")


def test_an_import_sets_add_bos(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    shutil.copytree(DATA / "llama3", source)
    pieces = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(pieces, unk_token="w0"))
    for template, begins in (("w1 $A", True), ("$A", False)):
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(template, None, [("w1", 1)])
        tokenizer.save(str(source / "tokenizer.json"))
        out = tmp_path / f"imported{begins}"
        assert import_hf.main([f"--source={source}", f"--out={out}", "--block_size=8"]) == 0
        assert resolve(read_config(out)).data.add_bos == begins


def test_the_id_comes_from_the_settings_or_the_template(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    vocabulary = load_vocabulary(str(folder / "tokenizer.json"))
    assert (vocabulary.bos_id, vocabulary.eos_id) == (BOS, EOS)
    assert vocabulary.encode(TEXT)[0] != BOS
    assert load_vocabulary(str(with_settings(folder, tmp_path, bos_token="<pad>"))).bos_id == 0
    assert load_vocabulary(str(sentencepiece_model(tmp_path / "a.model", bos=1))).bos_id == 1


def test_ids_equal_those_of_the_tokenizer(data: DataConfig) -> None:
    vocabulary = load_vocabulary(data.vocabulary)
    whole = tokenizers.Tokenizer.from_file(data.vocabulary).encode(TEXT).ids
    assert [*bos_ids(vocabulary, data), *vocabulary.encode(TEXT)] == whole
    assert bos_ids(vocabulary, dataclasses.replace(data, add_bos=False)) == []


@pytest.mark.parametrize("name", ["bytes", "passkey"])
def test_a_vocabulary_without_bos_is_rejected(name: str) -> None:
    vocabulary = load_vocabulary(name)
    with pytest.raises(ConfigError, match=f"config.data.add_bos: the vocabulary '{name}' has no start token"):
        bos_ids(vocabulary, DataConfig(vocabulary=name, add_bos=True))
    assert first_input(vocabulary, DataConfig(vocabulary=name)) == vocabulary.eos_id


class Two:
    """A source of two documents."""

    fingerprint = "two"
    documents = ([10, 11, 12, 13, EOS], [20, 21, EOS])

    def __init__(self, vocabulary: Any):
        self.vocabulary = vocabulary

    def epoch(self, epoch: int, first: int = 0) -> Any:
        for ids in itertools.islice(self.documents, first, None):
            yield Example(np.array(ids, np.int32), np.ones(len(ids), np.float32), 0)


def test_training_documents_begin_with_bos(data: DataConfig) -> None:
    def rows(add_bos: bool) -> tuple[list[int], list[int]]:
        config = dataclasses.replace(data, add_bos=add_bos, task="text", sequence_length=8, shuffle_batches=1)
        batches = PackedBatches(config, Two(load_vocabulary(data.vocabulary)), BatchSpec(8, 1, 0))
        batch = batches.next()
        return batch["inputs"][0].tolist(), batch["targets"][0].tolist()

    targets = [10, 11, 12, 13, EOS, 20, 21, EOS]
    assert rows(True) == ([BOS, 10, 11, 12, 13, BOS, 20, 21], targets)
    assert rows(False) == ([EOS, 10, 11, 12, 13, EOS, 20, 21], targets)


def test_evaluated_documents_begin_with_bos(monkeypatch: pytest.MonkeyPatch) -> None:
    class Both:
        vocab_size, bos_id, eos_id = 16, 3, 1

    class Other(Both):
        eos_id = Both.bos_id

    examples = [Example(np.arange(2, 9, dtype=np.int32), np.ones(7, np.float32), 0)]

    def loss(vocabulary: Any, add_bos: bool) -> float:
        monkeypatch.setattr(build, "heldout_examples", lambda *_: build.Heldout(examples, vocabulary))
        data = DataConfig(task="text", vocabulary="bytes", train_files=("some.txt",), add_bos=add_bos)
        setting = Setting(CONFIG, data, EvaluateConfig())
        documents = text_documents(setting)
        return measure_documents(Streamer(CONFIG, params_of(CONFIG)), documents, setting).scalars["loss"]

    assert loss(Both(), True) == loss(Other(), False) != loss(Both(), False)


def test_passkey_prompts_begin_with_bos(data: DataConfig) -> None:
    vocabulary = load_vocabulary(data.vocabulary)
    plain = dataclasses.replace(data, add_bos=False)
    for (prompt, answer), (without, same) in zip(
        passkey_examples(data, vocabulary, 30, 3, 0),
        passkey_examples(plain, vocabulary, 30, 3, 0),
        strict=True,
    ):
        assert prompt.tolist() == [BOS, *without]
        assert answer.tolist() == same.tolist()
    batch = PasskeyCurriculum(data, BatchSpec(32, 2, 0)).next()
    other = PasskeyCurriculum(plain, BatchSpec(32, 2, 0)).next()
    assert batch["inputs"][:, 0].tolist() == [BOS, BOS]
    np.testing.assert_array_equal(batch["inputs"][:, 1:9], other["inputs"][:, :8])


def test_a_stream_begins_with_bos_and_continues_without(data: DataConfig) -> None:
    vocabulary = load_vocabulary(data.vocabulary)
    model = dataclasses.replace(CONFIG, vocab_size=vocabulary.vocab_size)
    reader = TextModel(Config(model=model, data=data), params_of(model), vocabulary)
    question = "What is it?"
    for source in (TEXT, io.BytesIO(TEXT.encode())):
        state = reader.read(source, chunk_blocks=2)
        ids = [BOS, *vocabulary.encode(TEXT)]
        assert state.tokens_read == len(ids)
        logits, memory = reader.streamer.read([np.array(ids)])
        np.testing.assert_allclose(state.logits, logits, rtol=1e-4, atol=1e-5)
    found = reader.read(question, state)
    assert found.tokens_read == state.tokens_read + len(vocabulary.encode(question))
    logits, _ = reader.streamer.read([np.array(vocabulary.encode(question))], memory)
    np.testing.assert_allclose(found.logits, logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="holds no tokens"):
        reader.read("")
