"""Parameters into a Hugging Face folder that transformers loads, one file at a time."""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import save_file

from fam_jax.config import ModelConfig
from fam_jax.hf.errors import ConvertError
from fam_jax.hf.families import check_same
from fam_jax.hf.folder import CONFIG, INDEX, MEMORY_FILE, SINGLE
from fam_jax.hf.names import Tensor, tensors
from fam_jax.model.layer_types import is_memory
from fam_jax.model.parameters import flatten

Progress = Callable[[int, int], None]
Part = tuple[str, Tensor, int | None]  # name there, the parameter, the layer of it

SHARD_BYTES = 4 * 2**30
UNFINISHED = ".unfinished_export"


def export_folder(
    path: str | os.PathLike[str],
    model: ModelConfig,
    params: Mapping[str, Any],
    hf: Mapping[str, Any],
    *,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    on_progress: Progress | None = None,
    write_more: Callable[[Path], None] | None = None,
) -> None:
    """Writes `config.json`, the safetensors files and, if there is a FAM, `fam.safetensors` into a new folder.

    Args:
      path: a folder that does not exist or is empty.
      model: the model's config.
      params: nested dict of arrays, all of them addressable here.
      hf: the content of `config.json`, from :func:`fam_jax.hf.hf_config` or the folder that the model came from.
      dtype: of the tensors; None keeps the parameters'.
      shard_bytes: largest size of a safetensors file; so much is held in memory beside the parameters.
      on_progress: called with the number of tensors written and to be written.
      write_more: writes what else belongs into the folder, such as a tokenizer, before the folder is at `path`.

    Raises:
      ConvertError: `hf` does not describe `model`, or the folder cannot be written.
    """
    check_same(model, hf, ignored=tuple(hf))
    leaves = flatten(dict(params))
    if dtype is not None:
        hf = {key: value for key, value in hf.items() if key != "dtype"} | {"torch_dtype": dtype}
    with new_folder(path) as folder:
        _write_tensors(folder, model, leaves, dtype, shard_bytes, on_progress)
        write_memory(folder, model, leaves)
        (folder / CONFIG).write_text(json.dumps(hf, indent=2, sort_keys=True) + "\n")
        if write_more is not None:
            write_more(folder)


def check_new(path: str | os.PathLike[str]) -> Path:
    """The folder to be written.

    Raises:
      ConvertError: it is a file, is not empty, or cannot be replaced.
    """
    folder = Path(path).expanduser().resolve()
    if folder.exists() and not folder.is_dir():
        raise ConvertError(f"{folder}: is a file; give a new folder as --out")
    if folder.is_mount():
        raise ConvertError(f"{folder}: is where a file system is mounted; give a new folder in it as --out")
    if folder.is_dir() and any(folder.iterdir()):
        raise ConvertError(f"{folder}: is not empty; give a new folder as --out")
    return folder


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to be written to inside the context, and to be found at `path` when all is written.

    Until then it lies beside, under a name that begins with a dot. It is removed if writing fails; what a killed
    process left there is removed the next time.

    Raises:
      ConvertError: the folder at `path` is not empty, or cannot be written.
    """
    folder = check_new(path)
    beside = folder.with_name(f".{folder.name}{UNFINISHED}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if beside.exists():
            shutil.rmtree(beside)
        beside.mkdir()
        yield beside
        beside.replace(folder)
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConvertError(f"{folder}: cannot be written ({reason}); give another --out") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _write_tensors(
    folder: Path,
    model: ModelConfig,
    leaves: dict[str, Any],
    dtype: str | None,
    shard_bytes: int,
    on_progress: Progress | None,
) -> None:
    parts: list[Part] = [
        (name, tensor, layer if tensor.stacked else None)
        for tensor in tensors(model)
        for layer, name in enumerate(tensor.names)
    ]
    parts.sort(key=lambda part: -1 if part[2] is None else part[2])  # a layer's tensors lie together
    files: list[list[Part]] = [[]]
    size = total = 0
    for part in parts:
        leaf = leaves[part[1].path]
        more = leaf.size // part[1].layers * np.dtype(dtype or leaf.dtype).itemsize
        if files[-1] and size + more > shard_bytes:
            files.append([])
            size = 0
        files[-1].append(part)
        size += more
        total += more
    names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    names = names if len(files) > 1 else [SINGLE]
    done = 0
    for name, chosen in zip(names, files, strict=True):
        arrays = {
            there: _values(leaves[tensor.path], tensor, layer, dtype) for there, tensor, layer in chosen
        }
        save_file(arrays, folder / name, metadata={"format": "pt"})
        done += len(chosen)
        if on_progress is not None:
            on_progress(done, len(parts))
    if len(files) > 1:
        weight_map = {part[0]: name for name, chosen in zip(names, files, strict=True) for part in chosen}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _values(leaf: Any, tensor: Tensor, layer: int | None, dtype: str | None) -> np.ndarray:
    values = np.asarray(leaf if layer is None else leaf[layer])
    return tensor.to_file(values.astype(dtype or values.dtype, copy=False))


def write_memory(folder: Path, model: ModelConfig, leaves: dict[str, Any]) -> None:
    """Write the memory's own parameters, if it has any, with the config fields that they belong to.

    Args:
      folder: to write to.
      model: the config of the model.
      leaves: all parameters by path.
    """
    found = {path: np.asarray(leaf) for path, leaf in leaves.items() if is_memory(path)}
    if found:
        config = json.dumps({"block_size": model.block_size, "memory": dataclasses.asdict(model.memory)})
        metadata = {"format": "fam_jax 2", "config": config}
        save_file(found, folder / MEMORY_FILE, metadata=metadata)
