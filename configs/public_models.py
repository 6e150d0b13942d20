"""Sizes of public models by name, as in their `config.json`. They are enough to plan without the weights."""

from typing import Any

GEMMA2: dict[str, Any] = {
    "model_type": "gemma2", "vocab_size": 256_000, "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0, "sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
}  # fmt: skip

PUBLIC_MODELS: dict[str, dict[str, Any]] = {
    "gemma2_2b": GEMMA2 | {
        "num_hidden_layers": 26, "hidden_size": 2304, "intermediate_size": 9216, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256,
    },
    "gemma2_27b": GEMMA2 | {
        "num_hidden_layers": 46, "hidden_size": 4608, "intermediate_size": 36_864, "num_attention_heads": 32,
        "num_key_value_heads": 16, "head_dim": 128, "query_pre_attn_scalar": 144,
    },
    "gemma3_27b": {
        "model_type": "gemma3_text", "vocab_size": 262_208, "hidden_activation": "gelu_pytorch_tanh",
        "num_hidden_layers": 62, "hidden_size": 5376, "intermediate_size": 21_504, "num_attention_heads": 32,
        "num_key_value_heads": 16, "head_dim": 128, "query_pre_attn_scalar": 168, "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "rope_local_base_freq": 10_000.0, "sliding_window": 1024, "sliding_window_pattern": 6,
    },
    "llama3_8b": {
        "model_type": "llama", "vocab_size": 128_256, "num_hidden_layers": 32, "hidden_size": 4096,
        "intermediate_size": 14_336, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
    },
    "mistral_7b": {
        "model_type": "mistral", "vocab_size": 32_768, "num_hidden_layers": 32, "hidden_size": 4096,
        "intermediate_size": 14_336, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0, "sliding_window": None,
    },
}  # fmt: skip
