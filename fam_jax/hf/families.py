"""The supported model families, and the fields of :class:`ModelConfig` that a `config.json` decides."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from fam_jax.config import ModelConfig, ceil_div, fields_with_effect
from fam_jax.hf.config_json import (
    COMMON_OPTIONS,
    INERT,
    NEUTRAL,
    ROPE_OPTIONS,
    SIZES,
    UNSUPPORTED,
    ConvertError,
    check_types,
    short,
)

HfConfig = Mapping[str, Any]
Fields = dict[str, Any]


class ModelDescription(NamedTuple):
    """What a `config.json` says about its model."""

    # Fields of ModelConfig: what parameters the model has, and what it computes with them.
    fields: Fields
    # Sliding window of all layers, in tokens; 0: they have none.
    window: int
    # Tokens that the model was made for; None: the file does not say.
    context: int | None

    def segments(self, block_size: int, context: int) -> int:
        """Return how many past blocks a token has to see so that the model computes what the original does.

        Args:
          block_size: tokens of a block.
          context: tokens that have to see all tokens before them.
        """
        # A token sees window - 1 tokens before itself, and it may be the first of its block.
        reach = max(context - block_size, self.window - 1, self.fields["local_window"] - 1, 0)
        return ceil_div(reach, block_size)


class Family(NamedTuple):
    """What the models of one `model_type` have in common."""

    # Name of the class in transformers.
    architecture: str
    # Defaults of transformers for options that a config.json leaves out.
    defaults: dict[str, Any]
    # Fields of ModelConfig.
    fields: dict[str, Any]
    # Options that are read beside COMMON_OPTIONS.
    options: tuple[str, ...] = ()


COMMON = {
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "rope_theta": 10_000.0, "sliding_window": None,
    "hidden_act": "silu", "head_dim": None, "num_key_value_heads": None, "vocab_size": 32000,
}  # fmt: skip
QWEN = COMMON | {
    "vocab_size": 151936,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
GEMMA = COMMON | {
    "vocab_size": 256000, "num_key_value_heads": 16, "tie_word_embeddings": True, "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 0, "attn_logit_softcapping": None, "final_logit_softcapping": None,
}  # fmt: skip
GEMMA_FIELDS = {"norm_offset": True, "scale_embeddings": True}
LAYERED = ("layer_types", "sliding_window")
CAPPED = ("hidden_activation", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")

# Options for which null means "none". For other options it means the default.
NULLABLE = {*CAPPED, "sliding_window", "num_key_value_heads", "head_dim"}

FAMILIES = {
    "llama": Family("LlamaForCausalLM", COMMON, {}),
    "mistral": Family(
        "MistralForCausalLM", COMMON | {"num_key_value_heads": 8, "sliding_window": 4096}, {}, ("sliding_window",)
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM", QWEN, {"qkv_bias": True}, (*LAYERED, "use_sliding_window", "max_window_layers")
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM", QWEN | {"head_dim": 128}, {"qk_norm": True},
        (*LAYERED, "use_sliding_window", "max_window_layers"),
    ),
    "gemma": Family("GemmaForCausalLM", GEMMA, GEMMA_FIELDS, ("hidden_activation",)),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        GEMMA | {"num_key_value_heads": 4, "query_pre_attn_scalar": 256, "sliding_window": 4096,
                 "sliding_window_pattern": 2, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        GEMMA_FIELDS | {"post_norms": True},
        (*LAYERED, *CAPPED),
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        GEMMA | {"vocab_size": 262208, "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "sliding_window": 4096,
                 "sliding_window_pattern": 6, "rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0},
        GEMMA_FIELDS | {"post_norms": True, "qk_norm": True},
        (*LAYERED, *CAPPED, "sliding_window_pattern", "_sliding_window_pattern", "rope_local_base_freq"),
    ),
}  # fmt: skip

ACTIVATIONS = {"silu": "swiglu", "gelu_pytorch_tanh": "geglu"}
LAYER_TYPES = {"full_attention": "global", "sliding_attention": "local"}

# Options of RoPE's llama3 scaling, with the fields that they set.
LLAMA3_ROPE = {
    "factor": "rope_factor", "low_freq_factor": "rope_low_freq_factor", "high_freq_factor": "rope_high_freq_factor",
    "original_max_position_embeddings": "rope_original_length",
}  # fmt: skip

# The fields that a config.json decides, with the values of a model without any of the options of the families.
PLAIN = {
    field.name: field.default
    for field in dataclasses.fields(ModelConfig)
    if field.name in fields_with_effect(ModelConfig, "parameters")
}


def describe_model(hf: HfConfig, ignored: Collection[str] = ()) -> ModelDescription:
    """Return what a `config.json` says about its model.

    Args:
      hf: content of the file, or what :func:`fam_jax.hf.multimodal.text_part` makes of it.
      ignored: names of options that are not read, as the caller knows that they change nothing.

    Raises:
      ConvertError: an architecture, option or value is not supported, or a size is missing.
    """
    check_types(hf)
    family = _family(hf)
    _reject_unknown(hf, family, ignored)
    values = family.defaults | {
        key: value for key, value in hf.items() if value is not None or key in NULLABLE
    }
    for name in SIZES:
        if name not in values:
            raise ConvertError(f"config.json: {name} is missing; download the file again")
    heads = values["num_attention_heads"]
    fields = {ours: values[theirs] for theirs, ours in SIZES.items()} | {
        "vocab_size": values["vocab_size"],
        "num_kv_heads": values["num_key_value_heads"] or heads,
        "head_dim": values["head_dim"] or values["hidden_size"] // heads,
        "norm": "rmsnorm",
        "norm_epsilon": values["rms_norm_eps"],
        "tie_embeddings": values["tie_word_embeddings"],
        "activation": _activation(hf, values),
        "query_pre_attn_scalar": values.get("query_pre_attn_scalar") or 0.0,
        "attention_softcap": values.get("attn_logit_softcapping") or 0.0,
        "logit_softcap": values.get("final_logit_softcapping") or 0.0,
    }
    windows = _windows(hf, values)
    fields |= family.fields | windows.fields | _rope(hf, values, has_local="layer_pattern" in windows.fields)
    return ModelDescription(PLAIN | fields, windows.of_all, hf.get("max_position_embeddings"))


def _family(hf: HfConfig) -> Family:
    name, architectures = hf.get("model_type"), hf.get("architectures") or []
    if name not in FAMILIES:
        raise ConvertError(
            f"config.json: architecture {', '.join(architectures) or 'unnamed'} (model_type {name}) is not supported; "
            f"choose a model of {', '.join(FAMILIES)}"
        )
    expected = FAMILIES[name].architecture
    if architectures and architectures != [expected]:
        raise ConvertError(
            f"config.json: architecture {', '.join(architectures)} is not supported; model_type {name} needs {expected}"
        )
    return FAMILIES[name]


def _reject_unknown(hf: HfConfig, family: Family, ignored: Collection[str]) -> None:
    given = {key: value for key, value in hf.items() if value not in (None, False)}
    for key, value in given.items():
        if key in UNSUPPORTED:
            raise ConvertError(f"config.json: option {key} = {short(value)} is not supported")
    known = {*COMMON_OPTIONS, *INERT, *family.options, *ignored}
    unknown = [key for key in given if key not in known and given[key] != NEUTRAL.get(key)]
    if unknown:
        listed = ", ".join(f"{key} = {short(given[key])}" for key in unknown)
        one = len(unknown) == 1
        raise ConvertError(
            f"config.json: {'option' if one else 'options'} {listed} {'is' if one else 'are'} not supported for "
            f"{hf['model_type']}; if {'it does' if one else 'they do'} not change what the model computes, pass "
            + " ".join(f"--ignore_option={key}" for key in unknown)
        )


def _activation(hf: HfConfig, values: Fields) -> str:
    option = "hidden_act"
    name = values[option]
    if hf["model_type"].startswith("gemma"):
        # Early Gemma files say gelu but mean its tanh approximation. Later files say so in hidden_activation.
        if hf.get("hidden_activation"):
            option, name = "hidden_activation", hf["hidden_activation"]
        elif name == "gelu" and hf["model_type"] == "gemma":
            name = "gelu_pytorch_tanh"
    if name not in ACTIVATIONS:
        raise ConvertError(
            f"config.json: {option} {name} is not supported; supported are {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def _rope(hf: HfConfig, values: Fields, *, has_local: bool) -> Fields:
    """Return the fields of RoPE.

    They come from `rope_parameters` (transformers 5), or from `rope_theta`, `rope_scaling` and `rope_local_base_freq`
    (transformers 4).
    """
    old = {"rope_theta": values["rope_theta"]} | _group(hf, "rope_scaling")
    local = {"rope_theta": values.get("rope_local_base_freq", 0.0)}
    new = _group(hf, "rope_parameters")
    if set(new) & set(LAYER_TYPES):
        local |= _group(new, "sliding_attention", "rope_parameters.")
        new = _group(new, "full_attention", "rope_parameters.")
    fields = _rope_fields(old | new)
    if hf["model_type"] != "gemma3_text":
        return fields
    if _rope_fields(local)["rope_scaling"] != "none":
        raise ConvertError("config.json: scaled RoPE in sliding_attention layers is not supported")
    return fields | ({"local_rope_base": float(local["rope_theta"])} if has_local else {})


def _group(options: HfConfig, name: str, prefix: str = "") -> Fields:
    """Return the options of a group of RoPE options that are not null; empty if there is no such group."""
    found = options.get(name) or {}
    if not isinstance(found, Mapping):
        raise ConvertError(f"config.json: {prefix}{name}: expected a JSON object, got {short(found)}")
    check_types(found, ROPE_OPTIONS, f"{prefix}{name}.")
    return {key: value for key, value in found.items() if value is not None}


def _rope_fields(rope: Fields) -> Fields:
    unknown = [key for key in rope if key not in ROPE_OPTIONS]
    if rope.get("partial_rotary_factor") == 1:
        unknown.remove("partial_rotary_factor")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "linear", "llama3"):
        raise ConvertError(
            f"config.json: rope_type {kind} is not supported; supported are default, linear, llama3"
        )
    if unknown:
        raise ConvertError(f"config.json: RoPE option {unknown[0]} is not supported")
    needed = {"default": (), "linear": ("factor",), "llama3": tuple(LLAMA3_ROPE)}[kind]
    if missing := [key for key in needed if rope.get(key) is None]:
        raise ConvertError(
            f"config.json: rope_type {kind} needs {missing[0]}, which is missing; download the file again"
        )
    fields: Fields = {"rope_base": float(rope["rope_theta"])}
    fields["rope_scaling"] = "none" if kind == "default" else kind
    return fields | {LLAMA3_ROPE[key]: rope[key] for key in needed}


class _Windows(NamedTuple):
    """The sliding windows of the layers."""

    # layer_pattern and local_window, if only some layers have a window.
    fields: Fields
    # The window, if all layers have it; else 0.
    of_all: int = 0


def _windows(hf: HfConfig, values: Fields) -> _Windows:
    name, count, window = hf["model_type"], values["num_hidden_layers"], values["sliding_window"]
    if name in ("llama", "gemma"):
        return _Windows({})
    if name == "mistral":
        return _Windows({}, window or 0)
    if not values.get("use_sliding_window", True):
        window = None
    types = hf.get("layer_types")
    if types is None:
        types = _default_layer_types(hf, values, window)
    if unknown := sorted(set(types) - set(LAYER_TYPES)):
        raise ConvertError(
            f"config.json: layer type {unknown[0]} is not supported; supported are {', '.join(LAYER_TYPES)}"
        )
    if len(types) != count or ("sliding_attention" in types and not window):
        raise ConvertError(
            f"config.json: layer_types {types} contradict num_hidden_layers {count} or sliding_window {window}; "
            "download the file again"
        )
    kinds = tuple(LAYER_TYPES[kind] for kind in types)
    if "local" not in kinds:
        return _Windows({})
    if "global" not in kinds and name.startswith("qwen"):
        return _Windows({}, window)
    return _Windows({"layer_pattern": _period(kinds), "local_window": window})


def _default_layer_types(hf: HfConfig, values: Fields, window: int | None) -> list[str]:
    """Return the layer types that transformers derives from older options."""
    period = (
        hf.get("sliding_window_pattern")
        or hf.get("_sliding_window_pattern")
        or values.get("sliding_window_pattern")
    )
    layers = range(values["num_hidden_layers"])
    if period:
        slides = [(layer + 1) % period > 0 for layer in layers]
    else:
        slides = [layer >= values["max_window_layers"] for layer in layers]
    return ["sliding_attention" if slide and window else "full_attention" for slide in slides]


def _period(kinds: tuple[str, ...]) -> tuple[str, ...]:
    """Return the shortest pattern whose repetition begins with `kinds`."""
    lengths = range(1, len(kinds) + 1)
    return kinds[: next(n for n in lengths if all(k == kinds[i % n] for i, k in enumerate(kinds)))]
