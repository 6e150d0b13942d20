"""Load a config file, with one line that names file and line for every mistake in it."""

import contextlib
import importlib
import importlib.util
import inspect
import itertools
import re
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fam_jax.config import Config, ConfigError, UserError, resolve
from fam_jax.config.overrides import Override, apply_overrides


def load_config(name: str, overrides: Sequence[Override] = ()) -> Config:
    """Load a config file, set fields of its config, and check the result.

    Args:
      name: FILE, or FILE:ARG to call its `get_config` with the text ARG. FILE is a path, or the name of a config that
        comes with fam_jax. Both may have colons.
      overrides: fields to set.

    Raises:
      ConfigError: the file cannot be loaded, or the config is not valid.
    """
    file, path = _find(name)
    argument = name[len(file) + 1 :]
    with errors_of_file(path):
        get_config = getattr(_load_module(path), "get_config", None)
        if not callable(get_config):
            raise ConfigError(
                f"--config={name}: the file has no function get_config; define one that returns the config"
            )
        arguments = [argument] if name != file else []
        _check_arguments(name, file, get_config, arguments)
        values = get_config(*arguments)
        values = values.to_dict() if hasattr(values, "to_dict") else values
    if not isinstance(values, dict):
        raise ConfigError(
            f"--config={name}: get_config returns a {type(values).__name__}; return an edited default_config()"
        )
    apply_overrides(values, overrides)
    return resolve(values)


def own_configs() -> dict[str, Path]:
    """Return the config files that come with fam_jax, by name."""
    # In a clone they are the package `configs`; where fam_jax is installed, `fam_jax_configs` beside `fam_jax_launch`.
    package = importlib.import_module((__package__ or "").replace("launch", "configs"))
    files = sorted(Path(package.__path__[0]).glob("*.py"))
    return {file.stem: file for file in files if "\ndef get_config(" in file.read_text()}


def _find(name: str) -> tuple[str, Path]:
    """Return the part of FILE:ARG that names the file, and its path: the shortest part that names one."""
    known, parts = own_configs(), name.split(":")
    for end in range(1, len(parts) + 1):
        file = ":".join(parts[:end])
        path = known.get(file, Path(file))
        if path.is_file():
            return file, path
    raise ConfigError(
        f"--config={name}: there is no such file; give its path, or one of the names {', '.join(known)}"
    )


_folders = itertools.count()


def _load_module(path: Path) -> types.ModuleType:
    # Its folder is a package of its own, so that relative imports find the files beside it.
    package = types.ModuleType(f"config_folder_{next(_folders)}")
    package.__path__ = [str(path.resolve().parent)]
    sys.modules[package.__name__] = package
    spec = importlib.util.spec_from_file_location(f"{package.__name__}.{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--config={path}: is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _check_arguments(name: str, file: str, get_config: Callable[..., Any], arguments: list[str]) -> None:
    """Raise :class:`ConfigError` unless `get_config` can be called with these arguments."""
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError:
        if arguments:
            raise ConfigError(
                f"--config={name}: get_config takes no argument; give --config={file}"
            ) from None
        raise ConfigError(
            f"--config={name}: get_config needs an argument; give --config={file}:ARG"
        ) from None


@contextlib.contextmanager
def errors_of_file(path: Path) -> Iterator[None]:
    """Turn an error in a user's Python file, or in one beside it, into one line that says where it is.

    Raises:
      ConfigError: there was an error.
    """
    try:
        yield
    except UserError:
        raise
    except SyntaxError as error:
        line = f", line {error.lineno}" if error.lineno else ""
        raise ConfigError(
            f"{_shown(error.filename or path, path)}{line}: {error.msg}; correct the file"
        ) from error
    except (Exception, SystemExit) as error:
        folder = path.resolve().parent
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if Path(frame.filename).resolve().parent == folder]
        where = f"{_shown(own[-1].filename, path)}, line {own[-1].lineno}" if own else str(path)
        raise ConfigError(f"{where}: {_what(error)}; correct the file") from error


def _shown(filename: str | Path, path: Path) -> str:
    """Return the name of a file in the folder of `path`, as the user wrote it."""
    return str(path.parent / Path(filename).name)


def _what(error: BaseException) -> str:
    """Return what an error says, in one line."""
    # ConfigDict quotes what it says about an unknown field two or three times over.
    text = " ".join(str(error).replace(r"\n", " ").split())
    if wrong := re.search(r'Did you mean "(\w+)" instead of "(\w+)"', text):
        return f"there is no field {wrong[2]}; did you mean {wrong[1]}?"
    if wrong := re.fullmatch(r"""\"'(\w+)'\"""", text):
        return f"there is no field {wrong[1]}"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
