"""The text part of Gemma 3 with its vision tower, in every spelling of the files."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fam_jax.hf import ConvertError, Folder, describe_model
from fam_jax.hf.multimodal import text_part
from tests.hf.recorded import DATA, imported, recorded_logits, recorded_tokens
from tests.model.tiny import Reader

NAME = "gemma3_vision"

# What the published files say about the text part; the rest is left to the defaults of transformers.
LINEAR = {
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024,
    "model_type": "gemma3_text",
}
PUBLISHED = {
    "4b": {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34},
    "12b": {"hidden_size": 3840, "intermediate_size": 15360, "num_attention_heads": 16, "num_hidden_layers": 48,
            "num_key_value_heads": 8},
    "27b": {"hidden_size": 5376, "intermediate_size": 21504, "num_attention_heads": 32, "num_hidden_layers": 62,
            "num_key_value_heads": 16, "head_dim": 128, "query_pre_attn_scalar": 168},
}  # fmt: skip


def whole(text, **changes):
    """Return a config.json like the published ones."""
    return {
        "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eoi_token_index": 256000,
        "eos_token_id": [1, 106], "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 256,
        "model_type": "gemma3", "text_config": text | LINEAR, "torch_dtype": "bfloat16", "vision_config": {},
    } | changes  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(DATA / NAME, tmp_path / "model")
    return tmp_path / "model"


def rename(folder, spell):
    tensors = load_file(folder / "model.safetensors")
    save_file({spell(name): x for name, x in tensors.items()}, folder / "model.safetensors")


def new_name(name):
    """Return the name of a tensor in files of newer versions of transformers."""
    return "model." + name.replace("language_model.model.", "language_model.")


def logits_of(folder):
    config, params = imported(folder)
    return Reader(config, params, 2).read(recorded_tokens(), aligned=True)


@pytest.mark.parametrize("spelling", ["old", "new", "new, with an unembedding", "old, with an unembedding"])
def test_both_spellings_of_the_tensors_are_the_same_model(folder, spelling):
    head = "language_model.lm_head.weight"
    if "unembedding" in spelling:
        tensors = load_file(folder / "model.safetensors")
        tensors[head] = tensors["language_model.model.embed_tokens.weight"]
        save_file(tensors, folder / "model.safetensors")
    if spelling.startswith("new"):
        rename(folder, lambda name: "lm_head.weight" if name == head else new_name(name))
    names = load_file(folder / "model.safetensors").keys()
    begins = ("model.language_model.", "model.vision_tower.", "model.multi_modal_projector.", "lm_head.")
    assert all(name.startswith(begins) == spelling.startswith("new") for name in names)
    assert (
        Folder(folder).left_out
        == len([name for name in names if "vision" in name or "projector" in name])
        > 20
    )
    np.testing.assert_allclose(logits_of(folder), recorded_logits(NAME), rtol=0, atol=1e-4)


def test_an_old_config_that_leaves_defaults_out_is_the_same_model(folder):
    text = json.loads((folder / "config.json").read_text())["text_config"]
    keep = (
        "head_dim",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "query_pre_attn_scalar",
        "vocab_size",
    )
    old = {name: text[name] for name in keep} | {"sliding_window_pattern": 3}
    (folder / "config.json").write_text(
        json.dumps(whole(old) | {"text_config": LINEAR | old | {"sliding_window": 6}})
    )
    np.testing.assert_allclose(logits_of(folder), recorded_logits(NAME), rtol=0, atol=1e-4)


def test_the_rope_is_scaled_in_global_layers_only(folder):
    fields = describe_model(text_part(whole(PUBLISHED["4b"]))).fields
    assert (fields["rope_scaling"], fields["rope_factor"]) == ("linear", 8.0)
    assert (fields["rope_base"], fields["local_rope_base"]) == (1e6, 1e4)
    config, params = imported(folder, rope_scaling="none")
    logits = Reader(config, params, 2).read(recorded_tokens(), aligned=True)
    assert np.abs(logits - recorded_logits(NAME)).max() > 1e-2


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_configs_are_completed_as_transformers_does(size):
    fields = describe_model(text_part(whole(PUBLISHED[size]))).fields
    assert (fields["vocab_size"], fields["tie_embeddings"], fields["local_window"]) == (262208, True, 1024)
    assert fields["layer_pattern"] == ("local",) * 5 + ("global",)
    if size == "4b":
        assert (fields["num_heads"], fields["num_kv_heads"], fields["head_dim"]) == (8, 4, 256)
    transformers = pytest.importorskip("transformers")
    config = transformers.Gemma3Config(
        **whole(PUBLISHED[size], vision_config={"model_type": "siglip_vision_model"})
    )
    complete = text_part(config.to_dict())
    assert describe_model(complete, ignored=complete.keys()).fields == fields
    alone = transformers.Gemma3TextConfig(**PUBLISHED[size] | LINEAR)
    assert text_part(whole(PUBLISHED[size]))["max_position_embeddings"] == alone.max_position_embeddings


def test_text_config_may_say_nothing_at_all():
    fields = describe_model(text_part({"model_type": "gemma3"})).fields
    complete = pytest.importorskip("transformers").Gemma3TextConfig().to_dict()
    assert fields == describe_model(complete, ignored=complete.keys()).fields


def test_options_of_the_whole():
    assert text_part(whole({}, tie_word_embeddings=False))["tie_word_embeddings"] is False
    assert (
        text_part(whole({"tie_word_embeddings": False}))["tie_word_embeddings"] is True
    )  # the whole has lm_head
    assert text_part(whole({"final_logit_softcapping": 30.0}))["final_logit_softcapping"] is None
    assert text_part(whole({}))["eos_token_id"] == [1, 106]
    assert text_part(whole({}, hidden_size=7))["hidden_size"] == 2304
    with pytest.raises(ConvertError, match="option quantization_config"):
        describe_model(text_part(whole({}, quantization_config={"bits": 4})))
    with pytest.raises(ConvertError, match="option residual_scale = 2"):
        describe_model(text_part(whole({}, residual_scale=2)))
    with pytest.raises(ConvertError, match="option use_bidirectional_attention"):
        describe_model(text_part(whole({"use_bidirectional_attention": True})))


def test_a_text_model_is_left_as_it_is():
    config = json.loads((DATA / "gemma3" / "config.json").read_text())
    assert text_part(config) == config
    assert Folder(DATA / "gemma3").left_out == 0


@pytest.mark.parametrize("extra", ["model.audio_tower.weight", "language_model.model.layers.0.more", "other"])
def test_any_other_tensor_is_an_error(folder, extra):
    tensors = load_file(folder / "model.safetensors") | {extra: np.zeros(3, "f4")}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConvertError, match=f"tensor {extra} in model.safetensors is not expected"):
        imported(folder)


def test_a_tensor_in_both_spellings_is_an_error(folder):
    old = "language_model.model.norm.weight"
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {new_name(old): tensors[old]}, folder / "model.safetensors")
    with pytest.raises(ConvertError, match="are two spellings of one tensor"):
        imported(folder)


def test_a_vision_tower_in_a_text_model_is_an_error(tmp_path):
    shutil.copytree(DATA / "gemma3", tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors") | {"vision_tower.x": np.zeros(3, "f4")}
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    with pytest.raises(ConvertError, match=r"tensor vision_tower\.x in model\.safetensors is not expected"):
        imported(tmp_path / "model")
