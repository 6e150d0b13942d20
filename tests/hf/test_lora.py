"""Exports of runs with LoRA: merged into the weights, as an adapter for PEFT, and the base alone."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from fam_jax.checkpoint import COMPANIONS, Checkpoints, load_params
from fam_jax.config import Config, LoraConfig, TrainConfig, UserError
from fam_jax.hf import ConvertError, export_adapter, export_folder, torch_config
from fam_jax.model import create_model, from_dict, lora, to_dict
from fam_jax.model.layer_types import is_memory
from fam_jax.model.parameters import flatten, unflatten
from launch import export_hf
from tests.hf.recorded import DATA, assert_same_tensors, imported, recorded_tokens
from tests.model.tiny import Reader

LORA = LoraConfig(rank=3, alpha=6.0)


def run_with_lora(name, config=LORA, **changes):
    """Return config, parameters and logits of a recorded model with updates that are not zero."""
    model, params = imported(DATA / name, **changes)
    config = Config(model=model, lora=config, train=TrainConfig(init_from=str(DATA.parent / "base")))
    fresh = nnx.state(create_model(config, rngs=nnx.Rngs(1)))
    params = lora.join(to_dict(fresh), params)
    noise = np.random.default_rng(0)

    def shake(path, leaf):
        is_b = jax.tree_util.keystr(path, simple=True, separator="/").endswith("lora_b")
        return jnp.asarray(0.3 * noise.normal(size=leaf.shape), jnp.float32) if is_b else leaf

    params = jax.tree_util.tree_map_with_path(shake, params)

    @jax.jit
    def logits(params):
        graphdef, state = nnx.split(nnx.eval_shape(lambda: create_model(config, rngs=nnx.Rngs(0))))
        built = nnx.merge(graphdef, from_dict(state, params))
        return built(recorded_tokens(), built.init_state(2), aligned=True)[0]

    return config, params, np.asarray(logits(params))


@pytest.fixture
def workdir(tmp_path):
    """Return the folder and the logits of a run with LoRA that began with an imported Gemma 2."""
    config, params, logits = run_with_lora("gemma2")
    base = tmp_path / "base"
    (base / COMPANIONS).mkdir(parents=True)
    shutil.copyfile(DATA / "gemma2" / "config.json", base / COMPANIONS / "config.json")
    config = dataclasses.replace(config, train=TrainConfig(init_from=str(base / "0")))
    with Checkpoints(tmp_path / "run", config=dataclasses.asdict(config), keep=1) as checkpoints:
        checkpoints.save(5, {"params": params}, {}, wait=True)
    return tmp_path / "run", logits


def export(run, out, *arguments):
    assert export_hf.main([f"--checkpoint={run}", f"--out={out}", *arguments]) == 0


def test_the_base_and_the_merged_model(workdir, tmp_path):
    run, logits = workdir
    export(run, tmp_path / "base_again", "--lora=base")
    original = DATA / "gemma2" / "model.safetensors"
    assert_same_tensors(tmp_path / "base_again" / "model.safetensors", original)

    export(run, tmp_path / "merged")
    config, params = imported(tmp_path / "merged")
    got = Reader(config, params, 2).read(recorded_tokens(), aligned=True)
    np.testing.assert_allclose(got, logits, rtol=0, atol=1e-4)
    transformers = pytest.importorskip("transformers", reason="only transformers itself can read it")
    from tests.hf.hf_models import logits_of

    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", attn_implementation="eager"
    )
    np.testing.assert_allclose(logits_of(model, recorded_tokens()), logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "targets", [("layers/*/kernel",), ("layers/query/kernel", "layers/down/kernel")], ids=str
)
@pytest.mark.parametrize("name", ["qwen2", "gemma2"])
def test_peft_loads_the_adapter_upon_the_base(name, targets, tmp_path):
    config, params, logits = run_with_lora(name, dataclasses.replace(LORA, targets=targets))
    export_adapter(tmp_path / "adapter", config, params, "base")
    described = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (described["r"], described["lora_alpha"]) == (3, 6.0)
    assert ("q_proj" in described["target_modules"], len(described["target_modules"]) == 7) == (
        True,
        len(targets) == 1,
    )
    peft = pytest.importorskip("peft", reason="only PEFT itself can read it")
    import transformers

    from tests.hf.hf_models import logits_of

    base = transformers.AutoModelForCausalLM.from_pretrained(DATA / name, attn_implementation="eager")
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    np.testing.assert_allclose(logits_of(model, recorded_tokens()), logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("init", ["prompt", pytest.param("prefix", marks=pytest.mark.slow)])
def test_an_adapter_of_an_export_for_pytorch_has_the_memory(init, tmp_path, monkeypatch):
    """Upon the base, with its code, it is the merged model: the memory that was trained beside LoRA included."""
    changes = {"length": 3, "segments": 1, "init": init}
    config, params, _ = run_with_lora("qwen3", LORA, **changes)
    model = config.model
    hf = torch_config(model, {})
    export_folder(tmp_path / "base", model, params, hf)
    memory = {name: leaf + 1.0 for name, leaf in flatten(params).items() if is_memory(name)}
    params = unflatten(flatten(params) | memory)
    export_folder(tmp_path / "merged", model, lora.merge(params, config.lora), hf)
    base = tmp_path / "import"
    (base / COMPANIONS).mkdir(parents=True)
    shutil.copyfile(tmp_path / "base" / "config.json", base / COMPANIONS / "config.json")
    (base / COMPANIONS / "source.json").write_text(json.dumps({"source": str(tmp_path / "base")}))

    def save(folder, config):
        config = dataclasses.replace(config, train=TrainConfig(init_from=str(base / "0")))
        with Checkpoints(folder, config=dataclasses.asdict(config), keep=1) as checkpoints:
            checkpoints.save(5, {"params": params}, {}, wait=True)
        return folder

    assert base_named(save(tmp_path / "run", config), tmp_path / "adapter") == str(tmp_path / "base")
    assert not (tmp_path / "adapter" / "memory.safetensors").exists()
    other = dataclasses.replace(model, memory=dataclasses.replace(model.memory, previous_blocks=2))
    with pytest.raises(
        ConvertError, match=r"the base: previous_blocks is 1, but 2 in the run, and an adapter cannot"
    ):
        base_named(save(tmp_path / "other", dataclasses.replace(config, model=other)), tmp_path / "no")
    assert base_named(tmp_path / "other", tmp_path / "plain", "--base=some/model") == "some/model"
    assert (tmp_path / "plain" / "memory.safetensors").exists()

    peft = pytest.importorskip("peft", reason="only PEFT itself can read it")
    transformers = pytest.importorskip("transformers")
    from tests.hf.hf_models import logits_of

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    load = transformers.AutoModelForCausalLM.from_pretrained
    plain, merged = (load(tmp_path / name, trust_remote_code=True).eval() for name in ("base", "merged"))
    wanted = logits_of(merged, recorded_tokens())
    assert np.abs(logits_of(plain, recorded_tokens()) - wanted).max() > 0.1
    adapted = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")
    np.testing.assert_allclose(logits_of(adapted, recorded_tokens()), wanted, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_an_adapter_fits_the_model_with_vision_that_was_imported(tmp_path):
    name = "gemma3_vision"
    few = dataclasses.replace(LORA, targets=("layers/query/kernel", "layers/down/kernel"))
    config, params, logits = run_with_lora(name, few)
    export_adapter(tmp_path / "adapter", config, params, str(DATA / name), multimodal=True)
    peft = pytest.importorskip("peft", reason="only PEFT itself can read it")
    import transformers

    from tests.hf.hf_models import logits_of

    base = transformers.Gemma3ForConditionalGeneration.from_pretrained(
        DATA / name, attn_implementation="eager"
    )
    assert np.abs(logits_of(base, recorded_tokens()) - logits).max() > 0.1
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    np.testing.assert_allclose(logits_of(model, recorded_tokens()), logits, rtol=0, atol=1e-4)
    assert not [path for path, _ in model.named_parameters() if "lora" in path and "vision" in path]


def base_named(run, out, *arguments):
    export(run, out, "--lora=adapter", *arguments)
    return json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"]


def test_an_adapter_names_the_hugging_face_base(workdir, tmp_path, capsys):
    run, logits = workdir
    companions = run.parent / "base" / COMPANIONS
    assert base_named(run, tmp_path / "none") is None
    assert "pass --base=NAME" in capsys.readouterr().err
    described = json.loads((companions / "config.json").read_text())
    (companions / "config.json").write_text(json.dumps(described | {"_name_or_path": "some/model"}))
    assert base_named(run, tmp_path / "name") == "some/model"
    for number, path in enumerate((str(tmp_path / "gone"), "./gone", "~/gone", 3)):  # of the machine before
        (companions / "config.json").write_text(json.dumps(described | {"_name_or_path": path}))
        assert base_named(run, tmp_path / f"path_{number}") is None
    (companions / "config.json").write_text(json.dumps(described | {"_name_or_path": "some/model"}))
    for source, expected in ((tmp_path / "gone", "some/model"), (DATA / "gemma2", str(DATA / "gemma2"))):
        (companions / "source.json").write_text(json.dumps({"source": str(source)}))
        assert base_named(run, tmp_path / f"source_{source.name}") == expected
    assert base_named(run, tmp_path / "given", "--base=other/model") == "other/model"
    with pytest.raises(UserError, match="--base: names the base model of an adapter"):
        export(run, tmp_path / "merged", "--base=other/model")
    peft = pytest.importorskip("peft", reason="only PEFT itself can read it")
    from tests.hf.hf_models import logits_of

    model = peft.AutoPeftModelForCausalLM.from_pretrained(
        tmp_path / "source_gemma2", attn_implementation="eager"
    )
    np.testing.assert_allclose(logits_of(model, recorded_tokens()), logits, rtol=0, atol=1e-4)


def test_an_adapter_of_a_run_that_began_with_a_run_names_no_base(workdir, tmp_path):
    """Its base is the model that the first run trained, and not the one that was imported."""
    first, _ = workdir
    base = first.parent / "base"
    described = json.loads((base / COMPANIONS / "config.json").read_text())
    (base / COMPANIONS / "config.json").write_text(json.dumps(described | {"_name_or_path": "some/model"}))
    (base / COMPANIONS / "source.json").write_text(json.dumps({"source": str(DATA / "gemma2")}))
    params, values, _ = load_params(first)
    shutil.copytree(base / COMPANIONS, first / COMPANIONS)
    values["train"]["init_from"] = str(first)
    values["data"]["task"] = "seqio:any"  # a run of any other task copies the companions with its vocabulary
    with Checkpoints(tmp_path / "second", config=values, keep=1) as checkpoints:
        checkpoints.save(7, {"params": params}, {}, wait=True)
    assert base_named(first, tmp_path / "of_the_import") == str(DATA / "gemma2")
    for out in (tmp_path / "of_the_run", tmp_path / "alone"):
        assert base_named(tmp_path / "second", out) is None
        shutil.rmtree(first, ignore_errors=True)
    assert base_named(tmp_path / "second", tmp_path / "given", "--base=other/model") == "other/model"


def test_the_base_decides_which_layers_an_adapter_names(workdir, tmp_path):
    """A run whose import had a vision tower; --base names a folder without one."""
    run, _ = workdir
    shutil.copyfile(DATA / "gemma3_vision" / "config.json", run.parent / "base" / COMPANIONS / "config.json")

    def names(out, *arguments):
        export(run, out, "--lora=adapter", *arguments)
        return load_file(out / "adapter_model.safetensors").keys()

    assert all(".model.language_model.layers." in name for name in names(tmp_path / "vision"))
    text = names(tmp_path / "text", f"--base={DATA / 'gemma2'}")
    assert all(name.startswith("base_model.model.model.layers.") for name in text)


@pytest.mark.slow
def test_the_initial_fam_is_beside_the_adapter(tmp_path):
    config, params, _ = run_with_lora("qwen3", length=2)
    with Checkpoints(tmp_path / "run", config=dataclasses.asdict(config), keep=1) as checkpoints:
        checkpoints.save(5, {"params": params}, {}, wait=True)
    export(tmp_path / "run", tmp_path / "adapter", "--lora=adapter")
    names = {"adapter_config.json", "adapter_model.safetensors", "memory.safetensors"}
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == names
    fam = load_file(tmp_path / "adapter" / "memory.safetensors")["memory/initial_fam"]
    np.testing.assert_array_equal(fam, params["memory"]["initial_fam"])


def test_parameters_that_an_adapter_cannot_hold_are_rejected(tmp_path):
    config, params, _ = run_with_lora("qwen3", dataclasses.replace(LORA, train=("layers/*_norm/scale",)))
    with pytest.raises(ConvertError, match="layers/attention_norm/scale was trained too"):
        export_adapter(tmp_path, config, params)
    with pytest.raises(ConvertError, match="there is no adapter"):
        export_adapter(tmp_path, dataclasses.replace(config, lora=LoraConfig()), params)
