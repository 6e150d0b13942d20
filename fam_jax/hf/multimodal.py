"""The text part of a model that also has a vision tower: of its `config.json`, and of its tensors' names."""

from collections.abc import Mapping
from typing import Any

from fam_jax.hf.errors import ConvertError
from fam_jax.hf.options import OF_THE_WHOLE, READ, READ_OF_SOME, check_kinds, short

MODEL_TYPE, TEXT_TYPE = "gemma3", "gemma3_text"
ARCHITECTURE, TEXT_ARCHITECTURE = "Gemma3ForConditionalGeneration", "Gemma3ForCausalLM"

# What transformers takes where text_config is silent, beyond the defaults of the family; published ones are.
TEXT_DEFAULTS = {
    "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
    "max_position_embeddings": 131_072,
}  # fmt: skip

# Options of the whole that say nothing of the text part, whose own are in text_config. Others are carried over, for
# the caller to read, leave or refuse.
WHOLE_ONLY = {
    *READ, *READ_OF_SOME, *OF_THE_WHOLE, "mm_tokens_per_image", "boi_token_index", "eoi_token_index",
    "image_token_index", "boi_token_id", "eoi_token_id", "image_token_id",
}  # fmt: skip

# Beginnings of names: of the text part, in old files and in new ones, with what they are in a text model; of the rest.
TEXT_NAMES = {
    "language_model.model.": "model.",
    "model.language_model.": "model.",
    "language_model.lm_head.": "lm_head.",
}
OTHER_NAMES = tuple(
    f"{outer}{part}." for outer in ("", "model.") for part in ("vision_tower", "multi_modal_projector")
)


def is_multimodal(hf: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is that of a model with a vision tower, of which the text part is supported."""
    return hf.get("model_type") == MODEL_TYPE


def text_part(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` that the text part has as a model of its own; that of a text model as it is.

    Raises:
      ConvertError: the architecture is not supported, or a group is none.
    """
    if not is_multimodal(hf):
        return dict(hf)
    check_kinds(hf)
    text = hf.get("text_config") or {}
    for found, wanted, name in (
        (hf.get("architectures") or [ARCHITECTURE], [ARCHITECTURE], "architectures"),
        (text.get("model_type") or TEXT_TYPE, TEXT_TYPE, "text_config.model_type"),
    ):
        if found != wanted:
            raise ConvertError(
                f"config.json: {name} {short(found)} is not supported; of model_type {MODEL_TYPE} it is {wanted}"
            )
    outer = {key: value for key, value in hf.items() if key not in WHOLE_ONLY}
    own = {
        "architectures": [TEXT_ARCHITECTURE], "model_type": TEXT_TYPE,
        # The whole has the unembedding: whether that is tied is an option of the whole, and it has no soft cap.
        "tie_word_embeddings": hf.get("tie_word_embeddings") is not False, "final_logit_softcapping": None,
    }  # fmt: skip
    sizes = {key: value for key, value in TEXT_DEFAULTS.items() if text.get(key) is None}
    return {**text, **sizes, **outer, **own}


def text_name(name: str) -> str | None:
    """The name that a tensor has in a text model; None for those of the vision tower and its projector."""
    if name.startswith(OTHER_NAMES):
        return None
    for theirs, plain in TEXT_NAMES.items():
        if name.startswith(theirs):
            return plain + name.removeprefix(theirs)
    return name
