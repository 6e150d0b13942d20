"""Names and layouts of parameters: paths of this package on one side, tensors of transformers' models on the other."""

import functools
import math
import re
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from fam_jax.config import ModelConfig
from fam_jax.model import Transformer, to_dict
from fam_jax.model.layer_types import is_memory
from fam_jax.model.parameters import flatten


class Tensor(NamedTuple):
    """A parameter and the tensors that hold it in a Hugging Face checkpoint.

    A parameter stacked over the layers is one tensor per layer there. Kernels are (*in, *out) here, (out, in) there.
    """

    # Of the parameter, such as layers/query/kernel.
    path: str
    # Of the tensor, with {layer} for the number of the layer.
    name: str
    # Of the parameter.
    shape: tuple[int, ...]
    # Number of input axes of a kernel; 0 for all other parameters.
    in_axes: int

    @property
    def stacked(self) -> bool:
        """Return whether the first axis of the parameter is that of the layers."""
        return "{layer}" in self.name

    @property
    def layers(self) -> int:
        """Return the number of tensors."""
        return self.shape[0] if self.stacked else 1

    @property
    def names(self) -> list[str]:
        """Return the name of each tensor, in the order of the layers."""
        return [self.name.format(layer=layer) for layer in range(self.layers)]

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """Return the shape of one layer of the parameter."""
        return self.shape[1:] if self.stacked else self.shape

    @property
    def file_shape(self) -> tuple[int, ...]:
        """Return the shape of each tensor."""
        if self.in_axes:
            return math.prod(self.layer_shape[self.in_axes :]), math.prod(self.layer_shape[: self.in_axes])
        if self.path.startswith("embedding") or is_memory(self.path):
            return self.layer_shape
        return (math.prod(self.layer_shape),)

    def file_index(self, index: tuple[slice, ...]) -> tuple[slice, ...]:
        """Return the slices of a tensor that hold the slices `index` of one layer of the parameter.

        Raises:
          ValueError: they are not contiguous there.
        """
        if self.in_axes:
            groups = [(self.in_axes, len(self.layer_shape)), (0, self.in_axes)]
        elif len(self.file_shape) == 1:
            groups = [(0, len(self.layer_shape))]
        else:
            groups = [(0, 1), (1, 2)]
        return tuple(_merged(index[a:b], self.layer_shape[a:b]) for a, b in groups)

    def copy_from_file(self, values: np.ndarray, out: np.ndarray) -> None:
        """Copy slices of a tensor into `out`, the corresponding slices of one layer of the parameter."""
        if self.in_axes:
            out.reshape(values.shape[::-1])[...] = values.T
        else:
            out[...] = values.reshape(out.shape)

    def to_file(self, values: np.ndarray) -> np.ndarray:
        """Return one layer of the parameter in the layout of its tensor."""
        if self.in_axes:
            return np.ascontiguousarray(values.reshape(self.file_shape[::-1]).T)
        return np.ascontiguousarray(values.reshape(self.file_shape))


def _merged(index: tuple[slice, ...], shape: tuple[int, ...]) -> slice:
    """Return the slice of the flattened axes; all but the first axis must be whole."""
    first, *rest = [s.indices(n)[:2] for s, n in zip(index, shape, strict=True)]
    if any(part != (0, n) for part, n in zip(rest, shape[1:], strict=True)):
        raise ValueError(f"{index} of {shape} is not contiguous")
    inner = math.prod(shape[1:])
    return slice(first[0] * inner, first[1] * inner)


@functools.lru_cache(maxsize=8)
def parameter_shapes(model: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shape and dtype of every parameter of a model by path. Do not change the dict: it is cached."""
    return flatten(to_dict(nnx.eval_shape(lambda: nnx.state(Transformer(model, rngs=nnx.Rngs(0))))))


def memory_shapes(model: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shape and dtype of the parameters of a model's memory by path."""
    return {path: leaf for path, leaf in parameter_shapes(model).items() if is_memory(path)}


def tensors(model: ModelConfig) -> list[Tensor]:
    """Return all parameters of a model except those of its memory, in the order in which they are read."""
    names = _names(model)
    found = []
    for path, leaf in parameter_shapes(model).items():
        if not is_memory(path):
            in_axes = 0 if not path.endswith("kernel") else 2 if path == "layers/output/kernel" else 1
            found.append(Tensor(path, names[path], leaf.shape, in_axes))
    return found


def memory_tensors(model: ModelConfig) -> list[Tensor]:
    """Return the parameters of a model's memory, as an export for PyTorch has them among its tensors."""
    return [
        Tensor(path, f"model.{path.replace('layers/', 'layers/{layer}/').replace('/', '.')}", leaf.shape, 0)
        for path, leaf in memory_shapes(model).items()
    ]


def is_memory_tensor(name: str) -> bool:
    """Return whether a tensor of an export for PyTorch belongs to the memory."""
    return re.match(r"model\.(layers\.\d+\.)?memory\.", name) is not None


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
