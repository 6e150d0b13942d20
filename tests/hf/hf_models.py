"""Tiny random models of transformers, at least one of every supported family. Needs torch."""

import pathlib

import numpy as np
import torch
import transformers

from tests.hf.recorded import LENGTH, VOCABULARY

transformers.logging.set_verbosity_error()

SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "max_position_embeddings": 64,
    "initializer_range": 0.02,
}  # fmt: skip
GEMMA3 = {
    "sliding_window": 6, "sliding_window_pattern": 3, "num_hidden_layers": 4, "query_pre_attn_scalar": 10,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}  # fmt: skip
# Numbers of heads that transformers takes where a config does not say.
WITH_VISION = {"text_config": SIZES | GEMMA3 | {"num_attention_heads": 8, "num_key_value_heads": 4}}
VISION = {
    "model_type": "siglip_vision_model", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 2, "image_size": 8, "patch_size": 4,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip

# Name -> class of the config and what it differs in; windows and soft caps are small enough to show.
MODELS = {
    "llama": (transformers.LlamaConfig, {"num_key_value_heads": 4}),
    "llama3": (transformers.LlamaConfig, {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama_linear": (
        transformers.LlamaConfig,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "mistral": (transformers.MistralConfig, {"sliding_window": 7}),
    "qwen2": (transformers.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2_windows": (
        transformers.Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    ),
    "qwen3": (transformers.Qwen3Config, {}),
    "gemma": (transformers.GemmaConfig, {"num_key_value_heads": 1}),
    "gemma2": (
        transformers.Gemma2Config,
        {"sliding_window": 6, "query_pre_attn_scalar": 10, "attn_logit_softcapping": 2.0,
         "final_logit_softcapping": 3.0},
    ),
    "gemma3": (transformers.Gemma3TextConfig, GEMMA3),
    "gemma3_vision": (
        transformers.Gemma3Config, WITH_VISION | {"vision_config": VISION, "mm_tokens_per_image": 4},
    ),
}  # fmt: skip


def make(name: str, seed: int = 0) -> transformers.PreTrainedModel:
    """Return a model with random parameters, all of which show in its logits: no scale is 1, no bias is 0."""
    kind, changes = MODELS[name]
    config = kind(**changes if "text_config" in changes else SIZES | changes)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    offset = 0.0 if name.startswith("gemma") else 1.0
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
            else:
                parameter.copy_(0.3 * noise + (offset if path.endswith("norm.weight") else 0))
    return model.eval()


def logits_of(model: transformers.PreTrainedModel, tokens: np.ndarray) -> np.ndarray:
    """Return logits (B, T, V) in float32."""
    with torch.no_grad():
        return model(torch.from_numpy(tokens.astype(np.int64))).logits.float().numpy()


def record(name: str, folder: pathlib.Path) -> None:
    """Save a model as transformers does, with its logits of :func:`recorded_tokens` beside it."""
    from tests.hf.recorded import recorded_tokens

    model = make(name)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    logits = logits_of(model, recorded_tokens())
    assert logits.shape == (2, LENGTH, VOCABULARY)
    np.save(folder / "logits.npy", logits)


if __name__ == "__main__":
    for name in MODELS:
        record(name, pathlib.Path(__file__).parent / "data" / name)
