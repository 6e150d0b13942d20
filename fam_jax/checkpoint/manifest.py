"""The contents of a step: arrays by name, and a record of their shapes, dtypes and checksums.

A checksum is two sums, modulo 2^32, over the words of an array, each word mixed with its index. The order of integer
additions does not change their sum, so the checksum is the same under every sharding. The devices that hold the array
compute it in one pass over the data. The first sum multiplies words by odd numbers, so any change of a single word
changes it. Other damage goes undetected with probability 2^-64.
"""

import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from fam_jax.checkpoint.folder import CheckpointError, json_digest
from fam_jax.config.format1 import EMPTIED, FORMAT, upgrade_array_name

PARTS = ("params", "training")


class Damage(Exception):
    """A step is damaged. The message says where; `loading.py` adds the step and the remedy."""


class Unavailable(Exception):
    """A step cannot be read now, which does not mean that it is damaged."""


PyTree = Any
Arrays = dict[str, Any]
Record = dict[str, Any]


def by_name(tree: PyTree) -> Arrays:
    """Return the leaves of `tree` by path, such as `layers/query/kernel` or `optimizer/0/mu`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def nested(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Return the nested dict whose paths are the names of `arrays`."""
    return traverse_util.unflatten_dict(arrays, sep="/")


def raw(arrays: Arrays) -> Arrays:
    """Return `arrays` as they are stored: PRNG keys as their words, empty arrays left out."""
    return {
        name: jax.random.key_data(array) if _is_key(array) else array
        for name, array in arrays.items()
        if array.size
    }


def abstract(like: Arrays) -> Arrays:
    """Return the `ShapeDtypeStruct`s of :func:`raw` for those of `like`."""

    def stored(leaf: Any) -> Any:
        if not _is_key(leaf):
            return leaf
        data = jax.eval_shape(jax.random.key_data, leaf)
        return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)

    return {name: stored(leaf) for name, leaf in like.items() if leaf.size}


def rebuild(like: PyTree, arrays: Arrays, record: Record) -> PyTree:
    """Return stored `arrays` in the structure of `like`; the inverse of :func:`by_name` and :func:`raw`."""

    def leaf(name: str, struct: Any) -> Any:
        if not struct.size:
            return jnp.zeros(struct.shape, struct.dtype, device=struct.sharding)
        if _is_key(struct):
            return jax.random.wrap_key_data(arrays[name], impl=record[name]["key"])
        return arrays[name]

    leaves = [leaf(name, struct) for name, struct in by_name(like).items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def describe(arrays: Arrays) -> Record:
    """Return the record of `arrays`: shape, dtype, checksum and, for PRNG keys, implementation by name."""
    sums = checksums(raw(arrays))
    record = {}
    for name, array in arrays.items():
        entry = {"shape": list(array.shape), "dtype": str(array.dtype), "checksum": sums.get(name, "")}
        record[name] = entry | ({"key": str(jax.random.key_impl(array))} if _is_key(array) else {})
    return record


def seal(record: Record) -> Record:
    """Return `record`, converted to JSON types, with its digest."""
    record = json.loads(json.dumps(record))
    return {"digest": json_digest(record), "record": record}


def unseal(sealed: Any) -> Record:
    """Return the record that :func:`seal` was given.

    Raises:
      Damage: the digest does not match, or it is no record.
    """
    if not isinstance(sealed, dict) or sealed.get("digest") != json_digest(sealed.get("record")):
        raise Damage("its record of contents does not match its digest")
    record: Any = sealed["record"]
    if not _is_record(record):
        raise Damage("its record of contents is not as fam_jax writes it")
    return record


def _is_record(record: Any) -> bool:
    """Return whether a JSON value has the types of a record."""
    if not isinstance(record, dict) or not isinstance(record.get("position", {}), dict):
        return False
    origin, parts = record.get("origin", {}), [record[part] for part in PARTS if part in record]
    return (
        isinstance(origin, dict)
        and all(isinstance(digest, str) for digest in origin.values())
        and "params" in record
        and all(isinstance(part, dict) and all(map(_is_entry, part.values())) for part in parts)
    )


def _is_entry(entry: Any) -> bool:
    """Return whether a JSON value has the types of an array's entry in a record."""
    if not isinstance(entry, dict) or not isinstance(entry.get("checksum"), str):
        return False
    shape, dtype = entry.get("shape"), entry.get("dtype")
    if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 2**48 for size in shape):
        return False
    if not isinstance(dtype, str) or not isinstance(entry.get("key", ""), str):
        return False
    try:
        # NumPy parses texts that are no names, such as "2f4", and raises errors of many types.
        return "key" in entry or (dtype.isidentifier() and bool(jnp.dtype(dtype).itemsize))
    except TypeError:
        return False


def upgrade(record: Record) -> tuple[Record, dict[str, dict[str, str]]]:
    """Return the record with current array names, and by part the stored name of each array."""
    if record.get("format", 1) == FORMAT:
        return record, {part: {name: name for name in record[part]} for part in PARTS if part in record}
    new, names = dict(record), {}
    for part in PARTS:
        if part in record:
            # Format 1 saved an empty array if there was nothing to save.
            kept = [
                name for name, entry in record[part].items() if name not in EMPTIED or 0 not in entry["shape"]
            ]
            names[part] = {upgrade_array_name(name): name for name in kept}
            new[part] = {today: record[part][name] for today, name in names[part].items()}
    return new, names


def check_fit(part: str, record: Record, like: Arrays) -> None:
    """Raise :class:`CheckpointError` unless `like` has the names, shapes and dtypes of `record`."""
    for name in sorted(record.keys() | like.keys()):
        here, there = like.get(name), record.get(name)
        wanted = f"{here.dtype}{list(here.shape)}" if here is not None else "absent"
        saved = f"{there['dtype']}{there['shape']}" if there is not None else "absent"
        if wanted != saved:
            raise CheckpointError(
                f"{part}/{name} is {saved} in the checkpoint and {wanted} here; use the config that wrote it"
            )


def with_wrong_sums(record: Record, arrays: Arrays) -> list[str]:
    """Return the names of the arrays whose checksums differ from those that were saved."""
    return [name for name, found in checksums(arrays).items() if found != record[name]["checksum"]]


def checksums(arrays: Arrays) -> dict[str, str]:
    """Return the checksum of each array (`jax.Array` or numpy, no PRNG keys) as 16 hexadecimal digits."""
    groups: dict[Any, Arrays] = {}  # all arrays of a jitted call must be on the same devices
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
    """Return the bits of `array` as uint32: a word per element; two, on a new last axis, if it has 64 bits."""
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
    return jax.lax.reduce(  # one reduction compiles in a quarter of the time of two
        (words * (weight | jnp.uint32(1)), _mix(words ^ weight)),
        (zero, zero),
        lambda left, right: (left[0] + right[0], left[1] + right[1]),
        tuple(range(words.ndim)),
    )


def _mix(words: jax.Array) -> jax.Array:
    """Map uint32 to uint32 one to one, so that each input bit affects each output bit (MurmurHash3's finalizer)."""
    words = (words ^ (words >> 16)) * jnp.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * jnp.uint32(0xC2B2AE35)
    return words ^ (words >> 16)


def _is_key(array: Any) -> bool:
    return not isinstance(array, np.ndarray) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
