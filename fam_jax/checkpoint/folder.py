"""The folder of a run: its path, its `config.json`, the steps that it holds."""

import hashlib
import json
import os
from typing import Any

from etils import epath
from orbax.checkpoint import v1 as ocp

from fam_jax.config import UserError
from fam_jax.config.format1 import FORMAT, upgrade_config
from fam_jax.config.strict_json import parse_json

CONFIG_FILE = "config.json"
# The entry of a config.json with the checksum of all others.
SEAL = "sha256"

# Orbax searches folders with glob, and does not escape these characters of the path.
PATTERN = "*?[]{}"


class CheckpointError(UserError):
    """A checkpoint is missing or damaged, or belongs to another run. The message says what to do."""


class DamagedStepError(CheckpointError):
    """A step is damaged."""

    def __init__(self, message: str, reason: str):
        """Create the error; `reason` is the part of the message that says what is damaged."""
        super().__init__(message)
        self.reason = reason


class ReadError(CheckpointError):
    """A checkpoint could not be read, for a reason other than damage. The command may work again later."""

    # EX_TEMPFAIL of sysexits.h
    exit_code = 75


class SaveError(CheckpointError):
    """A checkpoint could not be saved. The command is right, and may work again when the disk or the bucket does."""

    # EX_TEMPFAIL of sysexits.h
    exit_code = 75


def absolute(folder: str | os.PathLike[str]) -> epath.Path:
    """Return the path of `folder`, made absolute unless it names a bucket (`gs://...`)."""
    text = os.fspath(folder)
    return epath.Path(text if "://" in text else os.path.abspath(os.path.expanduser(text)))


def check_name(folder: epath.Path) -> None:
    """Raise :class:`CheckpointError` if Orbax could not save in `folder` because of characters in its path."""
    check_readable(folder)
    if found := sorted(set(PATTERN) & set(os.fspath(folder))):
        raise CheckpointError(
            f"{folder}: no checkpoint can be saved here, because Orbax takes {' '.join(found)} in a path for a "
            "pattern; give a folder without it"
        )


def check_readable(folder: epath.Path) -> None:
    """Raise :class:`CheckpointError` if no array can be read in `folder` because of characters in its path.

    TensorStore, which reads and writes arrays for Orbax, takes a backslash for a slash, and paths in UTF-8 only.
    """
    path = os.fspath(folder)
    if "\\" in path or any("\ud800" <= character <= "\udfff" for character in path):
        wrong = "a backslash" if "\\" in path else "bytes that are not UTF-8"
        raise CheckpointError(
            f"{folder}: no checkpoint can be saved or read here, because its path has {wrong}; rename the folder"
        )


def locate(name: str) -> tuple[epath.Path, int | None]:
    """Return folder and step of a checkpoint named as WORKDIR (the step is None) or WORKDIR/STEP."""
    folder = absolute(name)
    return (folder.parent, int(folder.name)) if folder.name.isdigit() else (folder, None)


def saved_steps(folder: epath.Path) -> list[int]:
    """Return the complete steps in `folder`, in ascending order. Skip steps that a killed job left unfinished."""
    names = ocp.path.step.standard_name_format()
    return sorted(found.step for found in names.find_all(folder)) if folder.is_dir() else []


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the config of the run in `folder` as a nested dict, for `fam_jax.config.resolve`.

    Raises:
      CheckpointError: the folder does not exist, is in Hugging Face format, or has no readable config.
    """
    config, _ = read_config_file(folder)
    return config


def json_digest(value: Any) -> str:
    """Return the SHA-256 of a JSON value, whatever the order of its keys, in hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_config_file(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Read the config of the run in `folder`, as :func:`read_config` does, and the history of its changes."""
    path = absolute(folder) / CONFIG_FILE
    if not path.parent.is_dir():
        raise CheckpointError(f"{path.parent}: no such folder; give the workdir of a training run")
    if not path.exists():
        raise CheckpointError(f"{path.parent}: holds no {CONFIG_FILE}; give the workdir of a training run")
    try:
        config = parse_json(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path}: is not valid JSON ({error}); restore it from a copy") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected groups of fields; restore it from a copy")
    # Runs of version 0.1 and folders in other formats have none.
    if (sealed := config.pop(SEAL, None)) is not None and sealed != json_digest(config):
        raise CheckpointError(
            f"{path}: does not match its checksum, so it is damaged or was edited; restore it from a copy, or, if you "
            f'edited it, remove the entry "{SEAL}"'
        )
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
    history = config.pop("history", [])
    return (upgrade_config(config) if written == 1 else config), history
