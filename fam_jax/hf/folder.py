"""A folder in Hugging Face format, read one tensor at a time."""

import fnmatch
import os
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np
import safetensors
from etils import epath

from fam_jax.checkpoint.links import check_inside
from fam_jax.hf.config_json import ConvertError, check_no_pointer, first_line, read_json, short
from fam_jax.hf.multimodal import is_multimodal, text_name, text_part
from fam_jax.hf.torch_model import base_config, stored_memory

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}

# Companions of a model, small files that are copied unchanged: tokenizer, chat template, license.
TOKENIZER_FILES = (
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*",
    "vocab.json", "merges.txt",
)  # fmt: skip
LICENSE_FILES = ("LICENSE*", "USE_POLICY*")
AGAIN = "download the files again, from one source"
# All files of a folder that are read.
READ = (CONFIG, "*.safetensors", INDEX, *TOKENIZER_FILES, *LICENSE_FILES)


class _Entry(NamedTuple):
    """A tensor in a file."""

    # Its name in the file.
    stored: str
    file: Path
    shape: tuple[int, ...]
    dtype: str


class Folder:
    """The tensors of a folder: names, shapes and dtypes at once, values on request.

    Only one file is open at a time, so at most one file is mapped into memory. For a model with a vision tower, this is
    its text part, under the names of a text model.

    Attributes:
      path: the folder.
      config: content of `config.json`; for a model with a vision tower, that of its text part; for an export for
        PyTorch, that of the base model.
      memory: `block_size` and the group `memory` of an export for PyTorch; empty for all others.
      files: the safetensors files.
      left_out: number of tensors of the vision tower and its projector.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Open the folder at `path`, which holds `config.json` and one or more safetensors files.

        Raises:
          ConvertError: the folder, its config.json or a safetensors file is missing or damaged.
        """
        self.path = Path(path).expanduser()
        if not self.path.is_dir():
            raise ConvertError(f"{path}: no such folder; give a folder with {CONFIG} and safetensors files")
        if not (self.path / CONFIG).is_file():
            raise ConvertError(
                f"{path}: holds no {CONFIG}; give the folder of a model in Hugging Face format"
            )
        for link in self.path.iterdir():
            if link.is_symlink() and any(fnmatch.fnmatchcase(link.name, pattern) for pattern in READ):
                check_inside(link, self.path)
        whole = read_json(self.path / CONFIG)
        self.config = base_config(text_part(whole))
        self.memory = stored_memory(whole)
        self.left_out = 0
        self._open: tuple[Path, Any] | None = None
        self._entries: dict[str, _Entry] = {}
        # The file of each tensor, by its stored name.
        self._seen: dict[str, str] = {}
        # By stored name, the file that the index names; None: there is no index.
        self._weight_map: dict[str, str] | None = None
        self.files = self._files()
        for file in self.files:
            self._list_tensors(file, whole)
        listed: dict[str, str] = self._weight_map or {}
        for name, place in listed.items():
            if name not in self._seen:
                raise ConvertError(f"{self.path}: {place} does not hold {name}, as {INDEX} says; {AGAIN}")

    def _list_tensors(self, file: Path, config: dict[str, Any]) -> None:
        """Enter the tensors of a file; `config` is that of the whole model."""
        handle, place = self._handle(file), file.relative_to(self.path).as_posix()
        for stored in handle.keys():  # noqa: SIM118  (no dict)
            if stored in self._seen:
                raise ConvertError(
                    f"{self.path}: the tensor {stored} is in {self._seen[stored]} and in {place}; {AGAIN}"
                )
            said = place if self._weight_map is None else self._weight_map.get(stored)
            if said is None:
                continue
            if said != place:
                raise ConvertError(
                    f"{self.path}: the tensor {stored} is in {place}, but {INDEX} says {said}; {AGAIN}"
                )
            self._seen[stored] = place
            name = text_name(stored) if is_multimodal(config) else stored
            if name is None:
                self.left_out += 1
                continue
            if name in self._entries:
                raise ConvertError(
                    f"{self.path}: {self._entries[name].stored} and {stored} are two spellings of one tensor; {AGAIN}"
                )
            part = handle.get_slice(stored)
            self._entries[name] = _Entry(stored, file, tuple(part.get_shape()), part.get_dtype())

    def metadata(self, file: Path) -> dict[str, str]:
        """Return the metadata of one of the files."""
        return self._handle(file).metadata() or {}

    @property
    def names(self) -> set[str]:
        """Return the names of all tensors."""
        return set(self._entries)

    def where(self, name: str) -> str:
        """Return the name of a tensor in its file, and the name of the file, for a message."""
        return f"{self._entries[name].stored} in {self._entries[name].file.name}"

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._entries[name].shape

    def dtype(self, name: str) -> np.dtype:
        """Return the dtype of a tensor.

        Raises:
          ConvertError: it is not a floating-point type of 16 bits or more.
        """
        stored, file, _, dtype = self._entries[name]
        if dtype not in DTYPES:
            raise ConvertError(
                f"{file.name}: tensor {stored} has dtype {dtype}, and only {', '.join(DTYPES)} are supported; "
                "save a quantized model unquantized first"
            )
        return np.dtype(DTYPES[dtype])

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Read slices of a tensor.

        Raises:
          ConvertError: its file can no longer be read.
        """
        stored, file = self._entries[name][:2]
        try:
            return self._handle(file).get_slice(stored)[index]
        except (safetensors.SafetensorError, OSError) as error:
            raise ConvertError(
                f"{file}: tensor {stored} cannot be read ({first_line(error)}); download the file again"
            ) from error

    def close(self) -> None:
        """Close the open file. Reading opens it again."""
        self._open = None

    def _files(self) -> list[Path]:
        if (self.path / SINGLE).is_file():
            return [self.path / SINGLE]
        if (self.path / INDEX).is_file():
            return self._files_of_index(self.path / INDEX)
        if any(self.path.glob("*.bin")) or any(self.path.glob("*.pt*")):
            raise ConvertError(
                f"{self.path}: holds PyTorch files but no safetensors; convert it with transformers: "
                "AutoModelForCausalLM.from_pretrained(DIR, dtype='auto').save_pretrained(NEW_DIR)"
            )
        if found := sorted(path.name for path in self.path.glob("*.safetensors")):
            raise ConvertError(
                f"{self.path}: holds {', '.join(found):.200}, but neither {SINGLE} nor {INDEX}; download {INDEX}, or "
                "the weights in the format of transformers"
            )
        raise ConvertError(
            f"{self.path}: holds neither {SINGLE} nor {INDEX}; download the weights of the model"
        )

    def _files_of_index(self, index: Path) -> list[Path]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ConvertError(f"{index}: has no weight_map; download the file again")
        for tensor, name in weight_map.items():
            if not isinstance(name, str) or not name:
                raise ConvertError(
                    f"{index}: weight_map.{tensor}: expected the name of a file, got {short(name)}; "
                    "download the file again"
                )
            check_inside(self.path / name, self.path)
        self._weight_map = weight_map
        files = [self.path / name for name in sorted(set(weight_map.values()))]
        if missing := [file.name for file in files if not file.is_file()]:
            raise ConvertError(f"{self.path}: {missing[0]}, which {INDEX} names, is missing; download it")
        return files

    def _handle(self, file: Path) -> Any:
        if self._open is None or self._open[0] != file:
            self._open = None
            check_no_pointer(file)
            try:
                self._open = file, safetensors.safe_open(file, framework="np")
            except (safetensors.SafetensorError, OSError) as error:
                raise ConvertError(
                    f"{file}: is damaged or not a safetensors file ({first_line(error)}); download it again"
                ) from error
        return self._open[1]


def copy_companions(
    source: epath.PathLike, target: epath.PathLike, *, config: bool = True, tokenizer: bool = True
) -> None:
    """Copy tokenizer, chat template and similar files into the folder `target`, which is made if needed.

    Args:
      source: folder to copy from.
      target: folder to copy to.
      config: whether to copy config.json too.
      tokenizer: whether to copy the tokenizer, and what names its tokens.

    Raises:
      ConvertError: a file cannot be read or written.
      UserError: a link leads out of the folder.
    """
    source, target = epath.Path(source), epath.Path(target)
    try:
        target.mkdir(parents=True, exist_ok=True)
        patterns = (*LICENSE_FILES, *((CONFIG,) if config else ()), *(TOKENIZER_FILES if tokenizer else ()))
        # Not source.glob, which takes characters of the folder's path for a pattern.
        for file in source.iterdir():
            if any(fnmatch.fnmatchcase(file.name, pattern) for pattern in patterns) and file.is_file():
                check_inside(file, source)
                (target / file.name).write_bytes(file.read_bytes())
    except OSError as error:
        path = error.filename or target
        raise ConvertError(
            f"{path}: cannot be copied to {target} ({error.strerror}); check permissions and disk space"
        ) from error
