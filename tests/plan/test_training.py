"""Plans for training: FLOPs counted independently, meshes, memory, and users' mistakes."""

import dataclasses
import json
import math

import pytest

from configs import fam_1b, fam_8b, fam_24b
from fam_jax.config import ConfigError, MeshConfig, UserError, resolve
from fam_jax.plan.compile import bytes_missing
from fam_jax.plan.training import plan_training, sensible_meshes
from fam_jax.training.flops import keys_of_layers, step_flops
from fam_jax.training.loop import make_trainer
from tests.plan.programs import needs_compiler

SMOKE = resolve(fam_1b.get_config("smoke,pretrain"))


def test_flops_are_six_per_parameter_and_token() -> None:
    trainer = make_trainer(SMOKE)
    model, rows, tokens = SMOKE.model, SMOKE.train.batch_size, 64
    layer = model.model_dim * (4 * model.num_heads * model.head_dim + 3 * model.ff_dim)
    weights = model.num_layers * layer + model.vocab_size * model.model_dim
    scores = model.num_heads * rows * keys_of_layers(model, tokens)
    expected = 6 * weights * rows * tokens + 12 * model.head_dim * scores
    assert step_flops(SMOKE, trainer.state_shapes.params, tokens) == expected


def test_lora_leaves_out_gradients_of_frozen_weights() -> None:
    lora = resolve(fam_1b.get_config("smoke"))
    full, less = (
        step_flops(config, make_trainer(config).state_shapes.params, 64) for config in (SMOKE, lora)
    )
    assert 0.6 * full < less < full


@pytest.mark.parametrize("module", [fam_1b, fam_8b, fam_24b])
@pytest.mark.parametrize("topology", ["v5p:2x4x4", "v5p:4x4x8", "v5e:4x8"])
def test_sensible_meshes_divide_everything(module: object, topology: str) -> None:
    config = resolve(module.get_config())  # type: ignore[attr-defined]
    chips = math.prod(map(int, topology.partition(":")[2].split("x")))
    meshes = sensible_meshes(config, topology)
    assert meshes
    for mesh in meshes:
        assert mesh.data * mesh.fsdp * mesh.tensor == chips
        assert config.train.batch_size % (mesh.data * mesh.fsdp) == 0
        assert config.model.model_dim % mesh.fsdp == 0
        assert config.model.num_heads % mesh.tensor == 0
        assert mesh.fsdp < chips


def test_missing_memory_from_the_compilers_message() -> None:
    text = "Ran out of memory in memory space hbm. Used 21.50G of 15.75G hbm. Exceeded hbm capacity by 5.75G."
    assert bytes_missing(text) == int(5.75 * 2**30)
    early = "the total memory required for HLO temporaries (20.00G) exceeds available HBM (15.75G)."
    assert bytes_missing(f"RESOURCE_EXHAUSTED: Ran out of memory on HBM, {early}") == int(4.25 * 2**30)
    assert bytes_missing("something else") is None


@needs_compiler
def test_a_plan_of_a_small_model() -> None:
    plan = plan_training(SMOKE, "v5e:2x2", 128, MeshConfig(data=2, fsdp=2))
    report = json.loads(json.dumps(plan.report()))
    assert report["fits"] and report["mesh"] == {"data": 2, "fsdp": 2, "tensor": 1}
    assert 0 < report["step_seconds_low"] <= report["step_seconds_high"]
    assert 0 < report["mfu_low"] <= report["mfu_high"] < 1
    assert report["hbm_capacity_bytes"] == 16 * 2**30
    assert report["hbm_peak_bytes"] > report["hbm_parameter_bytes"] + report["hbm_optimizer_bytes"] > 0
    assert report["collectives"] and report["compile_seconds"] > 0
    # Compiled FLOPs include memory updates, which model FLOPs leave out, but not the scores in kernels.
    assert report["compiled_flops"] > 0.8 * report["model_flops"]


@needs_compiler
def test_a_slice_that_the_compiler_does_not_know() -> None:
    with pytest.raises(UserError, match="topology 'v5e:3x5'"):
        plan_training(SMOKE, "v5e:3x5", 128)


@needs_compiler
def test_a_batch_that_does_not_divide() -> None:
    config = dataclasses.replace(SMOKE, train=dataclasses.replace(SMOKE.train, batch_size=6))
    with pytest.raises(ConfigError, match=r"config\.train\.batch_size: 6 rows cannot be divided"):
        plan_training(config, "v5e:2x2", 128)
