"""The parameters of a memory, in a file beside the tensors of the model, or among them.

transformers knows no memory, so `memory.safetensors` holds the memory's parameters under their paths, such as
memory/initial_fam, and in its metadata the config fields that they were trained with. Version 0.1 of this package wrote
`fam.safetensors`, with one tensor initial_fam; it is read too. An export for PyTorch has no such file: its code knows
the memory, so the parameters are tensors of the model.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from fam_jax.config import ModelConfig
from fam_jax.config.format1 import upgrade_model
from fam_jax.config.strict_json import dump_json, parse_json
from fam_jax.hf.checksums import check_tensors, save_tensors
from fam_jax.hf.config_json import ConvertError, first_line
from fam_jax.hf.folder import Folder
from fam_jax.hf.names import is_memory_tensor, memory_shapes, memory_tensors
from fam_jax.model.layer_types import is_memory

MEMORY_FILE = "memory.safetensors"
FORMAT1_FILE = "fam.safetensors"
# Its only tensor, whether the vectors are those of the model or of each layer.
FORMAT1_NAME = "initial_fam"
# The "format" in the metadata of each.
FORMAT, FORMAT1 = "fam_jax 2", "fam_jax"
# Key in the metadata of a model's tensors, if a memory file was written beside them. Its value is the file's name.
BESIDE = "memory_file"


def find_memory_file(folder: Path) -> Path | None:
    """Return the file with the parameters of a memory, or None if the folder has none."""
    files = (folder / name for name in (MEMORY_FILE, FORMAT1_FILE))
    return next((file for file in files if file.is_file()), None)


def read_memory_config(folder: Path) -> dict[str, Any]:
    """Return the config fields that a memory was trained with.

    Returns:
      `block_size` and the group `memory`, fields of :class:`ModelConfig`; empty if the folder has no memory file.

    Raises:
      ConvertError: the file is damaged, or this package did not write it.
    """
    path = find_memory_file(folder)
    if path is None:
        return {}
    try:
        with safetensors.safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
        fields = parse_json(metadata["config"])
        if metadata.get("format") == FORMAT1:
            fields = upgrade_model(fields)
        return {"block_size": fields["block_size"], "memory": dict(fields["memory"])}
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ConvertError(
            f"{path}: is damaged, or fam_jax did not write it; download it again, or remove it to import the model "
            "without its memory"
        ) from error


def check_memory_file(folder: Folder) -> None:
    """Check that an export that had a memory file still has it: otherwise it would be imported without its memory.

    Raises:
      ConvertError: the file is gone.
    """
    if find_memory_file(folder.path) is not None:
        return
    named = next(filter(None, (folder.metadata(file).get(BESIDE) for file in folder.files)), None)
    if named is not None:
        raise ConvertError(
            f"{folder.path}: was exported with {named}, the parameters of its memory, which is missing; copy it again, "
            "or choose a memory without it, such as --config.model.memory.kind=bswa"
        )


def read_memory(folder: Folder, model: ModelConfig) -> dict[str, np.ndarray] | None:
    """Read the parameters of a memory by path; None if the folder holds none.

    Raises:
      ConvertError: the parameters are not those of the memory of `model`.
    """
    values = _read_tensors(folder, model) if folder.memory else _read_file(folder.path, model)
    if values is None:
        return None
    shapes = memory_shapes(model)
    for name, like in shapes.items():
        found = f"has shape {list(values[name].shape)}" if name in values else "is missing"
        if name not in values or values[name].shape != like.shape:
            raise ConvertError(
                f"{find_memory_file(folder.path) or folder.path}: {name} {found}, but the model needs shape "
                f"{list(like.shape)}; set the fields of the memory to those that it was trained with, "
                + ("or choose a memory without it" if folder.memory else "or remove the file")
            )
    return {name: values[name] for name in shapes}


def _read_tensors(folder: Folder, model: ModelConfig) -> dict[str, np.ndarray] | None:
    """Read the parameters from the tensors of an export for PyTorch."""
    if not any(map(is_memory_tensor, folder.names)):
        return None
    values = {}
    for tensor in memory_tensors(model):
        whole = folder.names.issuperset(tensor.names)
        if whole and len({folder.shape(name) for name in tensor.names}) == 1:
            layers = [folder.read(name, (slice(None), slice(None))) for name in tensor.names]
            values[tensor.path] = (np.stack(layers) if tensor.stacked else layers[0]).astype(np.float32)
    return values


def _read_file(folder: Path, model: ModelConfig) -> dict[str, np.ndarray] | None:
    """Read the parameters from a memory file."""
    path = find_memory_file(folder)
    if path is None:
        return None
    check_tensors([path])
    try:
        with safetensors.safe_open(path, framework="np") as file:
            values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no dict)
    except (safetensors.SafetensorError, OSError) as error:
        raise ConvertError(f"{path}: cannot be read ({first_line(error)}); download it again") from error
    if path.name == FORMAT1_FILE and FORMAT1_NAME in values:
        return dict.fromkeys(memory_shapes(model), values[FORMAT1_NAME])
    return values


def write_memory(folder: Path, model: ModelConfig, leaves: Mapping[str, Any]) -> None:
    """Write the parameters of the memory, if it has any.

    The tensors of the model name the file, in their metadata: see :func:`check_memory_file`.

    Args:
      folder: where to write the file.
      model: config of the model.
      leaves: parameters of the model by path.
    """
    found = {path: np.asarray(leaf) for path, leaf in leaves.items() if is_memory(path)}
    if found:
        config = dump_json({"block_size": model.block_size, "memory": dataclasses.asdict(model.memory)})
        save_tensors(found, folder / MEMORY_FILE, {"format": FORMAT, "config": config})
