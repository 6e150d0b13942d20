"""Configs of the supported families, between transformers' spelling (old and new) and :class:`ModelConfig`."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from fam_jax.config import ModelConfig, fields_with_effect
from fam_jax.hf.errors import ConvertError
from fam_jax.hf.options import INERT, READ, REFUSED, ROPE, SIZES, check_kinds, short

HfConfig = Mapping[str, Any]
Fields = dict[str, Any]


class Family(NamedTuple):
    """What the models of one `model_type` share."""

    architecture: str
    defaults: dict[str, Any]  # what transformers takes where a config.json is silent
    fields: dict[str, Any]  # of ModelConfig
    options: tuple[str, ...] = ()  # further keys that are read


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

# Here null says that there is none; of other options, that it is the default.
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

# A model without any of the options that families differ in: the fields that decide what parameters are or mean.
PLAIN = {
    field.name: field.default
    for field in dataclasses.fields(ModelConfig)
    if field.name in fields_with_effect(ModelConfig, "parameters")
}


def model_fields(hf: HfConfig, ignored: Collection[str] = ()) -> Fields:
    """Return the fields of :class:`ModelConfig` that a `config.json` decides: what its model computes.

    Args:
      hf: the file's content, or what :func:`fam_jax.hf.multimodal.text_part` makes of it.
      ignored: options that may be in it unread, because the caller knows that they change nothing.

    Raises:
      ConvertError: an architecture, option or value that is not supported, or a size that is missing.
    """
    return {name: value for name, value in _fields(hf, ignored).items() if name != "window"}


def model_window(hf: HfConfig, ignored: Collection[str] = ()) -> int:
    """Return the sliding window of all layers of a `config.json`, in tokens; 0: they have none.

    Raises:
      ConvertError: as :func:`model_fields`.
    """
    return _fields(hf, ignored).get("window", 0)


def _fields(hf: HfConfig, ignored: Collection[str]) -> Fields:
    """Return :func:`model_fields`, and "window" if all layers have one."""
    check_kinds(hf)
    family = _family(hf)
    _refuse_unknown(hf, family, ignored)
    values = family.defaults | {
        key: value for key, value in hf.items() if value is not None or key in NULLABLE
    }
    for name in SIZES:
        if name not in values:
            raise ConvertError(f"config.json: {name} is missing; complete the file from its source")
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
    return PLAIN | fields | family.fields | _rope(hf, values) | _layers(hf, values)


def hf_config(model: ModelConfig, *, dtype: str = "float32") -> dict[str, Any]:
    """The `config.json` of a model's layers, in the spelling that transformers 4 and 5 read; FAM is not part of it.

    Args:
      model: its attention is taken as that of blocks which see the whole context.
      dtype: of the tensors.

    Raises:
      ConvertError: no supported family computes what the config says; the message names a field in the way.
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
        hf |= _written_layers(model, name)
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
    """The `config.json` of a model that was imported with `original`: that one, as long as it describes the model.

    Raises:
      ConvertError: as :func:`hf_config`.
    """
    try:
        check_same(model, original, ignored=tuple(original))
    except ConvertError:  # a window was given up, say
        kept = (INERT | {"max_position_embeddings"}) - {"dtype", "torch_dtype"}
        return hf_config(model, dtype=dtype) | {key: original[key] for key in kept & original.keys()}
    return dict(original)


def check_same(model: ModelConfig, hf: HfConfig, ignored: Collection[str] = ()) -> None:
    """Raises :class:`ConvertError`, naming a field, unless `hf` says of a model just what its config says."""
    found = dataclasses.replace(model, **model_fields(hf, ignored))
    for field in dataclasses.fields(ModelConfig):
        ours, theirs = (_meaning(config, field.name) for config in (model, found))
        if ours != theirs:
            raise ConvertError(
                f"config.model.{field.name}: {ours!r} cannot be expressed in transformers' {hf['model_type']}, "
                f"where it would be {theirs!r}"
            )


def _meaning(model: ModelConfig, name: str) -> Any:
    """A field's value, the same for two configs that mean the same by it."""
    if name == "query_pre_attn_scalar":
        return model.query_pre_attn_scalar or float(model.head_dim)
    if name == "local_rope_base":
        return (model.local_rope_base or (model.rope_base, model.rope_scaling)) if model.local_window else 0.0
    if name.startswith("rope_") and name != "rope_base" and model.rope_scaling == "none":
        return "none"
    if name in ("rope_low_freq_factor", "rope_high_freq_factor", "rope_original_length"):
        return getattr(model, name) if model.rope_scaling == "llama3" else None
    return getattr(model, name)


def _family(hf: HfConfig) -> Family:
    name, architectures = hf.get("model_type"), hf.get("architectures") or []
    if name not in FAMILIES:
        raise ConvertError(
            f"config.json: architecture {', '.join(architectures) or 'unnamed'} (model_type {name}) is not supported; "
            f"supported are {', '.join(FAMILIES)}"
        )
    if architectures and architectures != [FAMILIES[name].architecture]:
        raise ConvertError(
            f"config.json: architecture {', '.join(architectures)} is not supported; of model_type {name} it is "
            f"{FAMILIES[name].architecture}"
        )
    return FAMILIES[name]


def _refuse_unknown(hf: HfConfig, family: Family, ignored: Collection[str]) -> None:
    for key, value in hf.items():
        if key in REFUSED and value not in (None, False):
            raise ConvertError(f"config.json: option {key} = {short(value)} is not supported")
        known = key in READ or key in INERT or key in family.options or key in ignored
        if not known and value not in (None, False):
            raise ConvertError(
                f"config.json: option {key} = {short(value)} is not supported for {hf['model_type']}; if it changes "
                f"nothing that the model computes, pass --ignore_option={key}"
            )


def _activation(hf: HfConfig, values: Fields) -> str:
    name = values["hidden_act"]
    if hf["model_type"].startswith("gemma"):
        # The first Gemma files say gelu and mean its tanh approximation, which hidden_activation says of later ones.
        newer = hf.get("hidden_activation")
        name = newer or ("gelu_pytorch_tanh" if name == "gelu" and hf["model_type"] == "gemma" else name)
    if name not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ConvertError(f"config.json: hidden_act {name} is not supported; supported are {known}")
    return ACTIVATIONS[name]


def _rope(hf: HfConfig, values: Fields) -> Fields:
    """From `rope_parameters` (transformers 5), or `rope_theta`, `rope_scaling` and `rope_local_base_freq` (4)."""
    old = {"rope_theta": values["rope_theta"]} | _group(hf, "rope_scaling")
    local = {"rope_theta": values.get("rope_local_base_freq", 0.0)}
    new = _group(hf, "rope_parameters")
    if set(new) & set(LAYER_TYPES):
        local |= _group(new, "sliding_attention", "rope_parameters.")
        new = _group(new, "full_attention", "rope_parameters.")
    fields = _one_rope(old | new)
    if hf["model_type"] != "gemma3_text":
        return fields
    if _one_rope(local)["rope_scaling"] != "none":
        raise ConvertError("config.json: scaled rope of the sliding_attention layers is not supported")
    has_local = "local" in _layers(hf, values).get("layer_pattern", ())
    return fields | ({"local_rope_base": float(local["rope_theta"])} if has_local else {})


def _group(options: HfConfig, name: str, where: str = "") -> Fields:
    """The options of a group of rope's that are not null; none if there is no such group."""
    found = options.get(name) or {}
    if not isinstance(found, Mapping):
        raise ConvertError(f"config.json: {where}{name}: expected a group of options, got {short(found)}")
    check_kinds(found, ROPE, f"{where}{name}.")
    return {key: value for key, value in found.items() if value is not None}


def _one_rope(rope: Fields) -> Fields:
    unknown = [key for key in rope if key not in ROPE]
    if rope.get("partial_rotary_factor") == 1:
        unknown.remove("partial_rotary_factor")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "linear", "llama3"):
        raise ConvertError(
            f"config.json: rope_type {kind} is not supported; supported are default, linear, llama3"
        )
    if unknown:
        raise ConvertError(f"config.json: option {unknown[0]} of rope is not supported")
    fields: Fields = {"rope_base": float(rope["rope_theta"])}
    needed = {"default": (), "linear": ("factor",)}.get(kind, tuple(_LLAMA3))
    if missing := [key for key in needed if rope.get(key) is None]:
        raise ConvertError(
            f"config.json: rope_type {kind} needs {missing[0]}; complete the file from its source"
        )
    scaling = "none" if kind == "default" else kind
    return fields | {"rope_scaling": scaling} | {_LLAMA3[key]: rope[key] for key in needed}


_LLAMA3 = {
    "factor": "rope_factor", "low_freq_factor": "rope_low_freq_factor", "high_freq_factor": "rope_high_freq_factor",
    "original_max_position_embeddings": "rope_original_length",
}  # fmt: skip


def _layers(hf: HfConfig, values: Fields) -> Fields:
    """Windows: which layers have one, and how wide."""
    name, count, window = hf["model_type"], values["num_hidden_layers"], values["sliding_window"]
    if name in ("llama", "gemma"):
        return {}
    if name == "mistral":
        return {"window": window or 0}
    if not values.get("use_sliding_window", True):
        window = None
    period = (
        hf.get("sliding_window_pattern")
        or hf.get("_sliding_window_pattern")
        or values.get("sliding_window_pattern")
    )
    types = hf.get("layer_types")
    if types is None:
        slides = [(i + 1) % period > 0 if period else i >= values["max_window_layers"] for i in range(count)]
        types = ["sliding_attention" if s and window else "full_attention" for s in slides]
    if unknown := sorted(set(types) - set(LAYER_TYPES)):
        raise ConvertError(
            f"config.json: layer type {unknown[0]} is not supported; supported are {', '.join(LAYER_TYPES)}"
        )
    if len(types) != count or ("sliding_attention" in types and not window):
        raise ConvertError(
            f"config.json: layer_types {types} do not fit num_hidden_layers {count} and sliding_window {window}"
        )
    kinds = tuple(LAYER_TYPES[kind] for kind in types)
    if "local" not in kinds:
        return {}
    if "global" not in kinds and name.startswith("qwen"):
        return {"window": window}  # as Mistral's, whose window belongs to all layers
    return {"layer_pattern": _period(kinds), "local_window": window}


def _period(kinds: tuple[str, ...]) -> tuple[str, ...]:
    """The shortest pattern whose repetition begins with `kinds`."""
    lengths = range(1, len(kinds) + 1)
    return kinds[: next(n for n in lengths if all(k == kinds[i % n] for i, k in enumerate(kinds)))]


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
    return {"rope_type": "llama3"} | {theirs: getattr(model, ours) for theirs, ours in _LLAMA3.items()}


def _written_layers(model: ModelConfig, name: str) -> Fields:
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
