"""A decoder layer's parameters and what they compute. Attention, memory and positions are left to the caller."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from fam_jax.config import ModelConfig

# Names of the projections' results, for rematerialization policies. Not every layer has all of them. The last is the
# product x A of a low-rank update.
LOW_RANK = "low_rank"
PROJECTIONS = ("query", "key", "value", "output", "gate", "up", "down", LOW_RANK)


class FrozenParam(nnx.Param):
    """A parameter that is not trained. Custom backward passes compute no gradient for it."""


class Linear(nnx.Module):
    """A projection without bias: x (..., *in) times kernel (*in, *out) gives (..., *out), in the dtype of x."""

    def __init__(self, name: str, in_shape: tuple[int, ...], out_shape: tuple[int, ...], *, rngs: nnx.Rngs):
        self.name = name
        self.in_axes = len(in_shape)
        kernel = jax.random.truncated_normal(rngs.params(), -2, 2, (*in_shape, *out_shape), jnp.float32)
        # 0.8796 is the standard deviation of a standard normal truncated at 2.
        self.kernel = nnx.Param(kernel * (math.prod(in_shape) ** -0.5 / 0.87962566))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the product."""
        return contract(x, self.kernel[...].astype(x.dtype), self.in_axes, self.name)


def contract(x: jax.Array, kernel: jax.Array, in_axes: int, name: str) -> jax.Array:
    """Contract the last `in_axes` axes of x with the first of `kernel`.

    This is one product of two matrices, because for any other form XLA on CPU transposes the activations to compute the
    gradient of the weights.

    Args:
      x: (..., *in).
      kernel: (*in, *out).
      in_axes: number of axes of `in`.
      name: name of the result, for rematerialization policies.
    """
    batch, out = x.shape[: x.ndim - in_axes], kernel.shape[in_axes:]
    width = math.prod(kernel.shape[:in_axes])
    product = x.reshape(math.prod(batch), width) @ kernel.reshape(width, math.prod(out))
    return checkpoint_name(product, name).reshape(*batch, *out)


# How a layer applies one of its projections. A chain of updates passes its own, to collect weight gradients.
Apply = Callable[[Linear, jax.Array], jax.Array]


def apply_linear(linear: Linear, x: jax.Array) -> jax.Array:
    """Return `linear(x)`: the default way to apply a projection."""
    return linear(x)


class Norm(nnx.Module):
    """RMSNorm or LayerNorm over the last axis (D wide unless `width` is given), computed in at least float32."""

    def __init__(self, config: ModelConfig, width: int | None = None):
        self.epsilon = config.norm_epsilon
        self.offset = 1.0 if config.norm_offset else 0.0
        width = width or config.model_dim
        self.scale = nnx.Param(jnp.full(width, 1.0 - self.offset, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(width, jnp.float32)) if config.norm == "layernorm" else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalize x (..., D)."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if self.bias is not None:
            wide = wide - wide.mean(axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + self.epsilon)
        wide = wide * (self.offset + self.scale[...].astype(wide.dtype))
        if self.bias is not None:
            wide = wide + self.bias[...].astype(wide.dtype)
        return wide.astype(x.dtype)


class DecoderLayer(nnx.Module):
    """Pre-norm attention projections and feed-forward. The same weights serve tokens and memory rows (section 2.2)."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        memory: Callable[[nnx.Rngs], nnx.Module | None] = lambda _: None,
    ):
        """Create parameters.

        Args:
          config: the model's config.
          rngs: random streams for the initial values.
          memory: creates the parameters that the layer has for its memory.
        """
        width, heads, kv_heads, head_dim = (
            config.model_dim,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
        )
        self.activation = config.activation
        # Memory rows may be wider than this. Projections are computed in it, and residual connections in the rows' own.
        self.dtype = jnp.dtype(config.dtype)
        self.attention_softcap = config.attention_softcap
        self.query_factor = math.sqrt(head_dim / (config.query_pre_attn_scalar or head_dim))
        self.attention_norm = Norm(config)
        self.query = Linear("query", (width,), (heads, head_dim), rngs=rngs)
        self.key = Linear("key", (width,), (kv_heads, head_dim), rngs=rngs)
        self.value = Linear("value", (width,), (kv_heads, head_dim), rngs=rngs)
        self.output = Linear("output", (heads, head_dim), (width,), rngs=rngs)
        # Biases are not part of `Linear`, because a chain of updates treats the gradients of kernels alone specially.
        self.query_bias = nnx.Param(jnp.zeros((heads, head_dim), jnp.float32)) if config.qkv_bias else None
        self.key_bias = nnx.Param(jnp.zeros((kv_heads, head_dim), jnp.float32)) if config.qkv_bias else None
        self.value_bias = nnx.Param(jnp.zeros((kv_heads, head_dim), jnp.float32)) if config.qkv_bias else None
        self.query_norm = Norm(config, head_dim) if config.qk_norm else None
        self.key_norm = Norm(config, head_dim) if config.qk_norm else None
        self.attention_post_norm = Norm(config) if config.post_norms else None
        self.ff_norm = Norm(config)
        self.up = Linear("up", (width,), (config.ff_dim,), rngs=rngs)
        gated = config.activation != "gelu"
        self.gate = Linear("gate", (width,), (config.ff_dim,), rngs=rngs) if gated else None
        self.down = Linear("down", (config.ff_dim,), (width,), rngs=rngs)
        self.ff_post_norm = Norm(config) if config.post_norms else None
        self.memory: Any = memory(rngs)

    def linears(self) -> dict[str, Linear]:
        """Return the projections of the layer by name."""
        found = (self.query, self.key, self.value, self.output, self.gate, self.up, self.down)
        return {linear.name: linear for linear in found if linear is not None}

    def project(self, x: jax.Array, apply: Apply = apply_linear) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return queries (B, T, H, hd), keys and values (B, T, K, hd) of the normalized x (B, T, D), without RoPE.

        They have the dtype of the model, whatever that of x.
        Attention divides scores by sqrt(hd), so the queries absorb any other scale of the config.
        """
        h = self.attention_norm(x).astype(self.dtype)
        q, k, v = apply(self.query, h), apply(self.key, h), apply(self.value, h)
        if self.query_bias is not None and self.key_bias is not None and self.value_bias is not None:
            biases = (bias[...].astype(h.dtype) for bias in (self.query_bias, self.key_bias, self.value_bias))
            q, k, v = (y + bias for y, bias in zip((q, k, v), biases, strict=True))
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        return q if self.query_factor == 1 else q * self.query_factor, k, v

    def finish(
        self, attended: jax.Array, residual: jax.Array | None, apply: Apply = apply_linear
    ) -> jax.Array:
        """Apply the output projection and the feed-forward, each with its residual connection.

        Args:
          attended: (B, T, H, hd) result of attention.
          residual: (B, T, D) added to the projected attention; None adds nothing.
          apply: applies a projection to its input.

        Returns:
          (B, T, D), the output of the layer, in the dtype of the residual.
        """
        x = self.project_attended(attended, apply)
        if residual is not None:
            x = x + residual
        return self.feed_forward(x, apply)

    def project_attended(self, attended: jax.Array, apply: Apply = apply_linear) -> jax.Array:
        """Return (B, T, D), what attention adds to the residual stream, of its result (B, T, H, hd)."""
        x = apply(self.output, attended)
        return x if self.attention_post_norm is None else self.attention_post_norm(x)

    def feed_forward(self, x: jax.Array, apply: Apply = apply_linear) -> jax.Array:
        """Return x (B, T, D) plus what the feed-forward adds to it."""
        h = self.ff_norm(x).astype(self.dtype)
        up = apply(self.up, h)
        if self.gate is None:
            hidden = jax.nn.gelu(up)
        else:
            nonlinearity = jax.nn.silu if self.activation == "swiglu" else jax.nn.gelu
            hidden = nonlinearity(apply(self.gate, h)) * up
        down = apply(self.down, hidden)
        return x + (down if self.ff_post_norm is None else self.ff_post_norm(down))


def embedding_stddev(config: ModelConfig) -> float:
    """Return the initial scale of embeddings. With tied embeddings it gives logits of unit variance."""
    return config.model_dim**-0.5
