"""The mesh, and the two tables that place every array on it.

`PARAMETERS` lists the logical axes of each parameter, `AXES` the mesh axes over which each logical axis is divided.
Batches are divided over data and fsdp, parameters and optimizer state over fsdp (their width) and tensor (their heads,
feed-forward and vocabulary). The compiler places all other arrays (Auto axes).
"""

import fnmatch
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fam_jax.config import ConfigError, MeshConfig
from fam_jax.config.memory import memory_parameter_axes

PyTree = Any
MeshAxes = str | tuple[str, ...] | None

MESH_AXES = ("data", "fsdp", "tensor")
# The mesh axes over which the rows of a batch are divided.
ROW_AXES = ("data", "fsdp")

# Logical axis -> the mesh axes over which it is divided, and the config field that sets its size.
AXES: dict[str, tuple[MeshAxes, str]] = {
    "batch": (ROW_AXES, "train.batch_size"),
    "layers": (None, "model.num_layers"),
    "vocab": ("tensor", "model.vocab_size"),
    "width": ("fsdp", "model.model_dim"),
    "norm": (None, "model.model_dim"),
    "heads": ("tensor", "model.num_heads"),
    "kv_heads": ("tensor", "model.num_kv_heads"),
    "head": (None, "model.head_dim"),
    "ff": ("tensor", "model.ff_dim"),
    "slots": (None, "model.memory.length"),
    "rank": (None, "lora.rank"),
    # The rank of a LoRA factor that has no width to divide.
    "spread_rank": ("fsdp", "lora.rank"),
}

# Every device keeps a copy of these if the mesh axis does not divide them: multi-query attention may have fewer
# key/value heads than the tensor axis has devices, and the rank of LoRA may be small.
COPIED_IF_INDIVISIBLE = frozenset({"kv_heads", "spread_rank"})

# The group of a memory's own parameters. The memory's config lists their logical axes.
MEMORY = "/memory/"

# Pattern of a parameter's path -> its logical axes.
PARAMETERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("embedding/table", ("vocab", "width")),
    ("unembedding/kernel", ("width", "vocab")),
    ("final_norm/*", ("norm",)),
    ("layers/*_norm/*", ("layers", "norm")),
    ("layers/query/kernel", ("layers", "width", "heads", "head")),
    ("layers/key/kernel", ("layers", "width", "kv_heads", "head")),
    ("layers/value/kernel", ("layers", "width", "kv_heads", "head")),
    ("layers/output/kernel", ("layers", "heads", "head", "width")),
    ("layers/query_bias", ("layers", "heads", "head")),
    ("layers/key_bias", ("layers", "kv_heads", "head")),
    ("layers/value_bias", ("layers", "kv_heads", "head")),
    ("layers/up/kernel", ("layers", "width", "ff")),
    ("layers/gate/kernel", ("layers", "width", "ff")),
    ("layers/down/kernel", ("layers", "ff", "width")),
)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Make the mesh (data, fsdp, tensor) over `devices`, by default all devices of the job.

    Raises:
      ConfigError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    given = {name: getattr(config, name) for name in MESH_AXES}
    known = math.prod(size for size in given.values() if size)
    axes = " * ".join(name for name, size in given.items() if size)
    rest = [name for name, size in given.items() if not size]
    if rest and count % known:
        raise ConfigError(
            f"config.mesh: {axes} = {known} does not divide the {count} devices; choose sizes that do"
        )
    given |= dict.fromkeys(rest, count // known)
    if math.prod(given.values()) != count:
        raise ConfigError(
            f"config.mesh: {axes} = {known}, but there are {count} devices; set data=0 to use all that remain"
        )
    # A mesh axis may use part of an axis of the torus.
    shape = tuple(given.values())
    ordered = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(ordered, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array with a copy on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of arrays whose first axis is the batch."""
    return NamedSharding(mesh, P(AXES["batch"][0]))


def global_batch(sharding: NamedSharding, rows: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Combine the rows that each process made into one batch, placed by `sharding`.

    Process i of n makes the i-th of n equal shares of the rows, so row r of the batch does not depend on the number of
    processes. The devices of a process may need rows that another process made, because the mesh of a TPU slice follows
    its wiring and the tensor axis may span hosts. Processes then exchange rows.

    Args:
      sharding: sharding of the batch.
      rows: arrays (B / n, ...) of this process.

    Returns:
      Arrays (B, ...).
    """
    size = next(iter(rows.values())).shape[0] * jax.process_count()
    if _holds_what_it_made(sharding, size):
        return {name: jax.make_array_from_process_local_data(sharding, own) for name, own in rows.items()}
    made = {
        name: jax.make_array_from_process_local_data(_by_process(sharding.mesh), own)
        for name, own in rows.items()
    }
    return jax.device_put(made, sharding)


@functools.lru_cache(maxsize=32)
def _holds_what_it_made(sharding: NamedSharding, size: int) -> bool:
    """Return whether every process made the rows that its devices need. Either all processes exchange rows, or none."""
    held: dict[int, set[int]] = {}
    indices: Mapping[Any, Any] = sharding.devices_indices_map((size,))
    for device, (rows, *_) in indices.items():
        held.setdefault(device.process_index, set()).update(range(*rows.indices(size)))
    share = size // len(held)
    return all(rows == set(range(i * share, (i + 1) * share)) for i, rows in held.items())


@functools.lru_cache(maxsize=32)
def _by_process(mesh: Mesh) -> NamedSharding:
    devices = sorted(mesh.devices.flat, key=lambda device: (device.process_index, device.id))
    grid = np.array(devices).reshape(jax.process_count(), -1)
    return NamedSharding(Mesh(grid, ("process", "local"), axis_types=(AxisType.Auto,) * 2), P("process"))


def traced_for(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function`, traced with `mesh` in use: the attention kernels divide their work by it."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return call


def check_batch(mesh: Mesh, size: int, field: str) -> None:
    """Raise :class:`ConfigError` naming `field` unless `mesh` divides a batch of `size` rows."""
    ways = _ways(mesh, AXES["batch"][0])
    if size % ways:
        raise ConfigError(
            f"config.{field}: {size} rows cannot be divided over mesh.data * mesh.fsdp = {ways} devices; choose a "
            "multiple"
        )


def param_shardings(shapes: PyTree, mesh: Mesh) -> PyTree:
    """Return a `NamedSharding` for every parameter.

    Args:
      shapes: the nested dict of parameters; leaves have a `shape`.
      mesh: from :func:`make_mesh`.

    Raises:
      ConfigError: a mesh axis does not divide an axis of a parameter.
      ValueError: a parameter is not in `PARAMETERS`.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, P(*parameter_spec("/".join(_names(path)), leaf.shape, mesh))),
        shapes,
    )


def state_shardings(shapes: PyTree, params: PyTree, mesh: Mesh) -> PyTree:
    """Return shardings for state that goes with the parameters: optimizer state, averages, the parameters themselves.

    A leaf belongs to a parameter if its path ends with the parameter's path. If it has the same shape, it is placed
    like the parameter. `v_row` and `v_col` of a factored second moment (optax) are placed like the parameter without
    its largest, or second largest, dimension. If the state of the stacked layers was made by `vmap` over L, below its
    own `layers`, the largest dimension of one layer counts. All other leaves are replicated.

    Args:
      shapes: the state; leaves have a `shape`.
      params: the nested dict of parameters; leaves have a `shape`.
      mesh: from :func:`make_mesh`.

    Raises:
      ConfigError, ValueError: as :func:`param_shardings`.
    """
    known = {
        _names(path): (leaf.shape, parameter_spec("/".join(_names(path)), leaf.shape, mesh))
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    }

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = _names(path)
        for owner in _owners(names, known):
            for shape, spec in _derived(names, *known[owner], stacked=owner[0] == "layers"):
                if shape == leaf.shape:
                    return NamedSharding(mesh, P(*spec))
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, shapes)


def parameter_spec(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> tuple[MeshAxes, ...]:
    """Return the mesh axes over which each axis of a parameter is divided.

    Raises:
      ConfigError, ValueError: as :func:`param_shardings`.
    """
    logical = logical_axes(path, len(shape))
    if logical is None or len(logical) != len(shape):
        raise ValueError(f"parameter {path} of shape {shape} is not in fam_jax.sharding.PARAMETERS")
    return tuple(_place_axis(axis, size, mesh) for axis, size in zip(logical, shape, strict=True))


def logical_axes(path: str, ndim: int) -> tuple[str, ...] | None:
    """Return the logical axes of a parameter of `ndim` dimensions; None if the tables do not list it.

    The factors of a low-rank update have the axes of its kernel: `lora_a` (layers, *in, rank), `lora_b` (layers, rank,
    *out).
    """
    group, _, name = path.rpartition("/")
    if name in ("lora_a", "lora_b"):
        path = f"{group}/kernel"
    axes = next((axes for pattern, axes in PARAMETERS if fnmatch.fnmatch(path, pattern)), None)
    if MEMORY in f"/{path}":
        own = memory_parameter_axes(f"/{path}".partition(MEMORY)[2])
        in_layers = ("layers",) if path.startswith("layers/") else ()
        return own if own is None else (*in_layers, *own)
    if axes is None or path == f"{group}/{name}":
        return axes
    own = axes[1 : ndim - 1] if name == "lora_a" else axes[len(axes) - ndim + 2 :]
    rank = "rank" if "width" in own else "spread_rank"
    return ("layers", *own, rank) if name == "lora_a" else ("layers", rank, *own)


def _place_axis(axis: str, size: int, mesh: Mesh | AbstractMesh) -> MeshAxes:
    mesh_axes, field = AXES[axis]
    ways = _ways(mesh, mesh_axes)
    if size % ways == 0:
        return mesh_axes
    if axis in COPIED_IF_INDIVISIBLE:
        return None
    raise ConfigError(f"config.mesh.{mesh_axes}: {ways} does not divide {field} {size}; choose a divisor")


def _ways(mesh: Mesh | AbstractMesh, mesh_axes: MeshAxes) -> int:
    if mesh_axes is None:
        return 1
    return math.prod(mesh.shape[name] for name in ([mesh_axes] if isinstance(mesh_axes, str) else mesh_axes))


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _owners(names: tuple[str, ...], known: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Return the parameters whose path ends `names`, longest first; `layers` may be further up in `names`."""

    def owns(owner: tuple[str, ...]) -> bool:
        if names[-len(owner) :] == owner:
            return True
        inner = owner[1:]
        return owner[0] == "layers" and names[-len(inner) :] == inner and "layers" in names[: -len(inner)]

    return sorted(filter(owns, known), key=len, reverse=True)


def _derived(
    names: tuple[str, ...], shape: tuple[int, ...], spec: tuple[MeshAxes, ...], stacked: bool
) -> list[tuple[tuple[int, ...], tuple[MeshAxes, ...]]]:
    """Return the shapes that the state of a parameter can have, with their specs."""
    rank = {"v_row": -1, "v_col": -2}
    which = next((rank[name] for name in names if name in rank), None)
    if which is None:
        return [(shape, spec)]
    factored = []
    for lead in (1, 0) if stacked else (0,):
        if len(shape) - lead >= 2:
            dropped = lead + int(np.argsort(shape[lead:])[which])  # optax breaks ties by argsort too
            factored.append((_without(shape, dropped), _without(spec, dropped)))
    return factored


def _without(items: tuple[Any, ...], index: int) -> tuple[Any, ...]:
    return items[:index] + items[index + 1 :]
