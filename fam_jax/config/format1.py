"""Translate configs and array names of version 0.1 of the package (format 1) to those of today (format 2)."""

from collections.abc import Mapping
from typing import Any

FORMAT = 2

# Fields of ModelConfig that moved into its memory group.
MOVED = {
    "memory_segments": "segments",
    "window": "window",
    "stop_gradient": "stop_gradient",
    "fam_length": "length",
    "fam_init": "init",
    "fam_positions": "positions",
    "fam_previous_blocks": "previous_blocks",
}
# The fields of MOVED that both kinds of memory of format 1 had.
OF_WINDOWS = ("memory_segments", "window", "stop_gradient")


# Arrays that a checkpoint of format 1 stores empty if there was nothing to save.
EMPTIED = ("saved_fam",)


def moved_field(path: str) -> str | None:
    """Return the path in format 2 of a config field that moved, or None if it did not move."""
    group, _, name = path.rpartition(".")
    return f"{group}.memory.{MOVED[name]}" if group.endswith("model") and name in MOVED else None


def upgrade_model(model: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a model group from format 1 to format 2: the memory is FAM, or BSWA if `fam_length` was 0."""
    has_fam = model.get("fam_length", 0) > 0
    names = MOVED if has_fam else OF_WINDOWS
    memory = {"kind": "fam" if has_fam else "bswa"}
    memory |= {MOVED[name]: model[name] for name in names if name in model}
    return {name: value for name, value in model.items() if name not in MOVED} | {"memory": memory}


def upgrade_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a config, as nested dict, from format 1 to format 2."""
    new = dict(config)
    if isinstance(model := config.get("model"), Mapping):
        new["model"] = upgrade_model(model)
    if isinstance(lora := config.get("lora"), Mapping) and "train" in lora:
        new["lora"] = {**lora, "train": ["*memory/*" if p == "*initial_fam" else p for p in lora["train"]]}
    return new


def upgrade_array_name(name: str) -> str:
    """Return the name in format 2 of an array of a checkpoint or memory file, such as layers/initial_fam."""
    if name in STATE_NAMES:
        return STATE_NAMES[name]
    head, slash, last = name.rpartition("/")
    if last != "initial_fam" or head.endswith("memory"):
        return name
    return f"{head}{slash}memory/initial_fam"


def former_array_name(key: str) -> str:
    """Return the key path in format 1 of a parameter such as ['layers']['memory']['initial_fam']."""
    return key.replace("['memory']['initial_fam']", "['initial_fam']")


STATE_NAMES = {
    "saved_fam": "carried/fam",
    "has_saved_fam": "has_carried",
    "carries_context": "position.carries_context",
    "blocks": "position.blocks",
    "filled": "position.filled",
}
