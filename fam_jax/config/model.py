"""The fields of a model, and what they must satisfy together."""

import dataclasses

from fam_jax.config.errors import require


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The decoder. Letters are those of the shape legend in `fam_jax/model/__init__.py`."""

    vocab_size: int = 64  # V
    num_layers: int = 3  # L
    model_dim: int = 96  # D
    num_heads: int = 4  # H
    num_kv_heads: int = 4  # K: H is MHA, 1 is MQA, between them GQA
    head_dim: int = 24  # hd, even (RoPE rotates pairs)
    ff_dim: int = 384  # F
    activation: str = "swiglu"  # swiglu | geglu | gelu
    norm: str = "rmsnorm"  # rmsnorm | layernorm
    norm_epsilon: float = 1e-6
    tie_embeddings: bool = True
    scale_embeddings: bool = False  # multiply embeddings by sqrt(D) on their way in
    logit_softcap: float = 0.0  # logits are softcap * tanh(logits / softcap); 0 = as they are
    # What open checkpoints differ in (fam_jax/hf).
    qkv_bias: bool = False  # of queries, keys and values
    qk_norm: bool = False  # RMSNorm of the queries and keys of every head, before RoPE
    query_pre_attn_scalar: float = 0.0  # scores are divided by its square root; 0 = head_dim
    attention_softcap: float = 0.0  # as logit_softcap, of the attention scores
    post_norms: bool = False  # norms of what attention and feed-forward add to the residual stream
    norm_offset: bool = False  # the scale of a norm is 1 + its parameter
    rope_base: float = 10_000.0
    rope_scaling: str = "none"  # none | linear | llama3: how frequencies are lowered for longer contexts
    rope_factor: float = 1.0  # by which they are at most divided
    rope_low_freq_factor: float = 1.0  # llama3: wavelengths above rope_original_length / this: fully
    rope_high_freq_factor: float = 4.0  # llama3: wavelengths below rope_original_length / this: not at all
    rope_original_length: int = 8192  # llama3: tokens of context before scaling
    # Kinds of layers, repeated over the depth: "global" as all else here says; "local" is sliding window attention.
    layer_pattern: tuple[str, ...] = ("global",)
    local_window: int = 0  # of local layers, which have no FAM
    local_rope_base: float = 0.0  # of local layers, unscaled; 0 = as global layers
    dtype: str = "float32"  # of activations; parameters are always float32
    # Block Sliding Window Attention (section 2.1 of the paper).
    block_size: int = 32  # C
    memory_segments: int = 1  # m: past blocks that stay visible; 0 is allowed
    stop_gradient: bool = False  # no gradient into cached keys and values (Transformer-XL)
    window: int = 0  # if > 0, keys further back than window - 1 tokens are hidden too
    # Feedback Attention Memory (section 2.2). fam_length 0 is plain BSWA.
    fam_length: int = 8  # M
    fam_init: str = "prompt"  # prompt | prefix (appendix B.1)
    fam_positions: str = "last"  # last | float | zero (appendix B.2.1)
    fam_previous_blocks: int = 1  # FAMs of how many past blocks a token sees (appendix B.4.2)
    # Execution.
    attention: str = "auto"  # auto | reference | xla | pallas (TPU) | pallas_interpret: see README
    # What a layer keeps for its backward pass. none: everything. dots: the results of its projections and of attention.
    # wide: of these the feed-forward's and attention's. full: nothing.
    remat: str = "none"


def validate_model(model: ModelConfig) -> None:
    """Raises :class:`ConfigError` if fields contradict each other; ranges are checked by `fam_jax.config.validate`."""
    require(
        model.num_heads % model.num_kv_heads == 0,
        f"config.model.num_kv_heads: {model.num_kv_heads} does not divide num_heads {model.num_heads}",
    )
    require(model.head_dim % 2 == 0, f"config.model.head_dim: must be even for RoPE, got {model.head_dim}")
    require(
        model.fam_length <= model.block_size,
        f"config.model.fam_length: {model.fam_length} is longer than block_size {model.block_size}",
    )
    require(model.norm_epsilon > 0, f"config.model.norm_epsilon: must be positive, got {model.norm_epsilon}")
    require(model.rope_base > 1, f"config.model.rope_base: must be above 1, got {model.rope_base}")
    require(
        not model.attention.startswith("pallas") or model.block_size % 128 == 0,
        f"config.model.attention: {model.attention} needs a block_size that is a multiple of 128, "
        f"got {model.block_size}",
    )
    require(
        model.attention != "pallas_interpret" or model.remat == "none",
        f"config.model.remat: the interpreter of pallas_interpret cannot run under it, got {model.remat}; set none",
    )
    reach = model.memory_segments * model.block_size + 1
    for field in ("window", "local_window"):
        require(
            getattr(model, field) <= reach,
            f"config.model.{field}: {getattr(model, field)} is further back than every token can see, which is "
            f"memory_segments * block_size + 1 = {reach}",
        )
    _validate_variants(model)


def _validate_variants(model: ModelConfig) -> None:
    """What open checkpoints differ in."""
    require(
        not (model.attention.startswith("pallas") and model.attention_softcap),
        f"config.model.attention: {model.attention} has no attention_softcap; set auto, xla or reference",
    )
    require(
        model.rope_scaling != "llama3" or 0 < model.rope_low_freq_factor < model.rope_high_freq_factor,
        f"config.model.rope_low_freq_factor: must be above 0 and below rope_high_freq_factor "
        f"{model.rope_high_freq_factor}, got {model.rope_low_freq_factor}",
    )
    pattern = model.layer_pattern
    require(
        0 < len(pattern) <= model.num_layers and set(pattern) <= {"global", "local"},
        f"config.model.layer_pattern: expected 1 to num_layers {model.num_layers} of global and local, got {pattern}",
    )
    require(
        ("local" in pattern) == (model.local_window > 0),
        f"config.model.local_window: is of the local layers in layer_pattern, {pattern}, got {model.local_window}",
    )
    require(
        model.local_rope_base == 0 or model.local_rope_base > 1,
        f"config.model.local_rope_base: must be above 1, or 0 for rope_base, got {model.local_rope_base}",
    )
