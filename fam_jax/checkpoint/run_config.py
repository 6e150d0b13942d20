"""The `config.json` of a run: which fields may change when the run is resumed, and the record of those that did."""

import dataclasses
import fnmatch
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath

from fam_jax.checkpoint.folder import (
    CONFIG_FILE,
    SEAL,
    CheckpointError,
    json_digest,
    read_config_file,
    saved_steps,
)
from fam_jax.checkpoint.new_file import new_file
from fam_jax.config import Config, fields_with_effect
from fam_jax.config.format1 import FORMAT

MAY_CHANGE = tuple(sorted(fields_with_effect(Config, "execution")))
"""Config fields that may change when a run is resumed, because they do not change what it computes."""

# Fields that say where something is. They may change as long as the same thing is there (see `origin.py`).
PLACES = ("data.vocabulary", "train.init_from")

FlatConfig = dict[str, Any]


def settle_config(
    folder: epath.Path,
    config: Mapping[str, Any],
    may_change: Sequence[str],
    *,
    step: int | None = None,
    forked_from: str = "",
) -> dict[str, Any]:
    """Write `config` to a folder without saved steps, or check that it continues the run in the folder.

    Fields that match a pattern of `may_change` may differ; their new values are written to the file. Those that change
    what the run computes are added to its history, with both values and the step.

    Args:
      folder: folder of the run.
      config: the resolved config as nested dict.
      may_change: patterns of config fields.
      step: the saved step that the run goes on from; None: the latest.
      forked_from: the checkpoint that a new run starts from, for its history.

    Returns:
      The config that the run had before.

    Raises:
      CheckpointError: other fields differ; the message lists them with both values.
      OSError: the folder cannot be written.
    """
    new = json.loads(json.dumps(config))  # tuples become lists, as in the file
    history: list[dict[str, Any]] = [{"forked_from": forked_from}] if forked_from else []
    steps = saved_steps(folder)
    if steps and (folder / CONFIG_FILE).exists():
        old, history = read_config_file(folder)
        changes = changed_fields(old, new)
        check_changes(folder, changes, may_change)
        if old == new:
            return old
        if effective := changes_of_result(changes):
            history.append({"step": step if step is not None else steps[-1], "changed": effective})
    else:
        old = new
    if jax.process_index() == 0:
        _write(folder, new, history)
    return old


def _write(folder: epath.Path, config: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> None:
    whole = {"format": FORMAT, **({"history": history} if history else {}), **config}
    whole[SEAL] = json_digest(whole)
    with new_file(folder / CONFIG_FILE) as file:
        file.write(f"{json.dumps(whole, indent=2, sort_keys=True)}\n".encode())


def correct_history(folder: epath.Path, step: int, restored: int) -> None:
    """Record that changes after `step`, which turned out to be damaged, count from step `restored` on.

    Raises:
      OSError: the file cannot be written.
    """
    config, history = read_config_file(folder)
    if any(entry.get("step") == step for entry in history):
        corrected = [entry | ({"step": restored} if entry.get("step") == step else {}) for entry in history]
        _write(folder, config, corrected)


def changed_fields(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the fields whose values differ between two configs, with both values, {"was": ..., "is": ...}."""
    # A field that was added to fam_jax after the run began has its default.
    defaults = _flat(json.loads(json.dumps(dataclasses.asdict(Config()))))
    before, now = (defaults | _flat(json.loads(json.dumps(config))) for config in (old, new))
    return {
        field: {"was": before.get(field), "is": now.get(field)}
        for field in sorted(before.keys() | now.keys())
        if before.get(field) != now.get(field)
    }


def changes_of_result(changes: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return those of the changed fields that change what the run computes."""
    return {field: change for field, change in changes.items() if field not in (*MAY_CHANGE, *PLACES)}


def check_changes(
    folder: epath.Path, changes: Mapping[str, Mapping[str, Any]], may_change: Sequence[str]
) -> None:
    """Raise :class:`CheckpointError` if a changed field of the run in `folder` matches no pattern of `may_change`."""
    differing = {
        field: f"{field} was {json.dumps(change['was'])}, is {json.dumps(change['is'])}"
        for field, change in changes.items()
        if not any(fnmatch.fnmatch(field, pattern) for pattern in may_change)
    }
    if differing:
        raise CheckpointError(
            f"{folder}: holds a run with another config ({'; '.join(differing.values())}); "
            f"set these fields back to continue it, give a new workdir{_advice(list(differing))}"
        )


def _advice(fields: Sequence[str]) -> str:
    """Return how launch.train changes fields of a run, if it can."""
    if not set(fields) <= changeable_fields(Config()):
        return ""
    return f", or pass --allow_change={','.join(fields)} to go on with the new values"


def changeable_fields(config: Config) -> set[str]:
    """Return the fields that a run may change if it is asked to: those that do not decide what its parameters mean."""
    memory = type(config.model.memory)
    own = fields_with_effect(memory, "state", "training", "execution", prefix="model.memory.")
    found = fields_with_effect(Config, "state", "training", "execution") | own
    return found - {"model.memory.kind", *PLACES}


def _flat(group: Mapping[str, Any], prefix: str = "") -> FlatConfig:
    fields: FlatConfig = {}
    for name, value in group.items():
        fields |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return fields
