"""A tokenizer with an added token beyond the model's table, as of Gemma 3 1B: all but texts that have it works."""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import numpy as np
import pytest
import tokenizers

from fam_jax.checkpoint import load_params, read_config
from fam_jax.config import Config, ConfigError, UserError, resolve
from fam_jax.data.build import make_batches
from fam_jax.data.interface import BatchSpec
from fam_jax.data.vocabulary import check_ids, check_vocabulary_size, load_vocabulary
from fam_jax.evaluation import evaluate
from fam_jax.generation.text import TextModel
from fam_jax.training.loop import train
from launch import export_hf, import_hf
from tests.hf.recorded import DATA, VOCABULARY

SAYS = r"the text has the token '<image>' \(id 40\) after 'w5 w6', but the model has embeddings for 40 tokens only"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Import a model of 40 embeddings with a tokenizer of 41 tokens, whose last one is <image>."""
    folder = tmp_path_factory.mktemp("beyond")
    shutil.copytree(DATA / "llama3", folder / "source")
    pieces = {f"w{number}": number for number in range(VOCABULARY - 2)} | {"<s>": 38, "</s>": 39}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(pieces, unk_token="w0"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.decoder = tokenizers.decoders.WordPiece("##", cleanup=False)
    made.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", None, [("<s>", 38)])
    made.add_special_tokens(["<s>", "</s>", "<image>"])
    made.save(str(folder / "source" / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "source" / "tokenizer_config.json").write_text(json.dumps(settings))
    how = [f"--source={folder}/source", f"--out={folder}/base", "--block_size=8"]
    assert import_hf.main(how) == 0
    (folder / "good.txt").write_text("w1 w2 w3 w4 " * 8)
    (folder / "bad.txt").write_text("w5 w6<image>w7 " * 8)
    return folder / "base"


def config_of(checkpoint: pathlib.Path, file: str) -> Config:
    values = read_config(checkpoint)
    values["data"] |= {"task": "text", "train_files": [f"{checkpoint.parent}/{file}"], "sequence_length": 8}
    values["train"] |= {"steps": 1, "batch_size": 8, "init_from": str(checkpoint)}
    return resolve(values)


def test_the_table_has_all_tokens_but_one(checkpoint: pathlib.Path) -> None:
    config = resolve(read_config(checkpoint))
    vocabulary = load_vocabulary(config.data.vocabulary)
    assert (config.model.vocab_size, vocabulary.vocab_size) == (40, 41)
    check_vocabulary_size(vocabulary, config.model, config.data)
    smaller: Any = dataclasses.replace(config.model, vocab_size=39)
    with pytest.raises(
        ConfigError, match=r"vocab_size: 39 is smaller than the vocabulary .*, which has 40 pieces"
    ):
        check_vocabulary_size(vocabulary, smaller, config.data)
    check_ids(np.arange(40), vocabulary, 40)
    with pytest.raises(UserError, match="the token '<image>'"):
        check_ids(np.array([3, 40]), vocabulary, 40)


def test_generation(checkpoint: pathlib.Path) -> None:
    model = TextModel.restore(checkpoint)
    state = model.read("w1 w2")
    assert model.generate(state, max_tokens=2).tokens > 0
    for begin in (state, None):
        with pytest.raises(UserError, match=SAYS):
            model.read("w5 w6<image>w7", begin)


def test_evaluation(checkpoint: pathlib.Path, tmp_path: pathlib.Path) -> None:
    files = {name: (f"{checkpoint.parent}/{name}.txt",) for name in ("good", "bad")}
    found = evaluate(checkpoint, task="text", files=files["good"], out=tmp_path / "out.json")
    assert found.details["tokens_read"] == 33
    with pytest.raises(UserError, match=SAYS):
        evaluate(checkpoint, task="text", files=files["bad"], out=tmp_path / "out.json")


@pytest.mark.slow
def test_training(checkpoint: pathlib.Path, tmp_path: pathlib.Path) -> None:
    train(config_of(checkpoint, "good.txt"), tmp_path / "run", quiet=True)
    assert load_params(tmp_path / "run")[2] == 1
    with pytest.raises(UserError, match=SAYS):
        train(config_of(checkpoint, "bad.txt"), tmp_path / "other", quiet=True)
    data = config_of(checkpoint, "bad.txt").data
    assert make_batches(data, BatchSpec(8, 1, 0)).next()["targets"].max() == 40


def test_export(checkpoint: pathlib.Path, tmp_path: pathlib.Path) -> None:
    assert export_hf.main([f"--checkpoint={checkpoint}", f"--out={tmp_path}/out"]) == 0
    name = "tokenizer.json"
    assert (tmp_path / "out" / name).read_bytes() == (checkpoint.parent / "source" / name).read_bytes()
