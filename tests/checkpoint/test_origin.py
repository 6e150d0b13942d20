"""The vocabulary and the base of a run: they may move, but no other file may take their place."""

import dataclasses
import json
import pathlib
from typing import Any

import jax.numpy as jnp
import pytest

from fam_jax.checkpoint import CheckpointError, Checkpoints, find_vocabulary, read_config, steps
from fam_jax.checkpoint.origin import file_digest, saved_origin
from fam_jax.config import Config, DataConfig, TrainConfig, resolve


def save(folder: pathlib.Path, config: Config, number: int = 1, value: float = 0.0, **how: Any) -> None:
    with Checkpoints(folder, config=dataclasses.asdict(config), keep=9, **how) as checkpoints:
        checkpoints.save(number, {"params": {"x": jnp.full(3, value)}}, {})


def of(vocabulary: pathlib.Path, base: str = "") -> Config:
    return Config(data=DataConfig(vocabulary=str(vocabulary)), train=TrainConfig(init_from=base))


def found(folder: pathlib.Path) -> str:
    """Return the vocabulary that evaluation and generation load."""
    return find_vocabulary(resolve(read_config(folder)), folder).data.vocabulary


@pytest.fixture
def model(tmp_path: pathlib.Path) -> pathlib.Path:
    file = tmp_path / "v.model"
    file.write_text("one")
    return file


@pytest.fixture
def run(model: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    save(tmp_path / "run", of(model))
    return tmp_path / "run"


def test_a_run_carries_its_vocabulary(run: pathlib.Path, model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    assert saved_origin(run) == {"vocabulary": file_digest(model)}  # type: ignore[arg-type]
    assert read_config(run)["data"]["vocabulary"] == str(model)
    model.write_text("two")
    moved = run.rename(tmp_path / "moved")
    assert found(moved) == str(moved / "vocabulary" / "v.model")
    assert pathlib.Path(found(moved)).read_text() == "one"


def test_what_lies_beside_a_tokenizer_is_carried_too(tmp_path: pathlib.Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "x"}')
    (tmp_path / "mine.json").write_text("{}")
    save(tmp_path / "run", of(tmp_path / "mine.json"))
    names = {path.name for path in (tmp_path / "run" / "vocabulary").iterdir()}
    assert names == {"mine.json", "tokenizer_config.json"}


def test_what_lies_beside_a_tokenizer_must_say_the_same(tmp_path: pathlib.Path) -> None:
    """It names special tokens and adds tokens, so other files would give other ids."""
    file, settings = tmp_path / "tokenizer.json", tmp_path / "tokenizer_config.json"
    file.write_text("{}")
    settings.write_text('{"eos_token": "x", "bos_token": "y"}')
    save(tmp_path / "run", of(file))
    before = saved_origin(tmp_path / "run")  # type: ignore[arg-type]
    assert before.keys() == {"vocabulary", "vocabulary_settings", "vocabulary_class"}
    # Another layout says the same, and other files say nothing about ids.
    settings.write_text('{\n "bos_token": "y", "eos_token": "x", "chat_template": "y"}')
    (tmp_path / "generation_config.json").write_text("{}")
    save(tmp_path / "run", of(file), 2)
    assert saved_origin(tmp_path / "run") == before  # type: ignore[arg-type]
    for name, content in (("tokenizer_config.json", '{"eos_token": "z"}'), ("added_tokens.json", '{"a": 3}')):
        kept = settings.read_text()
        (tmp_path / name).write_text(content)
        with pytest.raises(CheckpointError, match="special tokens"):
            save(tmp_path / "run", of(file), 3)
        copy = tmp_path / "run" / "vocabulary"
        carried = (copy / "tokenizer_config.json").read_text()
        (copy / name).write_text(content)
        with pytest.raises(CheckpointError, match="special tokens"):
            found(tmp_path / "run")
        settings.write_text(kept)
        (copy / "tokenizer_config.json").write_text(carried)


@pytest.mark.parametrize(
    ("config", "declared", "same"),
    [
        ({"model_type": "mistral"}, "LlamaTokenizer", False),
        ({"model_type": "qwen2"}, "LlamaTokenizerFast", False),
        ({"model_type": "gemma2"}, None, False),
        ({"tokenizer_class": "Qwen2Tokenizer"}, None, False),
        ({"model_type": "gemma2"}, "GemmaTokenizer", True),
        ({"model_type": "llama"}, None, True),
    ],
)
def test_a_model_that_decides_how_a_tokenizer_is_read_is_a_part_of_it(
    tmp_path: pathlib.Path, config: dict, declared: str | None, same: bool
) -> None:
    """The tokenizer moves without the config.json that it lay beside."""
    for place in ("with", "without"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "tokenizer.json").write_text("{}")
        settings = {} if declared is None else {"tokenizer_class": declared}
        (tmp_path / place / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "with" / "config.json").write_text(json.dumps(config))
    save(tmp_path / "run", of(tmp_path / "with" / "tokenizer.json"))
    assert found(tmp_path / "run") == str(tmp_path / "run" / "vocabulary" / "tokenizer.json")
    moved = of(tmp_path / "without" / "tokenizer.json")
    if same:
        save(tmp_path / "run", moved, 2)
    else:
        with pytest.raises(CheckpointError, match="special tokens or its class"):
            save(tmp_path / "run", moved, 2)


def test_another_vocabulary_is_refused_by_name(run: pathlib.Path, model: pathlib.Path) -> None:
    model.write_text("two")
    with pytest.raises(
        CheckpointError, match=r"vocabulary '.*v\.model': is not the one that the run in"
    ) as caught:
        save(run, of(model), 2)
    assert "\n" not in str(caught.value)
    (run / "vocabulary" / "v.model").write_text("three")
    with pytest.raises(CheckpointError, match=r"v\.model': is not the one"):
        found(run)
    model.write_text("one")
    assert found(run) == str(model)
    save(run, of(model), 2)


def test_a_vocabulary_may_move(run: pathlib.Path, model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    other = model.rename(tmp_path / "w.model")
    save(run, of(other), 2)
    assert read_config(run)["data"]["vocabulary"] == str(other)
    other.write_text("two")
    with pytest.raises(CheckpointError, match=r"w\.model': is not the one"):
        save(run, of(other), 3)
    config = json.loads((run / "config.json").read_text())
    assert "history" not in config, "the run computes what it did"


def test_a_run_resumes_with_its_own_copy(run: pathlib.Path, model: pathlib.Path) -> None:
    model.unlink()
    config = find_vocabulary(of(model), run, resuming=True)
    assert config.data.vocabulary == str(run / "vocabulary" / "v.model")
    save(run, config, 2)
    assert found(run) == config.data.vocabulary


def test_a_name_is_no_file(tmp_path: pathlib.Path) -> None:
    for number, name in enumerate(("passkey", "bytes")):
        save(tmp_path / name, Config(data=DataConfig(vocabulary=name)))
        assert (saved_origin(tmp_path / name), found(tmp_path / name)) == ({}, name)  # type: ignore[arg-type]
        with pytest.raises(CheckpointError, match=r"data\.vocabulary was"):
            save(tmp_path / name, Config(data=DataConfig(vocabulary=("bytes", "passkey")[number])), 2)


def test_another_vocabulary_of_a_data_task_is_refused(tmp_path: pathlib.Path) -> None:
    config = Config(data=DataConfig(task="seqio:any"))
    save(tmp_path / "old", config)
    save(tmp_path / "run", config, task_vocabulary="a")
    for folder in ("run", "old"):  # a run of an earlier version learns the digest
        save(tmp_path / folder, config, 2, task_vocabulary="a")
        save(tmp_path / folder, config, 3)
        with pytest.raises(CheckpointError, match="was trained with another vocabulary than the data task"):
            save(tmp_path / folder, config, 4, task_vocabulary="b")
    with pytest.raises(CheckpointError, match="another vocabulary than the data task"):
        save(tmp_path / "fork", config, forked_from=f"{tmp_path}/run/2", task_vocabulary="b")


def test_a_run_without_digests_goes_on(
    model: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs of earlier versions: the same path, or another path of the same file."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(steps, "settle_origin", lambda *_: ({}, []))
        patch.setattr(steps, "keep_copies", lambda *_: None)
        save(run, of(model))
    assert saved_origin(run) == {}  # type: ignore[arg-type]
    assert found(run) == str(model)
    copy = tmp_path / "copy.model"
    copy.write_text("two")
    with pytest.raises(CheckpointError, match=r"data\.vocabulary was .*v\.model.*, is .*copy\.model"):
        save(run, of(copy), 2)
    copy.write_text("one")
    save(run, of(copy), 2)
    assert saved_origin(run) == {"vocabulary": file_digest(copy)}  # type: ignore[arg-type]


def test_a_base_may_move_with_its_run(tmp_path: pathlib.Path) -> None:
    project = tmp_path / "project"
    base, run = project / "base", project / "run"
    tokenizer = base / "huggingface" / "tokenizer.json"
    tokenizer.parent.mkdir(parents=True)
    tokenizer.write_text("{}")
    (base / "huggingface" / "config.json").write_text('{"model_type": "llama"}')
    save(base, of(tokenizer), 3, value=1.0)
    save(run, of(tokenizer, str(base)))
    assert {path.name for path in (run / "huggingface").iterdir()} == {"config.json", "tokenizer.json"}
    assert not (run / "vocabulary").exists()
    second = project / "second"
    (run / "huggingface" / "source.json").write_text('{"source": "there"}')
    save(second, of(tokenizer, str(run)))
    # Its base is no longer what was imported.
    assert json.loads((second / "huggingface" / "source.json").read_text()) == {"source": None}
    assert json.loads((run / "huggingface" / "source.json").read_text()) == {"source": "there"}

    moved = project.rename(tmp_path / "moved")
    base, run = moved / "base", moved / "run"
    assert found(run) == str(run / "huggingface" / "tokenizer.json")
    config = of(base / "huggingface" / "tokenizer.json", str(base / "3"))
    save(run, config, 2)
    assert read_config(run)["train"]["init_from"] == str(base / "3")

    other = moved / "other"
    save(other, of(base / "huggingface" / "tokenizer.json"), 3, value=2.0)
    for name in (other, moved / "missing"):
        with pytest.raises(CheckpointError, match=r"train\.init_from was .*base/3.*, is "):
            save(run, of(base / "huggingface" / "tokenizer.json", str(name)), 3)


def test_companions_of_another_vocabulary_stay_with_the_base(
    model: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    tokenizer = tmp_path / "base" / "huggingface" / "tokenizer.json"
    tokenizer.parent.mkdir(parents=True)
    tokenizer.write_text("{}")
    save(tmp_path / "base", of(tokenizer))
    save(tmp_path / "run", of(model, str(tmp_path / "base")))
    assert not (tmp_path / "run" / "huggingface").exists()
    assert found(tmp_path / "run") == str(tmp_path / "run" / "vocabulary" / "v.model")
