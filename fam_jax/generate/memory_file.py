"""Memories as files: bit for bit what was saved, or an error that says why not.

A file is in the safetensors format: the length of a header (8 bytes, little-endian), the header in JSON, the arrays.
The header's `__metadata__` holds the version of this layout, the config fields that decide what a memory means, a
fingerprint of the model's parameters, how many tokens every stream has read, and the SHA-256 of the whole file
(with the checksum itself left empty).
"""

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fam_jax.config import ModelConfig, UserError, fields_with_effect
from fam_jax.config.format1 import former_array_name, upgrade_array_name, upgrade_model
from fam_jax.model import StreamState, Transformer

VERSION = "2"
READABLE = ("1", VERSION)
SMALL = 1 << 20  # bytes of an array up to which its fingerprint covers every one
SAMPLES = 1 << 14  # entries that it covers of a larger array
DTYPES = {"bool": "BOOL", "int32": "I32", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}


class MemoryFileError(UserError):
    """A file of a memory is missing, damaged, or of another model."""


def fingerprint(params: dict[str, Any], rename: Callable[[str], str] = str) -> str:
    """64 hexadecimal digits that tell models apart: a digest of names, shapes, dtypes and contents of all parameters.

    Arrays of up to 1 MiB count with all their bytes; of larger ones 16384 entries do, evenly spread. Any training or
    rounding of the parameters changes it; an edit of a few entries of a large array may not.
    """
    digest = hashlib.sha256()
    leaves = {rename(jax.tree_util.keystr(path)): leaf for path, leaf in jax.tree.leaves_with_path(params)}
    for name, leaf in sorted(leaves.items()):
        digest.update(f"{name} {leaf.shape} {leaf.dtype}\n".encode())
        if leaf.size * leaf.dtype.itemsize > SMALL:
            spread = np.linspace(0, leaf.size - 1, SAMPLES).astype(np.int64)
            leaf = leaf[np.unravel_index(spread, leaf.shape)]
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def save_memory(
    path: str | os.PathLike[str], memory: StreamState, config: ModelConfig, params: dict[str, Any]
) -> None:
    """Writes a memory of the model of `config` and `params`; the file appears only when it is complete.

    Raises:
      MemoryFileError: the file cannot be written.
    """
    arrays = {name: np.asarray(array) for name, array in _by_name(memory).items()}
    tokens = memory.tokens_read
    metadata = {
        "format": "fam_jax memory",
        "version": VERSION,
        "config": json.dumps(_meaning(config), sort_keys=True),
        "fingerprint": fingerprint(params),
        "tokens_read": json.dumps(tokens.tolist()),
    }
    entries, end = {}, 0
    for name, array in arrays.items():
        begin, end = end, end + array.nbytes
        entries[name] = {
            "dtype": DTYPES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [begin, end],
        }
    data = b"".join(array.tobytes() for array in arrays.values())
    head = _head(entries, metadata | {"sha256": hashlib.sha256(_head(entries, metadata) + data).hexdigest()})
    _write(Path(path), head + data)


def load_memory(path: str | os.PathLike[str], config: ModelConfig, params: dict[str, Any]) -> StreamState:
    """Reads a memory that :func:`save_memory` wrote, to be continued by the model of `config` and `params`.

    Raises:
      MemoryFileError: there is no such file, or it is no memory, or damaged, or of another model; the message says
        which fields of the config differ, or that the weights do.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise MemoryFileError(f"{path}: cannot be read ({error.strerror}); give a saved memory") from error
    metadata, entries, data = _parse(path, content)
    _check_model(path, metadata, config, params)
    rows = len(json.loads(metadata["tokens_read"]))
    like = jax.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)).init_state(rows))
    if metadata["version"] == "1":
        entries = {upgrade_array_name(name): entry for name, entry in entries.items()}
    arrays = []
    for name, leaf in _by_name(like).items():
        entry = entries[name]
        begin, end = entry["data_offsets"]
        array = np.frombuffer(data[begin:end], jnp.dtype(leaf.dtype)).reshape(entry["shape"])
        arrays.append(jnp.asarray(array))
    return jax.tree.unflatten(jax.tree.structure(like), arrays)


def _parse(path: Any, content: bytes) -> tuple[dict[str, str], dict[str, Any], bytes]:
    """Metadata, entries by array and the arrays' bytes; the checksum has been found right."""
    size = int.from_bytes(content[:8], "little")
    raw, data = content[8 : 8 + size], content[8 + size :]
    try:
        entries = json.loads(raw)
        metadata = dict(entries.pop("__metadata__"))
        version = metadata["version"] if metadata["format"] == "fam_jax memory" else None
        told = metadata.pop("sha256")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MemoryFileError(
            f"{path}: not a memory file, or its beginning is damaged; restore it from a copy or read the text again"
        ) from error
    if version not in READABLE:
        raise MemoryFileError(
            f"{path}: is of version {version}; this version of fam_jax reads {' and '.join(READABLE)}"
        )
    head = _head(entries, metadata)
    intact = content[: 8 + size] == _head(entries, metadata | {"sha256": told})
    if not intact or hashlib.sha256(head + data).hexdigest() != told:
        raise MemoryFileError(
            f"{path}: is damaged (its checksum is wrong); restore it from a copy or read the text again"
        )
    return metadata, entries, data


def _check_model(path: Any, metadata: dict[str, str], config: ModelConfig, params: dict[str, Any]) -> None:
    saved, own = json.loads(metadata["config"]), json.loads(json.dumps(_meaning(config)))
    if metadata["version"] == "1":
        saved = _flat(upgrade_model(saved))
    differing = [
        f"{field} was {json.dumps(saved.get(field))}, is {json.dumps(own.get(field))}"
        for field in sorted(saved.keys() | own.keys())
        if saved.get(field) != own.get(field)
    ]
    if differing:
        raise MemoryFileError(
            f"{path}: is of another model ({'; '.join(differing)}); load it with the model that it was saved from"
        )
    names = former_array_name if metadata["version"] == "1" else str
    if metadata["fingerprint"] != fingerprint(params, names):
        raise MemoryFileError(
            f"{path}: is of a model of the same shape with other weights; load it with the checkpoint that it was "
            "saved from"
        )


def _meaning(config: ModelConfig) -> dict[str, Any]:
    """Return the fields that decide what a state means, by path."""
    kinds = ("parameters", "state")
    own = fields_with_effect(type(config), *kinds)
    own |= fields_with_effect(type(config.memory), *kinds, prefix="memory.")
    return {name: value for name, value in _flat(dataclasses.asdict(config)).items() if name in own}


def _flat(group: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in group.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def _by_name(memory: StreamState) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree.leaves_with_path(memory)
    }


def _head(entries: dict[str, Any], metadata: dict[str, str]) -> bytes:
    text = json.dumps({"__metadata__": metadata, **entries}, sort_keys=True).encode()
    text += b" " * (-len(text) % 8)  # arrays begin at a multiple of eight
    return len(text).to_bytes(8, "little") + text


def _write(path: Path, content: bytes) -> None:
    unfinished = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            unfinished = Path(file.name)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        if unfinished is not None:
            unfinished.unlink(missing_ok=True)
        raise MemoryFileError(f"{path}: cannot be written ({error.strerror}); give another path") from error
