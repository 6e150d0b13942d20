"""The folder of a run: its path, its `config.json`, the steps that it holds."""

import dataclasses
import fnmatch
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from fam_jax.config import Config, UserError, fields_with_effect
from fam_jax.config.format1 import FORMAT, upgrade_config

CONFIG_FILE = "config.json"

MAY_CHANGE = tuple(sorted(fields_with_effect(Config, "execution")))
"""Config fields that may change when a run is resumed, because they do not change what it computes."""


class CheckpointError(UserError):
    """A checkpoint is missing or damaged, or belongs to another run. The message says what to do."""


def absolute(folder: str | os.PathLike[str]) -> epath.Path:
    """Return the path of `folder`, made absolute unless it names a bucket (`gs://...`)."""
    text = os.fspath(folder)
    return epath.Path(text if "://" in text else os.path.abspath(os.path.expanduser(text)))


def saved_steps(folder: epath.Path) -> list[int]:
    """Return the complete steps in `folder`, in ascending order. Skip steps that a killed job left unfinished."""
    names = ocp.path.step.standard_name_format()
    return sorted(found.step for found in names.find_all(folder)) if folder.is_dir() else []


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the config of the run in `folder` as a nested dict, for `fam_jax.config.resolve`.

    Raises:
      CheckpointError: the folder does not exist, is in Hugging Face format, or has no readable config.
    """
    path = absolute(folder) / CONFIG_FILE
    if not path.parent.is_dir():
        raise CheckpointError(f"{path.parent}: no such folder; give the workdir of a training run")
    if not path.exists():
        raise CheckpointError(f"{path.parent}: holds no {CONFIG_FILE}; give the workdir of a training run")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path}: is not valid JSON ({error}); restore it from a copy") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected groups of fields; restore it from a copy")
    if "model" not in config and ("architectures" in config or "model_type" in config):
        raise CheckpointError(
            f"{path.parent}: is a folder in Hugging Face format; import it first: "
            f"python -m launch.import_hf --source={path.parent} --out=CKPT, and give CKPT"
        )
    written = config.pop("format", 1)
    if written not in (1, FORMAT):
        raise CheckpointError(
            f"{path}: has format {written}, but this version of fam_jax reads formats up to {FORMAT}; update fam_jax"
        )
    return upgrade_config(config) if written == 1 else config


def settle_config(folder: epath.Path, config: Mapping[str, Any], may_change: Sequence[str]) -> None:
    """Write `config` to a new folder, or check that it continues the run in the folder.

    Fields that match a pattern of `may_change` may differ; their new values are written to the file.

    Raises:
      CheckpointError: other fields differ (the message lists them with both values), or the folder cannot be written.
    """
    new = json.loads(json.dumps(config))  # tuples become lists, as in the file
    if (folder / CONFIG_FILE).exists():
        old = read_config(folder)
        _check_same_run(folder, old, new, may_change)
        if old == new:
            return
    new = {"format": FORMAT, **new}
    if jax.process_index() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            unfinished = folder / f"{CONFIG_FILE}.tmp"
            unfinished.write_text(json.dumps(new, indent=2, sort_keys=True) + "\n")
            unfinished.replace(folder / CONFIG_FILE)
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot be written ({error}); give another workdir") from error


def _check_same_run(
    folder: epath.Path, old: dict[str, Any], new: dict[str, Any], may_change: Sequence[str]
) -> None:
    # A field that was added to fam_jax after the run began has its default.
    defaults = _flat(json.loads(json.dumps(dataclasses.asdict(Config()))))
    before, now = defaults | _flat(old), defaults | _flat(new)
    differing = [
        f"{field} was {json.dumps(before.get(field))}, is {json.dumps(now.get(field))}"
        for field in sorted(before.keys() | now.keys())
        if before.get(field) != now.get(field) and not any(fnmatch.fnmatch(field, p) for p in may_change)
    ]
    if differing:
        raise CheckpointError(
            f"{folder}: holds a run with another config ({'; '.join(differing)}); "
            "set these fields back to continue it, or give a new workdir"
        )


def _flat(group: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in group.items():
        fields |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return fields
