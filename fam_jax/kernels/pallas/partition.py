"""The kernels on several devices: each attends for its own rows of the batch and its own heads.

The compiler cannot divide a kernel by itself, so the mesh in use (`jax.set_mesh`) says how. Nothing is communicated:
rows and heads do not see each other.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

# Mesh axes that rows, and heads, are spread over (`fam_jax.sharding.AXES`).
ROWS = ("data", "fsdp")
HEADS = "tensor"


def over_mesh(attend: Callable[..., jax.Array], *arrays: Any) -> jax.Array:
    """`attend(q, k, v, fam_k, fam_v, past_length, fam_count)`, divided over the mesh in use, if there is one.

    Rows that do not divide over their axes are computed by all; so are key heads, of which each device takes those that
    its query heads want (multi-query attention has one).

    Raises:
      ValueError: there are more devices along the heads' axis than one, and they divide neither the key heads nor, as
        multi-query attention would have it, is there one of these.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return attend(*arrays)
    q, k = arrays[:2]
    row_axes = tuple(axis for axis in ROWS if axis in mesh.axis_names)
    ways = math.prod(mesh.shape[axis] for axis in row_axes)
    rows = row_axes if q.shape[0] % ways == 0 else None
    split = mesh.shape.get(HEADS, 1)
    if q.shape[2] % split or (k.shape[2] % split and k.shape[2] > 1):
        raise ValueError(
            f"mesh axis {HEADS} of {split} devices does not divide {q.shape[2]} query and {k.shape[2]} key heads"
        )
    heads = HEADS if split > 1 else None
    kv_heads = heads if k.shape[2] % split == 0 else None
    tokens, keys, fam = P(rows, None, heads), P(rows, None, kv_heads), P(rows, None, None, kv_heads)
    specs = (tokens, keys, keys, fam, fam, P(rows), P(rows))
    # None is no array and has no place.
    given = [i for i, array in enumerate(arrays) if array is not None]

    def local(*present: jax.Array) -> jax.Array:
        full: list[Any] = [None] * len(arrays)
        for i, array in zip(given, present, strict=True):
            full[i] = array
        return attend(*full)

    divided = jax.shard_map(
        local, mesh=mesh, in_specs=tuple(specs[i] for i in given), out_specs=tokens, check_vma=False
    )
    return divided(*(arrays[i] for i in given))
