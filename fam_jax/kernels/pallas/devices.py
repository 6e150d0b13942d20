"""The devices that a program is compiled for: their kind, and how they divide rows of the batch and heads.

The compiler cannot partition a kernel by itself, so the mesh in use (`jax.set_mesh`) says which device takes which rows
and heads. Nothing is communicated, because rows and heads do not see each other.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec as P

# Mesh axes over which rows and heads are divided (`fam_jax.sharding.AXES`).
ROWS = ("data", "fsdp")
HEADS = "tensor"

# How many cores of a chip run one kernel together; 1 for chips that are not listed.
CORES = dict.fromkeys(("TPU v4", "TPU v5", "TPU v5p"), 2)


def target_chip() -> str:
    """Return the kind of TPU that the current program is traced for, such as "TPU v5p"; "" for other devices.

    The mesh in use decides, because a program may be compiled for chips that this machine lacks. Without a mesh, the
    default device decides.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return device.device_kind if device.platform == "tpu" else ""
    first = jax.devices()[0]
    return first.device_kind if first.platform == "tpu" else ""


def wants_kernels(implementation: str) -> bool:
    """Return whether `implementation` (as in `block_attention`) asks for kernels where they can run."""
    return implementation.startswith("pallas") or (implementation == "auto" and bool(target_chip()))


class Division(NamedTuple):
    """Mesh axes over which rows, query heads and key heads are divided; None if every device has all of them."""

    rows: tuple[str, ...] | None = None
    heads: str | None = None
    kv_heads: str | None = None


def division(rows: int, heads: int, kv_heads: int) -> Division:
    """Return how the mesh in use divides rows and heads.

    If the rows cannot be divided evenly, every device computes all of them. A single key head (multi-query attention)
    stays whole on every device.

    Raises:
      ValueError: the devices along the heads' axis do not divide the heads.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return Division()
    row_axes = tuple(axis for axis in ROWS if axis in mesh.axis_names)
    ways, split = math.prod(mesh.shape[axis] for axis in row_axes), mesh.shape.get(HEADS, 1)
    if heads % split or (kv_heads % split and kv_heads > 1):
        raise ValueError(
            f"mesh axis {HEADS}: {split} devices do not divide {heads} query heads and {kv_heads} key heads; "
            "use a common divisor"
        )
    by_head = HEADS if split > 1 else None
    return Division(
        rows=row_axes if rows % ways == 0 else None,
        heads=by_head,
        kv_heads=by_head if kv_heads % split == 0 else None,
    )


def over_mesh(function: Callable[[Any], jax.Array], inputs: Any, specs: Any, out: P) -> jax.Array:
    """Return `function(inputs)`; each device of the mesh in use computes its part.

    Args:
      function: takes one pytree and returns one array.
      inputs: the pytree of whole arrays; subtrees may be None.
      specs: a pytree of their PartitionSpecs; the spec of a subtree that is None has no effect.
      out: PartitionSpec of the result.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function(inputs)
    return jax.shard_map(function, mesh=mesh, in_specs=(specs,), out_specs=out, check_vma=False)(inputs)
