"""Compile for TPUs on any machine: libtpu contains the whole TPU compiler, XLA and Mosaic."""

import contextlib
import functools
import importlib.util
import math
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from fam_jax.config import UserError
from fam_jax.plan.chips import Chip, chip_of

# Keep the library from looking for chips on this machine and from locking out other processes. Without the last two
# variables it reports errors, because it finds neither the type of this host nor the names of the others.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}

# Where `make test` installs libtpu. In the environment's site-packages it would make JAX look for chips at every start.
LIBRARY = Path(sys.prefix) / "tpu-compiler"


def has_compiler() -> bool:
    """Return whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None or (LIBRARY / "libtpu").is_dir()


def require_compiler() -> None:
    """Make libtpu importable.

    Raises:
      UserError: libtpu is not installed.
    """
    if not has_compiler():
        raise UserError(
            "libtpu: not installed, but compiling for TPUs needs it; run pip install libtpu, or install fam-jax[tpu]"
        )
    if importlib.util.find_spec("libtpu") is None:
        sys.path.append(str(LIBRARY))


@functools.cache
def topology_devices(topology: str) -> tuple[jax.Device, ...]:
    """Return the chips of a topology such as v5p:4x4x8, as device descriptions that meshes and shardings accept.

    Raises:
      UserError: libtpu is not installed or does not know the topology.
    """
    generation = chip_of(topology).name
    require_compiler()
    os.environ.update({name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()})
    # Without this option, the two cores of a v4 chip are two devices. Those of v5p are always one.
    options: dict[str, Any] = {"chip_config_name": "megacore"} if generation == "v4" else {}
    if all(side == "1" for side in topology.partition(":")[2].split("x")):
        # A host with a single chip. All other hosts have at least four.
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        with _own_sigterm():
            found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ")
        raise UserError(
            f"topology {topology!r}: the compiler has no such slice ({reason}); choose a grid of whole hosts, such as "
            "v5e:4x4 or v5p:4x4x8"
        ) from None
    return tuple(found.devices)


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep this process's reaction to SIGTERM: loading the library installs one that prints a C++ stack."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():  # no other thread may set a handler
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def compile_on(
    mesh: Mesh, function: Callable[..., Any], *arguments: Any, **options: Any
) -> jax.stages.Compiled:
    """Compile `function` for the devices of `mesh`, usually those of :func:`topology_devices`.

    Args:
      mesh: the mesh. It is in use during tracing, and kernels are chosen for its chips.
      function: a function, or a result of `jax.jit`.
      arguments: pytrees of `jax.ShapeDtypeStruct` with shardings over the mesh.
      options: keyword arguments of `jax.jit`.

    Returns:
      The executable, which cannot run here. `memory_analysis()` returns bytes per device, and `as_text()` the text for
      :func:`fam_jax.plan.hlo.parse`.
    """
    jitted = function if hasattr(function, "trace") and not options else jax.jit(function, **options)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jitted.trace(*arguments).lower(lowering_platforms=("tpu",)).compile()


def compile_or_miss(lowered: jax.stages.Lowered) -> jax.stages.Compiled | int:
    """Compile a program; return the executable or, if it does not fit, the bytes of HBM that are missing."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        missing = bytes_missing(str(error))
        if missing is None:
            raise
        return missing


# The compiler's messages about programs that do not fit, at two of its stages. Programs cannot use all of HBM.
COMPLAINTS = (
    r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm",
    r"required for HLO temporaries \(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)",
)


def bytes_missing(message: str) -> int | None:
    """Return the missing bytes of HBM from the compiler's error message; None if the error is a different one."""
    match = next(filter(None, (re.search(pattern, message) for pattern in COMPLAINTS)), None)
    if match is None:
        return None
    needed, available = (float(match[i]) * 2 ** (10 * (1 + "KMGT".index(match[i + 1]))) for i in (1, 3))
    return max(int(needed - available), 1)


def peak_bytes(compiled: jax.stages.Compiled | int, chip: Chip) -> int:
    """Return the peak bytes of HBM on a chip, for a result of :func:`compile_or_miss`."""
    if isinstance(compiled, int):
        return chip.hbm_bytes + compiled
    analysis = compiled.memory_analysis()
    assert analysis is not None
    return analysis.peak_memory_in_bytes


def local_bytes(tree: Any) -> int:
    """Return the bytes of one device's shards of a pytree of `jax.ShapeDtypeStruct` with shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(
        jnp.dtype(x.dtype).itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in leaves if x.shape
    )
