"""TransformerFAM in NumPy float64, one row, one token and one key at a time.

This code is written from the paper and has one purpose: a reader can check it against the paper line by line. Every
key is an entry of a Python list, every attention a Python loop, every number a float64. Section numbers are the paper's
(arXiv 2404.09173). It shares only the configuration with the package.

Shape letters: B batch, T tokens, C block, M FAM length, L layers, D width, H query heads, K key/value heads, G = H/K,
hd head width, F feed-forward width, V vocabulary, m memory segments, R previous FAM blocks. `tau` counts blocks from 0;
a stream starts with the FAM `F_{-1}`.
"""

import dataclasses
import math
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from fam_jax.config import ModelConfig
from fam_jax.memories.fam import FamConfig

Array = np.ndarray
Params = Mapping[str, Any]


class NaiveResult(NamedTuple):
    # (B, T, V)
    logits: Array
    # (L, B, M, D) after the last complete block; the starting FAM if no block is complete.
    fam: Array


@dataclasses.dataclass
class _LayerState:
    """The state of one layer of one row. It keeps all keys; whether a key is visible is decided on use."""

    # keys[tau][i]: (K, hd), rotated, of token i of block tau.
    keys: list[list[Array]]
    # Like keys, but not rotated.
    values: list[list[Array]]
    # fams[tau + 1] = F_tau: (M, D); fams[0] is the starting FAM.
    fams: list[Array]
    # Whether the starting FAM carries context; all later ones do.
    carries_context: bool
    # Sliding window attention without FAM; nobody reads the starting FAM.
    local: bool


def naive_forward(
    params: Params,
    config: ModelConfig,
    tokens: Array,
    *,
    start_fam: Array | None = None,
    carries_context: Array | None = None,
    position: int = 0,
    offset: Array | None = None,
) -> NaiveResult:
    """Run the decoder over `tokens` from an empty state.

    Args:
      params: nested dict of arrays, layer parameters stacked on a leading L axis.
      config: the model's config; `dtype`, `attention`, `remat` and `stop_gradient` have no effect here.
      tokens: (B, T) integers; T need not be a multiple of the block size.
      start_fam: (L, M, D), a FAM saved by an earlier step (appendix B.2.3); None starts every row from the initial FAM.
      carries_context: (B,) bool, which rows start from `start_fam`; by default all, if there is a `start_fam`.
      position: absolute position of the first token, a multiple of the block size.
      offset: (B,) random position offset of each row (appendix B.2.2).
    """
    config, batch = as_fam(config), tokens.shape[0]
    offsets = np.zeros(batch) if offset is None else offset
    if start_fam is None:
        carries_context = np.zeros(batch, bool)
    elif carries_context is None:
        carries_context = np.ones(batch, bool)
    logits, fams = [], []
    for b in range(batch):
        origin = float(position) + float(offsets[b])
        if carries_context[b]:
            start = [np.asarray(f, np.float64) for f in start_fam]
        else:
            start = initial_fams(params, config, origin)
        row_logits, row_fams = _row(params, config, tokens[b], start, bool(carries_context[b]), origin)
        logits.append(row_logits)
        fams.append(row_fams)
    return NaiveResult(np.array(logits), np.stack(fams, axis=1))


def as_fam(config: ModelConfig) -> Any:
    """Return the config with any window written as a FAM without vectors.

    The result has type Any: its memory group is then known to be FamConfig.
    """
    if isinstance(config.memory, FamConfig):
        return config
    window = FamConfig(length=0, segments=config.memory_segments, window=config.memory.window)
    return dataclasses.replace(config, memory=window)


def initial_fams(params: Params, config: ModelConfig, origin: float = 0.0) -> list[Array]:
    """Return the learned F_{-1} of every layer, (M, D) each (appendix B.1); the first token is at `origin`."""
    config = as_fam(config)
    if config.memory.length == 0:
        return [np.zeros((0, config.model_dim))] * config.num_layers
    if config.memory.init == "prefix":
        return [np.asarray(f, np.float64) for f in params["layers"]["memory"]["initial_fam"]]
    stream = np.asarray(params["memory"]["initial_fam"], np.float64)
    positions = fam_positions(config, -1, origin)
    fams = []
    for index in range(config.num_layers):
        fams.append(stream)  # the value that *enters* the layer
        layer, own = parameters_of_layer(params, index), _layer_config(config, index)
        q, k, v = _fam_qkv(layer, own, stream, positions)
        new = []
        # Every vector attends to all vectors of the prompt, and to nothing else.
        for i in range(config.memory.length):
            a = project_output(layer, own, attend(own, q[i], k, v)) + stream[i]
            new.append(feed_forward(layer, own, a) + a)
        stream = np.array(new)
    return fams


def fam_positions(config: Any, tau: int, origin: float) -> list[float]:
    """Return the positions of the M vectors of F_tau (appendix B.2.1) if the first token is at `origin`."""
    length = config.memory.length
    end = origin + (tau + 1) * config.block_size  # where block tau + 1 begins
    if config.memory.positions == "last":
        return [end - length + i for i in range(length)]
    if config.memory.positions == "float":
        return [end - 1 + (i + 1) / (length + 1) for i in range(length)]
    assert config.memory.positions == "zero"
    return [0.0] * length


def _row(
    params: Params, config: ModelConfig, tokens: Array, start: list[Array], carries: bool, origin: float
) -> tuple[Array, Array]:
    """Run one row; return its logits (T, V) and its last FAM (L, M, D)."""
    table = np.asarray(params["embedding"]["table"], np.float64)
    unembedding = (
        table.T if config.tie_embeddings else np.asarray(params["unembedding"]["kernel"], np.float64)
    )
    indices = range(config.num_layers)
    layers = [(parameters_of_layer(params, index), _layer_config(config, index)) for index in indices]
    states = [
        _LayerState([], [], [fam], carries, _is_local(config, index))
        for index, fam in zip(indices, start, strict=True)
    ]
    logits = []
    for t, token in enumerate(tokens):
        tau, within = divmod(t, config.block_size)
        if within == 0:
            for state in states:
                state.keys.append([])
                state.values.append([])
        x = table[token]
        if config.scale_embeddings:
            x = x * math.sqrt(config.model_dim)
        for (layer, own), state in zip(layers, states, strict=True):
            x = _token_step(layer, own, state, x, t, origin)
        h = normalize(config, params["final_norm"], x)
        logits.append(_soft_cap(h @ unembedding, config.logit_softcap))
        if within == config.block_size - 1:
            for (layer, own), state in zip(layers, states, strict=True):
                state.fams.append(_next_fam(layer, own, state, tau, origin))
    return np.array(logits), np.array([state.fams[-1] for state in states])


def _token_step(
    layer: Params, config: ModelConfig, state: _LayerState, x: Array, t: int, origin: float
) -> Array:
    """Run the token path of algorithm 2: add the key of token t to the state, return the layer's output (D,)."""
    tau = t // config.block_size
    q, k, v = project_vector(layer, config, x, origin + t)
    state.keys[tau].append(k)
    state.values[tau].append(v)

    keys: list[Array] = []
    values: list[Array] = []
    # Memory segment: all keys of blocks tau-m .. tau-1; then the own block up to this token.
    for block in range(max(0, tau - config.memory.segments), tau + 1):
        for i, (k, v) in enumerate(zip(state.keys[block], state.values[block], strict=True)):
            distance = t - (block * config.block_size + i)
            if config.memory.window == 0 or distance < config.memory.window:
                keys.append(k)
                values.append(v)
    # FAM of the blocks before: F_{tau-1}, F_{tau-2}, ... F_{tau-R}, as far back as F_{-1}.
    oldest = tau if state.local else max(-1, tau - config.memory.previous_blocks)
    for block in range(tau - 1, oldest - 1, -1):
        fam, positions = state.fams[block + 1], fam_positions(config, block, origin)
        _, fam_keys, fam_values = _fam_qkv(layer, config, fam, positions)
        keys += fam_keys
        values += fam_values

    a = project_output(layer, config, attend(config, q, keys, values)) + x
    return feed_forward(layer, config, a) + a


def _next_fam(layer: Params, config: ModelConfig, state: _LayerState, tau: int, origin: float) -> Array:
    """Run the FAM path of algorithm 2: return F_tau (M, D), from F_{tau-1} and the complete block `tau`."""
    previous = state.fams[tau]  # F_{tau-1}
    if state.local:
        return previous
    carries = state.carries_context if tau == 0 else True
    q, k, v = _fam_qkv(layer, config, previous, fam_positions(config, tau - 1, origin))
    new = []
    for i in range(config.memory.length):
        a = project_output(layer, config, attend(config, q[i], k + state.keys[tau], v + state.values[tau]))
        if carries:  # the "FAM copy"; the learned initial FAM has no context to copy (appendix B.1)
            a = a + bounded(previous[i], config.memory.bound)
        new.append(feed_forward(layer, config, a) + a)
    return np.reshape(new, previous.shape)


def bounded(x: Array, bound: float) -> Array:
    """Return x (D,), scaled down if its root mean square is above a positive `bound`."""
    size = np.sqrt(np.mean(x**2))
    return x * (bound / size) if 0 < bound < size else x


def _fam_qkv(
    layer: Params, config: ModelConfig, fam: Array, positions: list[float]
) -> tuple[list[Array], list[Array], list[Array]]:
    """Return QF (H, hd), KF and VF (K, hd) of each of the M vectors, with the weights of the tokens."""
    q, k, v = [], [], []
    for x, p in zip(fam, positions, strict=True):
        for into, y in zip((q, k, v), project_vector(layer, config, x, p), strict=True):
            into.append(y)
    return q, k, v


def project_vector(
    layer: Params, config: ModelConfig, x: Array, position: float
) -> tuple[Array, Array, Array]:
    """Return query (H, hd), key and value (K, hd) of one vector (D,), the first two rotated."""
    normed = normalize(config, layer["attention_norm"], x)
    q, k, v = (_project(normed, layer[name]) for name in ("query", "key", "value"))
    if config.qkv_bias:
        q, k, v = q + layer["query_bias"], k + layer["key_bias"], v + layer["value_bias"]
    if config.qk_norm:
        q = np.array([normalize(config, layer["query_norm"], head) for head in q])
        k = np.array([normalize(config, layer["key_norm"], head) for head in k])
    return _rope(config, q, position), _rope(config, k, position), v


def _is_local(config: ModelConfig, index: int) -> bool:
    return config.layer_pattern[index % len(config.layer_pattern)] == "local"


def _layer_config(config: ModelConfig, index: int) -> ModelConfig:
    """Return the config of layer `index`, with the window and RoPE of its type."""
    if not _is_local(config, index):
        return config
    memory = dataclasses.replace(config.memory, window=config.local_window)
    config = dataclasses.replace(config, memory=memory)
    if config.local_rope_base:
        config = dataclasses.replace(config, rope_base=config.local_rope_base, rope_scaling="none")
    return config


def _soft_cap(x: Any, cap: float) -> Any:
    return cap * np.tanh(x / cap) if cap > 0 else x


def attend(config: ModelConfig, q: Array, keys: list[Array], values: list[Array]) -> Array:
    """Attend with one query (H, hd) to lists of keys and values (K, hd); query head h reads kv head h // G."""
    heads, width = q.shape
    group = heads // keys[0].shape[0]
    out = np.zeros_like(q)
    for h in range(heads):
        scale = math.sqrt(config.query_pre_attn_scalar or width)
        scores = np.array([_soft_cap(q[h] @ k[h // group] / scale, config.attention_softcap) for k in keys])
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        for weight, v in zip(weights, values, strict=True):
            out[h] += weight * v[h // group]
    return out


def _rope(config: ModelConfig, x: Array, position: float) -> Array:
    """Rotate the pairs (i, i + hd/2) of x (heads, hd) by position * base^(-2i/hd), scaled."""
    half = config.head_dim // 2
    out = np.empty_like(x)
    for i in range(half):
        angle = position * _scaled(config, config.rope_base ** (-2.0 * i / config.head_dim))
        out[:, i] = x[:, i] * math.cos(angle) - x[:, i + half] * math.sin(angle)
        out[:, i + half] = x[:, i] * math.sin(angle) + x[:, i + half] * math.cos(angle)
    return out


def _scaled(config: ModelConfig, frequency: float) -> float:
    """Return the scaled frequency of RoPE, in radians per position."""
    if config.rope_scaling == "linear":
        return frequency / config.rope_factor
    if config.rope_scaling == "none":
        return frequency
    wavelength = 2 * math.pi / frequency
    if wavelength > config.rope_original_length / config.rope_low_freq_factor:
        return frequency / config.rope_factor
    if wavelength < config.rope_original_length / config.rope_high_freq_factor:
        return frequency
    turns = config.rope_original_length / wavelength
    smooth = (turns - config.rope_low_freq_factor) / (
        config.rope_high_freq_factor - config.rope_low_freq_factor
    )
    return (1 - smooth) * frequency / config.rope_factor + smooth * frequency


def normalize(config: ModelConfig, norm: Params, x: Array) -> Array:
    scale = np.asarray(norm["scale"], np.float64) + (1 if config.norm_offset else 0)
    if config.norm == "layernorm":
        centered = x - x.mean()
        normed = centered / math.sqrt((centered**2).mean() + config.norm_epsilon)
        return normed * scale + np.asarray(norm["bias"], np.float64)
    assert config.norm == "rmsnorm"
    return x / math.sqrt((x**2).mean() + config.norm_epsilon) * scale


def _project(x: Array, linear: Params) -> Array:
    """Multiply x (D,) by a kernel (D, heads, hd)."""
    return np.einsum("d,dhk->hk", x, linear["kernel"])


def project_output(layer: Params, config: ModelConfig, x: Array) -> Array:
    """Multiply x (H, hd) by the output kernel (H, hd, D), and normalize if the config says so."""
    out = np.einsum("hk,hkd->d", x, layer["output"]["kernel"])
    return normalize(config, layer["attention_post_norm"], out) if config.post_norms else out


def feed_forward(layer: Params, config: ModelConfig, x: Array) -> Array:
    normed = normalize(config, layer["ff_norm"], x)
    up = normed @ layer["up"]["kernel"]
    if config.activation == "gelu":
        hidden = _gelu(up)
    else:
        gate = normed @ layer["gate"]["kernel"]
        hidden = {"swiglu": _silu, "geglu": _gelu}[config.activation](gate) * up
    down = hidden @ layer["down"]["kernel"]
    return normalize(config, layer["ff_post_norm"], down) if config.post_norms else down


def _silu(x: Array) -> Array:
    return x / (1.0 + np.exp(-x))


def _gelu(x: Array) -> Array:
    """Compute GELU in the tanh approximation."""
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def parameters_of_layer(params: Params, index: int) -> Params:
    """Return layer `index` of the stacked parameters, in float64."""

    def pick(node: Any) -> Any:
        if isinstance(node, Mapping):
            return {name: pick(child) for name, child in node.items()}
        return np.asarray(node[index], np.float64)

    return pick(params["layers"])


def random_params(config: ModelConfig, seed: int) -> dict[str, Any]:
    """Return random float64 values for every parameter that `config` needs.

    A forgotten scale, bias, rotation or mask changes the output, because norm scales are away from 1, biases away from
    0 and attention scores of the order of 1. A parameter depends on its name, its shape and `seed` alone, so two
    configs get the same values for the parameters that they share.
    """
    config = as_fam(config)
    count, width, ff = config.num_layers, config.model_dim, config.ff_dim
    heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim

    def normal(name: str, *shape: int) -> Array:
        return np.random.default_rng([seed, zlib.crc32(name.encode())]).normal(size=shape)

    def kernel(name: str, *shape: int, fan_in: int) -> dict[str, Array]:
        return {"kernel": normal(name, *shape) / math.sqrt(fan_in)}

    def norm(name: str, *shape: int) -> dict[str, Array]:
        out = {"scale": 0.3 * normal(name + "/scale", *shape) + (0 if config.norm_offset else 1)}
        if config.norm == "layernorm":
            out["bias"] = 0.3 * normal(name + "/bias", *shape)
        return out

    layers: dict[str, Any] = {
        "attention_norm": norm("attention_norm", count, width),
        "ff_norm": norm("ff_norm", count, width),
        "query": kernel("query", count, width, heads, head_dim, fan_in=width),
        "key": kernel("key", count, width, kv_heads, head_dim, fan_in=width),
        "value": kernel("value", count, width, kv_heads, head_dim, fan_in=width),
        "output": kernel("output", count, heads, head_dim, width, fan_in=heads * head_dim),
        "up": kernel("up", count, width, ff, fan_in=width),
        "down": kernel("down", count, ff, width, fan_in=ff),
    }
    if config.activation != "gelu":
        layers["gate"] = kernel("gate", count, width, ff, fan_in=width)
    if config.qkv_bias:
        for name, number in (("query", heads), ("key", kv_heads), ("value", kv_heads)):
            layers[f"{name}_bias"] = 0.3 * normal(f"{name}_bias", count, number, head_dim)
    if config.qk_norm:
        layers |= {name: norm(name, count, head_dim) for name in ("query_norm", "key_norm")}
    if config.post_norms:
        layers |= {name: norm(name, count, width) for name in ("attention_post_norm", "ff_post_norm")}
    params: dict[str, Any] = {
        "embedding": {"table": normal("embedding", config.vocab_size, width) / math.sqrt(width)},
        "final_norm": norm("final_norm", width),
        "layers": layers,
    }
    if not config.tie_embeddings:
        params["unembedding"] = kernel("unembedding", width, config.vocab_size, fan_in=width)
    if config.memory.length > 0 and config.memory.init == "prompt":
        params["memory"] = {"initial_fam": normal("initial_fam", config.memory.length, width)}
    if config.memory.length > 0 and config.memory.init == "prefix":
        layers["memory"] = {"initial_fam": normal("layers/initial_fam", count, config.memory.length, width)}
    return params
