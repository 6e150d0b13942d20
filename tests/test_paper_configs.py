"""The paper's models: their sizes, and the sharding of every array of their training states.

`python -m tests.test_paper_configs` rewrites the snapshots.
"""

import functools
import json
import math
import pathlib
from typing import Any

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from configs import fam_1b, fam_8b, fam_24b
from fam_jax import sharding
from fam_jax.config import Config, ConfigError, resolve
from fam_jax.training.optimizer import make_optimizer
from fam_jax.training.state import init_state

SNAPSHOTS = pathlib.Path(__file__).parent / "snapshots"
# Config, number of parameters without embeddings (table 3), chips.
MODELS = {"fam_1b": (fam_1b, 1.19e9, 32), "fam_8b": (fam_8b, 8.6e9, 64), "fam_24b": (fam_24b, 24.5e9, 128)}
ARGUMENTS = ("", "pretrain")


@functools.cache
def shapes_of(name: str, argument: str) -> tuple[Config, Any]:
    """Return the config, and the shapes of the training state."""
    config = resolve(MODELS[name][0].get_config(argument))
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    return config, jax.eval_shape(lambda: init_state(config, optimizer, 0, None))


def placed(name: str, argument: str) -> dict[str, Any]:
    """Return shape, type and mesh axes of every array by path."""
    config, shapes = shapes_of(name, argument)
    chips, inner = MODELS[name][2], config.mesh.data * config.mesh.tensor
    mesh = AbstractMesh(
        (config.mesh.data, config.mesh.fsdp or chips // inner, config.mesh.tensor),
        sharding.MESH_AXES,
        axis_types=(AxisType.Auto,) * 3,
    )
    placements = sharding.state_shardings(shapes, shapes.params, mesh)
    found = {}
    leaves = zip(jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(placements), strict=True)
    for (path, leaf), placement in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found[name] = [list(leaf.shape), str(leaf.dtype), [str(axis) for axis in placement.spec]]
    return found


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_paper(name: str) -> None:
    _, shapes = shapes_of(name, "pretrain")
    counts = {
        path: leaf.size
        for path, leaf in sharding_paths(shapes.params)
        if not path.startswith("embedding/") and "initial_fam" not in path
    }
    assert sum(counts.values()) == pytest.approx(MODELS[name][1], rel=0.01)


def sharding_paths(tree: Any) -> list[tuple[str, Any]]:
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


@pytest.mark.parametrize("argument", ARGUMENTS)
@pytest.mark.parametrize("name", MODELS)
def test_shardings_match_the_snapshot(name: str, argument: str) -> None:
    assert placed(name, argument) == json.loads(snapshot(name, argument).read_text())


@pytest.mark.parametrize("argument", ARGUMENTS)
@pytest.mark.parametrize("name", MODELS)
def test_no_large_array_is_replicated(name: str, argument: str) -> None:
    for path, (shape, _, axes) in placed(name, argument).items():
        spread = any(axis != "None" for axis in axes)
        # The state that is carried between steps is replicated; it has 28 MiB at 24B.
        assert spread or math.prod(shape) <= 2**24, path


@pytest.mark.parametrize("name", MODELS)
def test_the_papers_settings(name: str) -> None:
    config, _ = shapes_of(name, "")
    model, train = config.model, config.train
    assert (model.block_size, model.memory.length, model.memory.segments) == (1024, 64, 3)
    assert (train.batch_size, train.steps, train.random_state_passing) == (128, 50_000, 0.8)
    assert (config.lora.rank, model.vocab_size, config.data.sequence_length) == (64, 256_000, 8704)
    assert (config.optimizer.name, config.optimizer.beta1, config.optimizer.beta2) == ("adafactor", 0.9, 0.99)
    assert config.optimizer.learning_rate == (1e-4 if name == "fam_1b" else 3e-3)
    plain = resolve(MODELS[name][0].get_config("bswa"))
    assert (plain.model.memory.kind, plain.train.random_state_passing) == ("bswa", 0)


def test_an_unknown_word_is_named() -> None:
    with pytest.raises(ConfigError, match=r"configs/fam_1b.py:pretrained: .* got 'pretrained'"):
        fam_1b.get_config("pretrained")


def snapshot(name: str, argument: str) -> pathlib.Path:
    return SNAPSHOTS / f"sharding_{name}{'_' + argument if argument else ''}.json"


if __name__ == "__main__":
    SNAPSHOTS.mkdir(exist_ok=True)
    for model in MODELS:
        for word in ARGUMENTS:
            lines = [
                f"{json.dumps(path)}: {json.dumps(array)}" for path, array in placed(model, word).items()
            ]
            snapshot(model, word).write_text("{\n" + ",\n".join(lines) + "\n}\n")
