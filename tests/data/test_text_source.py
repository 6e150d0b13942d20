"""Warnings about texts that spell control tokens."""

import json
import pathlib

import pytest
import tokenizers

from fam_jax.data.sources import TextSource
from fam_jax.data.vocabulary import load_vocabulary


class Texts(list[str]):
    fingerprint = "some texts"


@pytest.fixture
def path(tmp_path: pathlib.Path) -> str:
    """Write a tokenizer of single letters with two special tokens."""
    letters = {letter: id_ for id_, letter in enumerate("abc<|>eots")}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(letters, []))
    tokenizer.add_special_tokens(["<|eot|>", "<s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|eot|>"}))
    return str(tmp_path / "tokenizer.json")


def test_the_log_tells_once_of_each_control_token_that_a_text_spells(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    vocabulary = load_vocabulary(path)
    source = TextSource(Texts(["abc", "a<|eot|>b", "<|eot|>", "<s>a", "<|eo"]), vocabulary)
    assert [len(example.ids) for example in source.read([0, 4])] == [4, 5]
    assert not caplog.records
    examples = [*source.read([1, 2, 3, 1])]
    assert examples[0].ids.tolist() == [0, vocabulary.eos_id, 1, vocabulary.eos_id]
    told = [record.getMessage() for record in caplog.records]
    assert [message.partition(",")[0] for message in told] == ["a text spells <|eot|>", "a text spells <s>"]
    assert all("docs/data.md" in message for message in told)
