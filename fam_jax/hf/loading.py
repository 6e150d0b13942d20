"""Load the tensors of a Hugging Face folder into parameters, one at a time and straight into their shards."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from fam_jax.config import ModelConfig
from fam_jax.hf import checksums
from fam_jax.hf.config_json import ConvertError
from fam_jax.hf.folder import Folder
from fam_jax.hf.memory_file import read_memory
from fam_jax.hf.names import Tensor, is_memory_tensor, memory_shapes, tensors
from fam_jax.model.layer_types import start_of_memory
from fam_jax.model.parameters import unflatten

Shapes = dict[str, jax.ShapeDtypeStruct]
# XLA on a CPU takes an array without a copy if its address is a multiple of this many bytes.
ALIGNMENT = 64
# Values that are checked at a time.
CHECKED = 1 << 20
# Rows of a table that are compared at a time.
ROWS = 4096


def import_parameters(
    folder: Folder,
    model: ModelConfig,
    shardings: Callable[[Shapes], dict[str, jax.sharding.Sharding]],
    *,
    param_dtype: str | None = None,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Load the parameters of a model, each onto its devices as it is read.

    Host memory holds the pages of one file and the local shards of one parameter (all its layers). On a CPU these
    shards are the parameter itself.

    Args:
      folder: the folder whose `config.json` describes `model`.
      model: config of the model. Its memory takes the parameters stored in the folder. If there are none, they start as
        :func:`fam_jax.model.layer_types.start_of_memory` says.
      shardings: a function that returns the sharding of every parameter, given their shapes; both by path.
      param_dtype: dtype of all parameters but the memory's; None keeps that of the files.
      seed: of a memory that starts fresh.
      on_progress: called with the number of tensors read so far and in total.

    Returns:
      The parameters as nested dict.

    Raises:
      ConvertError: a tensor is missing or unexpected, has another shape or dtype than the model needs, is not the one
        that was exported, or has values that are not finite.
    """
    wanted = tensors(model)
    check_tensors(folder, model, wanted)
    checksums.check_tensors(folder.files)
    memory = memory_shapes(model)
    shapes = {t.path: jax.ShapeDtypeStruct(t.shape, param_dtype or _dtype(folder, t)) for t in wanted}
    placed = shardings(shapes | memory)
    done, total = 0, sum(tensor.layers for tensor in wanted)
    params: dict[str, jax.Array] = {}
    for tensor in wanted:
        params[tensor.path] = _load(folder, tensor, shapes[tensor.path].dtype, placed[tensor.path])
        done += tensor.layers
        if on_progress is not None:
            on_progress(done, total)
    if memory:
        stored = read_memory(folder, model)
        where = {path: placed[path] for path in memory}
        if stored is None:
            start = jax.jit(lambda table: start_of_memory(model, table, seed), out_shardings=where)
            params |= start(params["embedding/table"])
        else:
            params |= {path: jax.device_put(array, where[path]) for path, array in stored.items()}
    folder.close()
    return unflatten(params)


def check_tensors(folder: Folder, model: ModelConfig, wanted: Sequence[Tensor]) -> None:
    """Raise :class:`ConvertError` unless a folder holds exactly the tensors of a model, in their shapes."""
    expected = {name: tensor.file_shape for tensor in wanted for name in tensor.names}
    # Old files store this buffer, which is computed here.
    present = {name for name in folder.names if not name.endswith("rotary_emb.inv_freq")}
    if folder.memory:  # read_memory checks its tensors
        present = {name for name in present if not is_memory_tensor(name)}
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
            f"{folder.path}: {'; '.join(problems[:3])}{more}; check that config.json and tensors are of one model"
        )


def _check_tied(folder: Folder) -> None:
    """Check that a tied model whose unembedding is stored as well has the same values in both."""
    names = ("model.embed_tokens.weight", "lm_head.weight")
    rows = folder.shape(names[1])[0]
    same = names[0] in folder.names and folder.shape(names[0]) == folder.shape(names[1])
    for begin in range(0, rows if same else 0, ROWS):
        a, b = (folder.read(name, (slice(begin, min(begin + ROWS, rows)), slice(None))) for name in names)
        same = same and a.tobytes() == b.tobytes()
    if not same:
        raise ConvertError(
            f"{folder.path}: tensor lm_head.weight differs from model.embed_tokens.weight, but config.json ties them; "
            "set tie_word_embeddings to false there if the model has two tables"
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
    def read_shard(index: Any) -> np.ndarray:  # a slice for each axis
        shape = tuple(len(range(*s.indices(n))) for s, n in zip(index, tensor.shape, strict=True))
        out = _aligned(shape, dtype)
        if not tensor.stacked:
            tensor.copy_from_file(folder.read(tensor.name, tensor.file_index(index)), out)
            _check_finite(folder, tensor.name, out)
            return out
        layers = range(*index[0].indices(tensor.layers))
        for row, layer in zip(out, layers, strict=True):
            name = tensor.names[layer]
            tensor.copy_from_file(folder.read(name, tensor.file_index(index[1:])), row)
            _check_finite(folder, name, row)
        return out

    return jax.make_array_from_callback(tensor.shape, sharding, read_shard, dtype=dtype)


def _check_finite(folder: Folder, name: str, values: np.ndarray) -> None:
    """Raise :class:`ConvertError` if a tensor, in the dtype of its parameter, has NaN or infinite values."""
    # An exponent of ones, looked for in the bits: numpy has no fast isfinite for bfloat16.
    exponent = np.frombuffer(np.array(np.inf, values.dtype).tobytes(), f"u{values.dtype.itemsize}")[0]
    bits = values.reshape(-1).view(exponent.dtype)
    for begin in range(0, bits.size, CHECKED):
        if ((bits[begin : begin + CHECKED] & exponent) == exponent).any():
            raise ConvertError(
                f"{folder.path}: tensor {folder.where(name)} has values that are not finite as {values.dtype}; "
                "download the file again, or import with another --param_dtype"
            )


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return an uninitialized array at an address that XLA on a CPU takes without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    buffer = np.empty(size + ALIGNMENT, np.uint8)
    begin = -buffer.ctypes.data % ALIGNMENT
    return buffer[begin : begin + size].view(dtype).reshape(shape)
