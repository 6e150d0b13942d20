"""Saved states of tf.data iterators, so that a resumed run need not read again what came before."""

import contextlib
import hashlib
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from absl import logging
from etils import epath

from fam_jax.data.quiet_seqio import tf

# Seconds between two bookmarks.
SECONDS = 10.0
# Bookmarks that stay in the folder, the newest ones.
KEPT = 4
# Bytes of the checksum at the start of a file.
DIGEST = 16
# Of temporary folders.
PREFIX = "fam_jax_bookmarks_"
# Files in which TensorFlow saves "state".
STATE_FILES = ("state.index", "state.data-00000-of-00001")
# Policy of tf.data for functions with a state that cannot be saved: an error.
FAIL = 2


class Bookmark(NamedTuple):
    """A place in the examples, and how the iterator got there."""

    epoch: int
    # Number of the next example in its epoch.
    place: int
    # Examples that the iterator's dataset was told to skip.
    skipped: int

    @classmethod
    def of_file(cls, path: epath.Path) -> "Bookmark":
        """Return the bookmark of a file; ValueError or TypeError if it has another name."""
        return cls(*map(int, path.name.split("-")))

    @property
    def file_name(self) -> str:
        """Return the name of its file."""
        return "-".join(map(str, self))


def check_savable(dataset: tf.data.Dataset) -> None:
    """Check that all of the state of a dataset's iterators can be saved.

    Raises:
      ValueError: a function of the dataset may have a state that cannot.
    """
    try:
        variant = tf.data.experimental.to_variant(dataset)
        tf.raw_ops.DatasetToGraphV2(input_dataset=variant, external_state_policy=FAIL)
    except tf.errors.OpError as error:
        raise ValueError(reason_of(error)) from error


def saved_state(iterator: tf.data.NumpyIterator) -> bytes:
    """Return the state of an iterator over a :func:`savable` dataset, in a tenth of the time of its method `save`."""
    with tempfile.TemporaryDirectory(prefix=PREFIX) as folder:
        tf.train.Checkpoint(iterator=iterator).write(f"{folder}/state")
        parts = [Path(folder, name).read_bytes() for name in STATE_FILES]
    return len(parts[0]).to_bytes(8, "little") + b"".join(parts)


def savable(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Return the dataset, with iterators whose state is saved without that of Python functions and random numbers."""
    options = tf.data.Options()
    options.experimental_external_state_policy = tf.data.experimental.ExternalStatePolicy.IGNORE
    return dataset.with_options(options)


def restore(iterator: tf.data.NumpyIterator, state: bytes) -> None:
    """Continue from a :func:`saved_state` of an iterator over such a dataset.

    Raises:
      ValueError: the state is of another dataset, or of another version of TensorFlow.
    """
    length = 8 + int.from_bytes(state[:8], "little")
    with tempfile.TemporaryDirectory(prefix=PREFIX) as folder:
        for name, part in zip(STATE_FILES, (state[8:length], state[length:]), strict=True):
            Path(folder, name).write_bytes(part)
        try:
            tf.train.Checkpoint(iterator=iterator).read(f"{folder}/state").assert_consumed()
        except (tf.errors.OpError, AssertionError) as error:
            raise ValueError(reason_of(error)) from error


def reason_of(error: Exception) -> str:
    """Return what TensorFlow says in an error, without the place."""
    return str(error).partition("\n")[0].rpartition("}} ")[2].partition(" [Op:")[0]


class Bookmarks:
    """The bookmarks of one sequence of examples.

    The thread that reads adds one every few seconds, in a temporary folder. At a checkpoint, the last one before the
    run's position is copied to a folder that outlives the process. A bookmark only saves time: one that is missing,
    damaged, or of another version of TensorFlow leaves a resumed run with the same examples, which it then reads
    again from an earlier bookmark or from the start of the epoch.
    """

    def __init__(self, folder: epath.Path, name: str, *, makes: bool = True):
        """Prepare to make bookmarks. Nothing is written yet.

        Args:
          folder: where bookmarks outlive the process.
          name: of the examples, for warnings.
          makes: False: use those that another process makes.
        """
        self._folder, self._name = folder, name
        self._made: list[Bookmark] = []
        self._last = time.monotonic()
        # Whether bookmarks are made, and whether the folder can be written.
        self._works = self._kept = makes
        # Whether all of the state can be saved, as far as that is known.
        self._checked = False
        self._temporary: Path | None = None
        # The reading thread adds bookmarks while the main thread keeps and drops them.
        self._lock = threading.Lock()

    def due(self) -> bool:
        """Return whether it is time for another bookmark."""
        return self._works and time.monotonic() - self._last >= SECONDS

    def add(
        self, bookmark: Bookmark, iterator: tf.data.NumpyIterator, parts: Iterable[tf.data.Dataset]
    ) -> None:
        """Save the state of an iterator; warn once if TensorFlow cannot save it.

        Args:
          bookmark: where the iterator is.
          iterator: over examples.
          parts: datasets that together have all functions of the iterator's dataset that may have a state; looked at
            before the first bookmark only.
        """
        try:
            if not self._checked:
                for part in parts:
                    check_savable(part)
                self._checked = True
            state = saved_state(iterator)
            digest = hashlib.blake2b(state, digest_size=DIGEST).digest()
            with self._lock:
                self._path_of(bookmark).write_bytes(digest + state)
                self._made.append(bookmark)
        except (ValueError, tf.errors.OpError, OSError) as error:
            self._give_up(error)
        self._last = time.monotonic()

    def passed(self, epoch: int, place: int) -> None:
        """Drop the bookmarks that no checkpoint will want, now that the run has come to this place."""
        with self._lock:
            before = [mark for mark in self._made if mark[:2] <= (epoch, place)]
            for mark in before[:-1]:
                self._made.remove(mark)
                with contextlib.suppress(OSError):
                    self._path_of(mark).unlink()

    def keep(self, epoch: int, place: int) -> None:
        """Copy the last bookmark up to this place to the folder, and remove others there; warn if that fails."""
        with self._lock:
            marks = [mark for mark in self._made if mark.epoch == epoch and mark.place <= place]
            if not marks or not self._kept:
                return
            name = max(marks).file_name
            try:
                if not (self._folder / name).exists():
                    self._folder.mkdir(parents=True, exist_ok=True)
                    part = self._folder / f"{name}.part"
                    part.write_bytes(self._path_of(max(marks)).read_bytes())
                    part.replace(self._folder / name)
                # What lies behind this place was read before the run was taken back to an earlier step.
                saved = sorted(self._saved())
                before = [mark for mark in saved if mark[:2] <= (epoch, place)]
                for mark in {*saved} - {*before[-KEPT:]}:
                    (self._folder / mark.file_name).unlink()
            except OSError as error:
                self._kept = False
                self._give_up(error)

    def until(self, epoch: int, place: int) -> Iterator[tuple[Bookmark, bytes]]:
        """Yield the bookmarks in the folder up to a place of an epoch, the last one first, with their states."""
        for mark in sorted(self._saved(), reverse=True):
            if mark.epoch != epoch or mark.place > place:
                continue
            with contextlib.suppress(OSError):
                raw = (self._folder / mark.file_name).read_bytes()
                if hashlib.blake2b(raw[DIGEST:], digest_size=DIGEST).digest() == raw[:DIGEST]:
                    yield mark, raw[DIGEST:]

    def _saved(self) -> Iterator[Bookmark]:
        """Yield the bookmarks in the folder."""
        if self._folder.is_dir():
            for path in self._folder.iterdir():
                with contextlib.suppress(ValueError, TypeError):
                    yield Bookmark.of_file(path)

    def _path_of(self, bookmark: Bookmark) -> Path:
        if self._temporary is None:
            self._temporary = Path(tempfile.mkdtemp(prefix=PREFIX))
            weakref.finalize(self, shutil.rmtree, self._temporary, ignore_errors=True)
        return self._temporary / bookmark.file_name

    def _give_up(self, error: Exception) -> None:
        """Make no more bookmarks."""
        self._works = False
        reason = error.strerror if isinstance(error, OSError) else reason_of(error)
        logging.warning(
            "%s: the place in the data cannot be saved (%s), so a resumed run reads the examples of its epoch again; "
            "docs/data.md says which preprocessing can be saved",
            self._name,
            reason,
        )
