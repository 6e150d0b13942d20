"""A folder that cannot be read exactly is rejected with one line that names what is wrong."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fam_jax.hf import ConvertError, Folder, describe_model
from fam_jax.hf.config_json import OPTIONS
from fam_jax.hf.families import FAMILIES
from tests.hf.recorded import DATA, imported


@pytest.fixture
def folder(tmp_path):
    """Return a copy of the recorded Llama, to be damaged."""
    shutil.copytree(DATA / "llama", tmp_path / "model")
    return tmp_path / "model"


def message_of(folder):
    with pytest.raises(ConvertError) as caught:
        imported(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_no_folder(tmp_path):
    assert "no such folder" in message_of(tmp_path / "nothing")


def test_no_config(folder):
    (folder / "config.json").unlink()
    assert "holds no config.json" in message_of(folder)


@pytest.mark.parametrize("content", ["{", "[]", "", "[" * 100_000])
def test_a_config_that_is_not_a_json_object(folder, content):
    (folder / "config.json").write_text(content)
    assert "config.json: " in message_of(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pytorch_files_only(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    assert "holds PyTorch files but no safetensors" in message_of(folder)
    assert "save_pretrained" in message_of(folder)


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    assert "holds neither model.safetensors" in message_of(folder)


@pytest.mark.parametrize("damage", [
    lambda data: data[: len(data) // 2],
    lambda data: b"\xff" * 8 + data[8:],
    lambda data: data[:8] + b"#" + data[9:],
    lambda data: data[:4],
    lambda data: b"version 1\n",
])  # fmt: skip
def test_a_damaged_file(folder, damage):
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    assert "model.safetensors: is damaged or not a safetensors file" in message_of(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_pointer_of_git_lfs(folder, name):
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert f"{name}: is a pointer of Git LFS, not the file itself; run `git lfs pull`" in message_of(folder)


def test_a_config_may_begin_with_a_byte_order_mark(folder):
    (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + (folder / "config.json").read_bytes())
    imported(folder)


@pytest.mark.parametrize("name", ["model-00001-of-00001.safetensors", "consolidated.safetensors"])
def test_weights_without_an_index(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    assert f"holds {name}, but neither model.safetensors nor model.safetensors.index.json" in message_of(
        folder
    )


def test_all_unknown_options_are_named_at_once(folder):
    edit_config(folder, residual_scale=0.3, max_sequence_length=4096, some_flag=False)
    assert (
        "config.json: options residual_scale = 0.3, max_sequence_length = 4096 are not supported for llama; if they do "
        "not change what the model computes, pass --ignore_option=residual_scale --ignore_option=max_sequence_length"
    ) in message_of(folder)
    describe_model(Folder(folder).config, ["residual_scale", "max_sequence_length"])


def test_options_that_change_nothing_are_accepted(folder):
    plain = describe_model(Folder(folder).config)
    edit_config(
        folder, _attn_implementation="sdpa", unsloth_fixed=True, id2label={"0": "A"}, label2id={"A": 0},
        partial_rotary_factor=1.0, tokenizer_class="LlamaTokenizer",
    )  # fmt: skip
    assert describe_model(Folder(folder).config) == plain
    edit_config(folder, partial_rotary_factor=0.5)
    assert "option partial_rotary_factor = 0.5 is not supported" in message_of(folder)


def test_a_part_that_the_index_names_is_missing(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert (
        "model-00002-of-00002.safetensors, which model.safetensors.index.json names, is missing"
        in message_of(folder)
    )
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "has no weight_map" in message_of(folder)


@pytest.mark.parametrize("name", [5, None, ""])
def test_an_index_that_does_not_name_a_file(folder, name):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    weight_map = {"a": "model-00001-of-00001.safetensors", "model.norm.weight": name}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    says = f"index.json: weight_map.model.norm.weight: expected the name of a file, got {name!r}"
    assert says in message_of(folder)


def test_a_tensor_is_missing(folder):
    edit_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    assert "tensor model.layers.1.mlp.up_proj.weight is missing" in message_of(folder)


def test_a_tensor_is_not_expected(folder):
    edit_tensors(folder, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(24, "f4")}))
    assert "tensor model.layers.0.self_attn.q_proj.bias in model.safetensors is not expected" in message_of(
        folder
    )


def test_a_tensor_of_another_shape(folder):
    edit_config(folder, vocab_size=41)
    assert (
        "tensor model.embed_tokens.weight in model.safetensors has shape [40, 16], not [41, 16]"
        in message_of(folder)
    )
    assert "lm_head.weight" in message_of(folder)


def test_tensors_of_quantised_models(folder):
    edit_tensors(folder, lambda t: t.update({"model.norm.weight": np.ones(16, "i1")}))
    assert "tensor model.norm.weight has dtype I8" in message_of(folder)


def test_layers_of_different_dtypes(folder):
    name = "model.layers.2.mlp.up_proj.weight"
    edit_tensors(folder, lambda t: t.update({name: t[name].astype("f2")}))
    assert f"{name} (float16) differ in dtype; set --param_dtype" in message_of(folder)


def test_buffers_of_old_files_are_left_out(folder):
    edit_tensors(
        folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, "f4")})
    )
    imported(folder)


def test_an_unembedding_beside_tied_embeddings_must_be_the_same(folder):
    edit_config(folder, tie_word_embeddings=True)
    assert "lm_head.weight differs from model.embed_tokens.weight" in message_of(folder)
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    assert "unembedding" not in imported(folder)[1]


NOT_SUPPORTED = {
    "architecture LlamaModel is not supported; model_type llama needs LlamaForCausalLM": {
        "architectures": ["LlamaModel"],
    },
    "architecture PhiForCausalLM (model_type phi) is not supported; choose a model of llama": {
        "model_type": "phi", "architectures": ["PhiForCausalLM"],
    },
    "architectures ['Gemma3ForCausalLM'] is not supported; model_type gemma3 needs ['Gemma3ForConditionalGen": {
        "model_type": "gemma3", "architectures": ["Gemma3ForCausalLM"],
    },
    "text_config.model_type 'llama' is not supported": {
        "model_type": "gemma3", "architectures": None, "text_config": {"model_type": "llama"},
    },
    "option attention_bias = True is not supported": {"attention_bias": True},
    "option mlp_bias = True is not supported": {"mlp_bias": True},
    "option quantization_config": {"quantization_config": {"bits": 4}},
    "option residual_scale = 0.3 is not supported for llama; if it does not change": {"residual_scale": 0.3},
    "hidden_act relu is not supported; supported are silu": {"hidden_act": "relu"},
    "rope_type yarn is not supported": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
    "rope_type dynamic is not supported": {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_parameters": None},
    "RoPE option partial_rotary_factor": {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 1e4}},
    "rope_type linear needs factor": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}},
    "num_hidden_layers is missing": {"num_hidden_layers": None},
}  # fmt: skip


@pytest.mark.parametrize(("says", "changes"), NOT_SUPPORTED.items(), ids=NOT_SUPPORTED)
def test_options_that_are_not_supported(folder, says, changes):
    edit_config(folder, **changes)
    assert f"config.json: {says}" in message_of(folder)


SCALED = {
    "rope_theta": 1e4,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
WRONG_TYPES = {
    "num_hidden_layers: expected a positive integer, got '2'": {"num_hidden_layers": "2"},
    "num_attention_heads: expected a positive integer, got 0": {"num_attention_heads": 0},
    "hidden_size: expected a positive integer, got 16.0": {"hidden_size": 16.0},
    "vocab_size: expected a positive integer, got True": {"vocab_size": True},
    "num_key_value_heads: expected a positive integer, got [2]": {"num_key_value_heads": [2]},
    "max_position_embeddings: expected a positive integer, got 'x'": {"max_position_embeddings": "x"},
    "rms_norm_eps: expected a positive number, got nan": {"rms_norm_eps": float("nan")},
    "tie_word_embeddings: expected true or false, got 'no'": {"tie_word_embeddings": "no"},
    "hidden_act: expected a string, got {}": {"hidden_act": {}},
    "model_type: expected a string, got ['llama']": {"model_type": ["llama"]},
    "architectures: expected a list of strings, got 'LlamaForCausalLM'": {"architectures": "LlamaForCausalLM"},
    "sliding_window: expected an integer of at least 0, got '20'": {"model_type": "mistral", "sliding_window": "20"},
    "layer_types: expected a list of strings, got [1]": {"layer_types": [1]},
    "text_config: expected a JSON object, got []": {"model_type": "gemma3", "text_config": []},
    "rope_theta: expected a positive number, got 'big'": {"rope_theta": "big"},
    "rope_parameters: expected a JSON object, got [1]": {"rope_parameters": [1]},
    "rope_parameters.rope_theta: expected a positive number, got 'big'": {"rope_parameters": {"rope_theta": "big"}},
    "rope_parameters.full_attention: expected a JSON object": {"rope_parameters": {"full_attention": "default"}},
    "rope_parameters.full_attention.factor: expected": {"rope_parameters": {"full_attention": {"factor": {}}}},
    "rope_scaling.type: expected a string, got 3": {"rope_parameters": None, "rope_scaling": {"type": 3}},
    "rope_parameters.original_max_position_embeddings: expected a positive": {
        "rope_parameters": SCALED | {"original_max_position_embeddings": "8192"},
    },
}  # fmt: skip


@pytest.mark.parametrize(("says", "changes"), WRONG_TYPES.items(), ids=WRONG_TYPES)
def test_options_of_the_wrong_type(folder, says, changes):
    edit_config(folder, **{"architectures": None} | changes)
    assert f"config.json: {says}" in message_of(folder)


def test_every_option_that_is_read_has_a_type():
    read = {option for family in FAMILIES.values() for option in (*family.options, *family.defaults)}
    assert read <= OPTIONS.keys()


def test_null_is_the_default(folder):
    edit_config(folder, max_position_embeddings=None, rope_theta=None, rope_parameters={"rope_theta": None})
    assert imported(folder)[0].rope_base == 10_000


def test_an_option_may_be_ignored_by_name_unless_it_is_known_to_matter(folder):
    config = Folder(folder).config
    plain = describe_model(config)
    assert describe_model(config | {"residual_scale": 0.3}, ["residual_scale"]) == plain
    with pytest.raises(ConvertError, match="attention_bias"):
        describe_model(config | {"attention_bias": True}, ["attention_bias"])


def test_an_activation_is_named_as_the_file_names_it():
    config = Folder(DATA / "gemma2").config
    for option in ("hidden_activation", "hidden_act"):
        changes = {"hidden_activation": None} | {option: "relu"}
        with pytest.raises(ConvertError, match=rf"config\.json: {option} relu is not supported"):
            describe_model(config | changes)


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("gemma2", {"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, "chunked_attention"),
        ("gemma2", {"layer_types": ["full_attention"]}, "contradict num_hidden_layers 3"),
        ("gemma2", {"sliding_window": None}, "contradict num_hidden_layers 3 or sliding_window None"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("mistral", {"layer_types": ["full_attention"] * 3}, "option layer_types"),
        ("gemma3", {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {
            "rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}}, "scaled RoPE in sliding_attention layers"),
    ],
)  # fmt: skip
def test_windows_that_are_not_supported(name, changes, says):
    with pytest.raises(ConvertError) as caught:
        describe_model(Folder(DATA / name).config | changes)
    assert says in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "model.norm.weight"]
)
def test_values_that_are_not_finite(folder, name, dtype, value):
    def spoil(tensors):
        for each in tensors:
            tensors[each] = tensors[each].astype(dtype)
        tensors[name].reshape(-1)[-1] = value

    edit_tensors(folder, spoil)
    assert f"tensor {name} in model.safetensors has values that are not finite as {dtype}" in message_of(
        folder
    )


def test_the_largest_values_are_finite(folder):
    def enlarge(tensors):
        tensors["model.norm.weight"][:2] = np.finfo("f4").max, np.finfo("f4").smallest_subnormal

    edit_tensors(folder, enlarge)
    _, params = imported(folder)
    assert params["final_norm"]["scale"][0] == np.finfo("f4").max
