"""In and out again: bit for bit here, and the same logits there."""

import dataclasses
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fam_jax.config import MeshConfig
from fam_jax.hf import (
    ConvertError,
    Folder,
    export_folder,
    hf_config,
    import_parameters,
    model_fields,
    model_window,
    updated_config,
)
from fam_jax.hf.exporting import UNFINISHED
from fam_jax.hf.families import FAMILIES
from fam_jax.hf.importing import stored_memory
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
    """A copy of a recorded model, in bfloat16."""
    shutil.copytree(DATA / name, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({key: x.astype(ml_dtypes.bfloat16) for key, x in tensors.items()}, folder / "model.safetensors")


@pytest.mark.parametrize("name", NAMES)
def test_exported_and_imported_again_is_bit_for_bit_the_same(name, tmp_path):
    """In bfloat16, which is kept, with the config written anew, and in several files."""
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
        assert model_fields(old) == model_fields(new)


def test_what_a_config_leaves_out_is_what_transformers_takes():
    sizes = {"hidden_size": 64, "intermediate_size": 8, "num_hidden_layers": 8, "num_attention_heads": 8}
    fields = model_fields({"model_type": "gemma3_text"} | sizes)
    assert fields["layer_pattern"] == ("local",) * 5 + ("global",)
    assert (fields["local_window"], fields["rope_base"], fields["local_rope_base"]) == (4096, 1e6, 1e4)
    assert (fields["num_kv_heads"], fields["head_dim"], fields["query_pre_attn_scalar"]) == (4, 256, 256)
    assert (fields["vocab_size"], fields["attention_softcap"], fields["tie_embeddings"]) == (262208, 0, True)
    fields = model_fields({"model_type": "gemma2", "hidden_act": None} | sizes)
    assert (fields["layer_pattern"], fields["attention_softcap"]) == (("local", "global"), 50)
    assert model_fields({"model_type": "gemma", "hidden_act": "gelu"} | sizes)["activation"] == "geglu"
    assert model_window({"model_type": "mistral"} | sizes) == 4096
    assert model_window({"model_type": "mistral", "sliding_window": None} | sizes) == 0
    assert model_window({"model_type": "qwen2", "sliding_window": 4096} | sizes) == 0


def test_the_initial_fam_goes_along(tmp_path):
    config, params = imported(DATA / "qwen3", length=3)
    table, fam = np.asarray(params["embedding"]["table"]), np.asarray(params["memory"]["initial_fam"])
    assert all((row == table).all(axis=1).any() for row in fam)
    params["memory"]["initial_fam"] += 0.5
    export_folder(tmp_path / "out", config, params, hf_config(config))
    assert stored_memory(Folder(tmp_path / "out"))["memory"]["length"] == 3
    same = imported(tmp_path / "out", length=3)[1]
    arrays_equal(same, params)
    with pytest.raises(ConvertError, match=r"shape \[3, 16\], and the model's has \[2, 16\]"):
        imported(tmp_path / "out", length=2)
    (tmp_path / "out" / "memory.safetensors").write_bytes(b"nothing")
    with pytest.raises(ConvertError, match="holds no memory of fam_jax, or is damaged"):
        stored_memory(Folder(tmp_path / "out"))


def test_a_learned_prefix_goes_along(tmp_path):
    config, params = imported(DATA / "gemma", length=2, init="prefix")
    assert params["layers"]["memory"]["initial_fam"].shape == (3, 2, 16)
    export_folder(tmp_path / "out", config, params, hf_config(config))
    arrays_equal(imported(tmp_path / "out", length=2, init="prefix")[1], params)


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
def test_what_no_family_computes_is_refused_by_name(changes, field):
    with pytest.raises(ConvertError, match=f"config.model.{field}: .* cannot be expressed"):
        hf_config(variant(**changes))


def test_a_config_of_another_model_is_refused_and_so_is_a_folder_in_use(tmp_path):
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
def test_an_export_that_is_cut_short_leaves_nothing(tmp_path, error):
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


def test_a_config_is_written_anew_where_the_original_no_longer_describes_the_model():
    original = json.loads((DATA / "mistral" / "config.json").read_text()) | {"eos_token_id": 7}
    config = config_of(Folder(DATA / "mistral"))
    assert updated_config(config, original) == original
    changed = updated_config(variant(config, window=0), original, dtype="bfloat16")
    assert (changed["model_type"], changed["eos_token_id"], changed["torch_dtype"]) == (
        "llama",
        7,
        "bfloat16",
    )
