"""All config files resolve, and a config that is written can be read back."""

import dataclasses
import importlib
import json
import pathlib
import re
import types

import ml_collections
import pytest

from fam_jax.config import (
    Config,
    ConfigError,
    changed,
    default_config,
    memory_config,
    resolve,
    to_json,
)
from fam_jax.memories.fam import FamConfig
from fam_jax.memories.registry import memory_kinds
from fam_jax.memories.window import BlockSlidingWindowConfig
from fam_jax.training.init_from import check_named
from launch.cli import load_config
from launch.train import parse_arguments

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG_FILES = sorted(
    path for path in (ROOT / "configs").glob("*.py") if "def get_config" in path.read_text()
)

NEED_A_BASE = ("retrofit", "instruct")


def test_config_dict_and_json_round_trips() -> None:
    config = changed(
        Config(),
        model={"num_layers": 5},
        data={"stage_blocks": (3, 7)},
        optimizer={"epsilon": 1e-30},
    )
    assert resolve(json.loads(to_json(config))) == config
    assert resolve(ml_collections.ConfigDict(dataclasses.asdict(config))) == config
    assert resolve(default_config().lock()) == Config()


@pytest.mark.parametrize("kind", memory_kinds())
def test_each_kind_of_memory_can_be_chosen(kind: str) -> None:
    values = default_config()
    values.model.memory = memory_config(kind)
    config = resolve(values)
    assert config.model.memory.kind == kind
    assert resolve(json.loads(to_json(config))) == config


def test_updating_a_memory_group_with_another_kind_is_refused() -> None:
    """`ConfigDict.update` merges groups, so fields of the old kind remain."""
    values = default_config()
    values.model.update(memory=memory_config("bswa"))
    with pytest.raises(
        ConfigError, match=r"is a field of fam.*, but the kind is bswa.*config.model.memory = memory"
    ):
        resolve(values)


def load(path: pathlib.Path) -> types.ModuleType:
    return importlib.import_module(f"configs.{path.stem}")


def arguments(path: pathlib.Path) -> list[str]:
    """Return the arguments that the docstring of a config file names, such as `:smoke`."""
    return re.findall(r"`(?:configs/\w+\.py)?:(\w+)`", load(path).__doc__ or "")


@pytest.mark.parametrize(
    ("path", "argument"),
    [
        (path, argument)
        for path in CONFIG_FILES
        for argument in [*([] if path.stem in NEED_A_BASE else [None]), *arguments(path)]
    ],
    ids=lambda value: getattr(value, "stem", str(value)),
)
def test_config_files_resolve(path: pathlib.Path, argument: str | None) -> None:
    get_config = load(path).get_config
    resolve(get_config() if argument is None else get_config(argument))


@pytest.mark.parametrize(
    "path", [path for path in CONFIG_FILES if path.stem not in NEED_A_BASE], ids=lambda p: p.stem
)
def test_commands_in_docstrings_name_all_that_training_needs(path: pathlib.Path) -> None:
    lines = (load(path).__doc__ or "").replace("\\\n", " ").splitlines()
    commands = [line.split()[3:] for line in lines if line.startswith("    python -m launch.train ")]
    assert commands
    for command in commands:
        given = parse_arguments(command)
        config = load_config(given.config, given.overrides)
        check_named(config)
        assert config.data.vocabulary


def test_the_passkey_models_differ_in_their_memory_and_the_first_stage_only() -> None:
    path = ROOT / "configs" / "passkey.py"
    assert {"fam", "bswa_m1", "bswa_m1_sg", "fam_bounded", "smoke"} == set(arguments(path))
    get_config = load(path).get_config
    seen = {}
    for variant in ("fam", "bswa_m1", "bswa_m1_sg"):
        config = resolve(get_config(variant))
        seen[variant] = config.model.memory
        # Windows learn from fillers that they span.
        stages = {"stage_blocks": (2, 4, 8, 18), "min_filler_blocks": 1}
        assert config.data.stage_blocks == ((2, 4, 8, 18) if variant == "fam" else (1, 2, 4, 8, 18))
        assert changed(config, model={"memory": FamConfig()}, data=stages) == changed(
            resolve(get_config()), model={"memory": FamConfig()}
        )
    assert seen == {
        "fam": FamConfig(length=8, segments=0),
        "bswa_m1": BlockSlidingWindowConfig(segments=1),
        "bswa_m1_sg": BlockSlidingWindowConfig(segments=1, stop_gradient=True),
    }
    with pytest.raises(
        ConfigError, match="bswa_m2: expected one of fam, bswa_m1, bswa_m1_sg, fam_bounded and any of smoke"
    ):
        get_config("bswa_m2")
    bounded = resolve(get_config("fam_bounded"))
    assert changed(
        bounded,
        model={"memory": FamConfig(length=8, segments=0)},
        data={"late_keys": 0.0, "questions": 1},
        train={"carry": "none"},
    ) == resolve(get_config())
