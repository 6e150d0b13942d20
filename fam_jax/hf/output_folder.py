"""Output folders of imports and exports: checked before anything is read, and removed if writing fails."""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import safetensors
from etils import epath
from jax.experimental import multihost_utils

from fam_jax.checkpoint import COMPANIONS, SOURCE, VOCABULARY, absolute, check_name, saved_steps
from fam_jax.config import UserError
from fam_jax.config.strict_json import dump_json
from fam_jax.hf.config_json import ConvertError
from fam_jax.hf.folder import copy_companions

UNFINISHED = ".unfinished_export"
# Names in the folder of an unfinished import.
UNFINISHED_IMPORT = (
    rf"{COMPANIONS}|{VOCABULARY}|\.lock|config\.json(\.tmp)?|\.config\.json\.unfinished|"
    r"0(\.orbax-checkpoint-tmp.*)?"
)


def check_new_folder(path: str | os.PathLike[str]) -> Path:
    """Return the absolute path of a folder that an export may write.

    Raises:
      ConvertError: there is a file, a mounted file system, or a folder that is not empty, or it cannot be created.
    """
    folder = Path(path).expanduser().resolve()
    if folder.exists() and not folder.is_dir():
        raise ConvertError(f"{folder}: is a file; give a new folder as --out")
    if folder.is_mount():
        raise ConvertError(
            f"{folder}: is the root of a mounted file system; give a new folder in it as --out"
        )
    if folder.is_dir() and any(folder.iterdir()):
        raise ConvertError(f"{folder}: is not empty; give a new folder as --out")
    _check_writable(folder, folder.parent)  # the export is written beside it
    return folder


def _check_writable(out: Path, place: Path) -> None:
    """Raise :class:`ConvertError` if nothing can be created in `place`, or below the part of it that exists."""
    found = next(folder for folder in (place, *place.parents) if folder.exists())
    number = 0 if found.is_dir() else errno.ENOTDIR
    if not number and not os.access(found, os.W_OK | os.X_OK):
        number = errno.EROFS if os.statvfs(found).f_flag & os.ST_RDONLY else errno.EACCES
    if number:
        raise ConvertError(f"{out}: cannot be created ({os.strerror(number)}); give another --out")


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Create a folder that appears at `path` only when the context ends without an error.

    Until then it lies beside `path`, under a hidden name. It is removed if an error occurs. The next export removes
    what a killed process left.

    Yields:
      The folder to write to.

    Raises:
      ConvertError: the folder at `path` is not empty, or cannot be written.
    """
    folder = check_new_folder(path)
    beside = folder.with_name(f".{folder.name}{UNFINISHED}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if beside.exists():
            shutil.rmtree(beside)
        beside.mkdir()
        yield beside
        beside.replace(folder)
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConvertError(f"{folder}: cannot be written ({reason}); give another --out") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def check_new_checkpoint(path: str | os.PathLike[str]) -> epath.Path:
    """Return the absolute path of a checkpoint folder that an import may write.

    Raises:
      UserError: there is a file, or a folder that is not empty, or it cannot be created. A folder that an unfinished
        import left is fine.
    """
    out = absolute(path)
    check_name(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give a new folder as --out")
    if "://" not in os.fspath(out):
        _check_writable(Path(out), Path(out))
    names = [path.name for path in out.iterdir()] if out.exists() else []
    # An import writes the companions first and the step last.
    unfinished = COMPANIONS in names and not saved_steps(out)
    if names and not (unfinished and all(re.fullmatch(UNFINISHED_IMPORT, name) for name in names)):
        raise UserError(f"{out}: is not empty; give a new folder as --out")
    return out


@contextlib.contextmanager
def new_checkpoint(out: epath.Path, source: Path, tokenizer: Path | None = None) -> Iterator[None]:
    """Create the folder of a checkpoint with the companions of a model; remove it if an error occurs.

    All processes of a job enter together, and the first one writes. In a job of several processes an error leaves the
    folder as it is: the processes end each other. The next import empties it.

    Args:
      out: a folder that :func:`check_new_checkpoint` returned.
      source: the folder of the model, in Hugging Face format.
      tokenizer: the folder of its tokenizer; None: `source`.

    Raises:
      ConvertError: the folder cannot be written, or a companion cannot be read.
    """
    if jax.process_index() == 0:
        try:
            _remove_contents(out)
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConvertError(f"{out}: cannot be created ({error.strerror}); give another --out") from error
    try:
        if jax.process_index() == 0:
            copy_companions(source, out / COMPANIONS, tokenizer=False)
            copy_companions(tokenizer or source, out / COMPANIONS, config=False)
            record = dump_json({"source": str(source.resolve())}, indent=2)
            (out / COMPANIONS / SOURCE).write_text(record + "\n")
        multihost_utils.sync_global_devices("companions")  # nothing of an earlier import is left from here on
        yield
    except BaseException:
        if jax.process_count() == 1:
            with contextlib.suppress(OSError):  # the next import recognizes what stays
                _remove_contents(out)
                out.rmdir()
        raise


def _remove_contents(out: epath.Path) -> None:
    """Empty the folder of an unfinished import. The companions, which mark it as one, are removed last."""
    found = sorted(out.iterdir(), key=lambda path: path.name == COMPANIONS) if out.exists() else []
    for path in found:
        if path.is_dir():
            path.rmtree()
        else:
            path.unlink()
