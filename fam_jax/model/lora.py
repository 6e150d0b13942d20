"""Low-rank adaptation (LoRA, Hu et al. 2021) of the layers' projections, and the choice of parameters to train.

A projection x W becomes x W + s (x A) B, with W frozen, A and B trained, and B zero at the start. Layers do not know
about it: :func:`add_lora` replaces projections, chosen by path, with ones that hold A and B beside their kernel.
Parameters therefore keep their paths, a base model's parameters can be used unchanged, and `layers/query` gains
`lora_a` and `lora_b`.
"""

import fnmatch
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from fam_jax.config import Config, ConfigError, LoraConfig
from fam_jax.layers.decoder_layer import LOW_RANK, FrozenParam, Linear
from fam_jax.model.parameters import flatten, to_dict, unflatten
from fam_jax.model.transformer import Transformer

Params = dict[str, Any]
ADAPTERS = ("lora_a", "lora_b")


class LoraLinear(Linear):
    """A stack of projections with frozen kernels (L, *in, *out) and trained A (L, *in, r) and B (L, r, *out)."""

    def __init__(self, base: Linear, config: LoraConfig, *, rngs: nnx.Rngs):
        self.name, self.in_axes = base.name, base.in_axes
        self.scale = config.alpha / config.rank
        self.kernel = FrozenParam(base.kernel[...])
        layers, *shape = base.kernel.shape
        in_shape, out_shape = shape[: self.in_axes], shape[self.in_axes :]
        a = jax.random.normal(rngs.params(), (layers, *in_shape, config.rank), jnp.float32)
        self.lora_a = nnx.Param(a * math.prod(in_shape) ** -0.5)
        self.lora_b = nnx.Param(jnp.zeros((layers, config.rank, *out_shape), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the product (..., *out) of x (..., *in) in one layer."""
        kernel, a, b = (w[...].astype(x.dtype) for w in (self.kernel, self.lora_a, self.lora_b))
        batch, out = x.shape[: x.ndim - self.in_axes], kernel.shape[self.in_axes :]
        # Add the products as matrices. Otherwise XLA on TPU gives each an axis of heads and reshapes the sum back.
        width, rank = math.prod(kernel.shape[: self.in_axes]), b.shape[0]
        rows = x.reshape(-1, width)
        low = checkpoint_name(rows @ a.reshape(width, rank), LOW_RANK)
        product = rows @ kernel.reshape(width, -1) + self.scale * (low @ b.reshape(rank, -1))
        return checkpoint_name(product, self.name).reshape(*batch, *out)


def create_model(config: Config, *, rngs: nnx.Rngs) -> Transformer:
    """Create the model to train, with LoRA if the config says so.

    Raises:
      ConfigError: as :func:`add_lora`.
    """
    model = Transformer(config.model, rngs=rngs)
    if config.lora.rank:
        add_lora(model, config.lora, rngs=rngs)
    return model


def add_lora(model: Transformer, config: LoraConfig, *, rngs: nnx.Rngs) -> None:
    """Replace the projections of the layers that `config.targets` names.

    Raises:
      ConfigError: a pattern of `targets` matches no projection, or a pattern of `train` matches no parameter, or the
        kernel of a target.
    """
    kernels = {f"layers/{name}/kernel": name for name in model.layers.linears()}
    chosen = set()
    for pattern in config.targets:
        named = fnmatch.filter(kernels, pattern)
        if not named:
            raise ConfigError(f"config.lora.targets: {pattern!r} matches none of {', '.join(kernels)}")
        chosen |= {*named}
    parameters = flatten(to_dict(nnx.state(model)))
    for pattern in config.train:
        named = fnmatch.filter(parameters, pattern)
        if not named and not pattern.endswith("memory/*"):  # not every memory has parameters
            raise ConfigError(f"config.lora.train: {pattern!r} matches none of {', '.join(parameters)}")
        twice = chosen.intersection(named)
        if twice:
            raise ConfigError(
                f"config.lora.train: {pattern!r} matches {min(twice)}, which config.lora.targets freezes; "
                "remove it from one of the two"
            )
    for path in sorted(chosen):
        name = kernels[path]
        setattr(model.layers, name, LoraLinear(getattr(model.layers, name), config, rngs=rngs))


def divide(params: Params, config: LoraConfig) -> tuple[Params, Params]:
    """Split parameters into trained and frozen ones. Without LoRA all are trained."""

    def trained(path: str) -> bool:
        is_adapter = path.rpartition("/")[2] in ADAPTERS
        return is_adapter or any(fnmatch.fnmatch(path, pattern) for pattern in config.train)

    if config.rank == 0:
        return params, {}
    flat = flatten(params)
    return (
        unflatten({path: leaf for path, leaf in flat.items() if trained(path)}),
        unflatten({path: leaf for path, leaf in flat.items() if not trained(path)}),
    )


def join(trained: Params, frozen: Params) -> Params:
    """Merge trained and frozen parameters; the inverse of :func:`divide`."""
    return unflatten(flatten(trained) | flatten(frozen))


def stored(params: Params, config: Config) -> Params:
    """Convert parameters to the dtypes in which training keeps them.

    Frozen matrices have the dtype `config.lora.base_dtype`. Keeping them in the dtype of the activations loses nothing,
    because every use converts them to it. Trained parameters and the vectors of norms, which are small and used in
    float32, are float32.
    """
    base = config.lora.base_dtype
    narrow = (
        "bfloat16" if "bfloat16" in (base, config.model.dtype if base == "model" else base) else "float32"
    )
    trained, frozen = divide(params, config.lora)

    def place(path: str, leaf: Any) -> Any:
        matrix = path.rpartition("/")[2] in ("kernel", "table")
        return leaf.astype(narrow if matrix else jnp.float32)

    frozen = unflatten({path: place(path, leaf) for path, leaf in flatten(frozen).items()})
    return join(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), trained), frozen)


def merge(params: Params, config: LoraConfig) -> Params:
    """Return the parameters of the equivalent model without LoRA: kernels W + s A B, in at least float32."""
    if config.rank == 0:
        return params
    flat = flatten(params)
    for path in [path for path in flat if path.endswith("/lora_a")]:
        group = path.removesuffix("/lora_a")
        a, b = flat.pop(path), flat.pop(f"{group}/lora_b")
        kernel = flat[f"{group}/kernel"]
        update = jnp.einsum("l...r,lro->l...o", a, b.reshape(*b.shape[:2], -1), precision="highest")
        flat[f"{group}/kernel"] = kernel + config.alpha / config.rank * update.reshape(kernel.shape)
    return unflatten(flat)
