"""The scripts of examples/ run, and so does the decoder example of the README.

The fourth script, running_mean.py, is tested with the other memories (tests/memories).
"""

import json
import pathlib
import re
import types
from collections.abc import Iterator
from importlib import util

import jax
import pytest
import tokenizers

import fam_jax
from fam_jax.checkpoint import saved_steps
from fam_jax.hf import Folder, export_folder, hf_config
from fam_jax.memories.window import FullConfig
from tests.model.tiny import params_of

EXAMPLES = pathlib.Path(__file__).resolve().parent.parent / "examples"
TEXT = "The cat sat on the mat, and the dog sat beside it.\n"


@pytest.fixture(scope="module", autouse=True)
def one_device() -> Iterator[None]:
    """Run the examples on one device, which compiles faster."""
    first = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: first)
        yield


def example(name: str) -> types.ModuleType:
    spec = util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("books")
    for name, repeats in {"train": 60, "heldout": 20}.items():
        (folder / name).mkdir()
        for number in range(8):
            (folder / name / f"{number}.txt").write_text(TEXT * repeats)
    return folder


@pytest.fixture(scope="module")
def run(books: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Return the run that train_on_folder.py makes."""
    workdir = tmp_path_factory.mktemp("runs") / "book"
    example("train_on_folder").main([f"{books}/train", f"{books}/heldout", str(workdir), "--steps=2"])
    return workdir


def test_train_on_a_folder(run: pathlib.Path) -> None:
    assert saved_steps(run)[-1] == 2
    found = json.loads((run / "evaluations" / "2" / "text.json").read_text())
    assert found["metrics"]["loss"] > 0
    assert "zeroed/loss" in found["scalars"]


def test_stream_a_text(run: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    book = tmp_path / "book.txt"
    book.write_text(TEXT * 30)
    example("stream_text").main([str(run), str(book), "Who sat? ", "Where? ", "--max_tokens=5"])
    lines = capsys.readouterr().out
    assert f"read {len(TEXT) * 30:,} tokens into a state of " in lines
    assert "Who sat? " in lines and "Where? " in lines
    assert fam_jax.TextModel.restore(run).load(book.with_suffix(".memory")).tokens_read == len(TEXT) * 30


def test_add_a_memory_to_an_open_model(
    books: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([TEXT], vocab_size=300, special_tokens=["</s>"])
    model = fam_jax.ModelConfig(
        vocab_size=304, num_layers=2, model_dim=16, num_heads=2, num_kv_heads=2, head_dim=8, ff_dim=32,
        memory=FullConfig(context=512),
    )  # fmt: skip
    source, out = tmp_path / "llama", tmp_path / "out"

    def add_tokenizer(folder: pathlib.Path) -> None:
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))

    export_folder(source, model, params_of(model), hf_config(model), write_more=add_tokenizer)
    example("add_memory_to_open_model").main(
        [str(source), f"{books}/train", str(out), "--block_size=16", "--steps=2"]
    )
    assert f"exported with its memory to {out / 'exported'}" in capsys.readouterr().out
    assert (out / "exported" / "memory.safetensors").exists()
    assert Folder(out / "exported").names == Folder(source).names


def test_the_decoder_example_of_the_readme(tmp_path: pathlib.Path) -> None:
    readme = (EXAMPLES.parent / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    assert len(blocks) == 2
    values: dict = {}
    exec(blocks[1], values)
    assert values["logits"].shape == (2, 1, values["model"].config.vocab_size)
    assert values["state"].tokens_read.tolist() == [101, 101]
