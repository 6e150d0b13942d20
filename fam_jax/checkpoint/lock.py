"""Let one job at a time write to the folder of a run, or to the file that --out names."""

import contextlib
import fcntl
import os
from typing import Self

from etils import epath

from fam_jax.checkpoint.folder import CheckpointError

LOCK = ".lock"


class WriterLock:
    """A lock on a folder or a file, which the operating system releases when the process ends, however it ends.

    There is none in buckets, nor on file systems without `flock`.
    """

    def __init__(self, folder: epath.Path, output: str = ""):
        """Take the lock.

        Args:
          folder: the folder, or that of the file.
          output: name of the file, whose lock is a hidden file beside it; empty: lock the folder.

        Raises:
          CheckpointError: another process has it.
          OSError: the folder cannot be written.
        """
        name = f".{output}{LOCK}" if output else LOCK
        self._place, self._instead = (folder / output, "--out") if output else (folder, "workdir")
        self._path = None if "://" in os.fspath(folder) else os.path.join(folder, name)
        self._file: int | None = None
        while self._path is not None and self._file is None:
            self._file = self._take(self._path)

    def _take(self, path: str) -> int | None:
        """Return the locked file, or None if it was removed in the meantime."""
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(file)
            raise CheckpointError(
                f"{self._place}: another process is writing to it; wait until it ends, or give another "
                f"{self._instead}"
            ) from error
        except OSError:
            self._path = None  # the file system has no locks
            return file
        try:
            same = os.path.samestat(os.fstat(file), os.stat(path))
        except FileNotFoundError:
            same = False
        if not same:
            os.close(file)
            return None
        return file

    def release(self) -> None:
        """Release the lock and remove its file. Do nothing if that was done."""
        if self._file is not None:
            if self._path is not None:
                with contextlib.suppress(FileNotFoundError):  # the whole folder may have been removed
                    os.unlink(self._path)
            os.close(self._file)
        self._path = self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
