"""Export and import again: the parameters are equal bit for bit, and transformers computes the same logits."""

import dataclasses
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fam_jax.config import MeshConfig
from fam_jax.config.overrides import Override
from fam_jax.hf import (
    ConvertError,
    Folder,
    describe_model,
    export_folder,
    hf_config,
    import_parameters,
    imported_config,
    updated_config,
)
from fam_jax.hf.families import FAMILIES
from fam_jax.hf.memory_file import read_memory_config
from fam_jax.hf.output_folder import UNFINISHED
from fam_jax.memories.window import BlockSlidingWindowConfig
from fam_jax.sharding import make_mesh, param_shardings
from tests.hf.recorded import (
    DATA,
    NAMES,
    config_of,
    imported,
    one_device,
    recorded_logits,
    recorded_tokens,
)
from tests.model.tiny import params_of, variant


def arrays_equal(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)
    assert [x.dtype for x in jax.tree.leaves(a)] == [x.dtype for x in jax.tree.leaves(b)]


def in_bfloat16(name, folder):
    """Write a copy of a recorded model in bfloat16."""
    shutil.copytree(DATA / name, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({key: x.astype(ml_dtypes.bfloat16) for key, x in tensors.items()}, folder / "model.safetensors")


@pytest.mark.parametrize("name", NAMES)
def test_exported_and_imported_again_is_bit_for_bit_the_same(name, tmp_path):
    """In bfloat16, which is kept, with a new config, and in several files."""
    in_bfloat16(name, tmp_path / "source")
    config, params = imported(tmp_path / "source")
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("bfloat16")}
    export_folder(tmp_path / "out", config, params, hf_config(config, dtype="bfloat16"), shard_bytes=2000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3
    again, same = imported(tmp_path / "out")
    assert again == config
    arrays_equal(same, params)


@pytest.mark.parametrize("name", NAMES)
def test_the_files_are_those_of_transformers(name, tmp_path):
    config, params = imported(DATA / name)
    export_folder(tmp_path / "out", config, params, Folder(DATA / name).config)
    ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path / "out", DATA / name))
    if name == "gemma3_vision":
        theirs = {
            key.removeprefix("language_model."): x
            for key, x in theirs.items()
            if key.startswith("language_model.")
        }
    assert ours.keys() == theirs.keys()
    arrays_equal(ours, theirs)


def test_old_spellings_of_a_config_mean_the_same():
    for name in ("llama3", "llama_linear", "gemma3"):
        new = json.loads((DATA / name / "config.json").read_text())
        old = {key: value for key, value in new.items() if key not in ("rope_parameters", "layer_types")}
        rope = new["rope_parameters"].get("full_attention", new["rope_parameters"])
        old["rope_theta"] = rope["rope_theta"]
        old["rope_scaling"] = {
            ("type" if k == "rope_type" else k): v for k, v in rope.items() if k != "rope_theta"
        }
        if name == "gemma3":
            old |= {"rope_local_base_freq": 1e4, "sliding_window_pattern": 3}
        assert describe_model(old) == describe_model(new)


def test_options_that_a_config_leaves_out_have_the_defaults_of_transformers():
    sizes = {"hidden_size": 64, "intermediate_size": 8, "num_hidden_layers": 8, "num_attention_heads": 8}
    fields = describe_model({"model_type": "gemma3_text"} | sizes).fields
    assert fields["layer_pattern"] == ("local",) * 5 + ("global",)
    assert (fields["local_window"], fields["rope_base"], fields["local_rope_base"]) == (4096, 1e6, 1e4)
    assert (fields["num_kv_heads"], fields["head_dim"], fields["query_pre_attn_scalar"]) == (4, 256, 256)
    assert (fields["vocab_size"], fields["attention_softcap"], fields["tie_embeddings"]) == (262208, 0, True)
    fields = describe_model({"model_type": "gemma2", "hidden_act": None} | sizes).fields
    assert (fields["layer_pattern"], fields["attention_softcap"]) == (("local", "global"), 50)
    assert (
        describe_model({"model_type": "gemma", "hidden_act": "gelu"} | sizes).fields["activation"] == "geglu"
    )
    assert describe_model({"model_type": "mistral"} | sizes).window == 4096
    assert describe_model({"model_type": "mistral", "sliding_window": None} | sizes).window == 0
    assert describe_model({"model_type": "qwen2", "sliding_window": 4096} | sizes).window == 0


def test_the_initial_fam_goes_along(tmp_path):
    config, params = imported(DATA / "qwen3", length=3)
    table, fam = np.asarray(params["embedding"]["table"]), np.asarray(params["memory"]["initial_fam"])
    assert all((row == table).all(axis=1).any() for row in fam)
    params["memory"]["initial_fam"] += 0.5
    export_folder(tmp_path / "out", config, params, hf_config(config))
    assert read_memory_config(tmp_path / "out")["memory"]["length"] == 3
    same = imported(tmp_path / "out", length=3)[1]
    arrays_equal(same, params)
    with pytest.raises(ConvertError, match=r"shape \[3, 16\], but the model needs shape \[2, 16\]"):
        imported(tmp_path / "out", length=2)
    (tmp_path / "out" / "memory.safetensors").write_bytes(b"nothing")
    with pytest.raises(ConvertError, match="is damaged, or fam_jax did not write it"):
        read_memory_config(tmp_path / "out")


def test_a_missing_memory_is_noticed(tmp_path):
    config, params = imported(DATA / "qwen3", length=3)
    export_folder(tmp_path / "out", config, params, hf_config(config), shard_bytes=20_000)
    assert len(Folder(tmp_path / "out").files) > 1
    (tmp_path / "out" / "memory.safetensors").unlink()
    with pytest.raises(
        ConvertError, match=r"was exported with memory\.safetensors, .* which is missing"
    ) as caught:
        imported_config(Folder(tmp_path / "out"))
    assert "--config.model.memory.kind=bswa" in str(caught.value)
    chosen = imported_config(Folder(tmp_path / "out"), [Override("config.model.memory.kind", "bswa")])
    assert chosen.model.memory.kind == "bswa"
    # A model without such a file has nothing to miss.
    plain = dataclasses.replace(config, memory=BlockSlidingWindowConfig())
    own = {name: group for name, group in params.items() if name != "memory"}
    export_folder(tmp_path / "plain", plain, own, hf_config(plain))
    assert not (tmp_path / "plain" / "memory.safetensors").exists()
    assert imported_config(Folder(tmp_path / "plain")).model.memory.kind == "bswa"


def test_a_learned_prefix_goes_along(tmp_path):
    config, params = imported(DATA / "gemma", length=2, init="prefix")
    assert params["layers"]["memory"]["initial_fam"].shape == (3, 2, 16)
    export_folder(tmp_path / "out", config, params, hf_config(config))
    arrays_equal(imported(tmp_path / "out", length=2, init="prefix")[1], params)


@pytest.mark.parametrize(("name", "init"), [("qwen3", "prompt"), ("gemma", "prefix")])
def test_a_fam_of_version_0_1_is_read(name, init, tmp_path):
    """It was stored as fam.safetensors, under one name for both kinds of initial FAM, with the former field names."""
    config, params = imported(DATA / name, length=2, init=init)
    memory = params["memory"] if init == "prompt" else params["layers"]["memory"]
    memory["initial_fam"] += 0.5
    export_folder(tmp_path / "out", config, params, hf_config(config))
    (tmp_path / "out" / "memory.safetensors").unlink()
    fields = {
        "block_size": 4, "memory_segments": config.memory.segments, "window": 0, "stop_gradient": False,
        "fam_length": 2, "fam_init": init, "fam_positions": "zero", "fam_previous_blocks": 3,
    }  # fmt: skip
    metadata = {"format": "fam_jax", "config": json.dumps(fields)}
    vectors = {"initial_fam": np.asarray(memory["initial_fam"])}
    save_file(vectors, tmp_path / "out" / "fam.safetensors", metadata=metadata)
    assert read_memory_config(tmp_path / "out") == {
        "block_size": 4,
        "memory": {
            "kind": "fam", "segments": config.memory.segments, "window": 0, "stop_gradient": False, "length": 2,
            "init": init, "positions": "zero", "previous_blocks": 3,
        },
    }  # fmt: skip
    arrays_equal(imported(tmp_path / "out", length=2, init=init)[1], params)


@pytest.mark.parametrize("name", ["qwen2", "gemma2"])
def test_on_a_mesh_every_device_gets_its_part(name):
    folder = Folder(DATA / name)
    config = config_of(folder, length=2)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    params = import_parameters(folder, config, lambda shapes: param_shardings(shapes, mesh))
    arrays_equal(params, import_parameters(folder, config, one_device))
    kernel = params["layers"]["query"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(3, 8, 2, 6)}


def test_a_model_trained_here_is_exported_as_the_family_that_computes_it(tmp_path):
    families = {
        "llama": {}, "mistral": {"window": 5}, "qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True},
        "gemma": {"norm_offset": True, "scale_embeddings": True, "activation": "geglu"},
    }  # fmt: skip
    for family, changes in families.items():
        config = variant(**changes)
        hf = hf_config(config)
        assert hf["model_type"] == family
        export_folder(tmp_path / family, config, params_of(config), hf)
        arrays_equal(imported(tmp_path / family, length=2)[1], params_of(config))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"norm": "layernorm"}, "norm"),
        ({"scale_embeddings": True}, "scale_embeddings"),
        ({"post_norms": True}, "post_norms"),
        ({"qk_norm": True, "qkv_bias": True}, "qkv_bias"),
        ({"attention_softcap": 1.0}, "attention_softcap"),
        ({"logit_softcap": 1.0}, "logit_softcap"),
        ({"query_pre_attn_scalar": 3.0}, "query_pre_attn_scalar"),
        ({"layer_pattern": ("local", "global"), "local_window": 3}, "layer_pattern"),
        ({"qk_norm": True, "layer_pattern": ("local", "global"), "local_window": 3, "local_rope_base": 9.0},
         "local_rope_base"),
    ],
)  # fmt: skip
def test_models_that_no_family_computes_are_rejected_by_name(changes, field):
    with pytest.raises(ConvertError, match=f"config.model.{field}: .* cannot be expressed"):
        hf_config(variant(**changes))


def test_a_config_of_another_model_and_a_folder_in_use_are_rejected(tmp_path):
    config = variant()
    with pytest.raises(ConvertError, match="vocab_size: 11 cannot be expressed"):
        export_folder(
            tmp_path, config, params_of(config), hf_config(dataclasses.replace(config, vocab_size=12))
        )
    (tmp_path / "something").touch()
    with pytest.raises(ConvertError, match="is not empty"):
        export_folder(tmp_path, config, params_of(config), hf_config(config))


def test_a_folder_is_written_beside_and_then_renamed(tmp_path):
    out, ours = tmp_path / "out", []

    def check(folder):
        assert not out.exists()
        ours.append(folder)
        (folder / "tokenizer.json").touch()

    config = variant()
    how = (config, params_of(config), hf_config(config))
    beside = tmp_path / f".out{UNFINISHED}"
    (beside / "left").mkdir(parents=True)  # by a process that was killed
    export_folder(out, *how, write_more=check)
    assert ours == [beside]
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "memory.safetensors",
        "model.safetensors",
        "tokenizer.json",
    }
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_export_leaves_nothing(tmp_path, error):
    config = variant()
    how = (tmp_path / "out", config, params_of(config), hf_config(config))

    def fail(folder):
        raise error

    with pytest.raises((KeyboardInterrupt, ConvertError)) as caught:
        export_folder(*how, write_more=fail)
    assert isinstance(caught.value, KeyboardInterrupt) or "No space left on device" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    export_folder(*how)


@pytest.mark.parametrize("name", NAMES)
def test_transformers_reads_what_is_exported(name, tmp_path):
    pytest.importorskip("torch", reason="the recorded logits stand in for transformers")
    transformers = pytest.importorskip("transformers")
    from tests.hf.hf_models import logits_of, make

    config, params = imported(DATA / name)
    live = make(name)
    np.testing.assert_allclose(logits_of(live, recorded_tokens()), recorded_logits(name), rtol=0, atol=1e-5)
    export_folder(tmp_path / "out", config, params, hf_config(config), shard_bytes=4000)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    np.testing.assert_array_equal(logits_of(model, recorded_tokens()), logits_of(live, recorded_tokens()))


def test_every_family_is_recorded():
    configs = [json.loads((DATA / name / "config.json").read_text()) for name in NAMES]
    assert {config["model_type"] for config in configs} == FAMILIES.keys() | {"gemma3"}


def test_a_new_config_is_written_if_the_original_no_longer_describes_the_model():
    original = json.loads((DATA / "mistral" / "config.json").read_text()) | {"eos_token_id": 7}
    config = config_of(Folder(DATA / "mistral"))
    assert updated_config(config, original) == original
    changed = updated_config(variant(config, window=0), original, dtype="bfloat16")
    assert (changed["model_type"], changed["eos_token_id"], changed["torch_dtype"]) == (
        "llama",
        7,
        "bfloat16",
    )
