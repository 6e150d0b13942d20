"""Write to a run's folder, which may be in a bucket."""

import os
import pathlib
import tempfile

from etils import epath


class Mirror:
    """A local folder to write to: `folder` itself or, if that is in a bucket, a temporary folder to upload from.

    Objects in a bucket cannot be appended to, and the profiler and TensorBoard's writer take only local paths.
    """

    def __init__(self, folder: epath.Path):
        """Create the local folder."""
        self._remote = folder if "://" in os.fspath(folder) else None
        self._uploaded: dict[pathlib.Path, tuple[int, int]] = {}
        self._temporary = tempfile.TemporaryDirectory() if self._remote is not None else None
        self.local = pathlib.Path(self._temporary.name if self._temporary is not None else folder)
        self.local.mkdir(parents=True, exist_ok=True)

    def fetch(self, name: str) -> pathlib.Path:
        """Return the local path of a file, with its contents copied from the bucket."""
        path = self.local / name
        if self._remote is not None and (self._remote / name).exists():
            path.write_bytes((self._remote / name).read_bytes())
        return path

    def upload(self) -> None:
        """Upload the files that have changed since the last call."""
        if self._remote is None:
            return
        for path in sorted(self.local.rglob("*")):
            status = path.stat()
            version = (status.st_size, status.st_mtime_ns)
            if path.is_file() and self._uploaded.get(path) != version:
                target = self._remote / path.relative_to(self.local).as_posix()
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
                self._uploaded[path] = version

    def close(self) -> None:
        """Upload the remaining changes and remove the temporary folder."""
        self.upload()
        if self._temporary is not None:
            self._temporary.cleanup()
