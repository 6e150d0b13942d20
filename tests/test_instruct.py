"""Configs that train on instructions: of an imported base, and of the paper's models with a mixture."""

import json
import pathlib

import pytest

from configs import instruct, retrofit
from configs.public_models import PUBLIC_MODELS
from fam_jax.config import Config, ConfigError, changed, resolve, to_json
from launch.config_file import load_config

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture
def base(tmp_path: pathlib.Path) -> pathlib.Path:
    """Return the folder of a base, whose name has commas, colons and quotes."""
    folder = tmp_path / "it's a,b:c"
    folder.mkdir()
    vocabulary = {"vocabulary": "bytes", "task": "text", "train_files": ("x",)}
    config = changed(Config(), model={"vocab_size": 264}, data=vocabulary)
    (folder / "config.json").write_text(to_json(config))
    return folder


def test_a_base_whose_path_has_commas_is_quoted(base: pathlib.Path) -> None:
    for quoted in (f'"{base}"', "'" + str(base).replace("'", "''") + "'"):
        for name in ("retrofit", "instruct"):
            config = load_config(f"configs/{name}.py:{quoted},bswa")
            assert config.train.init_from == str(base) and config.data.vocabulary == "bytes"
            assert config.model.memory.kind == "bswa" and config.lora.rank == 64
    for module in (retrofit, instruct):
        with pytest.raises(ConfigError, match=r"expected one base, .* quote a path with commas$"):
            module.get_config(f"{base},bswa")


def test_instructions_for_a_base(base: pathlib.Path) -> None:
    config = resolve(instruct.get_config(f'"{base}"'))
    assert (config.data.task, config.data.train_files) == ("instructions", ("data/train",))
    assert (config.model.memory.kind, config.lora.rank) == ("fam", 64)
    mixed = resolve(instruct.get_config(f'full,flan/*.parquet=0.7,"{base}","x,y"=0.3'))
    assert mixed.data.mixture == (("flan/*.parquet", 0.7), ("x,y", 0.3)) and mixed.data.train_files == ()
    assert (mixed.lora.rank, mixed.lora.random_base) == (0, False)
    assert mixed.optimizer.learning_rate < config.optimizer.learning_rate
    with pytest.raises(
        ConfigError, match=r"^configs/instruct\.py:.*runs/none.* is not a folder, and 'runs/none' is none"
    ):
        instruct.get_config("runs/none")


@pytest.mark.parametrize("name", PUBLIC_MODELS)
def test_a_smoke_run_of_every_public_model(name: str) -> None:
    config = resolve(instruct.get_config(f"{name},smoke"))
    assert config.lora.random_base and config.data.train_files == ("examples/instructions.jsonl",)
    assert not resolve(instruct.get_config(f"{name},full,smoke")).lora.random_base


@pytest.mark.parametrize("name", ["fam_1b", "fam_8b", "fam_24b"])
def test_the_papers_models_take_a_mixture(name: str) -> None:
    plain = load_config(f"{name}:bswa")
    config = load_config(f"{name}:gs://b/flan/*.parquet=0.6,bswa,'niv2/a,b.json'=0.4")
    assert config.data.mixture == (("gs://b/flan/*.parquet", 0.6), ("niv2/a,b.json", 0.4))
    data = {"task": "text", "mixture": (), "train_files": plain.data.train_files}
    assert changed(config, data=data | {"heldout_files": plain.data.heldout_files}) == plain
    small = load_config(f"{name}:smoke,examples/instructions.jsonl=1")
    assert small.data.task == "instructions" and small.model.vocab_size == 264
    assert load_config(f"{name}:smoke").data.task == "passkey"


def test_the_example_rows_are_of_many_shapes() -> None:
    from fam_jax.data.instructions import Reading, contents_of
    from fam_jax.data.records import Row

    lines = (ROOT / "examples" / "instructions.jsonl").read_text().splitlines()
    rows = [Row(f"line {number}", json.loads(line)) for number, line in enumerate(lines, 1)]
    assert all(contents_of(row, "auto", Reading(0)) for row in rows) and len(rows) >= 12
