"""The text part of a model with a vision tower: its `config.json` and the names of its tensors."""

from collections.abc import Mapping
from typing import Any

from fam_jax.hf.config_json import (
    COMMON_OPTIONS,
    FAMILY_OPTIONS,
    MULTIMODAL_OPTIONS,
    ConvertError,
    check_types,
    short,
)

MODEL_TYPE, TEXT_TYPE = "gemma3", "gemma3_text"
ARCHITECTURE, TEXT_ARCHITECTURE = "Gemma3ForConditionalGeneration", "Gemma3ForCausalLM"

# Defaults of transformers for text_config that are not in those of the family. The published 4B model relies on them.
TEXT_DEFAULTS = {
    "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
    "max_position_embeddings": 131_072,
}  # fmt: skip

# Top-level options that do not describe the text part. All other top-level options are copied to the text part's
# config.json, whose reader accepts or rejects them.
TOP_LEVEL_ONLY = {
    *COMMON_OPTIONS, *FAMILY_OPTIONS, *MULTIMODAL_OPTIONS, "mm_tokens_per_image", "boi_token_index", "eoi_token_index",
    "image_token_index", "boi_token_id", "eoi_token_id", "image_token_id",
}  # fmt: skip

# Prefixes of the text part's tensors, in old and in new files, and what replaces them in a text model.
TEXT_PREFIXES = {
    "language_model.model.": "model.",
    "model.language_model.": "model.",
    "language_model.lm_head.": "lm_head.",
}
# Prefixes of all other tensors.
VISION_PREFIXES = tuple(
    f"{outer}{part}." for outer in ("", "model.") for part in ("vision_tower", "multi_modal_projector")
)


def is_multimodal(hf: Mapping[str, Any]) -> bool:
    """Return whether a `config.json` describes a model with a vision tower whose text part is supported."""
    return hf.get("model_type") == MODEL_TYPE


def text_part(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `config.json` of the text part as a model of its own. A text model's is returned as it is.

    Raises:
      ConvertError: the architecture is not supported, or an option has the wrong type.
    """
    if not is_multimodal(hf):
        return dict(hf)
    check_types(hf)
    text = hf.get("text_config") or {}
    for found, expected, name in (
        (hf.get("architectures") or [ARCHITECTURE], [ARCHITECTURE], "architectures"),
        (text.get("model_type") or TEXT_TYPE, TEXT_TYPE, "text_config.model_type"),
    ):
        if found != expected:
            raise ConvertError(
                f"config.json: {name} {short(found)} is not supported; model_type {MODEL_TYPE} needs {expected}"
            )
    outer = {key: value for key, value in hf.items() if key not in TOP_LEVEL_ONLY}
    own = {
        "architectures": [TEXT_ARCHITECTURE], "model_type": TEXT_TYPE,
        # The whole model owns the unembedding: tying it is a top-level option, and its logits have no soft cap.
        "tie_word_embeddings": hf.get("tie_word_embeddings") is not False, "final_logit_softcapping": None,
    }  # fmt: skip
    sizes = {key: value for key, value in TEXT_DEFAULTS.items() if text.get(key) is None}
    return {**text, **sizes, **outer, **own}


def text_name(name: str) -> str | None:
    """Return the name of a tensor in a text model, or None if it belongs to the vision tower or its projector."""
    if name.startswith(VISION_PREFIXES):
        return None
    for prefix, replacement in TEXT_PREFIXES.items():
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    return name
