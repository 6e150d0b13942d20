"""What ends a text: the end tokens of an imported model, stop strings, and special tokens by their text."""

import dataclasses
import json
import pathlib
from typing import Any

import pytest
import sentencepiece
import tokenizers

from fam_jax.checkpoint import CheckpointError, Checkpoints, end_ids, read_config
from fam_jax.config import Config, DataConfig, TrainConfig, UserError, resolve
from fam_jax.data.vocabulary import load_vocabulary, special_token_id
from fam_jax.generation.batch import Batch, HowToComplete
from fam_jax.generation.endings import Endings, TextWriter
from fam_jax.generation.text import TextModel
from tests.generation.tiny import CONFIG
from tests.model.tiny import params_of, variant

SIZE = 64
PROMPT = "w5 w9 w5 w40"


def save_tokenizer(path: pathlib.Path, *special: int) -> str:
    """Write a tokenizer of the words w0, w1, ..., some of them special tokens."""
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({f"w{i}": i for i in range(SIZE)}, unk_token="w0")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([f"w{token}" for token in special])
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    return str(path)


def save(folder: pathlib.Path, vocabulary: str, **train: Any) -> pathlib.Path:
    config = Config(
        model=variant(CONFIG, vocab_size=SIZE),
        data=DataConfig(vocabulary=vocabulary),
        train=TrainConfig(**train),
    )
    with Checkpoints(folder, config=dataclasses.asdict(config), keep=1) as checkpoints:
        checkpoints.save(1, {"params": params_of(config.model)}, {}, wait=True)
    return folder


def imported(folder: pathlib.Path, *special: int, **files: Any) -> pathlib.Path:
    """Write a checkpoint with the companions of an import, among them JSON files."""
    vocabulary = save_tokenizer(folder / "huggingface" / "tokenizer.json", *special)
    for name, content in files.items():
        (folder / "huggingface" / f"{name}.json").write_text(json.dumps(content))
    return save(folder, vocabulary)


def text_of(folder: pathlib.Path, **how: Any) -> tuple[str, int, str]:
    model = TextModel.restore(folder)
    found = model.generate(model.read(PROMPT), max_tokens=20, **how)
    return found.text, found.tokens, found.ended_by


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    """Return the ids that the model generates greedily; the first 5 are distinct."""
    text, tokens, ended_by = text_of(imported(tmp_path_factory.mktemp("plain")))
    assert (tokens, ended_by) == (20, "length")
    ids = [int(word[1:]) for word in text.split()]
    assert len({*ids[:5]}) == 5
    return ids


def words(ids: list[int]) -> str:
    return " ".join(f"w{token}" for token in ids)


def test_every_end_token_of_an_import_ends_a_text(tmp_path: pathlib.Path, chain: list[int]) -> None:
    found = {
        4: {"generation_config": {"eos_token_id": [99, chain[4], -1, 2**31, 10**12]}},
        3: {"generation_config": {"eos_token_id": chain[3]}, "config": {"eos_token_id": chain[4]}},
        2: {"config": {"eos_token_id": [chain[2]]}, "generation_config": {}},
        1: {"config": {"eos_token_id": None, "text_config": {"eos_token_id": chain[1]}}},
    }
    for place, files in found.items():
        folder = imported(tmp_path / str(place), **files)
        assert text_of(folder) == (words(chain[:place]), place + 1, "end")


def test_the_tokenizers_end_token_ends_a_text_too(tmp_path: pathlib.Path, chain: list[int]) -> None:
    settings = {"eos_token": f"w{chain[2]}"}
    folder = imported(tmp_path / "a", tokenizer_config=settings, generation_config={"eos_token_id": chain[4]})
    assert TextModel.restore(folder).end_ids == sorted([chain[2], chain[4]])
    assert text_of(folder) == (words(chain[:2]), 3, "end")


def test_a_run_inherits_the_end_tokens_of_its_base(tmp_path: pathlib.Path, chain: list[int]) -> None:
    base = imported(tmp_path / "base", generation_config={"eos_token_id": [chain[3]]})
    vocabulary = str(base / "huggingface" / "tokenizer.json")
    run = save(tmp_path / "run", vocabulary, init_from=str(base))
    for folder in (run, save(tmp_path / "second", vocabulary, init_from=f"{run}/1")):
        assert text_of(folder) == (words(chain[:3]), 4, "end")
    # Ids of another vocabulary mean other tokens.
    other = save(tmp_path / "other", save_tokenizer(tmp_path / "own.json"), init_from=str(base))
    assert text_of(other)[1:] == (20, "length")


@pytest.mark.parametrize("content", ["{", '{"eos_token_id": "</s>"}', '{"eos_token_id": [true]}'])
def test_end_tokens_that_cannot_be_read(tmp_path: pathlib.Path, content: str) -> None:
    folder = imported(tmp_path / "a")
    (folder / "huggingface" / "generation_config.json").write_text(content)
    with pytest.raises(
        CheckpointError, match=r"generation_config\.json: (cannot be read|eos_token_id: expected)"
    ):
        end_ids(resolve(read_config(folder)), folder)


def test_a_special_token_is_a_stop_by_its_text(tmp_path: pathlib.Path, chain: list[int]) -> None:
    stop = f"w{chain[3]}"
    folder = imported(tmp_path / "special", chain[3])
    hidden = [token for token in chain if token != chain[3]]
    assert text_of(folder) == (words(hidden), 20, "length")  # decoding leaves it out
    assert text_of(folder, stop=[stop]) == (words(chain[:3]), 4, stop)
    assert text_of(folder, stop=["never", f"w{chain[1]}", stop])[1:] == (2, f"w{chain[1]}")
    # In a batch too.
    model = TextModel.restore(folder)
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": PROMPT}))
    batch = Batch(tmp_path / "in.jsonl", tmp_path / "out.jsonl", {})
    batch.complete(model, HowToComplete(20, stop=(stop,)))
    record = json.loads((tmp_path / "out.jsonl").read_text())
    assert (record["text"], record["tokens"], record["ended_by"]) == (words(chain[:3]), 4, stop)


def test_special_token_ids(tmp_path: pathlib.Path) -> None:
    with (tmp_path / "a.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["a b c d e f g " * 9]), model_writer=file, vocab_size=14, model_type="char",
            control_symbols=["<turn>"], user_defined_symbols=["<shown>"], minloglevel=2,
        )  # fmt: skip
    vocabulary = load_vocabulary(str(tmp_path / "a.model"))
    assert special_token_id(vocabulary, "<turn>") == vocabulary.tokenizer.PieceToId("<turn>")
    assert special_token_id(vocabulary, "</s>") == vocabulary.eos_id
    for text in ("<shown>", "a", "missing", "<unk> "):
        assert special_token_id(vocabulary, text) is None
    vocabulary = load_vocabulary(save_tokenizer(tmp_path / "tokenizer.json", 7))
    assert [special_token_id(vocabulary, text) for text in ("w7", "w8", "<turn>")] == [7, None, None]
    assert special_token_id(load_vocabulary("bytes"), "</s>") is None


def test_stop_strings_are_found_across_calls() -> None:
    vocabulary = load_vocabulary("bytes")
    ids = vocabulary.encode("One, two. Three")
    for size in range(1, len(ids)):
        told: list[str] = []
        writer = TextWriter(vocabulary.decode, Endings(vocabulary, [1], ["o. Th", "\n"]), told.append)
        taken = 0
        for begin in range(0, len(ids), size):
            part = ids[begin : begin + size]
            count = writer.add(part)
            taken += count
            if writer.ended_by is not None:
                break
        assert (writer.finish(), writer.ended_by, taken) == ("One, tw", "o. Th", len("One, two. Th"))
        assert "".join(told) == "One, tw"
    with pytest.raises(UserError, match="stop: must not be an empty string"):
        Endings(vocabulary, [1], ["a", ""])
