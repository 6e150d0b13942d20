"""Save and restore the steps of a run."""

import contextlib
import gc
import logging as python_logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import jax
import numpy as np
from absl import logging
from etils import epath
from orbax.checkpoint import v1 as ocp

from fam_jax.checkpoint import manifest
from fam_jax.checkpoint.folder import (
    MAY_CHANGE,
    CheckpointError,
    absolute,
    read_config,
    saved_steps,
    settle_config,
)
from fam_jax.config.format1 import FORMAT

PyTree = Any
Shardings = jax.sharding.Sharding | Callable[[PyTree], PyTree]

# Size of the chunks in which an array is written if host memory is limited.
CHUNK_BYTES = 64 * 2**20


class Checkpoints:
    """The checkpoints of a training run; a context manager, which waits for the last save when it exits.

    All processes of a job open it, save and restore together. Only one instance at a time may write to a folder.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        config: Mapping[str, Any],
        keep: int,
        may_change: Sequence[str] = MAY_CHANGE,
        in_flight_bytes: int | None = None,
    ):
        """Open `folder` for training. Create it, with the config as `config.json`, if it does not exist.

        Args:
          folder: folder of the run. Relative paths start at the current directory.
          config: the resolved config as nested dict, from `dataclasses.asdict`.
          keep: number of latest steps to keep.
          may_change: patterns of config fields that may change when the run is resumed.
          in_flight_bytes: None copies all arrays to host memory, so that a save returns early. A number writes them
            without a copy, at most that many bytes at a time (at least the largest array); the arrays must not change
            until the save is complete.

        Raises:
          CheckpointError: the folder holds a run with another config, or cannot be written.
        """
        self.folder = absolute(folder)
        settle_config(self.folder, config, may_change)
        self._rewound_to: int | None = None
        self._saving: int | None = None
        self._steps = ocp.training.Checkpointer(
            self.folder,
            context=_context(in_flight_bytes),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait for the save in progress and close the folder."""
        with self._writing():
            self._steps.close()

    def wait(self) -> None:
        """Wait for the save in progress; raise :class:`CheckpointError` if it failed."""
        with self._writing():
            self._steps.wait()

    def all_steps(self) -> list[int]:
        """Return the steps that can be restored, including the one being saved, in ascending order."""
        return [saved.step for saved in self._steps.checkpoints]

    def latest_step(self) -> int | None:
        """Return the last of :meth:`all_steps`, or None."""
        return max(self.all_steps(), default=None)

    def save(
        self, step: int, state: Mapping[str, PyTree], position: Mapping[str, Any], wait: bool = False
    ) -> None:
        """Save a step. Return when the arrays are copied; they may be donated then.

        If :meth:`restore` went back to a step before the latest, delete the steps after it first.

        Args:
          step: number of the step, above all saved steps.
          state: nested containers of arrays, which may be PRNG keys or empty, with a subtree `params`.
          position: JSON values, equal on all processes.
          wait: return only when the step is complete on disk.

        Raises:
          CheckpointError: `step` is not above the latest, or this save or the previous one failed.
        """
        self.wait()
        self._forget_later_steps()
        latest = self.latest_step()
        if latest is not None and step <= latest:
            raise CheckpointError(
                f"{self.folder}: step {step} cannot be saved after step {latest}; "
                "restore an earlier step first, or give a new workdir"
            )
        self._saving = step
        arrays = {name: manifest.by_name(part) for name, part in _split(state).items()}
        record = {name: manifest.describe(part) for name, part in arrays.items()} | {"position": position}
        stored = {name: manifest.nested(manifest.raw(part)) for name, part in arrays.items()}
        stored = {name: part for name, part in stored.items() if part}  # Orbax takes no empty trees
        stored["contents"] = manifest.seal({"format": FORMAT, **record})
        with self._writing():
            # Without force Orbax may skip the save and only return None.
            self._steps.save_checkpointables_async(step, stored, force=True)
        if wait:
            self.wait()

    def restore(
        self, step: int | None, like: Mapping[str, PyTree]
    ) -> tuple[dict[str, PyTree], dict[str, Any]]:
        """Return the state and position of a step.

        Args:
          step: a saved step; None: the latest. If later steps exist, the next :meth:`save` deletes them.
          like: the state as `jax.ShapeDtypeStruct`s, on any mesh; leaves without sharding become numpy arrays.

        Raises:
          CheckpointError: the step does not exist, is damaged, or has other shapes.
        """
        self.wait()
        step = _choose(self.folder, self.all_steps(), step)
        parts = _split(like)
        wanted = {name: manifest.by_name(part) for name, part in parts.items()}
        arrays, record = _load(self.folder, step, lambda _: wanted)
        state = {name: manifest.rebuild(part, arrays[name], record[name]) for name, part in parts.items()}
        self._rewound_to = step
        return {"params": state["params"], **state["training"]}, record["position"]

    def _forget_later_steps(self) -> None:
        later = [
            step for step in self.all_steps() if self._rewound_to is not None and step > self._rewound_to
        ]
        for step in reversed(later):
            logging.warning(
                "%s: deleting step %d, as training continues from an earlier step", self.folder, step
            )
            with self._writing():
                self._steps.delete(step)
        self._rewound_to = None

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a background save raises whatever its file system raised
            raise CheckpointError(
                f"{self.folder}: saving step {self._saving} failed ({_first_line(error)}); "
                "check disk space and permissions, then resume from the latest step"
            ) from error


def load_params(
    folder: str | os.PathLike[str], step: int | None = None, shardings: Shardings | None = None
) -> tuple[dict[str, PyTree], dict[str, Any], int]:
    """Load the parameters of a run, without the rest of its training state.

    Args:
      folder: folder of the run.
      step: a saved step; None: the latest.
      shardings: None loads numpy arrays; one sharding applies to every parameter; a function takes the nested dict of
        `jax.ShapeDtypeStruct`s and returns their shardings.

    Returns:
      The nested dict of parameters, the config as nested dict, and the step.

    Raises:
      CheckpointError: the folder or the step does not exist, or is damaged.
    """
    path = absolute(folder)
    config = read_config(path)
    step = _choose(path, saved_steps(path), step)

    def wanted(record: manifest.Record) -> dict[str, manifest.Arrays]:
        shapes = {
            name: jax.ShapeDtypeStruct(tuple(entry["shape"]), entry["dtype"])
            for name, entry in record["params"].items()
        }
        return {"params": _with_shardings(shapes, shardings)}

    arrays, _ = _load(path, step, wanted)
    return manifest.nested(arrays["params"]), config, step


def _with_shardings(shapes: manifest.Arrays, shardings: Shardings | None) -> manifest.Arrays:
    chosen = dict.fromkeys(shapes, shardings)
    if callable(shardings):
        chosen = manifest.by_name(shardings(manifest.nested(shapes)))
    return {name: shape.update(sharding=chosen[name]) for name, shape in shapes.items()}


def _load(
    folder: epath.Path, step: int, wanted: Callable[[manifest.Record], dict[str, manifest.Arrays]]
) -> tuple[dict[str, manifest.Arrays], manifest.Record]:
    """Return the arrays of the parts that `wanted` asks for, verified, and the record of the step."""
    path = folder / str(step)
    try:
        record = manifest.unseal(_read(path, {"contents": None})["contents"])
        record, stored_names = manifest.upgrade(record)
        parts = wanted(record)
        for part, like in parts.items():
            manifest.check_fit(f"{path}: {part}", record[part], like)
        structs = {part: manifest.abstract(like) for part, like in parts.items()}
        stored = {
            part: {stored_names[part][name]: leaf for name, leaf in leaves.items()}
            for part, leaves in structs.items()
        }
        loaded = _read(path, {part: manifest.nested(leaves) for part, leaves in stored.items() if leaves})
        found = {part: manifest.by_name(loaded.get(part, {})) for part in parts}
        arrays = {
            part: {name: found[part][stored_names[part][name]] for name in leaves}
            for part, leaves in structs.items()
        }
        for part in parts:
            manifest.check_sums(part, record[part], arrays[part])
    except manifest.Damage as error:
        earlier = [other for other in saved_steps(folder) if other < step]
        remedy = "there is no earlier step to go back to"
        if earlier:
            remedy = f"go back to step {earlier[-1]} (--restore_step={earlier[-1]})"
        raise CheckpointError(f"{folder}: step {step} is damaged ({error}); {remedy}") from error
    return arrays, record


def _read(path: epath.Path, like: dict[str, Any]) -> dict[str, Any]:
    """Read parts of the step at `path`; leaves of `like` without sharding become numpy arrays."""

    def target(struct: Any) -> Any:
        if struct.sharding is None:
            return np.ndarray
        struct.sharding.shard_shape(struct.shape)  # raises if the shape is not divisible, which is no damage
        return struct

    like = jax.tree.map(target, like)
    with _silent_tasks():
        try:
            with _context():
                return ocp.load_checkpointables(path, like)
        except Exception as error:  # damaged files raise many types, even a bare Exception
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            if isinstance(cause, jax.errors.JaxRuntimeError | MemoryError):
                raise  # such as out of memory
            failure = f"cannot be read: {type(cause).__name__}: {_first_line(cause)}"
            del cause
        gc.collect()
    raise manifest.Damage(failure)


@contextlib.contextmanager
def _silent_tasks() -> Iterator[None]:
    """Silence the tracebacks of abandoned tasks of a failed read, which are printed when they are collected."""
    logger, hook = python_logging.getLogger("asyncio"), sys.unraisablehook
    logger.disabled, sys.unraisablehook = True, lambda _: None
    try:
        with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
            yield
    finally:
        logger.disabled, sys.unraisablehook = False, hook


def _choose(folder: epath.Path, steps: Sequence[int], step: int | None) -> int:
    if not steps:
        raise CheckpointError(
            f"{folder}: holds no complete checkpoint; train there first, or give another workdir"
        )
    if step is not None and step not in steps:
        raise CheckpointError(f"{folder}: has no step {step}; saved are {', '.join(map(str, steps))}")
    return steps[-1] if step is None else step


def _first_line(error: BaseException) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0].partition(" [tensorstore_spec")[0]
    return text if len(text) <= 240 else f"{text[:240]}..."


def _split(state: Mapping[str, PyTree]) -> dict[str, PyTree]:
    return {"params": state["params"], "training": {k: v for k, v in state.items() if k != "params"}}


def _context(in_flight_bytes: int | None = None) -> ocp.Context:
    # By default Orbax may take the JSON for a tree of arrays.
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="contents")
    context = ocp.Context()
    context.checkpointables.registry = registry
    if in_flight_bytes is not None:
        context.memory.deepcopy_host_arrays = False
        limit = in_flight_bytes + 1  # Orbax rejects sizes that reach its limit
        context.memory.transfer_concurrent_bytes = context.memory.write_concurrent_bytes = limit
        # Orbax copies and compresses one chunk at a time.
        context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    return context
