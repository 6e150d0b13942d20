"""Parameters into a Hugging Face folder that transformers loads, one file at a time."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from fam_jax.config import ModelConfig
from fam_jax.convert.families import ConvertError, check_same
from fam_jax.convert.folder import CONFIG, FAM_FILE, INDEX, SINGLE
from fam_jax.convert.importing import FAM_FIELDS
from fam_jax.convert.names import Tensor, tensors
from fam_jax.model.parameters import flatten

Progress = Callable[[int, int], None]
Part = tuple[str, Tensor, int | None]  # name there, the parameter, the layer of it

SHARD_BYTES = 4 * 2**30


def export_folder(
    path: str | os.PathLike[str],
    model: ModelConfig,
    params: Mapping[str, Any],
    hf: Mapping[str, Any],
    *,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    on_progress: Progress | None = None,
) -> None:
    """Writes `config.json`, the safetensors files and, if there is a FAM, `fam.safetensors` into a new folder.

    Args:
      path: a folder that does not exist or is empty.
      model: the model's config.
      params: nested dict of arrays, all of them addressable here.
      hf: the content of `config.json`, from :func:`fam_jax.convert.hf_config` or the folder that the model came from.
      dtype: of the tensors; None keeps the parameters'.
      shard_bytes: largest size of a safetensors file; so much is held in memory beside the parameters.
      on_progress: called with the number of tensors written and to be written.

    Raises:
      ConvertError: `hf` does not describe `model`, or the folder cannot be written.
    """
    check_same(model, hf, ignored=tuple(hf))
    leaves = flatten(dict(params))
    if dtype is not None:
        hf = {key: value for key, value in hf.items() if key != "dtype"} | {"torch_dtype": dtype}
    with new_folder(path) as folder:
        _write_tensors(folder, model, leaves, dtype, shard_bytes, on_progress)
        write_fam(folder, model, leaves)
        (folder / CONFIG).write_text(json.dumps(hf, indent=2, sort_keys=True) + "\n")


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Makes a folder, to be written to inside the context.

    Raises:
      ConvertError: it is not empty, or cannot be written.
    """
    folder = Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise ConvertError(f"{folder}: is not empty; give a new folder")
        yield folder
    except OSError as error:
        raise ConvertError(f"{folder}: cannot be written ({error.strerror}); give another --out") from error


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


def write_fam(folder: Path, model: ModelConfig, leaves: dict[str, Any]) -> None:
    """Writes the initial FAM, if there is one among the parameters by path, with the fields that it belongs to."""
    found = [np.asarray(leaf) for path, leaf in leaves.items() if path.endswith("initial_fam")]
    if found:
        fields = dataclasses.asdict(model)
        config = json.dumps({name: fields[name] for name in FAM_FIELDS})
        save_file(
            {"initial_fam": found[0]}, folder / FAM_FILE, metadata={"format": "fam_jax", "config": config}
        )
