"""Read and write the parts of a step with Orbax."""

import contextlib
import errno
import gc
import logging
import re
import sys
import warnings
from collections.abc import Collection, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint
import tensorstore as ts
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from fam_jax.checkpoint import manifest

# Where the code of Orbax is.
ORBAX = orbax.checkpoint.__path__[0]
# Failures to read that are not damage: numbers of the operating system, and codes of TensorStore.
UNAVAILABLE_ERRNO = {
    errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.ETIMEDOUT, errno.ESTALE,
    errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ECONNREFUSED, errno.ECONNRESET,
}  # fmt: skip
UNAVAILABLE = re.compile(
    r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|PERMISSION_DENIED|UNAUTHENTICATED|ABORTED)\b"
)
# Size of the chunks in which an array is written if host memory is limited.
CHUNK_BYTES = 64 * 2**20


def read_record(path: epath.Path) -> manifest.Record:
    """Return the record of the step at `path`; empty if it is damaged or cannot be read."""
    try:
        return whole_record(path)
    except (manifest.Damage, manifest.Unavailable):
        return {}


def whole_record(path: epath.Path) -> manifest.Record:
    """Return the record of the step at `path`.

    Raises:
      Damage: it is damaged.
      Unavailable: it cannot be read now.
    """
    sealed = read_parts(path, {"contents": None})["contents"]
    try:
        return manifest.unseal(sealed)
    except manifest.Damage as error:
        raise manifest.Damage(f"{path / 'contents' / 'data.json'}: {error}") from error


def read_parts(path: epath.Path, like: dict[str, Any], *, partial: bool = False) -> dict[str, Any]:
    """Read parts of the step at `path`; leaves of `like` without sharding become numpy arrays.

    Args:
      path: folder of the step.
      like: nested dict of `jax.ShapeDtypeStruct`s by part.
      partial: whether `like` may lack some arrays of a part.

    Raises:
      Damage: a part cannot be read, in any process of the job.
      Unavailable: a part cannot be read now.
    """

    def target(struct: Any) -> Any:
        if struct.sharding is None:
            return np.ndarray
        struct.sharding.shard_shape(struct.shape)  # raises if the shape is not divisible, which is no damage
        return struct

    like = jax.tree.map(target, like)
    found, failure, unavailable = {}, "", False
    with _silent_tasks():
        try:
            with orbax_context(partial=partial):
                found = ocp.load_checkpointables(path, like)
        except Exception as error:  # damaged files raise many types, even a bare Exception
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            if isinstance(cause, jax.errors.JaxRuntimeError | MemoryError):
                raise  # such as out of memory
            failure = f"{_of_parts(path, like)} cannot be read: {type(cause).__name__}: {first_line(cause)}"
            unavailable = _is_unavailable(cause)
            del cause
        if failure:
            gc.collect()
    failed = np.array([bool(failure), unavailable])
    if jax.process_count() > 1:
        # Each process reads its own part of the arrays, and all have to go on together.
        failed = multihost_utils.process_allgather(failed).any(axis=0)
    if not failed.any():
        return found
    raise (manifest.Unavailable if failed[1] else manifest.Damage)(
        failure or "another process cannot read it"
    )


def _of_parts(path: epath.Path, parts: Collection[str]) -> str:
    return " or ".join(str(path / part) for part in parts)


def _is_unavailable(error: BaseException) -> bool:
    """Return whether a failed read says nothing about the files: no permission, no network, too many open files."""
    if isinstance(error, OSError) and error.errno in UNAVAILABLE_ERRNO:
        return True
    return isinstance(error, TimeoutError) or bool(UNAVAILABLE.search(str(error)))


def file_of(part: epath.Path, name: str) -> epath.Path:
    """Return the file with the first values of an array of a part of a step, or the part's folder if it is unknown."""
    prefix = f"{name.replace('/', '.')}/c".encode()
    try:
        store = ts.KvStore.open({"driver": "file", "path": f"{part}/"}).result()
        root = ts.ocdbt.dump(store).result()["versions"][-1]["root"]["location"]
        entries = ts.ocdbt.dump(store, root).result()["entries"]
        entry = next(each for each in entries if each["key"].startswith(prefix))
        # KIND:FOLDER:FILE:OFFSET:LENGTH; small arrays are in the file of the node itself.
        _, folder, file, *_ = entry.get("indirect_value", root).split(":")
    except Exception:  # the place of damage is not worth an error of its own
        return part
    return part / folder / file


class _NotOfOrbax(logging.Filter):
    """Drops what Orbax logs: errors with their tracebacks, which reach the user as one line of ours, and progress."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to keep a record."""
        return not record.pathname.startswith(ORBAX)


_FILTER = _NotOfOrbax()


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
    logging.getLogger("absl").addFilter(_FILTER)
    # Of a save that failed.
    warnings.filterwarnings("ignore", r"coroutine '\w*serialize\w*' was never awaited", RuntimeWarning)
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
