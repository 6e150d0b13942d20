"""Retrofits of imported models: config, state, the parameters they start with, and mistakes."""

import dataclasses
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import retrofit
from configs.public_models import PUBLIC_MODELS
from fam_jax.checkpoint import CheckpointError
from fam_jax.config import Config, ConfigError, DataConfig, memory_config, resolve
from fam_jax.config.overrides import Override
from fam_jax.generation.streaming import Streamer
from fam_jax.hf import import_model
from fam_jax.memories.fam import FamConfig
from fam_jax.memories.window_cache import visible_blocks
from fam_jax.model import from_dict, lora
from fam_jax.model.layer_types import layer_types
from fam_jax.training.init_from import base_config
from fam_jax.training.loop import make_trainer
from fam_jax.training.optimizer import make_optimizer
from fam_jax.training.state import TrainState, init_state, model_structure
from tests.hf.recorded import DATA, LENGTH, recorded_logits, recorded_tokens
from tests.variants import rest_slow

# Parameters as the publishers count them; for Gemma 3 27B, those of its text model.
PARAMETERS = {
    "gemma2_2b": 2_614_341_888,
    "gemma2_27b": 27_227_128_320,
    "gemma3_27b": 27_009_346_304,
    "llama3_8b": 8_030_261_248,
    "mistral_7b": 7_248_023_552,
}
BLOCK = 4


def shapes_of(config: Config) -> TrainState:
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    return jax.eval_shape(lambda: init_state(config, optimizer, 0, None))


def paths(tree: Any) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.mark.parametrize("name", PUBLIC_MODELS)
def test_parameters_are_those_of_the_public_models(name: str) -> None:
    config = resolve(retrofit.get_config(f"{name},bswa"))
    frozen = lora.divide(shapes_of(config).params, config.lora)[1]
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(frozen)) == PARAMETERS[name]


@pytest.mark.parametrize("name", PUBLIC_MODELS)
def test_frozen_weights_take_two_bytes_each(name: str) -> None:
    """They have no gradients, no optimizer state and no float32 copies: only trained parameters are float32."""
    config = resolve(retrofit.get_config(name))
    state = shapes_of(config)
    trained, frozen = map(paths, lora.divide(state.params, config.lora))
    kinds = {name.rpartition("/")[2] for name in trained}
    assert kinds == {"lora_a", "lora_b", "initial_fam"}
    assert {str(leaf.dtype) for leaf in trained.values()} == {"float32"}
    wide = {path: leaf for path, leaf in frozen.items() if leaf.dtype != jnp.bfloat16}
    assert all("norm" in path or "bias" in path for path in wide)
    assert all(path.rpartition("/")[2] in ("kernel", "table") for path in frozen.keys() - wide.keys())
    assert sum(leaf.size for leaf in wide.values()) < 1e-3 * sum(leaf.size for leaf in frozen.values())
    optimizer = sum(leaf.size for leaf in jax.tree.leaves(state.optimizer))
    # Momentum and second moments. Factored moments would need 128 in both dimensions, but the rank is 64.
    assert optimizer < 2.01 * sum(leaf.size for leaf in trained.values())


@pytest.mark.parametrize("name", PUBLIC_MODELS)
def test_every_public_model_can_be_planned(name: str) -> None:
    config = resolve(retrofit.get_config(name))
    trainer = make_trainer(config, jax.devices()[:1])
    paths_of = paths(trainer.state_shapes.params)
    assert paths_of["memory/initial_fam"].shape == (64, config.model.model_dim)
    batch = {
        key: jax.ShapeDtypeStruct((config.train.batch_size, config.data.sequence_length), dtype)
        for key, dtype in (
            ("inputs", "int32"),
            ("targets", "int32"),
            ("weights", "float32"),
            ("answer", "bool"),
        )
    }
    state, metrics = jax.eval_shape(trainer.step, trainer.state_shapes, batch)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, trainer.state_shapes)
    assert metrics["loss"].shape == ()


def test_full_fine_tuning_is_one_field() -> None:
    values = retrofit.get_config("gemma2_2b")
    values.lora.rank = 0
    config = resolve(values)
    trained, frozen = lora.divide(shapes_of(config).params, config.lora)
    assert not frozen and {str(leaf.dtype) for leaf in jax.tree.leaves(trained)} == {"float32"}


def test_local_layers_keep_their_window_and_have_no_fam() -> None:
    for name, window, reach in (("gemma2_2b", 4096, 4), ("gemma3_27b", 1024, 1)):
        local, of_all = (
            memory.model for memory in layer_types(resolve(retrofit.get_config(name)).model).memories
        )
        assert (local.memory.kind, local.memory.window) == ("bswa", window)
        assert visible_blocks(local) == reach
        assert of_all.memory == FamConfig(segments=max(3, reach), length=64)


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that imports a recorded model, once, and returns its checkpoint."""
    made: dict[tuple[str, ...], pathlib.Path] = {}

    def checkpoint(name: str, **fields: str) -> pathlib.Path:
        key = (name, *fields.values())
        if key not in made:
            folder = tmp_path_factory.mktemp(name) / "ckpt"
            overrides = [
                Override(f"config.model.{field}", value)
                for field, value in {"block_size": "4", "memory.segments": "5", **fields}.items()
            ]
            import_model(DATA / name, folder, overrides, tokenizer="none")
            made[key] = folder
        return made[key]

    return checkpoint


def config_for(base: pathlib.Path, words: str = "", **model: Any) -> Config:
    values = retrofit.get_config(f"{base}{words}")
    values.model.block_size = BLOCK
    values.model.memory = memory_config("fam", **{"segments": 5, "length": 2} | model)
    if not values.model.memory.length:
        values.train.random_state_passing = 0.0
    values.data.vocabulary = "bytes"
    values.lora.update(rank=2, alpha=4.0)
    return resolve(values)


def start(config: Config) -> TrainState:
    return make_trainer(config, jax.devices()[:1]).create()


def last_logits(config: Config, params: Any) -> np.ndarray:
    """Return the logits after all recorded tokens."""
    return np.asarray(Streamer(config.model, params).read(list(recorded_tokens()))[0])


@pytest.mark.parametrize("name", rest_slow(["llama3", "gemma2", "gemma3", "qwen3"], ["gemma3"]))
def test_at_the_start_with_all_visible_it_is_the_original(imported: Any, name: str) -> None:
    """The recorded tokens cross the windows of local layers."""
    config = config_for(imported(name), length=0)
    state = start(config)
    assert any("lora_a" in path for path in paths(state.params))
    found = last_logits(config, lora.merge(state.params, config.lora))
    np.testing.assert_allclose(found, recorded_logits(name)[:, LENGTH - 1], rtol=0, atol=1e-4)


def with_random_updates(params: Any) -> Any:
    """Return parameters with LoRA updates of the size that long training gives."""
    rng = np.random.default_rng(0)
    flat = lora.flatten(params)
    updates = {path: leaf for path, leaf in flat.items() if path.endswith("lora_b")}
    drawn = {path: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32) for path, leaf in updates.items()}
    return lora.unflatten(flat | drawn)


@pytest.mark.parametrize("name", rest_slow(["gemma2", "mistral"], []))
def test_merged_is_applied(imported: Any, name: str) -> None:
    """The model has FAM, the tokens reach beyond every window, and the results agree to float32 rounding."""
    config = config_for(imported(name), segments=2)
    fresh = start(config).params
    params = with_random_updates(fresh)
    graphdef, abstract = model_structure(config)
    tokens = jnp.asarray(recorded_tokens())

    @jax.jit
    def apply(params: Any) -> jax.Array:
        model = nnx.merge(graphdef, from_dict(abstract, params))
        return model(tokens, model.init_state(len(tokens)))[0][:, -1]

    merged = last_logits(config, lora.merge(params, config.lora))
    np.testing.assert_allclose(apply(params), merged, rtol=1e-4, atol=1e-4)
    assert np.abs(merged - last_logits(config, lora.merge(fresh, config.lora))).max() > 0.1, (
        "the updates change nothing"
    )


@pytest.mark.parametrize("name", ["llama3", "gemma2"])
def test_the_initial_fam_begins_as_embeddings(imported: Any, name: str) -> None:
    config = config_for(imported(name))
    params = start(config).params
    factor = math.sqrt(config.model.model_dim) if config.model.scale_embeddings else 1.0
    table = factor * np.asarray(params["embedding"]["table"])
    assert config.model.scale_embeddings == (name == "gemma2")
    for vector in np.asarray(params["memory"]["initial_fam"]):
        assert np.isclose(table, vector, rtol=1e-6).all(axis=1).any()


def test_a_base_that_has_a_fam_keeps_it(imported: Any) -> None:
    base = imported("llama3", **{"memory.kind": "fam", "memory.length": "3"})
    values = retrofit.get_config(str(base))
    values.data.vocabulary = "bytes"
    config = resolve(values)
    assert (config.model.block_size, config.model.memory.segments, config.model.memory.length) == (4, 5, 3)


def test_texts_begin_as_those_of_the_base(imported: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for add_bos in (True, False):
        found = dataclasses.replace(base_config(str(imported("mistral"))), data=DataConfig(add_bos=add_bos))
        monkeypatch.setattr(retrofit, "base_config", lambda _, found=found: found)
        assert retrofit.get_config(str(imported("mistral"))).data.add_bos == add_bos


def test_the_config_is_that_of_the_base_except_for_its_memory(imported: Any) -> None:
    base = imported("mistral")
    config = config_for(base, ",bswa", length=0)
    assert (config.model.memory.window, config.train.init_from) == (0, str(base))
    assert config.model.remat == "full" and not config.model.tie_embeddings


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("", "configs/retrofit.py: expected one base, then any of bswa, smoke"),
        ("bswa", "configs/retrofit.py:bswa: expected one base"),
        ("llama3_8b,gemma2_2b", "expected one base"),
        ("llama_8b", "'llama_8b' is none of gemma2_2b"),
        ("no/such,folder", "expected one base"),
        ("no/such", "is not a folder, and 'no/such' is none of"),
    ],
)
def test_a_missing_base(arg: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        retrofit.get_config(arg)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_without_a_checkpoint(tmp_path: pathlib.Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        retrofit.get_config(str(tmp_path))


def test_a_window_that_the_segments_do_not_reach_is_an_error(imported: Any) -> None:
    with pytest.raises(ConfigError, match=r"model\.local_window: 6 exceeds what every token can see"):
        config_for(imported("gemma2"), segments=1)


@pytest.mark.parametrize("arg", ["smoke", "gemma3_27b,smoke", "mistral_7b,bswa,smoke"])
def test_smoke_is_small(arg: str) -> None:
    config = resolve(retrofit.get_config(arg))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes_of(config).params)) < 200_000
    assert config.train.steps == 3 and dataclasses.asdict(config.lora)["rank"] == 4
