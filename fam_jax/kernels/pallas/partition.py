"""The kernels on several devices: each works on its own rows of the batch and its own heads.

The compiler cannot divide a kernel by itself, so the mesh in use (`jax.set_mesh`) says how. Nothing is communicated:
rows and heads do not see each other.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec as P

# Mesh axes that rows, and heads, are spread over (`fam_jax.sharding.AXES`).
ROWS = ("data", "fsdp")
HEADS = "tensor"


class Division(NamedTuple):
    """Mesh axes that rows, query heads and key heads are divided over; None where every device has all of them."""

    rows: tuple[str, ...] | None = None
    heads: str | None = None
    kv_heads: str | None = None


def division(rows: int, heads: int, kv_heads: int) -> Division:
    """How the mesh in use divides rows and heads.

    Rows that do not divide over their axes are computed by all; so are key heads, of which each device takes those that
    its query heads want (multi-query attention has one).

    Raises:
      ValueError: there are more devices along the heads' axis than one, and they divide neither the key heads nor, as
        multi-query attention would have it, is there one of these.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return Division()
    row_axes = tuple(axis for axis in ROWS if axis in mesh.axis_names)
    ways, split = math.prod(mesh.shape[axis] for axis in row_axes), mesh.shape.get(HEADS, 1)
    if heads % split or (kv_heads % split and kv_heads > 1):
        raise ValueError(
            f"mesh axis {HEADS} of {split} devices does not divide {heads} query and {kv_heads} key heads"
        )
    by_head = HEADS if split > 1 else None
    return Division(
        rows=row_axes if rows % ways == 0 else None,
        heads=by_head,
        kv_heads=by_head if kv_heads % split == 0 else None,
    )


def over_mesh(function: Callable[..., jax.Array], arrays: Sequence[Any], specs: Sequence[P], out: P) -> Any:
    """`function(*arrays)` by each device for its part of every array; an array may be None.

    Args:
      function: of as many arrays, or None.
      arrays: whole.
      specs: of each array.
      out: of the result.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function(*arrays)
    given = [i for i, array in enumerate(arrays) if array is not None]  # None has no place on a mesh

    def local(*present: jax.Array) -> jax.Array:
        full: list[Any] = [None] * len(arrays)
        for i, array in zip(given, present, strict=True):
            full[i] = array
        return function(*full)

    divided = jax.shard_map(
        local, mesh=mesh, in_specs=tuple(specs[i] for i in given), out_specs=out, check_vma=False
    )
    return divided(*(arrays[i] for i in given))
