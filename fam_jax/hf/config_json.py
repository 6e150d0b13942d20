"""A `config.json`: the JSON file, and which type each of its options has."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from etils import epath

from fam_jax.config import UserError
from fam_jax.config.strict_json import parse_json


class ConvertError(UserError):
    """A folder in Hugging Face format cannot be read exactly, or a model cannot be written as one."""


class OptionType(NamedTuple):
    """The values that an option accepts. Null is accepted too and means the default."""

    # As it follows "expected" in a message.
    description: str
    accepts: Callable[[Any], bool]


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return (_integer(value) or isinstance(value, float)) and abs(value) < 1e30  # false for NaN


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


COUNT = OptionType("a positive integer", lambda value: _integer(value) and value > 0)
INTEGER = OptionType("an integer of at least 0", lambda value: _integer(value) and value >= 0)
NUMBER = OptionType("a number of at least 0", lambda value: _number(value) and value >= 0)
POSITIVE = OptionType("a positive number", lambda value: _number(value) and value > 0)
FLAG = OptionType("true or false", lambda value: isinstance(value, bool))
STRING = OptionType("a string", lambda value: isinstance(value, str))
STRINGS = OptionType("a list of strings", _strings)
GROUP = OptionType("a JSON object", lambda value: isinstance(value, dict))

# The first bytes of what git checks out in place of a file that Git LFS holds.
LFS_POINTER = b"version https://git-lfs"

# Options without a default, with the fields of ModelConfig that they set.
SIZES = {
    "num_hidden_layers": "num_layers", "hidden_size": "model_dim", "intermediate_size": "ff_dim",
    "num_attention_heads": "num_heads",
}  # fmt: skip

# Options that every family reads.
COMMON_OPTIONS = dict.fromkeys(SIZES, COUNT) | {
    "model_type": STRING, "architectures": STRINGS, "vocab_size": COUNT, "num_key_value_heads": COUNT,
    "head_dim": COUNT, "hidden_act": STRING, "rms_norm_eps": POSITIVE, "tie_word_embeddings": FLAG,
    "max_position_embeddings": COUNT, "rope_theta": POSITIVE, "rope_scaling": GROUP, "rope_parameters": GROUP,
}  # fmt: skip

# Options that some families read; `Family.options` says which.
FAMILY_OPTIONS = {
    "hidden_activation": STRING, "layer_types": STRINGS, "sliding_window": INTEGER, "use_sliding_window": FLAG,
    "max_window_layers": INTEGER, "sliding_window_pattern": COUNT, "_sliding_window_pattern": COUNT,
    "rope_local_base_freq": POSITIVE, "query_pre_attn_scalar": NUMBER, "attn_logit_softcapping": NUMBER,
    "final_logit_softcapping": NUMBER,
}  # fmt: skip

# The groups of a model with a vision tower; text_config is the config.json of its text model.
MULTIMODAL_OPTIONS = {"text_config": GROUP, "vision_config": GROUP}

OPTIONS = COMMON_OPTIONS | FAMILY_OPTIONS | MULTIMODAL_OPTIONS

# Options within rope_scaling and rope_parameters.
ROPE_OPTIONS = {
    "rope_type": STRING, "type": STRING, "rope_theta": POSITIVE, "factor": POSITIVE, "low_freq_factor": POSITIVE,
    "high_freq_factor": POSITIVE, "original_max_position_embeddings": COUNT,
}  # fmt: skip

# Options that change what a model computes in ways that are not supported.
UNSUPPORTED = {"attention_bias", "mlp_bias", "use_bidirectional_attention", "quantization_config", "auto_map"}

# Options that do not change the logits.
INERT = {
    "_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "attention_dropout", "bos_token_id",
    "cache_implementation", "dtype", "eos_token_id", "id2label", "initializer_range", "label2id", "output_attentions",
    "output_hidden_states", "pad_token_id", "pretraining_tp", "return_dict", "tokenizer_class", "torch_dtype",
    "transformers_version", "unsloth_fixed", "unsloth_version", "use_cache",
}  # fmt: skip

# Values with which an option changes nothing.
NEUTRAL = {"partial_rotary_factor": 1.0}


def check_types(
    options: Mapping[str, Any], types: Mapping[str, OptionType] = OPTIONS, prefix: str = ""
) -> None:
    """Raise :class:`ConvertError` if an option has a value of the wrong type; the message names the option.

    Args:
      options: a config.json, or a group within it.
      types: the types of the options that are read. Other options are not checked.
      prefix: path of the group, ending in a dot.
    """
    for name, value in options.items():
        expected = types.get(name)
        if expected is not None and value is not None and not expected.accepts(value):
            raise ConvertError(
                f"config.json: {prefix}{name}: expected {expected.description}, got {short(value)}"
            )


def short(value: Any) -> str:
    """Return the `repr` of a value, cut to 80 characters, for a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def read_json(path: epath.PathLike) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
      ConvertError: the file cannot be read or does not hold a JSON object.
    """
    check_no_pointer(path)
    try:
        content = parse_json(epath.Path(path).read_bytes())
    except (ValueError, OSError) as error:
        raise ConvertError(
            f"{path}: cannot be read as JSON ({first_line(error)}); download it again"
        ) from error
    if not isinstance(content, dict):
        raise ConvertError(f"{path}: expected a JSON object; download it again")
    return content


def check_no_pointer(path: epath.PathLike) -> None:
    """Raise :class:`ConvertError` if a file is the pointer that git leaves where Git LFS is not installed."""
    try:
        with epath.Path(path).open("rb") as file:
            beginning = file.read(len(LFS_POINTER))
    except OSError:
        return  # reading the file will say why
    if beginning == LFS_POINTER:
        raise ConvertError(
            f"{path}: is a pointer of Git LFS, not the file itself; run `git lfs pull` in the folder, or download it"
        )


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the name of its type, cut to 160 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
