"""The `config.json` of a model that is exported."""

import dataclasses
from collections.abc import Collection
from typing import Any

from fam_jax.config import ModelConfig
from fam_jax.hf.config_json import INERT, SIZES, ConvertError
from fam_jax.hf.families import (
    ACTIVATIONS,
    FAMILIES,
    LAYER_TYPES,
    LLAMA3_ROPE,
    Fields,
    HfConfig,
    describe_model,
)


def hf_config(model: ModelConfig, *, dtype: str = "float32") -> dict[str, Any]:
    """Return a `config.json` for a model, in the spelling that transformers 4 and 5 both read.

    The memory is not part of it: the model is described as one that sees its whole context, or its window.

    Args:
      model: config of the model.
      dtype: of the tensors.

    Raises:
      ConvertError: no supported family computes what the config says; the message names a field.
    """
    name = _family_name(model)
    family = FAMILIES[name]
    activation = {ours: theirs for theirs, ours in ACTIVATIONS.items()}.get(
        model.activation, model.activation
    )
    hf: dict[str, Any] = {theirs: getattr(model, ours) for theirs, ours in SIZES.items()} | {
        "architectures": [family.architecture], "model_type": name, "torch_dtype": dtype,
        "vocab_size": model.vocab_size, "num_key_value_heads": model.num_kv_heads, "head_dim": model.head_dim,
        "rms_norm_eps": model.norm_epsilon, "tie_word_embeddings": model.tie_embeddings, "hidden_act": activation,
        "rope_theta": model.rope_base, "rope_scaling": _written_scaling(model),
        "max_position_embeddings": (model.memory_segments + 1) * model.block_size,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    if "sliding_window" in family.options:
        hf |= _written_windows(model, name)
    if "query_pre_attn_scalar" in family.options:
        scalar = model.query_pre_attn_scalar or model.head_dim
        hf |= {
            "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
            "attn_logit_softcapping": model.attention_softcap or None,
            "final_logit_softcapping": model.logit_softcap or None, "hidden_activation": activation,
        }  # fmt: skip
    if name == "gemma3_text":
        hf["rope_local_base_freq"] = model.local_rope_base or model.rope_base
    check_same(model, hf)
    return hf


def updated_config(model: ModelConfig, original: HfConfig, *, dtype: str = "float32") -> dict[str, Any]:
    """Return the `config.json` of a model that was imported with `original`, which is kept if it still describes it.

    Args:
      model: config of the model as it is now.
      original: content of the file that the model was imported with; empty if it was not imported.
      dtype: of the tensors.

    Raises:
      ConvertError: no supported family computes what the config says.
    """
    try:
        check_same(model, original, ignored=tuple(original))
    except ConvertError:  # for example, the model's window was replaced by blocks
        return new_config(model, original, dtype=dtype)
    return dict(original)


def new_config(model: ModelConfig, original: HfConfig, *, dtype: str = "float32") -> dict[str, Any]:
    """Return :func:`hf_config`, with the options of `original` that do not change what the model computes."""
    kept = (INERT | {"max_position_embeddings"}) - {"dtype", "torch_dtype"}
    return hf_config(model, dtype=dtype) | {key: original[key] for key in kept & original.keys()}


def check_same(model: ModelConfig, hf: HfConfig, ignored: Collection[str] = ()) -> None:
    """Raise :class:`ConvertError`, naming a field, unless a `config.json` describes exactly this model."""
    description = describe_model(hf, ignored)
    theirs = dataclasses.replace(model, **description.fields)
    compared = {name: (_meaning(model, name), _meaning(theirs, name)) for name in description.fields}
    compared["memory.window"] = model.memory.window, description.window
    for name, (here, there) in compared.items():
        if here != there:
            raise ConvertError(
                f"config.model.{name}: {here!r} cannot be expressed in transformers' {hf['model_type']}, which would "
                f"compute {there!r}; only models of a supported family can be exported"
            )


def _meaning(model: ModelConfig, name: str) -> Any:
    """Return the value of a field, made equal for configs that compute the same."""
    if name == "query_pre_attn_scalar":
        return model.query_pre_attn_scalar or float(model.head_dim)
    if name == "local_rope_base":
        return (model.local_rope_base or (model.rope_base, model.rope_scaling)) if model.local_window else 0.0
    if name.startswith("rope_") and name != "rope_base" and model.rope_scaling == "none":
        return "none"
    if name in ("rope_low_freq_factor", "rope_high_freq_factor", "rope_original_length"):
        return getattr(model, name) if model.rope_scaling == "llama3" else None
    return getattr(model, name)


def _family_name(model: ModelConfig) -> str:
    if model.norm_offset:
        if not model.post_norms:
            return "gemma"
        return "gemma3_text" if model.qk_norm else "gemma2"
    if model.qk_norm:
        return "qwen3"
    if model.qkv_bias:
        return "qwen2"
    return "mistral" if model.memory.window else "llama"


def _written_scaling(model: ModelConfig) -> Fields | None:
    if model.rope_scaling == "none":
        return None
    if model.rope_scaling == "linear":
        return {"rope_type": "linear", "factor": model.rope_factor}
    return {"rope_type": "llama3"} | {theirs: getattr(model, ours) for theirs, ours in LLAMA3_ROPE.items()}


def _written_windows(model: ModelConfig, name: str) -> Fields:
    if name == "mistral":
        return {"sliding_window": model.memory.window or None}
    pattern = ("local",) if model.memory.window else model.layer_pattern
    names = {ours: theirs for theirs, ours in LAYER_TYPES.items()}
    types = [names[pattern[i % len(pattern)]] for i in range(model.num_layers)]
    window = model.memory.window or model.local_window or None
    written: Fields = {"layer_types": types, "sliding_window": window}
    if name.startswith("qwen"):
        written |= {"use_sliding_window": window is not None, "max_window_layers": 0}
    return written
