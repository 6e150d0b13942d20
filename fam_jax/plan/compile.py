"""Compilation for TPUs on a machine that has none. libtpu holds the whole TPU compiler, XLA and Mosaic."""

import functools
import importlib.util
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from fam_jax.config import UserError
from fam_jax.plan.chips import Chip, chip_of

# The library is not to ask for the chips of this machine, nor to lock itself against a second process.
ENVIRONMENT = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

# Where `make test` puts libtpu: among an environment's packages it would have JAX look for chips at every start.
LIBRARY = Path(sys.prefix) / "tpu-compiler"


def has_compiler() -> bool:
    """Whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None or (LIBRARY / "libtpu").is_dir()


def require_compiler() -> None:
    """Makes libtpu importable.

    Raises:
      UserError: it is not installed.
    """
    if not has_compiler():
        raise UserError(
            "compiling for TPUs needs libtpu, which is not installed: pip install libtpu, or the extra fam-jax[tpu]"
        )
    if importlib.util.find_spec("libtpu") is None:
        sys.path.append(str(LIBRARY))


@functools.cache
def topology_devices(topology: str) -> tuple[jax.Device, ...]:
    """The chips of a topology such as v5p:4x4x8: descriptions of devices, which meshes and shardings take.

    Raises:
      UserError: libtpu is not installed, or it does not know the topology.
    """
    generation = chip_of(topology).name
    require_compiler()
    os.environ.update({name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()})
    # The two cores of a v4 chip are two devices unless this is said; those of v5p are one in any case.
    options: dict[str, Any] = {"chip_config_name": "megacore"} if generation == "v4" else {}
    if all(side == "1" for side in topology.partition(":")[2].split("x")):
        options["chips_per_host_bounds"] = (1, 1, 1)  # a host with a single chip; others have four at least
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"topology {topology!r}: {str(error).splitlines()[0]}") from None
    return tuple(found.devices)


def compile_on(
    mesh: Mesh, function: Callable[..., Any], *arguments: Any, **options: Any
) -> jax.stages.Compiled:
    """Compiles `function` for the devices of `mesh`, those of :func:`topology_devices` as a rule.

    Args:
      mesh: of the devices; while the function is traced it is the mesh in use, from which kernels learn their chip.
      function: to be traced; or a result of `jax.jit`.
      arguments: `jax.ShapeDtypeStruct`s with shardings over the mesh, in any pytrees.
      options: of `jax.jit`.

    Returns:
      The executable; it cannot run here. Its `memory_analysis()` is bytes per device, its `as_text()` the program that
      :func:`fam_jax.plan.hlo.parse` takes.
    """
    jitted = function if hasattr(function, "trace") and not options else jax.jit(function, **options)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jitted.trace(*arguments).lower(lowering_platforms=("tpu",)).compile()


def compile_or_miss(lowered: jax.stages.Lowered) -> jax.stages.Compiled | int:
    """The executable; or, where the program does not fit, the bytes of HBM that it needs beyond what there are."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        missing = bytes_missing(str(error))
        if missing is None:
            raise
        return missing


# The compiler gives up early or late, and says so in other words. A part of HBM is not for programs.
COMPLAINTS = (
    r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm",
    r"required for HLO temporaries \(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)",
)


def bytes_missing(message: str) -> int | None:
    """Of HBM, from what the compiler says of a program that does not fit; None if it says something else."""
    match = next(filter(None, (re.search(pattern, message) for pattern in COMPLAINTS)), None)
    if match is None:
        return None
    needed, available = (float(match[i]) * 2 ** (10 * (1 + "KMGT".index(match[i + 1]))) for i in (1, 3))
    return max(int(needed - available), 1)


def peak_bytes(compiled: jax.stages.Compiled | int, chip: Chip) -> int:
    """Of HBM, on a chip, for a result of :func:`compile_or_miss`."""
    if isinstance(compiled, int):
        return chip.hbm_bytes + compiled
    analysis = compiled.memory_analysis()
    assert analysis is not None
    return analysis.peak_memory_in_bytes


def local_bytes(tree: Any) -> int:
    """Of one device's share of `jax.ShapeDtypeStruct`s that have shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(
        jnp.dtype(x.dtype).itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in leaves if x.shape
    )
