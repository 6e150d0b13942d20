"""Save the state of streams to a file and load it again: bit for bit what was saved, or an error that says why not.

The file is in safetensors format. Its metadata holds the version of this layout, the config fields that decide what a
state means, a fingerprint of the model's parameters, how many tokens each stream has read, and the SHA-256 of the whole
file, computed with zeros in place of the checksum itself.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

from fam_jax.checkpoint.new_file import new_file
from fam_jax.config import ModelConfig, UserError, fields_with_effect
from fam_jax.config.format1 import former_array_name, upgrade_array_name, upgrade_model
from fam_jax.config.strict_json import dump_json, parse_json
from fam_jax.model import StreamState, Transformer

FORMAT = "fam_jax state"
VERSION = "2"
# What version 1 had: another name, and a checksum over the header without it.
FORMER_FORMAT, FORMER_VERSION = "fam_jax memory", "1"
CHECKSUM = re.compile(rb'"sha256": ?"([0-9a-f]{64})"')
NO_CHECKSUM = "0" * 64

# Names of dtypes in safetensors.
SAFE_DTYPES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "int32": "I32", "bool": "BOOL"}

# Bytes of an array up to which its fingerprint covers every one, and entries that it covers of a larger array.
SMALL = 1 << 20
SAMPLES = 1 << 14


class StateFileError(UserError):
    """A state file is missing, damaged, or of another model."""


def fingerprint(params: dict[str, Any], rename: Callable[[str], str] = str) -> str:
    """Return 64 hexadecimal digits that tell models apart: a digest of names, shapes, dtypes and values.

    Arrays of up to 1 MiB count with all their bytes, larger ones with 16,384 evenly spaced entries. Training or
    rounding the parameters changes the digest; an edit of a few entries of a large array may not.

    Args:
      params: nested dict of parameters.
      rename: from the key path of a parameter to its name in the digest.
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


def save_state(
    path: str | os.PathLike[str],
    state: StreamState,
    model: ModelConfig,
    params: dict[str, Any],
    vocabulary: str = "",
) -> None:
    """Write the state of streams of a model; the file appears only when it is complete.

    Args:
      path: of the file.
      state: of any number of streams.
      model: config of the model.
      params: its parameters, for the fingerprint.
      vocabulary: SHA-256 of the vocabulary's file; empty: unknown.

    Raises:
      StateFileError: the file cannot be written.
    """
    arrays = {name: np.ascontiguousarray(array) for name, array in _by_name(state).items()}
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "config": dump_json(_meaning(model), sort_keys=True),
        "fingerprint": fingerprint(params),
        "tokens_read": dump_json(state.tokens_read.tolist()),
        "sha256": NO_CHECKSUM,
    } | ({"vocabulary": vocabulary} if vocabulary else {})
    content = safetensors.numpy.save(arrays, metadata)
    found = CHECKSUM.search(content)
    assert found is not None
    checksum = hashlib.sha256(content).hexdigest().encode()
    _write(Path(path), content[: found.start(1)] + checksum + content[found.end(1) :])


def load_state(
    path: str | os.PathLike[str], model: ModelConfig, params: dict[str, Any], vocabulary: str = ""
) -> StreamState:
    """Read a state that :func:`save_state` wrote, to be continued by the same model.

    Args:
      path: of the file.
      model: config of the model.
      params: its parameters.
      vocabulary: SHA-256 of the vocabulary's file; empty: unknown.

    Raises:
      StateFileError: the file is missing, not a state file, damaged, or of another model or vocabulary; the message
        names the config fields that differ, or says that the weights or the vocabulary do.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise StateFileError(
            f"{path}: cannot be read ({error.strerror}); give a file that was saved"
        ) from error
    metadata = _checked_metadata(path, content)
    former = metadata["version"] == FORMER_VERSION
    try:
        _check_model(path, metadata, model, params, former=former)
        if vocabulary and metadata.get("vocabulary", vocabulary) != vocabulary:
            raise StateFileError(
                f"{path}: was saved by this model with another vocabulary, so its tokens mean other text; load it with "
                "the checkpoint that saved it"
            )
        stored = dict(safetensors.deserialize(content))
        if former:
            stored = {upgrade_array_name(name): entry for name, entry in stored.items()}
        return _rebuilt(model, stored, parse_json(metadata["tokens_read"]))
    # The checksum is right, so it is no accident: another program wrote it.
    except (
        safetensors.SafetensorError,
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
        OverflowError,
    ) as error:
        reason = " ".join(str(error).split())[:160]
        raise StateFileError(
            f"{path}: is not a memory as fam_jax saves it ({reason}); save it again with fam_jax"
        ) from error


def _rebuilt(model: ModelConfig, stored: dict[str, Any], tokens_read: Any) -> StreamState:
    """Return the state with stored arrays.

    Raises:
      ValueError: an array is not one of this model's states, or its values are not.
    """
    rows = len(tokens_read)
    like = jax.eval_shape(lambda: Transformer(model, rngs=nnx.Rngs(0)).init_state(rows))
    wanted = _by_name(like)
    if stored.keys() != wanted.keys():
        raise ValueError(f"its arrays are {', '.join(sorted(stored)):.80}")
    leaves = []
    for name, leaf in wanted.items():
        kind, shape = stored[name]["dtype"], tuple(stored[name]["shape"])
        # Some arrays were narrower in files of version 0.1.
        dtype = jnp.bfloat16 if kind == "BF16" else leaf.dtype
        if shape != leaf.shape or kind not in ("BF16", SAFE_DTYPES[str(leaf.dtype)]):
            raise ValueError(f"{name} is {kind}{list(shape)}, not {leaf.dtype}{list(leaf.shape)}")
        array = np.frombuffer(stored[name]["data"], dtype).reshape(shape)
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not np.isfinite(array.astype(np.float64)).all():
            raise ValueError(f"{name} has values that are not finite")
        leaves.append(jnp.asarray(array, leaf.dtype))
    state: StreamState = jax.tree.unflatten(jax.tree.structure(like), leaves)
    filled, blocks = (np.asarray(x) for x in (state.position.filled, state.position.blocks))
    if not ((filled >= 0) & (filled < model.block_size) & (blocks >= 0)).all():
        raise ValueError("it is at a place that no stream can reach")
    if state.tokens_read.tolist() != tokens_read and blocks.max() < np.iinfo(np.int32).max:
        raise ValueError(f"it has read {state.tokens_read.tolist()} tokens, not {tokens_read}")
    return state


def _checked_metadata(path: Any, content: bytes) -> dict[str, str]:
    """Return the metadata of a file whose checksum is right."""
    size = int.from_bytes(content[:8], "little")
    try:
        entries = parse_json(content[8 : 8 + size])
        metadata = dict(entries.pop("__metadata__"))
        known = (metadata["format"], metadata["version"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StateFileError(
            f"{path}: is not a saved memory, or its header is damaged; restore it from a copy or read the text again"
        ) from error
    if known not in ((FORMAT, VERSION), (FORMER_FORMAT, FORMER_VERSION)):
        raise StateFileError(
            f"{path}: is not a saved memory of version {FORMER_VERSION} or {VERSION}; save it again with this version "
            "of fam_jax"
        )
    intact = _intact if known == (FORMAT, VERSION) else _intact_former
    if not intact(content, entries, metadata):
        raise StateFileError(
            f"{path}: is damaged (its checksum is wrong); restore it from a copy or read the text again"
        )
    return metadata


def _intact(content: bytes, entries: dict[str, Any], metadata: dict[str, str]) -> bool:
    found = CHECKSUM.search(content)
    if found is None:
        return False
    whole = content[: found.start(1)] + NO_CHECKSUM.encode() + content[found.end(1) :]
    return hashlib.sha256(whole).hexdigest().encode() == found[1]


def _intact_former(content: bytes, entries: dict[str, Any], metadata: dict[str, str]) -> bool:
    """Check a file of version 1, whose checksum covers the header without the checksum, and the arrays."""

    def head(metadata: dict[str, str]) -> bytes:
        text = dump_json({"__metadata__": metadata, **entries}, sort_keys=True).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    told = metadata.get("sha256")
    without = {name: value for name, value in metadata.items() if name != "sha256"}
    whole = head(metadata)
    data = content[len(whole) :]
    return content[: len(whole)] == whole and hashlib.sha256(head(without) + data).hexdigest() == told


def _check_model(
    path: Any, metadata: dict[str, str], model: ModelConfig, params: dict[str, Any], *, former: bool
) -> None:
    saved, own = parse_json(metadata["config"]), json.loads(json.dumps(_meaning(model)))
    if former:
        saved = _flat(upgrade_model(saved))
    # A field that is younger than the file had its default.
    saved = _meaning(dataclasses.replace(ModelConfig(), memory=type(model.memory)())) | saved
    differing = [
        f"{field} was {dump_json(saved.get(field))}, is {dump_json(own.get(field))}"
        for field in sorted(saved.keys() | own.keys())
        if saved.get(field) != own.get(field)
    ]
    if differing:
        raise StateFileError(
            f"{path}: is of another model ({'; '.join(differing)}); load it with the model that it was saved from"
        )
    if metadata["fingerprint"] != fingerprint(params, former_array_name if former else str):
        raise StateFileError(
            f"{path}: is of a model of the same shape with other weights; load it with the checkpoint that it was "
            "saved from"
        )


def _meaning(model: ModelConfig) -> dict[str, Any]:
    """Return the fields that decide what a state means, by path."""
    own = fields_with_effect(type(model), "parameters", "state")
    own |= fields_with_effect(type(model.memory), "parameters", "state", prefix="memory.")
    return {name: value for name, value in _flat(dataclasses.asdict(model)).items() if name in own}


def _flat(group: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in group.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def _by_name(state: StreamState) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree.leaves_with_path(state)
    }


def _write(path: Path, content: bytes) -> None:
    try:
        os.stat(path.parent)  # a folder that is missing may be a mistake
        with new_file(path) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StateFileError(f"{path}: cannot be written ({error.strerror}); give another path") from error
