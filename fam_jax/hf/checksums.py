"""SHA-256 of the tensors in a safetensors file: written into its metadata at export, compared at import."""

import concurrent.futures
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import save_file

from fam_jax.checkpoint.new_file import mode_of_umask
from fam_jax.config.strict_json import dump_json, parse_json
from fam_jax.hf.config_json import ConvertError, first_line

# Key in the metadata. Its value is a JSON object that maps each tensor's name to the SHA-256 of its bytes in the file,
# in hexadecimal.
ENTRY = "sha256"
# Bytes that are read at a time.
CHUNK = 8 << 20


def save_tensors(arrays: Mapping[str, np.ndarray], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file with the SHA-256 of every tensor.

    Raises:
      OSError, SafetensorError: the file cannot be written.
    """
    found = dict(zip(arrays, _in_parallel(_digest_of_array, arrays.values()), strict=True))
    with mode_of_umask(path):
        save_file(dict(arrays), path, metadata={**metadata, ENTRY: dump_json(found)})
        _sort_metadata(path)


def _sort_metadata(path: Path) -> None:
    """Put the metadata of a file in order, in place: safetensors writes it in an order that changes with every call."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = dump_json(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        if len(text) == size:
            file.seek(8)
            file.write(text)


def check_tensors(paths: Iterable[Path]) -> None:
    """Compare the tensors of safetensors files with the digests in their metadata. Files without digests pass.

    Raises:
      ConvertError: a tensor differs, or a file cannot be read.
    """
    tasks = [(path, *entry) for path in paths for entry in _entries(path)]
    for path, name, same in _in_parallel(_check, tasks):
        if not same:
            raise ConvertError(
                f"{path}: tensor {name} is not the one that was exported (its SHA-256 differs); copy or download the "
                f"file again, or, if you changed it on purpose, remove {ENTRY} from its metadata"
            )


def _in_parallel(function: Callable[[Any], Any], values: Iterable[Any]) -> list[Any]:
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
        return [*threads.map(function, values)]


def _digest_of_array(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


def _entries(path: Path) -> list[tuple[str, str, int, int]]:
    """Return name, digest, first byte and last byte of each tensor of a file that has digests."""
    try:
        with safetensors.safe_open(path, framework="np") as file:
            text = (file.metadata() or {}).get(ENTRY)
            if text is None:
                return []
        with path.open("rb") as raw:
            size = int.from_bytes(raw.read(8), "little")
            header = parse_json(raw.read(size))
        digests = parse_json(text)
        offsets = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
        if not isinstance(digests, dict) or digests.keys() != offsets.keys():
            raise ValueError("its digests are not those of its tensors")
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, RecursionError) as error:
        raise ConvertError(f"{path}: is damaged ({first_line(error)}); download it again") from error
    return [(name, digests[name], 8 + size + begin, 8 + size + end) for name, (begin, end) in offsets.items()]


def _check(task: tuple[Path, str, str, int, int]) -> tuple[Path, str, bool]:
    path, name, digest, begin, end = task
    found = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            for place in range(begin, end, CHUNK):
                found.update(os.pread(file.fileno(), min(CHUNK, end - place), place))
    except OSError as error:
        raise ConvertError(f"{path}: cannot be read ({error.strerror}); check the disk") from error
    return path, name, found.hexdigest() == digest
