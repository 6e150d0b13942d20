"""Memories other than FAM work in training, generation, state files, meshes and local layers."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples.running_mean import RunningMeanConfig
from fam_jax import sharding
from fam_jax.config import Config, ConfigError
from fam_jax.generation.state_file import StateFileError, load_state, save_state
from fam_jax.generation.streaming import Streamer
from fam_jax.memories.autocompressor import AutoCompressorConfig
from fam_jax.memories.feedback import FeedbackConfig
from fam_jax.memories.rmt import RmtConfig
from fam_jax.model import Transformer
from fam_jax.training.loop import make_trainer
from tests.memories import toys
from tests.memories.cases import CASES, random_parameters
from tests.model.tiny import Reader
from tests.training.tiny import assert_close, changed, run, some_batch, start
from tests.variants import rest_slow

NEW = {
    "running_mean": RunningMeanConfig(segments=1, rate=0.5),
    "read_write": toys.ReadWriteConfig(segments=1),
    "associative": toys.AssociativeConfig(segments=0),
    "rmt": RmtConfig(length=2),
    "autocompressor": AutoCompressorConfig(length=2, summaries=2),
    "feedback": FeedbackConfig(segments=1),
}
OFTEN = "running_mean"
every_new_memory = pytest.mark.parametrize(
    "memory",
    [
        pytest.param(memory, id=name, marks=[] if name == OFTEN else pytest.mark.slow)
        for name, memory in NEW.items()
    ],
)


def training(memory: Any, **values: Any) -> Config:
    passing = 0.5 if memory.has_state else 0.0
    return changed(train__random_state_passing=passing, model__memory=memory, **values)


@every_new_memory
def test_training_learns_and_trains_every_parameter(memory: Any) -> None:
    """The loss on one batch falls, rows start from passed states, and the memory's own parameters move."""
    config = training(memory)
    state, metrics = start(config), []
    for _ in range(12):
        state, (found,) = run(config, 1, state)  # the same batch every time
        metrics.append(found)
    assert metrics[-1]["loss"] < 0.9 * metrics[0]["loss"]
    assert (max(found["from_saved_state"] for found in metrics) > 0) == memory.has_state
    assert metrics[0]["from_saved_state"] == 0
    moved = jax.tree.map(lambda old, new: bool((old != new).any()), start(config).params, state.params)
    assert all(jax.tree.leaves(moved)), moved
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(state.carried))


@pytest.mark.parametrize("name", rest_slow(NEW, [OFTEN]))
def test_a_sharded_step_is_the_step_of_one_device(name: str) -> None:
    passing = 1.0 if NEW[name].has_state else 0.0
    base = changed(train__random_state_passing=passing, model__memory=NEW[name])
    config = changed(base, mesh__data=2, mesh__fsdp=2, mesh__tensor=2, train__accumulation=2)
    expected, metrics = run(base, 2)
    trainer = make_trainer(config)
    state = jax.device_put(start(base), jax.tree.map(lambda leaf: leaf.sharding, trainer.state_shapes))
    for step in range(2):
        batch = jax.device_put(some_batch(step), sharding.batch_sharding(trainer.mesh))
        state, found = trainer.step(state, batch)
        assert_close(jax.tree.map(float, found), metrics[step], rtol=1e-4, atol=1e-6)
    for part in ("params", "carried"):
        assert_close(getattr(state, part), getattr(expected, part), rtol=1e-4, atol=1e-5)


@every_new_memory
def test_generation_goes_on_from_a_file(memory: Any, tmp_path: pathlib.Path) -> None:
    """Generation in one call, generation from a saved state, and one call of the model agree on the text."""
    model = dataclasses.replace(CASES["fam"].model, memory=memory, dtype="float32")
    streamer = Streamer(model, random_parameters(model))
    prompts = [np.arange(9, dtype=np.int32), np.arange(3, 9, dtype=np.int32)]
    logits, state = streamer.read(prompts, chunk_blocks=1)
    whole = streamer.generate(logits, state, max_tokens=12)
    for row, prompt in enumerate(prompts):
        text = np.concatenate([prompt, whole.tokens[row]])[None, :-1]
        seen = Reader(model, streamer.params, 1).read(text, aligned=True)[0, len(prompt) - 1 :]
        np.testing.assert_array_equal(seen.argmax(axis=-1), whole.tokens[row])
    part = streamer.generate(logits, state, max_tokens=5)
    path = tmp_path / "some.state"
    save_state(path, part.state, model, streamer.params)
    loaded = load_state(path, model, streamer.params)
    rest = streamer.generate(part.logits, loaded, max_tokens=7)
    np.testing.assert_array_equal(np.concatenate([part.tokens, rest.tokens], axis=1), whole.tokens)
    other = dataclasses.replace(model, memory=dataclasses.replace(memory, segments=2))
    with pytest.raises(StateFileError, match=r"memory\.segments was [01], is 2"):
        load_state(path, other, streamer.params)


@pytest.mark.parametrize("name", ["running_mean", "associative"])
def test_local_layers_between(name: str) -> None:
    """Local layers have only the window; rows that rise pass through them unchanged."""
    model = dataclasses.replace(
        CASES[name].model,
        memory=dataclasses.replace(NEW[name], segments=1),
        num_layers=3,
        layer_pattern=("local", "global"),
        local_window=3,
    )
    tokens = np.random.default_rng(0).integers(0, 16, (2, 14)).astype(np.int32)
    with jax.enable_x64(True):
        params = random_parameters(model)
        whole = Reader(model, params, 2).read(tokens, aligned=True)
        one = Reader(model, params, 2)
        steps = [one.read(tokens[:, at : at + 1]) for at in range(14)]
    np.testing.assert_allclose(np.concatenate(steps, axis=1), whole, rtol=1e-10, atol=1e-11)


def test_a_top_that_feeds_the_bottom_needs_global_layers() -> None:
    model = dataclasses.replace(
        CASES["fam"].model, memory=NEW["read_write"], layer_pattern=("local", "global"), local_window=3
    )
    with pytest.raises(ConfigError, match=r"config\.model\.layer_pattern: .* needs global layers only"):
        Reader(model, {}, 1)


@pytest.mark.parametrize(("name", "field"), [("running_mean", "mean"), ("associative", "matrix")])
def test_sums_stay_float32_in_a_bfloat16_model(name: str, field: str) -> None:
    """T8: the sums grow or decay over any number of blocks."""
    model = dataclasses.replace(CASES[name].model, memory=NEW[name], dtype="bfloat16")
    state = jax.eval_shape(lambda: _read(model))
    assert getattr(state.layers, field).dtype == jnp.float32
    assert state.layers.keys.dtype == jnp.bfloat16


def _read(model: Any) -> Any:
    built = Transformer(model, rngs=nnx.Rngs(0))
    _, state = built(jnp.zeros((1, 9), jnp.int32), built.init_state(1), aligned=True)
    return built(jnp.zeros((1, 4), jnp.int32), state)[1]


def test_the_guide_shows_the_example_as_it_is() -> None:
    root = pathlib.Path(__file__).resolve().parents[2]
    source = (root / "examples" / "running_mean.py").read_text()
    assert len(source.splitlines()) <= 80
    assert f"```python\n{source}```\n" in (root / "docs" / "add_a_memory.md").read_text()
