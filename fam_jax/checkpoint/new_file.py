"""Write files that appear only when they are complete, with the mode that the umask gives."""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from typing import BinaryIO

from etils import epath

from fam_jax.config import UserError


@contextlib.contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file for writing that appears at `path` when the block ends, and does not if it raises.

    Missing folders are created. Until the end, the file lies beside `path` under a hidden name.

    Raises:
      OSError: the file cannot be written.
    """
    whole = epath.Path(path)
    unfinished = whole.parent / f".{whole.name}.unfinished"
    if whole.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    if os.path.exists(path) and not os.path.isfile(path):  # on this machine, not in a bucket
        # Renaming the file would put it in the place of the device, such as /dev/null.
        raise OSError(errno.EINVAL, "it is a device or a pipe")
    try:
        whole.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from error
    try:
        with unfinished.open("wb") as file:
            yield file
        unfinished.replace(whole)
    finally:
        unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def output_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open the file that --out names, as :func:`new_file` does.

    Raises:
      UserError: the file cannot be written.
    """
    try:
        with new_file(path) as file:
            yield file
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); give another --out") from error


def check_output_file(path: str | os.PathLike[str]) -> None:
    """Raise :class:`UserError` if :func:`output_file` could not write `path`. Call it before hours of work."""
    with contextlib.suppress(_NotWritten), output_file(path):
        raise _NotWritten


class _NotWritten(Exception):
    """Ends a block of :func:`output_file` without leaving a file."""


@contextlib.contextmanager
def mode_of_umask(path: str | os.PathLike[str]) -> Iterator[None]:
    """Give the file that the block writes at `path` the mode that the umask gives.

    Use it for libraries that choose another mode: safetensors writes files that only their owner can read.

    Raises:
      OSError: the file cannot be created.
    """
    with open(path, "wb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    yield
    os.chmod(path, mode)
