"""What a step holds: arrays by name, and the record of their shapes, dtypes and checksums.

A checksum is two sums, modulo 2^32, over the words of an array, each word mixed with its index. Sums of
integers do not depend on their order, so the value is the same under every sharding and is computed on
the devices that hold the array, at the speed of one read of it. The first sum weighs words by odd
numbers: whatever happens to one word alone changes it. Any other damage goes unseen with probability 2^-64.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from fam_jax.checkpoint.folder import CheckpointError
from fam_jax.config.format1 import EMPTIED, FORMAT, upgrade_array_name

PARTS = ("params", "training")


class Damage(Exception):
    """What is stored is not what was saved; the message says where, for `steps.py` to complete."""


PyTree = Any
Arrays = dict[str, Any]
Record = dict[str, Any]


def by_name(tree: PyTree) -> Arrays:
    """Leaves of `tree` under their paths, such as `layers/query/kernel` or `optimizer/0/mu`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def nested(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict whose paths are the names of `arrays`."""
    return traverse_util.unflatten_dict(arrays, sep="/")


def raw(arrays: Arrays) -> Arrays:
    """`arrays` as they are stored: the words of PRNG keys for the keys, nothing for empty arrays."""
    return {
        name: jax.random.key_data(array) if _is_key(array) else array
        for name, array in arrays.items()
        if array.size
    }


def abstract(like: Arrays) -> Arrays:
    """What to ask Orbax for in order to get `like` (`ShapeDtypeStruct`s): as :func:`raw`, unread."""

    def stored(leaf: Any) -> Any:
        if not _is_key(leaf):
            return leaf
        data = jax.eval_shape(jax.random.key_data, leaf)
        return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)

    return {name: stored(leaf) for name, leaf in like.items() if leaf.size}


def rebuild(like: PyTree, arrays: Arrays, record: Record) -> PyTree:
    """The inverse of :func:`by_name` and :func:`raw`: stored `arrays` in the structure of `like`."""

    def leaf(name: str, struct: Any) -> Any:
        if not struct.size:
            return jnp.zeros(struct.shape, struct.dtype, device=struct.sharding)
        if _is_key(struct):
            return jax.random.wrap_key_data(arrays[name], impl=record[name]["key"])
        return arrays[name]

    leaves = [leaf(name, struct) for name, struct in by_name(like).items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def describe(arrays: Arrays) -> Record:
    """The record of `arrays`: per name its shape, dtype, checksum and, for PRNG keys, their kind."""
    sums = checksums(raw(arrays))
    record = {}
    for name, array in arrays.items():
        entry = {"shape": list(array.shape), "dtype": str(array.dtype), "checksum": sums.get(name, "")}
        record[name] = entry | ({"key": str(jax.random.key_impl(array))} if _is_key(array) else {})
    return record


def seal(record: Record) -> Record:
    """`record`, as JSON gives it back, with its own digest."""
    record = json.loads(json.dumps(record))
    return {"digest": _digest(record), "record": record}


def unseal(sealed: Any) -> Record:
    """The inverse of :func:`seal`.

    Raises:
      Damage: the digest does not fit.
    """
    if not isinstance(sealed, dict) or sealed.get("digest") != _digest(sealed.get("record")):
        raise Damage("its record of contents does not match its digest")
    return sealed["record"]


def upgrade(record: Record) -> tuple[Record, dict[str, dict[str, str]]]:
    """Return the record with the array names of today, and under which name each array of each part is stored."""
    if record.get("format", 1) == FORMAT:
        return record, {part: {name: name for name in record[part]} for part in PARTS if part in record}
    new, names = dict(record), {}
    for part in PARTS:
        if part in record:
            # Format 1 had an empty array where there was nothing to save.
            kept = [
                name for name, entry in record[part].items() if name not in EMPTIED or 0 not in entry["shape"]
            ]
            names[part] = {upgrade_array_name(name): name for name in kept}
            new[part] = {today: record[part][name] for today, name in names[part].items()}
    return new, names


def check_fit(part: str, record: Record, like: Arrays) -> None:
    """Raises :class:`CheckpointError` unless `like` has the names, shapes and dtypes of `record`."""
    for name in sorted(record.keys() | like.keys()):
        here, there = like.get(name), record.get(name)
        wanted = f"{here.dtype}{list(here.shape)}" if here is not None else "absent"
        saved = f"{there['dtype']}{there['shape']}" if there is not None else "absent"
        if wanted != saved:
            raise CheckpointError(
                f"{part}/{name} is {saved} in the checkpoint and {wanted} here; use the config that wrote it"
            )


def check_sums(part: str, record: Record, arrays: Arrays) -> None:
    """Raises :class:`Damage` if an array's checksum is not the one that was saved."""
    for name, found in checksums(arrays).items():
        if found != record[name]["checksum"]:
            raise Damage(f"the values of {part}/{name} do not match their checksum")


def checksums(arrays: Arrays) -> dict[str, str]:
    """Checksum of each array (`jax.Array` or numpy, no PRNG keys), as 16 hexadecimal digits."""
    groups: dict[Any, Arrays] = {}  # one jit takes only arrays of one mesh, or of the same devices
    cpu = jax.local_devices(backend="cpu")[0]
    for name, array in arrays.items():
        if not isinstance(array, jax.Array):
            array = jax.device_put(array, cpu)
        place = getattr(array.sharding, "mesh", None) or frozenset(array.sharding.device_set)
        groups.setdefault(place, {})[name] = array
    sums: dict[str, Any] = {}
    for group in groups.values():
        sums |= jax.device_get(_sums(group))
    return {name: f"{first:08x}{second:08x}" for name, (first, second) in sums.items()}


@jax.jit
def _sums(arrays: Arrays) -> dict[str, tuple[jax.Array, jax.Array]]:
    return {name: _sum_words(_words(array)) for name, array in arrays.items()}


def _words(array: jax.Array) -> jax.Array:
    """The bits of `array` as uint32: one word per element, two per 64-bit element, on a last axis of 2."""
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    word = {1: jnp.uint8, 2: jnp.uint16}.get(array.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(array, word).astype(jnp.uint32)


def _sum_words(words: jax.Array) -> tuple[jax.Array, jax.Array]:
    index = jnp.zeros(words.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(words.ndim)):
        step = jnp.uint32(stride % 2**32)
        index += step * jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        stride *= words.shape[axis]
    weight = _mix(index + jnp.uint32(0x9E3779B9))
    zero = jnp.uint32(0)
    return jax.lax.reduce(  # both sums in one reduction: a quarter of the compile time of two
        (words * (weight | jnp.uint32(1)), _mix(words ^ weight)),
        (zero, zero),
        lambda left, right: (left[0] + right[0], left[1] + right[1]),
        tuple(range(words.ndim)),
    )


def _mix(words: jax.Array) -> jax.Array:
    """A bijection of uint32 in which every input bit moves every output bit (MurmurHash3's last steps)."""
    words = (words ^ (words >> 16)) * jnp.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * jnp.uint32(0xC2B2AE35)
    return words ^ (words >> 16)


def _is_key(array: Any) -> bool:
    return not isinstance(array, np.ndarray) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
