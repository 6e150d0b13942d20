"""Export a model to a Hugging Face folder that transformers loads."""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from fam_jax.checkpoint import SOURCE, companion_folders, find_vocabulary, is_trained, load_params
from fam_jax.checkpoint.links import check_links_below
from fam_jax.checkpoint.origin import file_digest
from fam_jax.config import Config, ModelConfig, resolve
from fam_jax.config.strict_json import dump_json
from fam_jax.hf.adapter import export_adapter
from fam_jax.hf.checksums import save_tensors
from fam_jax.hf.config_json import ConvertError, read_json
from fam_jax.hf.converted_tokenizer import mark_reader
from fam_jax.hf.folder import CONFIG, INDEX, SINGLE, copy_companions
from fam_jax.hf.memory_file import BESIDE, MEMORY_FILE, write_memory
from fam_jax.hf.multimodal import is_multimodal, text_part
from fam_jax.hf.names import Tensor, memory_tensors, tensors
from fam_jax.hf.output_folder import check_new_folder, new_folder
from fam_jax.hf.tokenizer import FILES, copy_tokenizer, find_tokenizer
from fam_jax.hf.torch_model import (
    base_config,
    check_base_memory,
    check_torch_config,
    has_torch_code,
    torch_config,
    write_code,
)
from fam_jax.hf.written_config import check_same, updated_config
from fam_jax.model import lora
from fam_jax.model.layer_types import is_memory
from fam_jax.model.parameters import flatten

OnProgress = Callable[[int, int], None]
SHARD_BYTES = 4 * 2**30


class ExportedModel(NamedTuple):
    """An exported model."""

    # The step of the checkpoint.
    step: int
    # The class in transformers that loads the model; None: an adapter was exported.
    architecture: str | None
    # Whether the model was imported without its vision tower.
    text_part: bool
    # Whether a tokenizer was exported.
    tokenizer: bool = False
    # Of an adapter: the base model that it names.
    base: str | None = None


def export_model(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    step: int | None = None,
    *,
    lora_updates: str = "merged",
    base: str | None = None,
    with_fam: bool = False,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    on_progress: OnProgress | None = None,
) -> ExportedModel:
    """Write the model of a checkpoint, with its tokenizer and memory, into a new folder.

    Args:
      checkpoint: workdir of a run, or the checkpoint of an import.
      out: a folder that is empty or does not exist.
      step: the saved step; None takes the latest.
      lora_updates: what to export of a run with LoRA: "merged", the model with the updates merged into its weights;
        "base", the model without them; or "adapter", the updates alone, for PEFT.
      base: Hugging Face folder or name of the base model that an adapter names; None: the folder that was imported, if
        it still exists, or the name in its config.json; none for a run that began with another run.
      with_fam: write PyTorch code that computes the memory too, so that transformers runs the model as it was trained.
      dtype: of the tensors; None keeps that of the checkpoint, or takes float32 for merged weights.
      shard_bytes: largest size of a safetensors file.
      on_progress: called with the number of tensors written so far and in total.

    Raises:
      UserError: the checkpoint cannot be read, no supported family computes what the model does, PyTorch code cannot
        compute the memory or go with an adapter, or the folder cannot be written.
    """
    check_new_folder(out)
    if with_fam and lora_updates == "adapter":
        raise ConvertError("an adapter holds no code; leave out --with_fam, or export with --lora=merged")
    params, values, step = load_params(checkpoint, step)  # in host memory
    config = find_vocabulary(resolve(values), checkpoint, step)
    companions = find_companions(checkpoint, config)
    if lora_updates == "adapter":
        name = _export_adapter(out, config, params, companions, base)
        return ExportedModel(step, None, text_part=False, base=name)
    if config.lora.rank and lora_updates == "merged":
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            params, dtype = lora.merge(params, config.lora), dtype or "float32"
    stored = str(params["embedding"]["table"].dtype)
    original = {} if companions is None else read_json(companions / CONFIG)
    describe = torch_config if with_fam else updated_config
    hf = describe(config.model, base_config(text_part(original)), dtype=stored)
    export_folder(
        out,
        config.model,
        params,
        hf,
        dtype=dtype,
        shard_bytes=shard_bytes,
        on_progress=on_progress,
        write_more=functools.partial(_write_companions, companions, config.data.vocabulary),
    )
    has_tokenizer = find_tokenizer(Path(out).expanduser()) is not None
    return ExportedModel(step, hf["architectures"][0], is_multimodal(original), has_tokenizer)


def _export_adapter(
    out: str | os.PathLike[str],
    config: Config,
    params: Mapping[str, Any],
    companions: epath.Path | None,
    base: str | None,
) -> str | None:
    """Write an adapter for a run's base model, and return the name of the base that it has."""
    name, hf = _base_of_adapter(config, companions, base)
    has_memory = has_torch_code(hf)
    if has_memory:
        check_base_memory(config.model, hf)
    export_adapter(out, config, params, name, multimodal=is_multimodal(hf), with_memory=has_memory)
    return name


def find_companions(checkpoint: str | os.PathLike[str], config: Config) -> epath.Path | None:
    """Return the folder with the config.json and tokenizer that a run's model, or its base, was imported with.

    Raises:
      UserError: a file in it is a link that leads out of the checkpoint.
    """
    found = companion_folders(config, checkpoint)
    folder = next((folder for folder in found if (folder / CONFIG).is_file()), None)
    if folder is not None:
        check_links_below(folder, folder.parent)
    return folder


def _write_companions(companions: epath.Path | None, vocabulary: str, folder: Path) -> None:
    """Write the companions of a model into the folder of its export, and its vocabulary if it is another."""
    if companions is not None:
        own = epath.Path(vocabulary).expanduser()
        theirs = [companions / name for name in FILES if (companions / name).is_file()]
        other = own.is_file() and theirs and file_digest(own) not in map(file_digest, theirs)
        copy_companions(companions, folder, config=False, tokenizer=not other)
    if find_tokenizer(folder) is None:
        copy_tokenizer(vocabulary, folder)
    mark_reader(folder)


def _base_of_adapter(
    config: Config, companions: epath.Path | None, base: str | None
) -> tuple[str | None, dict[str, Any]]:
    """Return the base model that an adapter names, and its config.json; empty: unknown.

    Args:
      config: of the run.
      companions: of the imported model; None: the run did not begin with one.
      base: the name that the user gave; None: none.
    """
    hf = {} if companions is None else read_json(companions / CONFIG)
    if base is not None:
        hf = base_config(hf)  # a name says nothing of a memory
    if base is None and companions is not None and not is_trained(config.train.init_from):
        record = companions / SOURCE
        recorded = read_json(record) if record.exists() else {}
        # A fine-tuned model may keep the name of the model before it, so the folder comes first.
        names = (recorded.get("source", ""), hf.get("_name_or_path"))
        # Null says that the run began with other weights than those that were imported.
        base = None if names[0] is None else next(filter(_can_be_loaded, names), None)
    if base is not None and (Path(base).expanduser() / CONFIG).is_file():
        hf = read_json(Path(base).expanduser() / CONFIG)
    return base, hf


def _can_be_loaded(name: Any) -> bool:
    """Return whether a name may be that of a model: a folder that exists, or a name as of a hub."""
    if not isinstance(name, str) or not name:
        return False
    return (Path(name) / CONFIG).is_file() or not name.startswith(("/", ".", "~"))


def export_folder(
    path: str | os.PathLike[str],
    model: ModelConfig,
    params: Mapping[str, Any],
    hf: Mapping[str, Any],
    *,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    on_progress: OnProgress | None = None,
    write_more: Callable[[Path], None] | None = None,
) -> None:
    """Write `config.json`, safetensors files and, if the memory has parameters, `memory.safetensors`.

    An export for PyTorch has the code of the model instead of the last.

    Args:
      path: a folder that is empty or does not exist.
      model: config of the model.
      params: nested dict of arrays, all of them addressable by this process. LoRA updates are left out.
      hf: content of `config.json`, from :func:`fam_jax.hf.hf_config` or :func:`fam_jax.hf.torch_config`, or from the
        folder that the model came from.
      dtype: of the tensors; None keeps that of the parameters.
      shard_bytes: largest size of a safetensors file, and of the host memory that is needed beside the parameters.
      on_progress: called with the number of tensors written so far and in total.
      write_more: writes other files, such as a tokenizer, into the given folder before it appears at `path`.

    Raises:
      ConvertError: `hf` does not describe `model`, or the folder cannot be written.
    """
    has_code = has_torch_code(hf)
    if has_code:
        check_torch_config(model, hf)
    else:
        check_same(model, hf, ignored=tuple(hf))
    leaves = flatten(dict(params))
    if dtype is not None:
        hf = {key: value for key, value in hf.items() if key != "dtype"} | {"torch_dtype": dtype}
    written = [*tensors(model), *(memory_tensors(model) if has_code else ())]
    files = _divide(written, leaves, dtype, shard_bytes)
    with new_folder(path) as folder:
        beside = {} if has_code or not any(map(is_memory, leaves)) else {BESIDE: MEMORY_FILE}
        _write_tensors(folder, files, {"format": "pt", **beside}, on_progress)
        if has_code:
            write_code(folder)
        else:
            write_memory(folder, model, leaves)
        (folder / CONFIG).write_text(dump_json(hf, indent=2, sort_keys=True) + "\n")
        if write_more is not None:
            write_more(folder)


class _Part(NamedTuple):
    """A tensor to write."""

    # In the file.
    name: str
    tensor: Tensor
    # The parameter, of all layers.
    leaf: Any
    # None: the parameter is not stacked over the layers.
    layer: int | None
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return self.leaf.size // self.tensor.layers * self.dtype.itemsize

    def values(self) -> np.ndarray:
        """Return the values as they are written."""
        values = np.asarray(self.leaf if self.layer is None else self.leaf[self.layer])
        return self.tensor.to_file(values.astype(self.dtype, copy=False))


def _divide(
    written: Sequence[Tensor], leaves: Mapping[str, Any], dtype: str | None, shard_bytes: int
) -> list[list[_Part]]:
    """Divide the tensors of a model into files of at most `shard_bytes`. Those of the memory keep their dtype."""
    parts = []
    for tensor in written:
        leaf = leaves[tensor.path]
        own = None if is_memory(tensor.path) else dtype
        for layer, name in enumerate(tensor.names):
            which = layer if tensor.stacked else None
            parts.append(_Part(name, tensor, leaf, which, np.dtype(own or leaf.dtype)))
    parts.sort(key=lambda part: -1 if part.layer is None else part.layer)  # keeps a layer in one file
    files: list[list[_Part]] = [[]]
    size = 0
    for part in parts:
        if files[-1] and size + part.nbytes > shard_bytes:
            files.append([])
            size = 0
        files[-1].append(part)
        size += part.nbytes
    return files


def _write_tensors(
    folder: Path, files: list[list[_Part]], metadata: Mapping[str, str], on_progress: OnProgress | None
) -> None:
    count = len(files)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)] if count > 1 else [SINGLE]
    done, total = 0, sum(map(len, files))
    for name, parts in zip(names, files, strict=True):
        save_tensors({part.name: part.values() for part in parts}, folder / name, metadata)
        done += len(parts)
        if on_progress is not None:
            on_progress(done, total)
    if count > 1:
        weight_map = {part.name: name for name, parts in zip(names, files, strict=True) for part in parts}
        size = sum(part.nbytes for parts in files for part in parts)
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(dump_json(index, indent=2) + "\n")
