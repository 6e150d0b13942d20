"""Parameters as plain nested dicts of arrays, as checkpoints hold them."""

import math
from typing import Any

import jax
from flax import nnx, traverse_util


def to_dict(state: nnx.State) -> dict[str, Any]:
    """Return a nested dict of arrays, named as in the module tree."""
    return nnx.to_pure_dict(state)


def from_dict(like: nnx.State, values: dict[str, Any]) -> nnx.State:
    """Return a state with the structure of `like` and the arrays of `values`.

    Raises:
      ValueError: names or shapes differ; the message lists the first three.
    """
    flat_like, flat = flatten(to_dict(like)), flatten(values)
    wrong = [f"{name} is missing" for name in flat_like if name not in flat]
    wrong += [f"{name} is not expected" for name in flat if name not in flat_like]
    wrong += [
        f"{name} has shape {tuple(flat[name].shape)}, not {tuple(leaf.shape)}"
        for name, leaf in flat_like.items()
        if name in flat and tuple(flat[name].shape) != tuple(leaf.shape)
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"parameters do not fit the model: {'; '.join(wrong[:3])}{more}")
    state = jax.tree.map(lambda leaf: leaf, like)
    nnx.replace_by_pure_dict(state, values)
    return state


def count_parameters(values: Any) -> int:
    """Return the number of elements of all arrays in a tree."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(values))


def flatten(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the leaves of a nested dict by path, such as layers/query/kernel."""
    return {"/".join(str(key.key) for key in path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def unflatten(leaves: dict[str, Any]) -> dict[str, Any]:
    """Return the nested dict of leaves by path; the inverse of :func:`flatten`."""
    return traverse_util.unflatten_dict(leaves, sep="/")
