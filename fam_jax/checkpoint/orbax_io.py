"""Read and write the parts of a step with Orbax."""

import contextlib
import gc
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from fam_jax.checkpoint import manifest

# Size of the chunks in which an array is written if host memory is limited.
CHUNK_BYTES = 64 * 2**20


def read_record(path: epath.Path) -> manifest.Record:
    """Return the record of the step at `path`; empty if it is damaged."""
    try:
        return manifest.unseal(read_parts(path, {"contents": None})["contents"])
    except manifest.Damage:
        return {}


def read_parts(path: epath.Path, like: dict[str, Any], *, partial: bool = False) -> dict[str, Any]:
    """Read parts of the step at `path`; leaves of `like` without sharding become numpy arrays.

    Args:
      path: folder of the step.
      like: nested dict of `jax.ShapeDtypeStruct`s by part.
      partial: whether `like` may lack some arrays of a part.

    Raises:
      Damage: a part cannot be read.
    """

    def target(struct: Any) -> Any:
        if struct.sharding is None:
            return np.ndarray
        struct.sharding.shard_shape(struct.shape)  # raises if the shape is not divisible, which is no damage
        return struct

    like = jax.tree.map(target, like)
    with _silent_tasks():
        try:
            with orbax_context(partial=partial):
                return ocp.load_checkpointables(path, like)
        except Exception as error:  # damaged files raise many types, even a bare Exception
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            if isinstance(cause, jax.errors.JaxRuntimeError | MemoryError):
                raise  # such as out of memory
            failure = f"cannot be read: {type(cause).__name__}: {first_line(cause)}"
            del cause
        gc.collect()
    raise manifest.Damage(failure)


@contextlib.contextmanager
def _silent_tasks() -> Iterator[None]:
    """Silence the tracebacks of abandoned tasks of a failed read, which are printed when they are collected."""
    logger, hook = logging.getLogger("asyncio"), sys.unraisablehook
    logger.disabled, sys.unraisablehook = True, lambda _: None
    try:
        with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
            yield
    finally:
        logger.disabled, sys.unraisablehook = False, hook


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, cut to 240 characters."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0].partition(" [tensorstore_spec")[0]
    return text if len(text) <= 240 else f"{text[:240]}..."


def orbax_context(in_flight_bytes: int | None = None, *, partial: bool = False) -> ocp.Context:
    """Return the settings of Orbax; `in_flight_bytes` is that of `Checkpoints`, `partial` that of `read_parts`."""
    # By default Orbax may take the JSON for a tree of arrays.
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="contents")
    context = ocp.Context()
    context.checkpointables.registry = registry
    context.pytree.loading.partial_load = partial
    if in_flight_bytes is not None:
        context.memory.deepcopy_host_arrays = False
        limit = in_flight_bytes + 1  # Orbax rejects sizes that reach its limit
        context.memory.transfer_concurrent_bytes = context.memory.write_concurrent_bytes = limit
        # Orbax copies and compresses one chunk at a time.
        context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    return context
