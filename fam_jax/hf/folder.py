"""A folder in Hugging Face format, read one tensor at a time."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (numpy then knows bfloat16)
import numpy as np
import safetensors
from etils import epath

from fam_jax.hf.errors import ConvertError
from fam_jax.hf.multimodal import is_multimodal, text_name, text_part
from fam_jax.hf.options import short

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MEMORY_FILE = "memory.safetensors"
FAM_FILE = "fam.safetensors"  # its name in format 1
DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}

# Small files that go with a model and that nothing here changes: the tokenizer, its chat template, defaults.
COMPANIONS = (
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*",
    "vocab.json", "merges.txt", "LICENSE*", "USE_POLICY*",
)  # fmt: skip


class _Entry(NamedTuple):
    stored: str  # name in the file
    file: Path
    shape: tuple[int, ...]
    dtype: str


class Folder:
    """Names, shapes and dtypes of all tensors, known at once; their values on request.

    One file is open at a time, so that no more than that is mapped into memory. Of a model with a vision tower it is
    the text part, under the names of a text model.

    Attributes:
      path: of the folder.
      config: content of `config.json`; of a model with a vision tower, what the text part would have there.
      left_out: how many tensors of a vision tower there are.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Opens the folder at `path`, which holds `config.json` and one or several safetensors files.

        Raises:
          ConvertError: the folder, its config or a file is missing or damaged, or there are no safetensors files.
        """
        self.path = Path(path).expanduser()
        if not self.path.is_dir():
            raise ConvertError(f"{path}: no such folder; give one with config.json and safetensors files")
        if not (self.path / CONFIG).is_file():
            raise ConvertError(
                f"{path}: holds no {CONFIG}; give the folder of a model in Hugging Face format"
            )
        whole = read_json(self.path / CONFIG)
        self.config = text_part(whole)
        self.left_out = 0
        self._open: tuple[Path, Any] | None = None
        self._entries: dict[str, _Entry] = {}
        for file in self._files():
            handle = self._handle(file)
            for stored in handle.keys():  # noqa: SIM118  (no dict)
                name = text_name(stored) if is_multimodal(whole) else stored
                if name is None:
                    self.left_out += 1
                    continue
                if name in self._entries and self._entries[name].stored != stored:
                    raise ConvertError(
                        f"{self.path}: tensors {self._entries[name].stored} and {stored} are one in two spellings; "
                        "fetch the files again, from one source"
                    )
                part = handle.get_slice(stored)
                self._entries[name] = _Entry(stored, file, tuple(part.get_shape()), part.get_dtype())

    @property
    def memory_file(self) -> Path | None:
        """Return the file with the parameters of the memory, or None if there is none."""
        files = (self.path / name for name in (MEMORY_FILE, FAM_FILE))
        return next((file for file in files if file.is_file()), None)

    @property
    def names(self) -> set[str]:
        """Of all tensors."""
        return set(self._entries)

    def where(self, name: str) -> str:
        """A tensor's name in its file, and the file's."""
        return f"{self._entries[name].stored} in {self._entries[name].file.name}"

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor."""
        return self._entries[name].shape

    def dtype(self, name: str) -> np.dtype:
        """Of a tensor.

        Raises:
          ConvertError: it is no floating-point type of 16 bits or more.
        """
        stored, file, _, dtype = self._entries[name]
        if dtype not in DTYPES:
            raise ConvertError(
                f"{file.name}: tensor {stored} has dtype {dtype}; supported are {', '.join(DTYPES)} "
                "(a quantised model must be saved unquantised first)"
            )
        return np.dtype(DTYPES[dtype])

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Part of a tensor.

        Raises:
          ConvertError: its file cannot be read any more.
        """
        stored, file = self._entries[name][:2]
        try:
            return self._handle(file).get_slice(stored)[index]
        except (safetensors.SafetensorError, OSError) as error:
            raise ConvertError(
                f"{file}: tensor {stored} cannot be read ({_line(error)}); fetch the file again"
            ) from error

    def close(self) -> None:
        """Lets go of the open file; it is opened again when needed."""
        self._open = None

    def _files(self) -> list[Path]:
        if (self.path / SINGLE).is_file():
            return [self.path / SINGLE]
        if (self.path / INDEX).is_file():
            weight_map = read_json(self.path / INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ConvertError(f"{self.path / INDEX}: has no weight_map; fetch the file again")
            for tensor, name in weight_map.items():
                if not isinstance(name, str) or not name:
                    raise ConvertError(
                        f"{self.path / INDEX}: weight_map.{tensor}: expected the name of a file, got {short(name)}; "
                        "fetch the file again"
                    )
            files = [self.path / name for name in sorted(set(weight_map.values()))]
            if missing := [file.name for file in files if not file.is_file()]:
                raise ConvertError(
                    f"{self.path}: {missing[0]} is missing, which {INDEX} names; fetch the file"
                )
            return files
        if any(self.path.glob("*.bin")) or any(self.path.glob("*.pt*")):
            raise ConvertError(
                f"{self.path}: holds PyTorch files only, and safetensors are needed; convert it by transformers: "
                "AutoModelForCausalLM.from_pretrained(DIR, dtype='auto').save_pretrained(NEW_DIR)"
            )
        raise ConvertError(f"{self.path}: holds neither {SINGLE} nor {INDEX}; fetch the model's weights")

    def _handle(self, file: Path) -> Any:
        if self._open is None or self._open[0] != file:
            self._open = None
            try:
                self._open = file, safetensors.safe_open(file, framework="np")
            except (safetensors.SafetensorError, OSError) as error:
                raise ConvertError(
                    f"{file}: is no safetensors file or is damaged ({_line(error)}); fetch it again"
                ) from error
        return self._open[1]


def copy_companions(source: epath.PathLike, target: epath.PathLike, *, config: bool = True) -> None:
    """Copies tokenizer, chat template and other small files, and config.json if asked; makes the folder `target`.

    Raises:
      ConvertError: a file cannot be read, or not be written.
    """
    source, target = epath.Path(source), epath.Path(target)
    try:
        target.mkdir(parents=True, exist_ok=True)
        for pattern in (CONFIG, *COMPANIONS) if config else COMPANIONS:
            for file in source.glob(pattern):
                if file.is_file():
                    (target / file.name).write_bytes(file.read_bytes())
    except OSError as error:
        place = error.filename or target
        raise ConvertError(f"{place}: cannot be copied to {target} ({error.strerror})") from error


def read_json(path: epath.PathLike) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      ConvertError: it cannot be read, or is none.
    """
    try:
        content = json.loads(epath.Path(path).read_text())
    except (ValueError, OSError) as error:
        raise ConvertError(f"{path}: is not readable as JSON ({_line(error)}); fetch it again") from error
    if not isinstance(content, dict):
        raise ConvertError(f"{path}: expected a JSON object; fetch it again")
    return content


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
