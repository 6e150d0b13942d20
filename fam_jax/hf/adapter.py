"""LoRA updates as an adapter that the PEFT library loads upon the base model."""

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from fam_jax.config import Config
from fam_jax.hf.errors import ConvertError
from fam_jax.hf.exporting import new_folder, write_memory
from fam_jax.hf.names import tensors
from fam_jax.model import lora
from fam_jax.model.layer_types import is_memory
from fam_jax.model.parameters import flatten, unflatten

PREFIX = "base_model.model."  # what PEFT puts before the names of a base model's modules


def export_adapter(
    path: str | os.PathLike[str], config: Config, params: Mapping[str, Any], base_name: str = ""
) -> None:
    """Writes `adapter_config.json`, `adapter_model.safetensors` and the initial FAM, if there is one.

    Args:
      path: a folder that does not exist or is empty.
      config: of the run, with its LoRA.
      params: nested dict of the run's parameters, with `lora_a` and `lora_b`.
      base_name: where PEFT is to look for the base model: a folder, or a name.

    Raises:
      ConvertError: there is no LoRA, other parameters were trained with it, or the folder cannot be written.
    """
    leaves = flatten(dict(params))
    if config.lora.rank == 0:
        raise ConvertError(
            "config.lora.rank: is 0, so there is no adapter to export; export the model itself"
        )
    trained = flatten(lora.divide(dict(params), config.lora)[0])
    others = [path for path in trained if not (path.endswith(lora.ADAPTERS) or is_memory(path))]
    if others:
        raise ConvertError(
            f"config.lora.train: {others[0]} was trained too, which an adapter cannot hold; export the merged model"
        )
    arrays: dict[str, np.ndarray] = {}
    modules = set()
    for tensor in tensors(config.model):
        group = tensor.path.removesuffix("/kernel")
        if f"{group}/lora_a" not in leaves:
            continue
        modules.add(tensor.name.split(".")[-2])
        for layer, name in enumerate(tensor.names):
            a, b = (np.asarray(leaves[f"{group}/{part}"][layer]) for part in lora.ADAPTERS)
            module = PREFIX + name.removesuffix(".weight")
            arrays[f"{module}.lora_A.weight"] = np.ascontiguousarray(a.reshape(-1, config.lora.rank).T)
            arrays[f"{module}.lora_B.weight"] = np.ascontiguousarray(b.reshape(config.lora.rank, -1).T)
    described = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name, "bias": "none",
        "r": config.lora.rank, "lora_alpha": config.lora.alpha, "lora_dropout": 0.0, "inference_mode": True,
        "target_modules": sorted(modules),
    }  # fmt: skip
    with new_folder(path) as folder:
        save_file(arrays, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        write_memory(folder, config.model, leaves)
        (folder / "adapter_config.json").write_text(json.dumps(described, indent=2) + "\n")


def without_adapter(params: Mapping[str, Any]) -> dict[str, Any]:
    """The base model's parameters: kernels as they were before LoRA, and no updates."""
    leaves = flatten(dict(params))
    return unflatten({path: leaf for path, leaf in leaves.items() if not path.endswith(lora.ADAPTERS)})
