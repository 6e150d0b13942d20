"""Load what a step holds, and verify it."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from etils import epath

from fam_jax.checkpoint import manifest
from fam_jax.checkpoint.aside import note_of_gone_step
from fam_jax.checkpoint.folder import (
    CheckpointError,
    DamagedStepError,
    ReadError,
    absolute,
    check_readable,
    read_config,
    saved_steps,
)
from fam_jax.checkpoint.links import check_links_below
from fam_jax.checkpoint.orbax_io import file_of, read_parts, whole_record

PyTree = Any
Shardings = jax.sharding.Sharding | Callable[[PyTree], PyTree]

# The flags that choose another step, for messages.
STEP_FLAG, RESTORE_FLAG = "--step={step}", "--restore_step={step}"
# Names of the memory that a step hands to the next.
CARRIED = "carried/"


def load_params(
    folder: str | os.PathLike[str],
    step: int | None = None,
    shardings: Shardings | None = None,
    *,
    flag: str = STEP_FLAG,
) -> tuple[dict[str, PyTree], dict[str, Any], int]:
    """Load the parameters of a run, without the rest of its training state.

    Args:
      folder: folder of the run.
      step: a saved step; None: the latest.
      shardings: None loads numpy arrays; one sharding applies to every parameter; a function takes the nested dict of
        `jax.ShapeDtypeStruct`s and returns their shardings.
      flag: the argument that chooses another step, for error messages; it contains {step}.

    Returns:
      The nested dict of parameters, the config as nested dict, and the step.

    Raises:
      CheckpointError: the folder or the step does not exist, or is damaged.
    """
    path = absolute(folder)
    config = read_config(path)
    steps = saved_steps(path)
    if step is None and (note := note_of_gone_step(path, steps)):
        logging.warning("%s", note)
    step = choose_step(path, steps, step)

    def wanted(record: manifest.Record) -> dict[str, manifest.Arrays]:
        shapes = {
            name: jax.ShapeDtypeStruct(tuple(entry["shape"]), entry["dtype"])
            for name, entry in record["params"].items()
        }
        return {"params": _with_shardings(shapes, shardings)}

    arrays, _ = _load(path, step, wanted, flag)
    return manifest.nested(arrays["params"]), config, step


def load_state(
    folder: epath.Path, step: int, like: Mapping[str, PyTree], flag: str = RESTORE_FLAG
) -> tuple[dict[str, PyTree], dict[str, Any]]:
    """Load the whole state of a step, and its position.

    Args:
      folder: folder of the run.
      step: a saved step.
      like: the state as `jax.ShapeDtypeStruct`s, on any mesh; leaves without sharding become numpy arrays.
      flag: the argument that chooses another step, for error messages; it contains {step}.

    Raises:
      CheckpointError: the step is damaged, or has other shapes.
    """
    parts = split_state(like)
    here = {name: manifest.by_name(part) for name, part in parts.items()}

    def wanted(record: manifest.Record) -> dict[str, manifest.Arrays]:
        found = {part: _as_saved(arrays, record[part]) for part, arrays in here.items()}
        for part, arrays in found.items():
            manifest.check_fit(f"{folder / str(step)}: {part}", record[part], arrays)
        return found

    arrays, record = _load(folder, step, wanted, flag)
    for name, leaf in arrays["training"].items():
        if name.startswith(CARRIED):
            arrays["training"][name] = leaf.astype(here["training"][name].dtype)
    state = {name: manifest.rebuild(part, arrays[name], record[name]) for name, part in parts.items()}
    return {"params": state["params"], **state["training"]}, record["position"]


def _as_saved(arrays: manifest.Arrays, record: manifest.Record) -> manifest.Arrays:
    """Return what to read for `arrays`: earlier versions saved a carried memory in bfloat16."""
    found = dict(arrays)
    for name, leaf in arrays.items():
        saved = record.get(name, {}).get("dtype")
        if name.startswith(CARRIED) and (str(leaf.dtype), saved) == ("float32", "bfloat16"):
            found[name] = leaf.update(dtype=jnp.bfloat16)
    return found


def read_back(folder: epath.Path, step: int, arrays: Mapping[str, manifest.Arrays], limit: int) -> None:
    """Read a step that was just saved, as far as it tells whether it can be restored.

    Args:
      folder: folder of the run.
      step: the step.
      arrays: the arrays of each part.
      limit: bytes to read of each part; at least one array is read. The smallest arrays come first.

    Raises:
      CheckpointError: an array cannot be read, or differs.
    """
    chosen = {}
    for part, leaves in arrays.items():
        sizes = {name: leaf.nbytes for name, leaf in manifest.raw(leaves).items()}
        names: list[str] = []
        total = 0
        for name in sorted(sizes, key=sizes.__getitem__):
            total += sizes[name]
            if names and total > limit:
                break
            names.append(name)
        chosen[part] = {
            name: jax.ShapeDtypeStruct(
                leaves[name].shape, leaves[name].dtype, sharding=getattr(leaves[name], "sharding", None)
            )
            for name in names
        }
    try:
        _read_arrays(folder / str(step), lambda _: chosen, partial=True)
    except (manifest.Damage, manifest.Unavailable) as error:
        raise CheckpointError(
            f"{folder}: step {step} was saved but cannot be read back ({error}); give a workdir on another disk"
        ) from error


def choose_step(folder: epath.Path, steps: Sequence[int], step: int | None) -> int:
    """Return `step`, or the last of the saved `steps` if it is None.

    Raises:
      CheckpointError: there is no such step, or no array can be read in such a folder.
    """
    check_readable(folder)
    if not steps:
        raise CheckpointError(
            f"{folder}: holds no complete checkpoint; train there first, or give another workdir"
        )
    if step is not None and step not in steps:
        raise CheckpointError(f"{folder}: has no step {step}; saved are {', '.join(map(str, steps))}")
    return steps[-1] if step is None else step


def split_state(state: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """Return the parts of a step in which a state is saved."""
    return {"params": state["params"], "training": {k: v for k, v in state.items() if k != "params"}}


def _with_shardings(shapes: manifest.Arrays, shardings: Shardings | None) -> manifest.Arrays:
    chosen = dict.fromkeys(shapes, shardings)
    if callable(shardings):
        chosen = manifest.by_name(shardings(manifest.nested(shapes)))
    return {name: shape.update(sharding=chosen[name]) for name, shape in shapes.items()}


Wanted = Callable[[manifest.Record], dict[str, manifest.Arrays]]


def _load(
    folder: epath.Path, step: int, wanted: Wanted, flag: str
) -> tuple[dict[str, manifest.Arrays], manifest.Record]:
    """Return verified arrays and the record of a step; if it is damaged, say which earlier step there is."""
    check_links_below(folder / str(step), folder)
    try:
        return _read_arrays(folder / str(step), wanted)
    except manifest.Damage as error:
        earlier = [other for other in saved_steps(folder) if other < step]
        remedy = "there is no earlier step to go back to"
        if earlier:
            remedy = f"go back to step {earlier[-1]} ({flag.format(step=earlier[-1])})"
        message = f"{folder}: step {step} is damaged ({error}); {remedy}"
        raise DamagedStepError(message, str(error)) from error
    except manifest.Unavailable as error:
        raise ReadError(
            f"{folder}: step {step} cannot be read now ({error}); check the disk, the network and permissions, then "
            "try again"
        ) from error


def _read_arrays(
    path: epath.Path, wanted: Wanted, *, partial: bool = False
) -> tuple[dict[str, manifest.Arrays], manifest.Record]:
    """Return the arrays of the parts that `wanted` asks for, verified, and the record of the step at `path`.

    Args:
      path: folder of the step.
      wanted: returns arrays as `jax.ShapeDtypeStruct`s by part and name, given the record.
      partial: whether it asks for some of the arrays of a part only.

    Raises:
      Damage: something cannot be read, or differs from what was saved.
    """
    record = whole_record(path)
    record, stored_names = manifest.upgrade(record)
    structs = {part: manifest.abstract(like) for part, like in wanted(record).items()}
    stored = {
        part: {stored_names[part][name]: leaf for name, leaf in leaves.items()}
        for part, leaves in structs.items()
    }
    like = {part: manifest.nested(leaves) for part, leaves in stored.items() if leaves}
    loaded = read_parts(path, like, partial=partial)
    found = {part: manifest.by_name(loaded.get(part, {})) for part in structs}
    arrays = {
        part: {name: found[part][stored_names[part][name]] for name in leaves}
        for part, leaves in structs.items()
    }
    for part in structs:
        for name in manifest.with_wrong_sums(record[part], arrays[part]):
            file = file_of(path / part, stored_names[part][name])
            raise manifest.Damage(f"the values of {part}/{name} in {file} do not match their checksum")
    return arrays, record
