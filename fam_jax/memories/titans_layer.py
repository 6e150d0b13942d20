"""What the variants of Titans share: config fields, a layer's parameters, and the inputs of its neural memory."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fam_jax.config import ModelConfig, group, require, setting
from fam_jax.layers.decoder_layer import DecoderLayer, Linear, Norm, embedding_stddev
from fam_jax.layers.rope import Rope, rotate
from fam_jax.memories.neural_memory import FastWeights, Rates, Tokens, pack, unpack, widths_of
from fam_jax.memories.window_cache import BlockWindowConfig

# Tokens that a convolution sees, the own one included.
CONVOLUTION = 4
# Queries, keys and values.
ROLES = 3
MOST_MATRICES = 4
# Added to the squared norm of keys and queries.
EPSILON = 1e-6
# Largest step, times the root of a head's width, with which memories of width 64 to 2048 do not diverge on a text that
# repeats itself; twice as much is too much for some of them.
STEP = 0.08
# The logarithm of a rate that is as good as zero.
LOG_OF_NOTHING = -1e4


@group("model.memory", effect="state")
class TitansConfig(BlockWindowConfig):
    """The fields of all variants of Titans."""

    chunk: int = setting(
        default=16,
        doc="b, tokens whose gradients are taken at the same weights; it divides the block. 1: the plain recurrence.",
        minimum=1,
    )
    depth: int = setting(
        default=2,
        doc="Matrices of the memory's MLP; 1 is a linear memory.",
        minimum=1,
        maximum=MOST_MATRICES,
        effect="parameters",
    )
    expansion: int = setting(
        default=1,
        doc="Width of the MLP's hidden layers as a multiple of its input's.",
        minimum=1,
        effect="parameters",
    )
    heads: int = setting(
        default=1, doc="h, memories of a layer, each D / h wide.", minimum=1, effect="parameters"
    )
    persistent: int = setting(
        default=4, doc="Learned rows of each layer that all tokens see.", minimum=0, effect="parameters"
    )
    step_size: float = setting(
        default=0.0,
        doc="Largest theta, the step of a token's gradient; 0: 0.08 / sqrt(D / h). With larger ones, the memory may "
        "diverge while it reads.",
        minimum=0,
    )
    momentum: bool = setting(
        default=True, doc="Carry gradients on, by a rate eta that depends on the token.", effect="parameters"
    )
    forgetting: bool = setting(
        default=True, doc="Decay the weights, by a rate alpha that depends on the token.", effect="parameters"
    )

    parameter_axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **{
            f"{norm}/{name}": ("norm",)
            for norm in ("norm", "output_norm", "attention_norm")
            for name in ("scale", "bias")
        },
        **{f"{name}/kernel": ("width", "norm") for name in ("query", "key", "value", "mixing")},
        **{f"{name}/kernel": ("width", "slots") for name in ("step", "momentum", "forgetting")},
        **{f"{name}_bias": ("slots",) for name in ("step", "momentum", "forgetting")},
        **{f"start_{n}": ("width", "slots", "norm") for n in range(1, MOST_MATRICES + 1)},
        "mixing_bias": ("norm",),
        "convolution": ("slots", "slots", "norm"),
        "persistent": ("slots", "width"),
    }

    @property
    def extra_keys(self) -> int:
        """Return the number of persistent rows."""
        return self.persistent

    def read_products(self, model: ModelConfig) -> int:
        """Return the size of the MLP's matrices, all heads, as often as a token reads them."""
        width = model.model_dim // self.heads
        sizes = itertools.pairwise(widths_of(self.depth, width, width * self.expansion))
        return (1 + self.keys_per_token) * self.heads * sum(i * o for i, o in sizes)

    def check_model(self, model: ModelConfig) -> None:
        """Raise :class:`ConfigError` if the block has no whole number of chunks, or the heads no whole width."""
        require(
            model.block_size % self.chunk == 0,
            f"config.model.memory.chunk: {self.chunk} does not divide block_size {model.block_size}",
        )
        require(
            model.model_dim % self.heads == 0,
            f"config.model.memory.heads: {self.heads} does not divide model_dim {model.model_dim}",
        )


class TitansParameters(nnx.Module):
    """The parameters that a layer has for its neural memory."""

    def __init__(self, model: ModelConfig, rngs: nnx.Rngs, *, gate: bool = False, normalize: bool = False):
        """Create parameters.

        Args:
          model: the model's config.
          rngs: random streams for the initial values.
          gate: whether a gate mixes what the memory returns with what attention adds.
          normalize: whether what attention adds is normalized.
        """
        config: Any = model.memory
        width, heads = model.model_dim, config.heads
        self.norm, self.output_norm = Norm(model), Norm(model)
        self.attention_norm = Norm(model) if normalize else None
        self.query = Linear("query", (width,), (width,), rngs=rngs)
        self.key = Linear("key", (width,), (width,), rngs=rngs)
        self.value = Linear("value", (width,), (width,), rngs=rngs)
        # At the start a convolution passes its own token on.
        taps = jnp.zeros((CONVOLUTION, ROLES, width), jnp.float32).at[-1].set(1)
        self.convolution = nnx.Param(taps)
        self.step, self.step_bias = _rate("step", width, heads, 0.0, rngs)
        self.momentum, self.momentum_bias = _rate("momentum", width, heads, 0.0, rngs, config.momentum)
        # At the start a token leaves 98 % of the weights.
        self.forgetting, self.forgetting_bias = _rate(
            "forgetting", width, heads, -4.0, rngs, config.forgetting
        )
        sizes = widths_of(config.depth, width // heads, width // heads * config.expansion)
        for number, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes), 1):
            values = jax.random.normal(rngs.params(), (fan_in, heads, fan_out), jnp.float32)
            setattr(self, f"start_{number}", nnx.Param(values * fan_in**-0.5))
        rows = jax.random.normal(rngs.params(), (config.persistent, width), jnp.float32)
        self.persistent = nnx.Param(rows * embedding_stddev(model)) if config.persistent else None
        self.mixing = Linear("mixing", (width,), (width,), rngs=rngs) if gate else None
        self.mixing_bias = nnx.Param(jnp.zeros(width, jnp.float32)) if gate else None

    def mix(self, entering: jax.Array, added: jax.Array, recalled: jax.Array) -> jax.Array:
        """Return (1 - g) added + g recalled, all (B, T, D); the gate g depends on the memory's input."""
        assert self.mixing is not None and self.mixing_bias is not None
        gate = jax.nn.sigmoid(self.mixing(entering) + self.mixing_bias[...].astype(entering.dtype))
        return added + gate * (recalled - added)


def _rate(
    name: str, width: int, heads: int, bias: float, rngs: nnx.Rngs, exists: bool = True
) -> tuple[Linear | None, nnx.Param | None]:
    """Create the projection of a token to a rate of each head, and its bias."""
    if not exists:
        return None, None
    return Linear(name, (width,), (heads,), rngs=rngs), nnx.Param(jnp.full(heads, bias, jnp.float32))


class MemoryLayer:
    """The parts of a layer around its neural memory. One object serves all layers; it holds no arrays.

    `streams` is the number of projections of a token that pass through a convolution.
    """

    def __init__(self, model: ModelConfig, *, streams: int):
        self.model, self.streams = model, streams
        self.config: TitansConfig = model.memory  # type: ignore[assignment]
        self.width = model.model_dim // self.config.heads
        self.widths = widths_of(self.config.depth, self.width, self.width * self.config.expansion)
        self.step_size = self.config.step_size or STEP * self.width**-0.5
        self.dtype = jnp.promote_types(model.dtype, jnp.float32)

    # State.

    def zeros(self, batch_size: int, *shape: int) -> jax.Array:
        """Return zeros (B, C, h, n) for `shape` C, n."""
        size, width = shape
        return jnp.zeros((batch_size, size, self.config.heads, width), self.dtype)

    def empty_learned(self, batch_size: int) -> dict[str, jax.Array]:
        """Return zeros for the fields that tokens of the next block read."""
        count = sum(i * o for i, o in itertools.pairwise(self.widths))
        weights = jnp.zeros((batch_size, self.config.heads, count), self.dtype)
        tail = jnp.zeros((batch_size, CONVOLUTION - 1, self.streams, self.model.model_dim), self.model.dtype)
        return {"memory_weights": weights, "memory_momentum": weights, "convolution_tail": tail}

    def start_of(self, own: TitansParameters) -> jax.Array:
        """Return the learned weights (1, h, P) of an empty memory."""
        matrices = [getattr(own, f"start_{n}")[...] for n in range(1, self.config.depth + 1)]
        return pack([w.swapaxes(0, 1)[None] for w in matrices]).astype(self.dtype)

    def fast_weights(self, state: Any) -> FastWeights:
        """Return the weights and momentum of a layer's state, matrix by matrix."""
        return FastWeights(
            unpack(state.memory_weights, self.widths), unpack(state.memory_momentum, self.widths)
        )

    def fields_of(self, weights: FastWeights) -> dict[str, jax.Array]:
        """Return the fields of the state that hold weights and momentum."""
        return {"memory_weights": pack(weights.weights), "memory_momentum": pack(weights.momentum)}

    def split(self, rows: jax.Array, widths: Sequence[int]) -> tuple[jax.Array, ...]:
        """Return parts of `widths` of the last axis."""
        return tuple(jnp.split(rows, np.cumsum(widths)[:-1], axis=-1))

    def rates_of(self, rates: jax.Array) -> Rates:
        """Return the rates (B, C, h, 3) of a state's field."""
        return Rates(*(rates[..., n] for n in range(3)))

    # Inputs of the memory.

    def project(self, own: TitansParameters, x: jax.Array) -> jax.Array:
        """Return queries, keys and values (B, T, 3, D) of x (B, T, D), before their convolutions."""
        return jnp.stack([own.query(x), own.key(x), own.value(x)], axis=2)

    def rows_before(self, tail: jax.Array, block: jax.Array, filled: jax.Array) -> jax.Array:
        """Return the last three projections (B, 3, n, D) before the next token.

        Args:
          tail: (B, 3, n, D) those before the block.
          block: (B, C, n, D) those of the unfinished block.
          filled: (B,) how many of these there are.
        """
        history = jnp.concatenate([tail, block], axis=1)
        place = filled[:, None] + np.arange(CONVOLUTION - 1)
        return history[np.arange(len(tail))[:, None], place]

    def convolve(self, taps: jax.Array, fresh: jax.Array, before: jax.Array) -> jax.Array:
        """Apply a causal convolution to each feature, then SiLU.

        Args:
          taps: (4, n, D), oldest token first.
          fresh: (B, T, n, D).
          before: (B, 3, n, D) the tokens before.

        Returns:
          (B, T, n, D) in the dtype of the memory.
        """
        history = jnp.concatenate([before, fresh], axis=1).astype(self.dtype)
        length, taps = fresh.shape[1], taps.astype(self.dtype)
        return jax.nn.silu(sum(taps[n] * history[:, n : n + length] for n in range(CONVOLUTION)))

    def heads_of(self, x: jax.Array) -> jax.Array:
        """Return x (B, T, D) as (B, T, h, d)."""
        return x.reshape(*x.shape[:2], self.config.heads, self.width)

    def unit_heads_of(self, x: jax.Array) -> jax.Array:
        """Return x (B, T, D) as (B, T, h, d), each head of norm 1."""
        heads = self.heads_of(x)
        return heads * jax.lax.rsqrt(jnp.square(heads).sum(axis=-1, keepdims=True) + EPSILON)

    def tokens(self, own: TitansParameters, fresh: jax.Array, before: jax.Array, x: jax.Array) -> Tokens:
        """Return what tokens give to the memory.

        Args:
          own: the layer's parameters.
          fresh: (B, T, 3, D) from :meth:`project`.
          before: (B, 3, 3, D) the same of the tokens before.
          x: (B, T, D) the memory's input, which decides the rates.
        """
        convolved = self.convolve(own.convolution[...], fresh, before)
        return Tokens(
            queries=self.unit_heads_of(convolved[:, :, 0]),
            keys=self.unit_heads_of(convolved[:, :, 1]),
            values=self.heads_of(convolved[:, :, 2]),
            rates=self.rates(own, x),
        )

    def rates(self, own: TitansParameters, x: jax.Array) -> Rates:
        """Return the rates of tokens x (B, T, D)."""

        def logits(linear: Linear, bias: nnx.Param) -> jax.Array:
            return linear(x).astype(self.dtype) + bias[...].astype(self.dtype)

        assert own.step is not None and own.step_bias is not None
        step = self.step_size * jax.nn.sigmoid(logits(own.step, own.step_bias))
        log_momentum, log_keep = jnp.full_like(step, LOG_OF_NOTHING), jnp.zeros_like(step)
        if own.momentum is not None and own.momentum_bias is not None:
            log_momentum = jax.nn.log_sigmoid(logits(own.momentum, own.momentum_bias))
        if own.forgetting is not None and own.forgetting_bias is not None:
            log_keep = jax.nn.log_sigmoid(-logits(own.forgetting, own.forgetting_bias))
        return Rates(step, log_momentum, log_keep)

    def output(self, own: TitansParameters, recalled: jax.Array, dtype: Any) -> jax.Array:
        """Return what the memory returned (B, T, h, d), normalized, as (B, T, D)."""
        return own.output_norm(recalled.reshape(*recalled.shape[:2], -1).astype(dtype))

    # Persistent rows.

    def persistent_keys(
        self, layer: DecoderLayer, rope: Rope, batch_size: int, shift: int = 0
    ) -> tuple[jax.Array, jax.Array]:
        """Return keys and values (B, Np, K, hd) of the persistent rows, in the frame of the block after them.

        Args:
          layer: the layer.
          rope: its RoPE.
          batch_size: B.
          shift: positions between the last row and the block.
        """
        count, model = self.config.persistent, self.model
        shape = (batch_size, count, model.num_kv_heads, model.head_dim)
        if layer.memory.persistent is None:
            return jnp.zeros(shape, model.dtype), jnp.zeros(shape, model.dtype)
        _, k, v = layer.project(layer.memory.persistent[...].astype(model.dtype)[None])
        k = rotate(k, rope.static(np.arange(-count, 0) - shift))
        return jnp.broadcast_to(k, shape), jnp.broadcast_to(v, shape)
