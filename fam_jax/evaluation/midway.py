"""Memories of long documents that are being read, saved now and then: a killed evaluation goes on in their middle."""

import hashlib
import logging
import time
from collections.abc import Mapping
from pathlib import Path

from fam_jax.checkpoint.new_file import new_file
from fam_jax.config import UserError
from fam_jax.config.strict_json import dump_json, parse_json
from fam_jax.generation.state_file import load_state, save_state
from fam_jax.generation.streaming import Streamer
from fam_jax.model import StreamState

# By document: blocks read, and the state of one stream after them.
Begun = dict[str, tuple[int, StreamState]]


class Midway:
    """Saves the memories of documents that take longer than some minutes to read.

    There are two files: OUT.midway.safetensors has the states (`fam_jax.generation.state_file`), OUT.midway.json the
    documents, the blocks that were read of each, and the SHA-256 of the first file.
    """

    def __init__(self, results: Path, task: str, streamer: Streamer, minutes: float):
        """Watch over the documents of a task.

        Args:
          results: the file of results, which the two files stand beside.
          task: a name that changes with the items of the task.
          streamer: the model.
          minutes: between two times that memories are saved; 0: never.
        """
        self._names, self._states = _files(results)
        self._task, self._streamer, self._seconds = task, streamer, 60 * minutes
        self._saved = time.monotonic()
        # When each document was seen first.
        self._since: dict[str, float] = {}

    def begun(self) -> Begun:
        """Return what an earlier call had read; nothing if the files are missing, damaged or of another task."""
        try:
            told = parse_json(self._names.read_bytes())
            if told["task"] != self._task or told["states"] != _digest(self._states):
                return {}
            state = load_state(self._states, self._streamer.config, self._streamer.params)
            blocks = {str(key): int(count) for key, count in told["documents"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, UserError, ValueError, KeyError, TypeError, AttributeError) as error:
            logging.warning("%s: cannot be used (%s); its documents are read again", self._names, error)
            return {}
        found = {key: (count, state.select([row])) for row, (key, count) in enumerate(blocks.items())}
        self._since = dict.fromkeys(found, -self._seconds)
        size = self._streamer.config.block_size
        return {key: each for key, each in found.items() if each[1].tokens_read.tolist() == [each[0] * size]}

    def offer(self, reading: Mapping[int, tuple[str, int]], state: StreamState) -> None:
        """Save the memories of documents that have been read for long enough, if the last time is long enough ago.

        Args:
          reading: by row, the document that is read in it, and how many of its blocks have been read.
          state: of all rows.

        Raises:
          UserError: the files cannot be written.
        """
        now = time.monotonic()
        for key, _ in reading.values():
            self._since.setdefault(key, now)
        if not self._seconds or now - self._saved < self._seconds:
            return
        long = {
            row: each
            for row, each in reading.items()
            if now - self._since[each[0]] >= self._seconds and each[1]
        }
        if not long:
            return
        save_state(self._states, state.select([*long]), self._streamer.config, self._streamer.params)
        told = {"task": self._task, "documents": dict(long.values()), "states": _digest(self._states)}
        try:
            with new_file(self._names) as file:
                file.write(dump_json(told).encode())
        except OSError as error:
            raise UserError(
                f"{self._names}: cannot be written ({error.strerror}); give another --out"
            ) from error
        self._saved = time.monotonic()

    def clear(self) -> None:
        """Delete the files, if they are of this task."""
        try:
            mine = parse_json(self._names.read_bytes())["task"] == self._task
        except (OSError, ValueError, KeyError, TypeError):
            mine = self._names.exists()  # damaged
        for path in (self._names, self._states) if mine else ():
            path.unlink(missing_ok=True)


def forget(results: Path) -> None:
    """Delete what stands beside a file of results, of whatever task."""
    for path in _files(results):
        path.unlink(missing_ok=True)


def _files(results: Path) -> tuple[Path, Path]:
    return results.with_suffix(".midway.json"), results.with_suffix(".midway.safetensors")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
