"""Options of a `config.json`: of which kind each is, and which are read, refused or change nothing."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fam_jax.hf.errors import ConvertError


class Kind(NamedTuple):
    """What values an option takes, beside null, which stands for its default."""

    words: str
    fits: Callable[[Any], bool]


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return (_whole(value) or isinstance(value, float)) and abs(value) < 1e30  # which NaN is not


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


COUNT = Kind("a whole number above 0", lambda value: _whole(value) and value > 0)
WHOLE = Kind("a whole number of 0 or more", lambda value: _whole(value) and value >= 0)
NUMBER = Kind("a number of 0 or more", lambda value: _number(value) and value >= 0)
POSITIVE = Kind("a number above 0", lambda value: _number(value) and value > 0)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("a text", lambda value: isinstance(value, str))
NAMES = Kind("a list of texts", _names)
GROUP = Kind("a group of options", lambda value: isinstance(value, dict))

# Sizes have no default.
SIZES = {
    "num_hidden_layers": "num_layers", "hidden_size": "model_dim", "intermediate_size": "ff_dim",
    "num_attention_heads": "num_heads",
}  # fmt: skip

# Read for every family.
READ = dict.fromkeys(SIZES, COUNT) | {
    "model_type": TEXT, "architectures": NAMES, "vocab_size": COUNT, "num_key_value_heads": COUNT, "head_dim": COUNT,
    "hidden_act": TEXT, "rms_norm_eps": POSITIVE, "tie_word_embeddings": FLAG, "max_position_embeddings": COUNT,
    "rope_theta": POSITIVE, "rope_scaling": GROUP, "rope_parameters": GROUP,
}  # fmt: skip

# Read for some: see `Family.options`.
READ_OF_SOME = {
    "hidden_activation": TEXT, "layer_types": NAMES, "sliding_window": WHOLE, "use_sliding_window": FLAG,
    "max_window_layers": WHOLE, "sliding_window_pattern": COUNT, "_sliding_window_pattern": COUNT,
    "rope_local_base_freq": POSITIVE, "query_pre_attn_scalar": NUMBER, "attn_logit_softcapping": NUMBER,
    "final_logit_softcapping": NUMBER,
}  # fmt: skip

ROPE = {
    "rope_type": TEXT, "type": TEXT, "rope_theta": POSITIVE, "factor": POSITIVE, "low_freq_factor": POSITIVE,
    "high_freq_factor": POSITIVE, "original_max_position_embeddings": COUNT,
}  # fmt: skip

# Of a model with a vision tower, whose config.json has the text model's as a group.
OF_THE_WHOLE = {"text_config": GROUP, "vision_config": GROUP}

ALL = READ | READ_OF_SOME | OF_THE_WHOLE

# Options that change what a model computes, in ways that are not supported.
REFUSED = {"attention_bias", "mlp_bias", "use_bidirectional_attention", "quantization_config", "auto_map"}

# Options that change no logits.
INERT = {
    "_name_or_path", "attention_dropout", "bos_token_id", "cache_implementation", "dtype", "eos_token_id",
    "initializer_range", "output_attentions", "output_hidden_states", "pad_token_id", "pretraining_tp",
    "return_dict", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip


def check_kinds(options: Mapping[str, Any], kinds: Mapping[str, Kind] = ALL, where: str = "") -> None:
    """Raises :class:`ConvertError`, naming the option, if one is of another kind than it should be.

    Args:
      options: of a config.json, or of a group in it.
      kinds: of those that are read.
      where: name of the group, with a dot.
    """
    for name, value in options.items():
        kind = kinds.get(name)
        if kind is not None and value is not None and not kind.fits(value):
            raise ConvertError(f"config.json: {where}{name}: expected {kind.words}, got {short(value)}")


def short(value: Any) -> str:
    """A value for a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
