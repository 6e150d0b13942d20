"""The model group: the decoder and how its layers remember."""

import dataclasses

from fam_jax.config.errors import require
from fam_jax.config.fields import Constraint, group, setting
from fam_jax.config.memory import MemoryConfig, memory_config_type


def _default_memory() -> MemoryConfig:
    return memory_config_type("fam")()


@group("model", effect="parameters")
class ModelConfig:
    """The decoder. The letters in the descriptions are those of the shape legend in `fam_jax/layers/__init__.py`."""

    vocab_size: int = setting(default=64, doc="V, entries of the embedding table.", minimum=1)
    num_layers: int = setting(default=3, doc="L.", minimum=1, maximum=10_000)
    model_dim: int = setting(default=96, doc="D, width of the residual stream.", minimum=1)
    num_heads: int = setting(default=4, doc="H, query heads.", minimum=1)
    num_kv_heads: int = setting(
        default=4, doc="K, key/value heads: H is MHA, 1 is MQA, between them GQA.", minimum=1
    )
    head_dim: int = setting(default=24, doc="hd, width of a head; even, as RoPE rotates pairs.", minimum=1)
    ff_dim: int = setting(default=384, doc="F, width of the feed-forward layer.", minimum=1)
    activation: str = setting(
        default="swiglu", doc="Nonlinearity of the feed-forward layer.", choices=("swiglu", "geglu", "gelu")
    )
    norm: str = setting(default="rmsnorm", doc="Normalization layer.", choices=("rmsnorm", "layernorm"))
    norm_epsilon: float = setting(default=1e-6, doc="Added to the variance in norms.", above=0)
    tie_embeddings: bool = setting(default=True, doc="Use the embedding table for the logits too.")
    scale_embeddings: bool = setting(default=False, doc="Multiply embeddings by sqrt(D) at the input.")
    logit_softcap: float = setting(
        default=0.0, doc="Logits become softcap * tanh(logits / softcap); 0 turns it off.", minimum=0
    )
    # Options in which open checkpoints differ (fam_jax/hf).
    qkv_bias: bool = setting(default=False, doc="Add a bias to queries, keys and values.")
    qk_norm: bool = setting(
        default=False, doc="Apply RMSNorm to the queries and keys of every head before RoPE."
    )
    query_pre_attn_scalar: float = setting(
        default=0.0,
        doc="Attention scores are divided by the square root of this; 0 means head_dim.",
        minimum=0,
    )
    attention_softcap: float = setting(
        default=0.0, doc="Like logit_softcap, for attention scores.", minimum=0
    )
    post_norms: bool = setting(
        default=False,
        doc="Normalize the outputs of attention and feed-forward before they join the residual stream.",
    )
    norm_offset: bool = setting(default=False, doc="The scale of a norm is 1 + its parameter.")
    rope_base: float = setting(default=10_000.0, doc="Base of RoPE's wavelengths.", above=1)
    rope_scaling: str = setting(
        default="none",
        doc="Scaling of RoPE's frequencies for longer contexts.",
        choices=("none", "linear", "llama3"),
    )
    rope_factor: float = setting(
        default=1.0, doc="Largest factor by which frequencies are divided.", minimum=1
    )
    rope_low_freq_factor: float = setting(
        default=1.0, doc="llama3: wavelengths above rope_original_length / this are scaled fully."
    )
    rope_high_freq_factor: float = setting(
        default=4.0, doc="llama3: wavelengths below rope_original_length / this are not scaled."
    )
    rope_original_length: int = setting(
        default=8192, doc="llama3: context length before scaling, in tokens.", minimum=1
    )
    layer_pattern: tuple[str, ...] = setting(
        default=("global",),
        doc="Layer types, repeated over the depth. Global layers use model.memory; local layers use sliding window "
        "attention.",
    )
    local_window: int = setting(default=0, doc="Window of local layers, in tokens.", minimum=0)
    local_rope_base: float = setting(
        default=0.0, doc="RoPE base of local layers, unscaled; 0 means that of global layers."
    )
    dtype: str = setting(
        default="float32",
        doc="Dtype of activations. Parameters are float32.",
        choices=("float32", "bfloat16", "float64"),
        effect="state",
    )
    block_size: int = setting(
        default=32, doc="C, tokens of a block: memory changes at block borders.", minimum=1, effect="state"
    )
    memory: MemoryConfig = dataclasses.field(
        default_factory=_default_memory,
        metadata={
            "constraint": Constraint(
                "The memory of global layers; `kind` names it and decides its other fields."
            )
        },
    )
    attention: str = setting(
        default="auto",
        doc="Attention implementation; pallas needs a TPU. The table in docs/architecture.md says which runs where.",
        choices=("auto", "reference", "xla", "pallas", "pallas_interpret"),
        effect="execution",
    )
    remat: str = setting(
        default="none",
        doc="What a layer keeps for its backward pass. none: everything. dots: results of projections and attention. "
        "wide: those of feed-forward and attention. full: nothing.",
        choices=("none", "dots", "wide", "full"),
        effect="execution",
    )

    @property
    def memory_segments(self) -> int:
        """Return m, the number of past blocks whose keys and values stay visible."""
        return self.memory.cached_blocks(self.block_size)

    def check(self) -> None:
        """Raise :class:`ConfigError` if fields contradict each other."""
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"config.model.num_kv_heads: {self.num_kv_heads} does not divide num_heads {self.num_heads}",
        )
        require(self.head_dim % 2 == 0, f"config.model.head_dim: must be even for RoPE, got {self.head_dim}")
        require(
            not self.attention.startswith("pallas") or self.block_size % 128 == 0,
            f"config.model.attention: {self.attention} needs a block_size that is a multiple of 128, "
            f"got {self.block_size}",
        )
        require(
            self.attention != "pallas_interpret" or self.remat == "none",
            f"config.model.remat: pallas_interpret cannot run under rematerialization, got {self.remat}; set none",
        )
        self._check_variants()
        self._check_layer_types()
        self.memory.check_model(self)

    def _check_variants(self) -> None:
        """Check the options in which open checkpoints differ."""
        require(
            not (self.attention.startswith("pallas") and self.attention_softcap),
            f"config.model.attention: {self.attention} does not support attention_softcap; set auto, xla or "
            "reference",
        )
        require(
            self.rope_scaling != "llama3" or 0 < self.rope_low_freq_factor < self.rope_high_freq_factor,
            f"config.model.rope_low_freq_factor: must be above 0 and below rope_high_freq_factor "
            f"{self.rope_high_freq_factor}, got {self.rope_low_freq_factor}",
        )
        require(
            self.local_rope_base == 0 or self.local_rope_base > 1,
            f"config.model.local_rope_base: must be above 1, or 0 for rope_base, got {self.local_rope_base}",
        )

    def _check_layer_types(self) -> None:
        pattern = self.layer_pattern
        require(
            0 < len(pattern) <= self.num_layers and set(pattern) <= {"global", "local"},
            f"config.model.layer_pattern: expected 1 to num_layers {self.num_layers} entries, each global or local, "
            f"got {pattern}",
        )
        require(
            ("local" in pattern) == (self.local_window > 0),
            f"config.model.local_window: set it if and only if layer_pattern has local layers; layer_pattern is "
            f"{pattern}, local_window is {self.local_window}",
        )
        for name, window in (("memory.window", self.memory.window), ("local_window", self.local_window)):
            reach = self.memory_segments * self.block_size + 1
            require(
                window <= reach,
                f"config.model.{name}: {window} exceeds what every token can see, "
                f"memory_segments * block_size + 1 = {reach}",
            )
