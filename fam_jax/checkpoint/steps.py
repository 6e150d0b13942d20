"""Save and restore the steps of a run."""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from fam_jax.checkpoint import manifest
from fam_jax.checkpoint.aside import note_of_gone_step, remember_newest, set_aside
from fam_jax.checkpoint.folder import CheckpointError, DamagedStepError, SaveError, absolute, check_name
from fam_jax.checkpoint.loading import choose_step, load_state, read_back, split_state
from fam_jax.checkpoint.lock import WriterLock
from fam_jax.checkpoint.orbax_io import first_line, orbax_context
from fam_jax.checkpoint.origin import keep_copies, settle_origin
from fam_jax.checkpoint.run_config import MAY_CHANGE, correct_history, settle_config
from fam_jax.config.format1 import FORMAT

PyTree = Any

# Seconds before each new attempt to save a step that could not be saved.
PAUSES = (1.0, 5.0, 25.0)
# Bytes of each part that are read back after the first save.
READ_BACK_BYTES = 64 * 2**20


class Checkpoints:
    """The checkpoints of a training run; a context manager, which waits for the last save when it exits.

    All processes of a job open it, save and restore together. Only one instance at a time may write to a folder.

    Attributes:
      folder: folder of the run.
      previous_config: the config that the run had before, as nested dict.
      notes: lines for the user about steps that are gone or damaged.
    """

    _rewound_to: int | None = None
    # The step that was saved last, or is being saved; whether it is known to be complete; why it could not be saved.
    _saving: int | None = None
    _complete = True
    _lost: SaveError | None = None
    # Of Orbax, to the save in progress.
    _response: Any = None
    # Whether a part of the first step was read back.
    _read_back = False

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        config: Mapping[str, Any],
        keep: int,
        may_change: Sequence[str] = MAY_CHANGE,
        in_flight_bytes: int | None = None,
        step: int | None = None,
        forked_from: str = "",
        task_vocabulary: str = "",
    ):
        """Open `folder` for training. Create it, with the config as `config.json`, if it does not exist.

        Args:
          folder: folder of the run. Relative paths start at the current directory.
          config: the resolved config as nested dict, from `dataclasses.asdict`.
          keep: number of latest steps to keep.
          may_change: patterns of config fields that may change when the run is resumed. train.init_from and
            data.vocabulary may always change to another place of the same base and vocabulary.
          in_flight_bytes: None copies all arrays to host memory, so that a save returns early. A number writes them
            without a copy, at most that many bytes at a time (at least the largest array); the arrays must not change
            until the save is complete.
          step: the saved step that the run goes on from; None: the latest.
          forked_from: WORKDIR/STEP of the checkpoint that a new run starts from, for its record.
          task_vocabulary: digest of a vocabulary that the data task brings along; empty: data.vocabulary names it.

        Raises:
          CheckpointError: the folder holds a run with another config or vocabulary, another process writes to it, or
            it cannot be written.
        """
        self.folder = absolute(folder)
        check_name(self.folder)
        self._lock = self._locked()
        try:
            self._origin, moved = settle_origin(self.folder, config, step, forked_from, task_vocabulary)
            self.previous_config = settle_config(
                self.folder, config, (*may_change, *moved), step=step, forked_from=forked_from
            )
            if jax.process_index() == 0:
                keep_copies(self.folder, config)
            self._open = functools.partial(
                ocp.training.Checkpointer,
                self.folder,
                context=orbax_context(in_flight_bytes),
                preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            )
            self._steps = self._open()
            note = note_of_gone_step(self.folder, self.all_steps())
            self.notes = [note] if note and step is None else []
        except OSError as error:
            self._lock.close()
            raise self._unwritable(error) from error
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait for the save in progress and close the folder."""
        with self._lock, self._writing():
            try:
                if self._lost is None:  # or that was raised before
                    self.wait()
            finally:
                self._steps.close()

    def wait(self) -> None:
        """Wait for the save in progress; raise :class:`SaveError` if it failed."""
        if self._lost is not None:
            raise self._lost
        try:
            with self._writing():
                self._wait_for_orbax()
        except SaveError as error:
            self._lost = error
            raise
        if not self._complete and jax.process_index() == 0:
            self._record_newest()
        self._complete = True

    def _record_newest(self) -> None:
        try:
            remember_newest(self.folder, self._saving)
        except Exception as error:  # the step itself is saved; buckets raise errors of their own
            text = "%s: cannot record that step %s is the newest (%s); if its folder is lost, nothing will notice"
            logging.warning(text, self.folder, self._saving, first_line(error))

    def _together(self, action: Callable[[], None]) -> None:
        """Run an action in all processes; raise :class:`SaveError` in all of them if it fails in one."""
        failure = None
        try:
            action()
        except SaveError as error:
            failure = error
        failed = failure is not None
        if jax.process_count() > 1:
            failed = bool(multihost_utils.process_allgather(np.array(failed)).any())
        if failure is not None:
            raise failure
        if failed:
            self._lost = SaveError(f"{self.folder}: another process could not save step {self._saving}")
            raise self._lost

    def _wait_for_orbax(self) -> None:
        response, self._response = self._response, None
        try:
            if response is not None:
                response.result()  # which also ends a thread and closes its handles
        finally:
            self._steps.wait()

    @property
    def failed(self) -> bool:
        """Return whether the last save has failed, as far as it is known now; False in jobs of several processes."""
        if self._complete or jax.process_count() > 1 or self._steps.is_saving_in_progress():
            return False
        try:
            self.wait()
        except SaveError:
            return True
        return False

    def all_steps(self) -> list[int]:
        """Return the steps that can be restored, including the one being saved, in ascending order."""
        return [saved.step for saved in self._steps.checkpoints]

    def latest_step(self) -> int | None:
        """Return the last of :meth:`all_steps`, or None."""
        return max(self.all_steps(), default=None)

    def save(
        self, step: int, state: Mapping[str, PyTree], position: Mapping[str, Any], wait: bool = False
    ) -> None:
        """Save a step. Return when the arrays are copied; they may be donated then.

        The first save returns when the step is complete, and a part of it was read back. What could not be saved is
        saved again after each of :data:`PAUSES`, by all processes of a job if one of them failed. If the failure shows
        only after this method has returned, the next call takes the place of the lost step.

        If :meth:`restore` went back to a step before the latest, delete the steps after it first.

        Args:
          step: number of the step, above all saved steps; or that of the last call, with the same state, which only
            makes sure that it is saved.
          state: nested containers of arrays, which may be PRNG keys or empty, with a subtree `params`.
          position: JSON values, equal on all processes.
          wait: return only when the step is complete on disk.

        Raises:
          SaveError: the step could not be saved.
          CheckpointError: `step` is not above the latest, or what was saved cannot be read back.
        """
        try:
            self._together(self.wait)
        except SaveError as error:
            logging.warning("%s; saving step %d now", error, step)
            self._open_again()
            self._saving, wait = None, True
        if step == self._saving:
            return
        self._forget_later_steps()
        latest = self.latest_step()
        if latest is not None and step <= latest:
            raise CheckpointError(
                f"{self.folder}: step {step} cannot be saved after step {latest}; "
                "restore an earlier step first, or give a new workdir"
            )
        self._saving = step
        arrays = {name: manifest.by_name(part) for name, part in split_state(state).items()}
        record: manifest.Record = {name: manifest.describe(part) for name, part in arrays.items()}
        record |= {"position": position, "origin": self._origin}
        stored = {name: manifest.nested(manifest.raw(part)) for name, part in arrays.items()}
        stored = {name: part for name, part in stored.items() if part}  # Orbax takes no empty trees
        stored["contents"] = manifest.seal({"format": FORMAT, **record})
        self._store(step, stored, wait=wait or not self._read_back)
        if not self._read_back:
            read_back(self.folder, step, arrays, READ_BACK_BYTES)
            self._read_back = True

    def _store(self, step: int, parts: dict[str, PyTree], *, wait: bool) -> None:
        """Save the parts of a step; try again if that fails."""
        pauses = [*PAUSES]
        while True:
            try:
                self._together(functools.partial(self._begin_save, step, parts))
                if wait:
                    self._together(self.wait)
                return
            except SaveError as error:
                self._lost = error
                if not pauses:
                    raise
                logging.warning("%s; trying again in %.0f s", error, pauses[0])
            time.sleep(pauses.pop(0))
            self._open_again()
            wait = True

    def _begin_save(self, step: int, parts: dict[str, PyTree]) -> None:
        self._complete = False
        with self._writing():
            # Without force Orbax may skip the save and only return None.
            self._response = self._steps.save_checkpointables_async(step, parts, force=True)

    def _open_again(self) -> None:
        """Forget a failed save."""
        with contextlib.suppress(Exception):
            self._wait_for_orbax()
        with contextlib.suppress(Exception):
            self._steps.close()
        with self._writing():
            self._steps = self._open()
        self._lost = None

    def restore(
        self, step: int | None, like: Mapping[str, PyTree]
    ) -> tuple[dict[str, PyTree], dict[str, Any]]:
        """Return the state and position of a step.

        Args:
          step: a saved step; None: the latest that is not damaged. Later ones are set aside, and `notes` says so.
            If later steps than `step` exist, the next :meth:`save` deletes them.
          like: the state as `jax.ShapeDtypeStruct`s, on any mesh; leaves without sharding become numpy arrays.

        Raises:
          CheckpointError: the step does not exist, is damaged, or has other shapes.
        """
        self.wait()
        chosen, damaged = choose_step(self.folder, self.all_steps(), step), []
        while True:
            try:
                found = load_state(self.folder, chosen, like)
                break
            except DamagedStepError as error:
                earlier = [each for each in self.all_steps() if each < chosen]
                if step is not None or not earlier:
                    raise
                damaged.append((chosen, error.reason))
                chosen = earlier[-1]
        for each, reason in damaged:
            self._set_aside(each, reason, chosen)
        self._rewound_to = chosen
        return found

    def _set_aside(self, step: int, reason: str, restored: int) -> None:
        """Rename the folder of a damaged step, in whose place an earlier one was restored."""
        if jax.process_index() == 0:
            try:
                place = set_aside(self.folder, step)
                correct_history(self.folder, step, restored)
                remember_newest(self.folder, restored)
            except OSError as error:
                raise CheckpointError(
                    f"{self.folder}: step {step} is damaged ({reason}) and cannot be set aside ({error}); rename its "
                    f"folder, or go back to step {restored} (--restore_step={restored})"
                ) from error
            self.notes.append(
                f"step {step} is damaged ({reason}); it is kept as {place}, and the run goes on from step {restored}"
            )
        multihost_utils.sync_global_devices("damaged step set aside")
        self._steps.reload()

    def _locked(self) -> contextlib.ExitStack:
        """Take the lock of the folder in the first process; return what releases it."""
        lock = contextlib.ExitStack()
        if jax.process_index() == 0:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                lock.enter_context(WriterLock(self.folder))
            except OSError as error:
                raise self._unwritable(error) from error
        return lock

    def _unwritable(self, error: OSError) -> CheckpointError:
        return CheckpointError(f"{self.folder}: cannot be written ({error}); give another workdir")

    def _forget_later_steps(self) -> None:
        later = [
            step for step in self.all_steps() if self._rewound_to is not None and step > self._rewound_to
        ]
        if later and jax.process_index() == 0:
            with self._writing():
                remember_newest(self.folder, self._rewound_to)
        for step in reversed(later):
            logging.warning(
                "%s: deleting step %d, as training continues from an earlier step", self.folder, step
            )
            with self._writing():
                self._steps.delete(step)
        self._rewound_to = None

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except SaveError:
            raise
        except Exception as error:  # a background save raises whatever its file system raised
            raise SaveError(
                f"{self.folder}: saving step {self._saving} failed ({first_line(error)}); "
                "check disk space and permissions, then resume from the latest step"
            ) from error
