"""LoRA updates as an adapter, which the PEFT library adds to the base model."""

import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from fam_jax.config import Config, ModelConfig
from fam_jax.config.strict_json import dump_json
from fam_jax.hf.checksums import save_tensors
from fam_jax.hf.config_json import ConvertError
from fam_jax.hf.memory_file import write_memory
from fam_jax.hf.names import memory_tensors, tensors
from fam_jax.hf.output_folder import new_folder
from fam_jax.model import lora
from fam_jax.model.layer_types import is_memory
from fam_jax.model.parameters import flatten

# PEFT puts it before the names of the base model's modules.
PREFIX = "base_model.model."
# The layers of a text model, and those of the text part of a model with a vision tower.
TEXT_LAYERS, MULTIMODAL_LAYERS = "model.layers.", "model.language_model.layers."


def export_adapter(
    path: str | os.PathLike[str],
    config: Config,
    params: Mapping[str, Any],
    base_name: str | None = None,
    *,
    multimodal: bool = False,
    with_memory: bool = False,
) -> None:
    """Write `adapter_config.json`, `adapter_model.safetensors` and the parameters of the memory into a new folder.

    Args:
      path: a folder that is empty or does not exist.
      config: of the run, with its LoRA.
      params: nested dict of the run's parameters, with `lora_a` and `lora_b`.
      base_name: Hugging Face folder or name of the base model, from which PEFT loads it; None: unknown.
      multimodal: whether the base model has a vision tower. The adapter then fits its text part.
      with_memory: whether the base model is an export for PyTorch; the adapter then replaces its memory too.

    Raises:
      ConvertError: the run has no LoRA, LoRA trained other parameters too, or the folder cannot be written.
    """
    _check_adapter(config, params)
    rank, leaves = config.lora.rank, flatten(dict(params))
    layers = MULTIMODAL_LAYERS if multimodal else TEXT_LAYERS
    arrays: dict[str, np.ndarray] = {}
    modules = set()
    for tensor in tensors(config.model):
        group = tensor.path.removesuffix("/kernel")
        if f"{group}/lora_a" not in leaves:
            continue
        modules.add(tensor.name.split(".")[-2])
        for layer, name in enumerate(tensor.names):
            a, b = (np.asarray(leaves[f"{group}/{part}"][layer]) for part in lora.ADAPTERS)
            module = PREFIX + name.removesuffix(".weight").replace(TEXT_LAYERS, layers, 1)
            arrays[f"{module}.lora_A.weight"] = np.ascontiguousarray(a.reshape(-1, rank).T)
            arrays[f"{module}.lora_B.weight"] = np.ascontiguousarray(b.reshape(rank, -1).T)
    memory = _memory_arrays(config.model, leaves) if with_memory else {}
    # A pattern for a model with a vision tower, which has modules of the same names.
    pattern = rf"{re.escape(layers)}\d+\.\w+\.({'|'.join(sorted(modules))})"
    adapter_config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name, "bias": "none",
        "r": rank, "lora_alpha": config.lora.alpha, "lora_dropout": 0.0, "inference_mode": True,
        "target_modules": pattern if multimodal else sorted(modules),
        "modules_to_save": sorted({name.split(".")[-2] for name in memory}) or None,
    }  # fmt: skip
    with new_folder(path) as folder:
        save_tensors(arrays | memory, folder / "adapter_model.safetensors", {"format": "pt"})
        if not with_memory:
            write_memory(folder, config.model, leaves)
        (folder / "adapter_config.json").write_text(dump_json(adapter_config, indent=2) + "\n")


def _check_adapter(config: Config, params: Mapping[str, Any]) -> None:
    """Raise :class:`ConvertError` unless LoRA and the memory are all that was trained."""
    if config.lora.rank == 0:
        raise ConvertError(
            "config.lora.rank: is 0, so there is no adapter to export; export the model itself"
        )
    trained = flatten(lora.divide(dict(params), config.lora)[0])
    others = [name for name in trained if not (name.endswith(lora.ADAPTERS) or is_memory(name))]
    if others:
        raise ConvertError(
            f"config.lora.train: {others[0]} was trained too, and an adapter cannot hold it; export the merged model"
        )


def _memory_arrays(model: ModelConfig, leaves: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the parameters of the memory by the names that PEFT has for those of an export for PyTorch."""
    found = {}
    for tensor in memory_tensors(model):
        for layer, name in enumerate(tensor.names):
            value = np.asarray(leaves[tensor.path][layer] if tensor.stacked else leaves[tensor.path])
            found[PREFIX + name] = np.ascontiguousarray(tensor.to_file(value))
    return found
