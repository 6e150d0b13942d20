"""Exports for PyTorch: a model with its memory, and `modeling_fam.py`, the code by which transformers runs it.

Such a folder has a model_type of its own. Its config.json holds the memory and, written out in full, the options of the
base family. The parameters of the memory are tensors like the others, so what PyTorch trains and saves can be imported.
"""

import dataclasses
import importlib.resources
from pathlib import Path
from typing import Any

from fam_jax.config import ModelConfig
from fam_jax.config.memory import memory_config_type
from fam_jax.hf.config_json import COUNT, FLAG, GROUP, STRING, ConvertError, check_types
from fam_jax.hf.families import FAMILIES, Fields, HfConfig
from fam_jax.hf.written_config import check_same, new_config

MODEL_TYPE, ARCHITECTURE, MODULE = "fam", "FamForCausalLM", "modeling_fam"
AUTO_MAP = {"AutoConfig": f"{MODULE}.FamConfig", "AutoModelForCausalLM": f"{MODULE}.{ARCHITECTURE}"}
# The kinds of memory that the code computes.
KINDS = ("full", "swa", "bswa", "transformer_xl", "fam")
# Fields of ModelConfig that a base family implies and the code has to be told.
TRAITS = ("qkv_bias", "qk_norm", "post_norms", "norm_offset", "scale_embeddings")
# Options that a base model does not have.
NEEDED = {"base_model_type": STRING, "block_size": COUNT, "memory": GROUP}
OPTIONS = NEEDED | dict.fromkeys(TRAITS, FLAG) | {"auto_map": GROUP}
# Options that rope_parameters replaces.
OLD_ROPE = ("rope_theta", "rope_scaling", "rope_local_base_freq")


def has_torch_code(hf: HfConfig) -> bool:
    """Return whether a `config.json` is that of an export for PyTorch."""
    return hf.get("model_type") == MODEL_TYPE


def torch_config(model: ModelConfig, original: HfConfig, *, dtype: str = "float32") -> dict[str, Any]:
    """Return the `config.json` of an export for PyTorch.

    Args:
      model: config of the model.
      original: the base model's `config.json` that the model was imported with; empty if it was not imported.
      dtype: of the tensors.

    Raises:
      ConvertError: the code does not compute the memory, or no supported family computes the rest; the message names a
        field.
    """
    kind = model.memory.kind
    if kind not in KINDS:
        raise ConvertError(
            f"config.model.memory.kind: {MODULE}.py cannot compute {kind}, only {', '.join(KINDS)}; export the model "
            "without --with_fam"
        )
    base = new_config(_without_memory(model), original, dtype=dtype)
    own = {name: getattr(model, name) for name in TRAITS} | {
        "model_type": MODEL_TYPE, "architectures": [ARCHITECTURE], "auto_map": AUTO_MAP,
        "base_model_type": base["model_type"], "rope_parameters": _rope_parameters(base),
        "block_size": model.block_size, "memory": _memory_group(model),
    }  # fmt: skip
    return {key: value for key, value in (base | own).items() if key not in OLD_ROPE}


def check_torch_config(model: ModelConfig, hf: HfConfig) -> None:
    """Raise :class:`ConvertError`, naming a field, unless a `config.json` describes exactly this model."""
    check_same(_without_memory(model), base_config(hf))
    here = {"block_size": model.block_size, "memory": _memory_group(model)}
    for name, value in here.items():
        if hf[name] != value:
            raise ConvertError(f"config.model.{name}: {value!r} is not what config.json says, {hf[name]!r}")


def check_base_memory(model: ModelConfig, hf: HfConfig) -> None:
    """Check that an export for PyTorch can be the base of an adapter, which cannot change the fields of its memory.

    Raises:
      ConvertError: the base has another memory than `model`; the message names a field.
    """
    there = {"block_size": hf.get("block_size"), **(hf.get("memory") or {})}
    for name, value in {"block_size": model.block_size, **_memory_group(model)}.items():
        if there.get(name) != value:
            raise ConvertError(
                f"config.json of the base: {name} is {there.get(name)!r}, but {value!r} in the run, and an adapter "
                "cannot change it; export the merged model --with_fam, or name a base without memory with --base"
            )


def base_config(hf: HfConfig) -> dict[str, Any]:
    """Return the `config.json` of the base model of an export for PyTorch; that of any other folder as it is.

    Raises:
      ConvertError: an option is missing, has the wrong type or contradicts the base family.
    """
    if not has_torch_code(hf):
        return dict(hf)
    check_types(hf, OPTIONS)
    if missing := [name for name in NEEDED if hf.get(name) is None]:
        raise ConvertError(f"config.json: {missing[0]} is missing; export the model again")
    base = {key: value for key, value in hf.items() if key not in OPTIONS and key != "architectures"}
    base["model_type"] = name = hf["base_model_type"]
    base.setdefault(
        "tie_word_embeddings", True
    )  # transformers 4 leaves it out then, whatever the base family's default
    if name in FAMILIES:  # others are rejected by name when the options are read
        base["architectures"] = [FAMILIES[name].architecture]
        for trait in TRAITS:
            implied = FAMILIES[name].fields.get(trait, False)
            if hf.get(trait, False) != implied:
                raise ConvertError(
                    f"config.json: {trait} is {str(hf.get(trait, False)).lower()}, but base_model_type {name} needs "
                    f"{str(implied).lower()}; export the model again"
                )
    return base


def stored_memory(hf: HfConfig) -> dict[str, Any]:
    """Return `block_size` and the group `memory`, fields of :class:`ModelConfig`; empty for any other folder."""
    return {"block_size": hf["block_size"], "memory": dict(hf["memory"])} if has_torch_code(hf) else {}


def write_code(folder: Path) -> None:
    """Write `modeling_fam.py` into a folder."""
    code = importlib.resources.files("fam_jax.hf") / "assets" / f"{MODULE}.py"
    (folder / f"{MODULE}.py").write_bytes(code.read_bytes())


def _without_memory(model: ModelConfig) -> ModelConfig:
    """Return a model that sees its whole context, as the base family does."""
    plain: Any = memory_config_type("bswa")
    return dataclasses.replace(model, memory=plain(segments=model.memory_segments))


def _memory_group(model: ModelConfig) -> Fields:
    """Return the fields of the memory, with those that it may derive from others."""
    memory = model.memory
    derived = {
        "segments": model.memory_segments, "window": memory.window, "stop_gradient": memory.stop_gradient,
    }  # fmt: skip
    return derived | dataclasses.asdict(memory)


def _rope_parameters(base: HfConfig) -> Fields:
    """Return RoPE's options as transformers 5 writes them, by layer type if the types differ."""
    main = {"rope_type": "default", "rope_theta": base["rope_theta"]} | (base["rope_scaling"] or {})
    if "rope_local_base_freq" not in base:
        return main
    local = {"rope_type": "default", "rope_theta": base["rope_local_base_freq"]}
    return {"full_attention": main, "sliding_attention": local}
