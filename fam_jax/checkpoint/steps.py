"""Saving and restoring the steps of a run."""

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

CHUNK_BYTES = 64 * 2**20  # of an array on disk, where host memory is scarce


class Checkpoints:
    """The checkpoints of a training run; a context manager, which waits for the last save on leaving.

    All processes of a job open it, save and restore together. One instance at a time writes to a folder.
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
        """Opens `folder` for training; a new one is made and gets the config as `config.json`.

        Args:
          folder: Of the run. Relative paths are taken from the current directory; `gs://` paths stay.
          config: The resolved config as nested dict, from `dataclasses.asdict`.
          keep: How many of the latest steps stay on disk.
          may_change: Patterns of config fields that a run may change between sessions.
          in_flight_bytes: None copies all arrays at once, so that a save returns early. A number writes them from
            where they are, so many bytes at a time (at least those of the largest array), and so takes no second copy
            of them in host memory; they must stay as they are until the save is complete.

        Raises:
          CheckpointError: the folder holds a run whose config differs elsewhere, or cannot be written.
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
        """Waits for the save under way and lets go of the folder."""
        with self._writing():
            self._steps.close()

    def wait(self) -> None:
        """Waits for the save under way; raises :class:`CheckpointError` if it failed."""
        with self._writing():
            self._steps.wait()

    def all_steps(self) -> list[int]:
        """Steps that can be restored (the one being saved included), rising."""
        return [saved.step for saved in self._steps.checkpoints]

    def latest_step(self) -> int | None:
        """The highest of :meth:`all_steps`, or None."""
        return max(self.all_steps(), default=None)

    def save(
        self, step: int, state: Mapping[str, PyTree], position: Mapping[str, Any], wait: bool = False
    ) -> None:
        """Saves a step. Returns once the arrays are copied; they may be donated then.

        If :meth:`restore` went back to a step before the latest, the steps after it are deleted now.

        Args:
          step: Above all saved steps.
          state: Nested containers of arrays (PRNG keys and empty arrays too) with a subtree `params`.
          position: JSON, equal on all processes.
          wait: Return only when the step is complete on disk.

        Raises:
          CheckpointError: `step` is not above the latest, or writing failed (this save or the one before).
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
            # Without force Orbax may decide not to save, and say so only by returning None.
            self._steps.save_checkpointables_async(step, stored, force=True)
        if wait:
            self.wait()

    def restore(
        self, step: int | None, like: Mapping[str, PyTree]
    ) -> tuple[dict[str, PyTree], dict[str, Any]]:
        """State and position of `step`, or of the latest step if None.

        Args:
          step: To restore. If later steps exist, the next :meth:`save` deletes them.
          like: The state as `jax.ShapeDtypeStruct`s, on any mesh; leaves without sharding become numpy.

        Raises:
          CheckpointError: no such step, a damaged one, or one of other shapes.
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
            logging.warning("%s: step %d is deleted, training went back before it", self.folder, step)
            with self._writing():
                self._steps.delete(step)
        self._rewound_to = None

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a background save fails with whatever its file system raised
            raise CheckpointError(
                f"{self.folder}: saving step {self._saving} failed ({_first_line(error)}); "
                "check space and permissions, then continue from the latest step"
            ) from error


def load_params(
    folder: str | os.PathLike[str], step: int | None = None, shardings: Shardings | None = None
) -> tuple[dict[str, PyTree], dict[str, Any], int]:
    """Parameters alone, on whatever devices there are, with the config of their run.

    Args:
      folder: Of the run.
      step: None takes the latest.
      shardings: None gives numpy arrays; one sharding goes to every parameter; a function is called with
        the nested dict of `jax.ShapeDtypeStruct`s and returns their shardings.

    Returns:
      The nested dict of parameters, the config as nested dict, the step.

    Raises:
      CheckpointError: no such folder or step, or a damaged one.
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
    """Arrays of the parts that `wanted` asks for, checked, and the record of the whole step."""
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
        remedy = "no earlier step is left to go back to"
        if earlier:
            remedy = f"go back to step {earlier[-1]} (--restore_step={earlier[-1]})"
        raise CheckpointError(f"{folder}: step {step} is damaged ({error}); {remedy}") from error
    return arrays, record


def _read(path: epath.Path, like: dict[str, Any]) -> dict[str, Any]:
    """Reads parts of the step at `path`; leaves of `like` without sharding become numpy arrays."""

    def target(struct: Any) -> Any:
        if struct.sharding is None:
            return np.ndarray
        struct.sharding.shard_shape(struct.shape)  # raises if it does not divide: that is no damage
        return struct

    like = jax.tree.map(target, like)
    with _silent_tasks():
        try:
            with _context():
                return ocp.load_checkpointables(path, like)
        except Exception as error:  # damaged files raise almost anything, a bare Exception included
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            if isinstance(cause, jax.errors.JaxRuntimeError | MemoryError):
                raise  # out of memory, say
            failure = f"cannot be read: {type(cause).__name__}: {_first_line(cause)}"
            del cause
        gc.collect()
    raise manifest.Damage(failure)


@contextlib.contextmanager
def _silent_tasks() -> Iterator[None]:
    """Keeps the tasks that a failed read leaves behind from printing tracebacks when they are collected."""
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
            f"{folder}: holds no finished checkpoint; train there first, or give another workdir"
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
    # Left to itself, Orbax may take a JSON for a tree of arrays.
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="contents")
    context = ocp.Context()
    context.checkpointables.registry = registry
    if in_flight_bytes is not None:
        context.memory.deepcopy_host_arrays = False
        limit = in_flight_bytes + 1  # Orbax takes it for the first size that is too large
        context.memory.transfer_concurrent_bytes = context.memory.write_concurrent_bytes = limit
        # What is written is copied and compressed chunk by chunk.
        context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    return context
