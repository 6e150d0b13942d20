"""Names and layouts of parameters: those of this package, by path, and those of transformers' models."""

import math
from typing import NamedTuple

import numpy as np
from flax import nnx

from fam_jax.config import ModelConfig
from fam_jax.model import Transformer, to_dict
from fam_jax.model.layer_types import is_memory
from fam_jax.model.parameters import flatten


class Tensor(NamedTuple):
    """Where a parameter is found in a Hugging Face checkpoint.

    A stacked parameter has a tensor for every layer. Kernels are (*in, *out) here and (out, in) there.
    """

    path: str  # here, such as layers/query/kernel
    name: str  # there, with {layer} for a number
    shape: tuple[int, ...]  # here
    in_axes: int  # of a kernel, how many axes are summed over; 0 for all else

    @property
    def stacked(self) -> bool:
        """Whether the first axis is that of the layers."""
        return "{layer}" in self.name

    @property
    def layers(self) -> int:
        """How many tensors there are."""
        return self.shape[0] if self.stacked else 1

    @property
    def names(self) -> list[str]:
        """Of the tensors, one for every layer."""
        return [self.name.format(layer=layer) for layer in range(self.layers)]

    @property
    def own_shape(self) -> tuple[int, ...]:
        """Of one layer, here."""
        return self.shape[1:] if self.stacked else self.shape

    @property
    def file_shape(self) -> tuple[int, ...]:
        """Of one tensor, there."""
        if self.in_axes:
            return math.prod(self.own_shape[self.in_axes :]), math.prod(self.own_shape[: self.in_axes])
        return self.own_shape if self.path.startswith("embedding") else (math.prod(self.own_shape),)

    def file_index(self, index: tuple[slice, ...]) -> tuple[slice, ...]:
        """The part of a tensor there that is the part `index` of one layer here."""
        groups = [(0, len(self.own_shape))] if len(self.file_shape) == 1 else [(0, 1), (1, 2)]
        if self.in_axes:
            groups = [(self.in_axes, len(self.own_shape)), (0, self.in_axes)]
        return tuple(_merged(index[a:b], self.own_shape[a:b]) for a, b in groups)

    def to_own(self, values: np.ndarray, out: np.ndarray) -> None:
        """Writes values as they are there, a part of one layer, into `out`, the same part here."""
        if self.in_axes:
            out.reshape(values.shape[::-1])[...] = values.T
        else:
            out[...] = values.reshape(out.shape)

    def to_file(self, values: np.ndarray) -> np.ndarray:
        """One layer of the parameter as it is there."""
        if self.in_axes:
            return np.ascontiguousarray(values.reshape(self.file_shape[::-1]).T)
        return np.ascontiguousarray(values.reshape(self.file_shape))


def _merged(index: tuple[slice, ...], shape: tuple[int, ...]) -> slice:
    """The slice of flattened axes, of which all but the first are whole."""
    first, *rest = [s.indices(n)[:2] for s, n in zip(index, shape, strict=True)]
    if any(part != (0, n) for part, n in zip(rest, shape[1:], strict=True)):
        raise ValueError(f"{index} of {shape} is not contiguous")
    inner = math.prod(shape[1:])
    return slice(first[0] * inner, first[1] * inner)


def tensors(model: ModelConfig) -> list[Tensor]:
    """Every parameter of a model but its initial FAM, in the order in which a checkpoint is read."""
    abstract = to_dict(nnx.eval_shape(lambda: nnx.state(Transformer(model, rngs=nnx.Rngs(0)))))
    shapes = {path: leaf.shape for path, leaf in flatten(abstract).items()}
    names = _names(model)
    found = []
    for path, shape in shapes.items():
        if not is_memory(path):
            in_axes = 0 if not path.endswith("kernel") else 2 if path == "layers/output/kernel" else 1
            found.append(Tensor(path, names[path], shape, in_axes))
    return found


def _names(model: ModelConfig) -> dict[str, str]:
    attention, ff = "self_attn.{}_proj", "mlp.{}_proj"
    ff_norm = "pre_feedforward_layernorm" if model.post_norms else "post_attention_layernorm"
    layer = {
        "attention_norm/scale": "input_layernorm.weight",
        "attention_post_norm/scale": "post_attention_layernorm.weight",
        "ff_norm/scale": f"{ff_norm}.weight",
        "ff_post_norm/scale": "post_feedforward_layernorm.weight",
        "query_norm/scale": "self_attn.q_norm.weight",
        "key_norm/scale": "self_attn.k_norm.weight",
        "output/kernel": "self_attn.o_proj.weight",
        **{f"{ours}/kernel": f"{ff.format(ours)}.weight" for ours in ("gate", "up", "down")},
    }
    for ours, theirs in {"query": "q", "key": "k", "value": "v"}.items():
        layer[f"{ours}/kernel"] = f"{attention.format(theirs)}.weight"
        layer[f"{ours}_bias"] = f"{attention.format(theirs)}.bias"
    return {
        "embedding/table": "model.embed_tokens.weight",
        "unembedding/kernel": "lm_head.weight",
        "final_norm/scale": "model.norm.weight",
        **{f"layers/{ours}": f"model.layers.{{layer}}.{theirs}" for ours, theirs in layer.items()},
    }
