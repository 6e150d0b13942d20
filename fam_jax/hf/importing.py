"""Tensors of a Hugging Face folder into parameters, one at a time and straight into their shards."""

import json
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import safetensors
from flax import nnx

from fam_jax.config import ModelConfig
from fam_jax.config.format1 import upgrade_array_name, upgrade_model
from fam_jax.hf.errors import ConvertError
from fam_jax.hf.folder import Folder
from fam_jax.hf.names import Tensor, tensors
from fam_jax.model import Transformer, to_dict
from fam_jax.model.layer_types import is_memory, start_of_memory
from fam_jax.model.parameters import flatten, unflatten

Progress = Callable[[int, int], None]
Shardings = Callable[[dict[str, Any]], dict[str, Any]]
ALIGNMENT = 64  # bytes


def import_parameters(
    folder: Folder,
    model: ModelConfig,
    shardings: Shardings,
    *,
    param_dtype: str | None = None,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """The nested dict of a model's parameters, each spread over its devices as it is read.

    Host memory holds one file's pages and the local shards of one parameter (all its layers) at a time; on a CPU these
    are the parameter.

    Args:
      folder: whose `config.json` `model` was made from.
      model: the parameters of its memory are those stored in the folder, or else start as
        `Memory.initial_parameters` says.
      shardings: from the nested dict of shapes to that of shardings.
      param_dtype: None keeps the file's.
      seed: of the rows.
      on_progress: called with the number of tensors read and to be read.

    Raises:
      ConvertError: a tensor is missing, not expected, or of another shape or dtype than the model's.
    """
    wanted = tensors(model)
    check_tensors(folder, model, wanted)
    shapes = {t.path: jax.ShapeDtypeStruct(t.shape, param_dtype or _dtype(folder, t)) for t in wanted}
    memory = memory_shapes(model)
    shapes |= memory
    placed = flatten(shardings(unflatten(shapes)))
    total, done = sum(t.layers for t in wanted), 0
    params = {}
    for tensor in wanted:
        struct = shapes[tensor.path]
        params[tensor.path] = _load(folder, tensor, struct.dtype, placed[tensor.path])
        done += tensor.layers
        if on_progress is not None:
            on_progress(done, total)
    folder.close()
    if memory:
        params |= _memory_parameters(folder, model, params, {path: placed[path] for path in memory}, seed)
    return unflatten(params)


def memory_shapes(model: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shape and dtype of the memory's own parameters by path."""
    whole = to_dict(nnx.state(nnx.eval_shape(lambda: Transformer(model, rngs=nnx.Rngs(0)))))
    return {path: leaf for path, leaf in flatten(whole).items() if is_memory(path)}


def check_tensors(folder: Folder, model: ModelConfig, wanted: list[Tensor]) -> None:
    """Raises :class:`ConvertError` unless the folder holds just the tensors of `model`, in their shapes."""
    expected = {name: tensor.file_shape for tensor in wanted for name in tensor.names}
    present = {
        name for name in folder.names if not name.endswith("rotary_emb.inv_freq")
    }  # of old files, computed
    if model.tie_embeddings and "lm_head.weight" in present:
        present.remove("lm_head.weight")
        _check_tied(folder)
    problems = [f"tensor {name} is missing" for name in expected if name not in present]
    problems += [f"tensor {folder.where(name)} is not expected" for name in sorted(present - set(expected))]
    problems += [
        f"tensor {folder.where(name)} has shape {list(folder.shape(name))}, not {list(shape)}"
        for name, shape in expected.items()
        if name in present and folder.shape(name) != shape
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ConvertError(
            f"{folder.path}: {'; '.join(problems[:3])}{more}; is it the model of its config.json?"
        )


def stored_memory(folder: Folder) -> dict[str, Any]:
    """Return the fields `block_size` and `memory` with which the memory stored beside a model was trained.

    Returns:
      Fields of :class:`ModelConfig`; none if nothing is stored.

    Raises:
      ConvertError: the file is damaged or not one of fam_jax.
    """
    path = folder.memory_file
    if path is None:
        return {}
    try:
        with safetensors.safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            fields = json.loads(metadata["config"])
        if metadata.get("format") == "fam_jax":  # format 1
            fields = upgrade_model(fields)
        return {"block_size": fields["block_size"], "memory": fields["memory"]}
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ConvertError(
            f"{path}: holds no memory of fam_jax, or is damaged; fetch it again or remove it"
        ) from error


def _check_tied(folder: Folder) -> None:
    """A tied model may be stored with its unembedding all the same: then it must be the table."""
    names = ("model.embed_tokens.weight", "lm_head.weight")
    rows, step = folder.shape(names[1])[0], 4096
    same = names[0] in folder.names and folder.shape(names[0]) == folder.shape(names[1])
    for begin in range(0, rows if same else 0, step):
        a, b = (folder.read(name, (slice(begin, min(begin + step, rows)), slice(None))) for name in names)
        same = same and a.tobytes() == b.tobytes()
    if not same:
        raise ConvertError(
            f"{folder.path}: tensor lm_head.weight differs from model.embed_tokens.weight, but config.json ties them; "
            "set tie_word_embeddings to false there if they are two"
        )


def _dtype(folder: Folder, tensor: Tensor) -> np.dtype:
    found = {folder.dtype(name): name for name in tensor.names}
    if len(found) > 1:
        (a, first), (b, second) = list(found.items())[:2]
        raise ConvertError(
            f"{folder.path}: tensors {first} ({a}) and {second} ({b}) differ in dtype; set --param_dtype"
        )
    return next(iter(found))


def _load(folder: Folder, tensor: Tensor, dtype: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    def part(index: Any) -> np.ndarray:  # slices
        shape = tuple(len(range(*s.indices(n))) for s, n in zip(index, tensor.shape, strict=True))
        out = _aligned(shape, dtype)
        if not tensor.stacked:
            tensor.to_own(folder.read(tensor.name, tensor.file_index(index)), out)
            return out
        layers = range(*index[0].indices(tensor.layers))
        for row, layer in zip(out, layers, strict=True):
            name = tensor.names[layer]
            tensor.to_own(folder.read(name, tensor.file_index(index[1:])), row)
        return out

    return jax.make_array_from_callback(tensor.shape, sharding, part, dtype=dtype)


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An empty array that begins where XLA wants its own to begin: on a CPU it becomes the parameter without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % ALIGNMENT
    return memory[begin : begin + size].view(dtype).reshape(shape)


def _memory_parameters(
    folder: Folder, model: ModelConfig, params: dict[str, Any], placed: dict[str, Any], seed: int
) -> dict[str, jax.Array]:
    """Return the memory's own parameters by path: stored ones, or those that a new memory starts with."""
    shapes, path = memory_shapes(model), folder.memory_file
    if path is not None:
        with safetensors.safe_open(path, framework="np") as file:
            values = {upgrade_array_name(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if [*values] == [
            "memory/initial_fam"
        ] and "layers/memory/initial_fam" in shapes:  # format 1 named both alike
            values = {"layers/memory/initial_fam": values["memory/initial_fam"]}
        for name, like in shapes.items():
            found = list(values[name].shape) if name in values else "none"
            if found != list(like.shape):
                raise ConvertError(
                    f"{path}: {name} has shape {found}, and the model's has {list(like.shape)}; set the fields of the "
                    "memory to those that it was trained with, or remove the file"
                )
        return {name: jax.device_put(values[name], placed[name]) for name in shapes}
    start = jax.jit(lambda table: start_of_memory(model, table, seed), out_shardings=placed)
    return start(params["embedding/table"])
