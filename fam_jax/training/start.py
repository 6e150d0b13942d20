"""Start a run: afresh, from its latest checkpoint, or as a fork of another run, with fields that may change."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from etils import epath

from fam_jax.checkpoint import (
    CheckpointError,
    Checkpoints,
    changeable_fields,
    changed_fields,
    changes_of_result,
    check_changes,
    choose_step,
    load_state,
    locate,
    read_config,
    read_config_file,
    saved_steps,
    settle_origin,
)
from fam_jax.config import Config, ConfigError, UserError, check_field, resolve
from fam_jax.data.interface import Batches
from fam_jax.training.optimizer import learning_rate

# Fields outside the group data that decide which batches come.
OF_BATCHES = ("train.batch_size", "train.seed", "model.block_size")


def check_allowed(names: Sequence[str], config: Config) -> list[str]:
    """Return the paths of the fields that a run may change beside those that change no result.

    Args:
      names: such as optimizer.learning_rate, with or without "config." before it.
      config: of the run.

    Raises:
      ConfigError: there is no such field, or it decides what the parameters are.
    """
    paths = [name.removeprefix("config.") for name in names]
    for path in paths:
        check_field(f"config.{path}")
        if path not in changeable_fields(config):
            raise ConfigError(
                f"--allow_change={path}: this field decides what the parameters are, so it cannot change; "
                "start a new run, from these parameters with config.train.init_from"
            )
    return paths


def decide_batches(paths: Sequence[str]) -> bool:
    """Return whether one of these fields decides which batches come."""
    return any(path in OF_BATCHES or path.startswith("data.") for path in paths)


class Fork(NamedTuple):
    """The checkpoint that a new run starts from."""

    folder: epath.Path
    step: int
    # As nested dict.
    config: dict[str, Any]

    @property
    def name(self) -> str:
        """Return WORKDIR/STEP."""
        return f"{self.folder}/{self.step}"


def find_fork(name: str, workdir: epath.Path, config: Config, restore_step: int | None) -> Fork | None:
    """Return the checkpoint that `name`, WORKDIR or WORKDIR/STEP, names; None if the run was forked before.

    Raises:
      UserError: there is no such checkpoint, its parameters are of another config, or `workdir` holds another run.
    """
    folder, step = locate(name)
    if saved_steps(workdir):
        _, history = read_config_file(workdir)
        origin = locate(next((entry["forked_from"] for entry in history if "forked_from" in entry), workdir))
        if origin[0] != folder or step not in (None, origin[1]):
            raise CheckpointError(
                f"{workdir}: holds a run that was not forked from {name}; leave out --fork to resume it, or give a new "
                "workdir"
            )
        return None
    if restore_step is not None:
        raise CheckpointError(
            f"--restore_step={restore_step}: {workdir} has no steps yet; choose one with --fork={folder}/STEP"
        )
    before, values = read_config(folder), dataclasses.asdict(config)
    fork = Fork(folder, choose_step(folder, saved_steps(folder), step), before)
    _, moved = settle_origin(workdir, values, forked_from=fork.name)
    check_changes(folder, changed_fields(before, values), [*changeable_fields(config), *moved])
    return fork


def load_from(
    checkpoints: Checkpoints, step: int | None, fork: Fork | None, like: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the state and the position in the data of a saved step of a run, or of the one that it is forked from.

    Raises:
      CheckpointError: the step does not exist, is damaged, or has other shapes.
    """
    if fork is None:
        return checkpoints.restore(step, like)
    return load_state(fork.folder, fork.step, like, flag=f"--fork={fork.folder}/{{step}}")


def restore_batches(
    batches: Batches, position: dict[str, Any], make: Callable[[], Batches], may_start_over: bool
) -> tuple[Batches, list[str]]:
    """Return batches that go on from a saved position, and a line about it if they do not.

    Args:
      batches: fresh batches.
      position: from a checkpoint.
      make: makes fresh batches again.
      may_start_over: return fresh batches if the position is of other batches.

    Raises:
      UserError: the position is of other batches, and they may not start over.
    """
    try:
        batches.restore(position)
    except UserError as error:
        if not may_start_over:
            raise
        return make(), [f"the data starts over; {str(error).partition(';')[0]}"]
    return batches, []


def change_notes(before: dict[str, Any], config: Config, done: int) -> list[str]:
    """Return lines about changed fields that change what a run computes from here on.

    Args:
      before: config that the run had, as nested dict.
      config: config that it has now.
      done: steps that are done.
    """
    changes = changed_fields(before, dataclasses.asdict(config))
    notes = [
        f"changed after step {done}: {field} from {change['was']} to {change['is']}"
        for field, change in changes_of_result(changes).items()
    ]
    if steps := changes.get("train.steps"):
        old = resolve(before).optimizer
        was, now = (float(learning_rate(old, end)(done)) for end in (steps["was"], steps["is"]))
        if was != now:
            notes.append(
                f"changed after step {done}: train.steps from {steps['was']} to {steps['is']}; the {old.schedule} "
                f"schedule ends there, so the next learning rate is {now:.3g} instead of {was:.3g}"
            )
    return notes
