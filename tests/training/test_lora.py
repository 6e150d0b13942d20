"""Training with LoRA: which parameters change, its cost, its base, resuming, and sharding."""

import dataclasses
import functools
import json
import pathlib
import signal
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fam_jax import sharding
from fam_jax.checkpoint import CheckpointError, load_params
from fam_jax.config import Config, UserError
from fam_jax.data import build
from fam_jax.memories.window import BlockSlidingWindowConfig
from fam_jax.model import lora
from fam_jax.restore import load_model
from fam_jax.training import loop
from fam_jax.training.loop import Interrupted, make_trainer, train
from tests.training.test_loop import stopping_at
from tests.training.tiny import ROWS, TINY, assert_close, changed, run, some_batch, start

LORA = changed(lora__rank=2, lora__alpha=4.0, train__random_state_passing=1.0)
TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}


def host(tree: Any) -> Any:
    return jax.tree.map(np.array, tree)


def test_frozen_parameters_stay_and_have_no_optimizer_state() -> None:
    config = changed(LORA, model__dtype="bfloat16")
    fresh = start(config)
    trained, frozen = host(lora.divide(fresh.params, config.lora))
    for name, leaf in lora.flatten(trained).items():
        assert leaf.dtype == np.float32
        assert (np.abs(leaf).max() == 0) == name.endswith("lora_b"), name
    assert frozen["layers"]["up"]["kernel"].dtype == frozen["embedding"]["table"].dtype == jnp.bfloat16
    assert frozen["final_norm"]["scale"].dtype == np.float32
    sizes = {leaf.size for leaf in jax.tree.leaves(fresh.optimizer)}
    assert max(sizes) <= max(leaf.size for leaf in jax.tree.leaves(trained))
    state, metrics = run(config, 3, fresh)
    after = host(lora.divide(state.params, config.lora))
    for name, leaf in lora.flatten(after[0]).items():
        assert (leaf != lora.flatten(trained)[name]).any(), name
    for name, leaf in lora.flatten(after[1]).items():
        assert leaf.tobytes() == lora.flatten(frozen)[name].tobytes(), name
        assert leaf.dtype == lora.flatten(frozen)[name].dtype
    assert metrics[0]["gradient_norm"] > 0


@pytest.mark.parametrize(("base_dtype", "stored"), [("model", "float32"), ("bfloat16", "bfloat16")])
def test_the_dtype_of_the_base(base_dtype: str, stored: str) -> None:
    params = start(changed(LORA, lora__base_dtype=base_dtype)).params
    assert params["layers"]["down"]["kernel"].dtype == stored
    assert params["layers"]["down"]["lora_a"].dtype == "float32"


@pytest.mark.slow
def test_accumulation_changes_nothing() -> None:
    """Compare two steps, the second from the saved FAM."""
    whole, metrics = run(LORA, 2)
    parts, same = run(changed(LORA, train__accumulation=4), 2)
    assert_close(parts.params, whole.params, **TOLERANCE)
    assert_close(parts.optimizer, whole.optimizer, **TOLERANCE)
    assert_close(same, metrics, **TOLERANCE)


@pytest.mark.slow
def test_a_sharded_step_is_the_step_of_one_device() -> None:
    expected, metrics = run(LORA, 2)
    config = changed(LORA, mesh__data=2, mesh__fsdp=2, mesh__tensor=2)
    trainer = make_trainer(config)
    state = jax.device_put(start(LORA), jax.tree.map(lambda leaf: leaf.sharding, trainer.state_shapes))
    for step in range(2):
        batch = jax.device_put(some_batch(step), sharding.batch_sharding(trainer.mesh))
        state, found = trainer.step(state, batch)
        assert_close(jax.tree.map(float, found), metrics[step], rtol=1e-4, atol=1e-6)
    for part in ("params", "optimizer", "carried"):
        assert_close(getattr(state, part), getattr(expected, part), rtol=1e-4, atol=1e-5)
    specs = jax.tree.map(lambda leaf: tuple(leaf.sharding.spec), state.params["layers"])
    assert specs["query"]["lora_a"] == (None, "fsdp", None)
    assert specs["query"]["lora_b"] == (None, "fsdp", "tensor", None)
    assert specs["output"]["lora_a"] == (None, "tensor", None, "fsdp")
    assert specs["output"]["lora_b"] == (None, None, "fsdp")
    moments = [
        tuple(leaf.sharding.spec)
        for path, leaf in jax.tree.leaves_with_path(state.optimizer)
        if jax.tree_util.keystr(path).endswith("['output']['lora_a']") and leaf.ndim == 4
    ]
    assert moments and set(moments) == {specs["output"]["lora_a"]}


def on_one_device(config: Config) -> Any:
    return make_trainer(config, devices=jax.devices()[:1])


def compiled(config: Config) -> Any:
    trainer = on_one_device(config)
    batch = {name: jax.ShapeDtypeStruct(rows.shape, rows.dtype) for name, rows in some_batch().items()}
    return trainer.step.lower(trainer.state_shapes, batch).compile()  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_step_costs_less_than_one_of_full_training() -> None:
    """By XLA's own count, a step has fewer operations, less state and less temporary memory."""
    wide = changed(TINY, model__model_dim=128, model__ff_dim=512, model__head_dim=32, model__remat="dots")
    full, adapted = compiled(wide), compiled(changed(wide, lora__rank=4))
    flops = [step.cost_analysis()["flops"] for step in (full, adapted)]
    # A third of the products with weights are their gradients; attention and logits cost the same as before.
    assert flops[1] < 0.8 * flops[0]
    full_memory, memory = full.memory_analysis(), adapted.memory_analysis()
    assert memory.argument_size_in_bytes < 0.6 * full_memory.argument_size_in_bytes
    assert memory.temp_size_in_bytes < full_memory.temp_size_in_bytes


# The common config of a base and of the runs that adapt it.
BASE = changed(
    model__vocab_size=64,
    model__block_size=8,
    model__num_layers=1,
    data__digits=1,
    data__stage_blocks=(2, 3),
    data__max_stage_steps=3,
    train__steps=3,
    train__batch_size=ROWS // 2,
    train__log_every=1,
    train__checkpoint_every=2,
)


@pytest.fixture(scope="module", autouse=True)
def one_device() -> Any:
    """Run loops on the first of the simulated devices; compile once per config."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_trainer", functools.cache(on_one_device))
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("base") / "run"
    train(BASE, str(folder), quiet=True)
    return folder


def adapting(base: pathlib.Path | str, **changes: Any) -> Config:
    values = {"lora__rank": 2, "memory__segments": 0, "train__steps": 5, **changes}
    return changed(BASE, train__init_from=str(base), **values)


def params_at(folder: pathlib.Path, step: int | None = None) -> dict[str, Any]:
    return lora.flatten(load_params(folder, step)[0])


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, leaf in found.items():
        np.testing.assert_array_equal(leaf, expected[name], err_msg=name)


@pytest.fixture(scope="module")
def adapted(base: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("adapted") / "run"
    train(adapting(base), str(folder), quiet=True)
    return folder


def test_a_run_begins_with_the_parameters_of_another(base: pathlib.Path, adapted: pathlib.Path) -> None:
    before, after = params_at(base), params_at(adapted)
    kept = {name for name in before if name != "memory/initial_fam"}
    assert_equal({name: after[name] for name in kept}, {name: before[name] for name in kept})
    assert (after["memory/initial_fam"] != before["memory/initial_fam"]).any()
    assert all(np.abs(after[name]).max() > 0 for name in after if name.endswith("lora_b"))


def test_stopped_and_resumed_it_is_the_run_that_was_not(
    base: pathlib.Path, adapted: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = adapting(base)
    with monkeypatch.context() as patch:
        patch.setattr(build, "PasskeyCurriculum", stopping_at(3, signal.SIGTERM))
        with pytest.raises(Interrupted):
            train(config, str(tmp_path / "run"), quiet=True)
    train(config, str(tmp_path / "run"), quiet=True)
    assert_equal(params_at(tmp_path / "run", 5), params_at(adapted, 5))


def test_restored_for_inference_it_is_the_plain_model(adapted: pathlib.Path) -> None:
    config, params, step = load_model(adapted)
    assert step == 5
    stored = load_params(adapted)[0]
    assert_equal(lora.flatten(params), lora.flatten(lora.merge(stored, config.lora)))
    assert not any("lora" in name for name in lora.flatten(params))


@pytest.mark.slow
def test_an_adapted_model_may_be_a_base(adapted: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Fine-tune the merged model in full, at a learning rate of zero."""
    config = adapting(adapted, lora__rank=0, optimizer__learning_rate=0.0, train__steps=1)
    train(config, str(tmp_path / "run"), quiet=True)
    assert_equal(params_at(tmp_path / "run"), lora.flatten(load_model(adapted)[1]))


@pytest.mark.slow
def test_a_step_of_the_base_may_be_named(base: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = adapting(base, train__steps=1)
    config = changed(config, train__init_from=f"{base}/2")
    train(config, str(tmp_path / "run"), quiet=True)
    before = params_at(base, 2)
    assert (before["layers/up/kernel"] != params_at(base, 3)["layers/up/kernel"]).any()
    np.testing.assert_array_equal(params_at(tmp_path / "run")["layers/up/kernel"], before["layers/up/kernel"])


@pytest.mark.slow
def test_a_base_without_fam_gets_one(tmp_path: pathlib.Path) -> None:
    train(
        changed(BASE, model__memory=BlockSlidingWindowConfig(), train__steps=1),
        str(tmp_path / "base"),
        quiet=True,
    )
    train(adapting(tmp_path / "base", train__steps=1), str(tmp_path / "run"), quiet=True)
    found = params_at(tmp_path / "run")
    assert found["memory/initial_fam"].shape == (2, BASE.model.model_dim)
    np.testing.assert_array_equal(found["layers/up/kernel"], params_at(tmp_path / "base")["layers/up/kernel"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model__ff_dim": 24, "model__num_layers": 2},
            "holds another model (model.num_layers is 1 there, 2 here; model.ff_dim is 16 there, 24 here)",
        ),
        ({"model__rope_base": 5000.0}, "model.rope_base is 10000.0 there, 5000.0 here"),
        ({"memory__length": 3}, "model.memory.length is 2 there, 3 here"),
    ],
)  # fmt: skip
def test_the_base_of_another_model_is_refused(
    base: pathlib.Path, tmp_path: pathlib.Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        train(adapting(base, **changes), str(tmp_path / "run"), quiet=True)
    assert str(caught.value).startswith("config.train.init_from: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_base_that_is_not_there_is_refused(base: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(CheckpointError, match="missing: no such folder"):
        train(adapting(tmp_path / "missing"), str(tmp_path / "run"), quiet=True)
    with pytest.raises(CheckpointError, match="has no step 7; saved are 2, 3"):
        train(adapting(base / "7"), str(tmp_path / "run"), quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_adapting_random_weights_must_be_asked_for(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError) as caught:
        train(adapting(""), str(tmp_path / "run"), quiet=True)
    assert str(caught.value).startswith("config.train.init_from: names no checkpoint")
    assert not (tmp_path / "run").exists()
    train(adapting("", lora__random_base=True, train__steps=1), str(tmp_path / "run"), quiet=True)
    assert (tmp_path / "run" / "1").is_dir()


def test_the_config_of_the_run_says_where_it_began(base: pathlib.Path, adapted: pathlib.Path) -> None:
    values = json.loads((adapted / "config.json").read_text())
    assert values["train"]["init_from"] == str(base)
    assert values["lora"] == json.loads(json.dumps(dataclasses.asdict(adapting(base).lora)))
