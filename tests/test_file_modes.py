"""Every file that is written has the mode that the umask gives."""

import dataclasses
import os
import pathlib
import stat
from collections.abc import Iterator

import jax.numpy as jnp
import pytest

from fam_jax.checkpoint import Checkpoints
from fam_jax.checkpoint.new_file import output_file
from fam_jax.config import Config, DataConfig
from fam_jax.config.overrides import Override
from fam_jax.generation.state_file import save_state
from fam_jax.generation.streaming import Streamer
from fam_jax.hf import export_adapter, export_model, import_model
from tests.generation.tiny import CONFIG
from tests.hf.recorded import DATA
from tests.hf.test_lora import run_with_lora
from tests.model.tiny import params_of


@pytest.fixture(params=[0o022, 0o027], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def assert_modes(folder: pathlib.Path, umask: int) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in files}
    wrong = {name: oct(mode) for name, mode in modes.items() if mode != 0o666 & ~umask}
    assert not wrong


def test_checkpoints(umask: int, tmp_path: pathlib.Path) -> None:
    (tmp_path / "mine.json").write_text("{}")
    (tmp_path / "mine.json").chmod(0o600)  # the copy does not keep it
    config = Config(data=DataConfig(vocabulary=str(tmp_path / "mine.json")))
    with Checkpoints(tmp_path / "run", config=dataclasses.asdict(config), keep=1) as checkpoints:
        checkpoints.save(1, {"params": {"x": jnp.ones((3, 4))}}, {}, wait=True)
        assert_modes(tmp_path / "run", umask)


def test_imports_and_exports(umask: int, tmp_path: pathlib.Path) -> None:
    overrides = [Override("config.model.block_size", "8"), Override("config.model.memory.kind", "fam")]
    import_model(DATA / "gemma2", tmp_path / "ckpt", overrides, tokenizer="none")
    assert_modes(tmp_path / "ckpt", umask)
    export_model(tmp_path / "ckpt", tmp_path / "out", shard_bytes=10_000)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"memory.safetensors", "model.safetensors.index.json", "config.json"} < names
    assert_modes(tmp_path / "out", umask)


def test_adapters(umask: int, tmp_path: pathlib.Path) -> None:
    config, params, _ = run_with_lora("qwen3", length=2)
    export_adapter(tmp_path / "adapter", config, params)
    assert_modes(tmp_path / "adapter", umask)


def test_memories_and_outputs(umask: int, tmp_path: pathlib.Path) -> None:
    params = params_of(CONFIG)
    _, state = Streamer(CONFIG, params).read([[1, 2, 3]])
    with output_file(tmp_path / "out" / "results.json") as file:
        file.write(b"{}")
    save_state(tmp_path / "out" / "saved.memory", state, CONFIG, params)
    assert_modes(tmp_path / "out", umask)
