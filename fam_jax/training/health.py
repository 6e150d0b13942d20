"""Watch over a training: batches that were skipped because a number was not finite, and jumps of the loss."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from fam_jax.checkpoint.new_file import new_file
from fam_jax.config import UserError
from fam_jax.config.strict_json import dump_json

# A loss is a jump if it lies this many standard deviations, and this share of the mean, above the mean of those before.
JUMP_DEVIATIONS = 6.0
JUMP_SHARE = 0.5
# Decay of that mean and deviation with each logged loss, and the losses to see first.
DECAY = 0.95
FIRST_LOSSES = 10


@dataclasses.dataclass
class Health:
    """What the steps of a run say about it.

    Metrics stay on the device until :meth:`check`, so that no step has to wait.
    """

    # Skipped batches in a row that end the run, less one.
    allowed: int
    # Folder of the run, for the batch that ends it.
    folder: epath.Path
    # Skipped batches in all, and in a row up to the last step checked.
    skipped: int = 0
    in_row: int = 0
    # Of the losses logged so far, by the figures of their data.
    losses: dict[Any, "_Losses"] = dataclasses.field(default_factory=dict)
    _unchecked: list[tuple[int, jax.Array]] = dataclasses.field(default_factory=list)

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Take in the metrics of a step."""
        self._unchecked.append((step, metrics["skipped"]))

    def check(self) -> list[int]:
        """Wait for the steps taken in; return those whose batches were skipped since the last check."""
        found = [step for step, skipped in self._unchecked if self._count(bool(skipped))]
        self._unchecked.clear()
        return found

    def _count(self, skipped: bool) -> bool:
        # Once the run has to end, what comes after does not save it.
        if self.in_row <= self.allowed:
            self.in_row = self.in_row + 1 if skipped else 0
        self.skipped += skipped
        return skipped

    @property
    def must_end(self) -> bool:
        """Return whether more batches in a row were skipped than are allowed."""
        return self.in_row > self.allowed

    def jump(self, loss: float, data: Mapping[str, float]) -> str:
        """Take in a logged loss; return a warning if it is far above those before, else an empty string.

        Args:
          loss: of a step.
          data: figures on its data. Losses are compared with those of the same figures: another stage of a curriculum,
            or another part of a mixture, has another loss.
        """
        if not math.isfinite(loss):
            return ""
        return self.losses.setdefault(tuple(sorted(data.items())), _Losses()).jump(loss)

    def end(
        self,
        step: int,
        metrics: dict[str, jax.Array],
        arrays: dict[str, jax.Array],
        params: Any,
        saved: int | None,
    ) -> UserError:
        """Write the last batch and the norms of the parameters to files; return the error that ends the run.

        Args:
          step: the last step.
          metrics: of that step.
          arrays: its batch, of which each process writes its own rows.
          params: the parameters, which skipped batches did not change.
          saved: the latest checkpoint; None: there is none.
        """
        norms = {
            jax.tree_util.keystr(path, simple=True, separator="/"): float(_norm(leaf))
            for path, leaf in jax.tree.leaves_with_path(params)
        }
        values = {name: float(value) for name, value in metrics.items()}
        place = self.folder / "not_finite" / str(step)
        rows = {name: _own_rows(array) for name, array in arrays.items()}
        with new_file(place / f"batch_{jax.process_index()}.npz") as file:
            np.savez(file, **rows)  # type: ignore[arg-type]
        if jax.process_index() == 0:
            with new_file(place / "norms.json") as file:
                file.write(dump_json({"step": step, "metrics": values, "parameter_norms": norms}).encode())
        names = ("loss", "gradient_norm", "update_norm")
        bad = next((name for name in names if not math.isfinite(values[name])), "loss")
        row = f", and batches are skipped for {self.in_row} steps" if self.in_row > 1 else ""
        go_on = (
            f"to go on from step {saved}, add --allow_change=optimizer.learning_rate,optimizer.clip_norm"
            if saved is not None
            else f"no checkpoint is saved yet, so {self.folder} takes the new values"
        )
        return UserError(
            f"the {bad.replace('_', ' ')} is {values[bad]} at step {step}{row}: lower config.optimizer.learning_rate "
            f"or clip_norm; {go_on}; batch and norms are in {place}"
        )


@dataclasses.dataclass
class _Losses:
    """Mean and variance of the latest losses."""

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def jump(self, loss: float) -> str:
        above, usual = loss - self.mean, self.count >= FIRST_LOSSES
        jumps = usual and above > max(JUMP_DEVIATIONS * math.sqrt(self.variance), JUMP_SHARE * self.mean)
        warning = f"the loss jumped from about {self.mean:.3g} to {loss:.3g}" if jumps else ""
        weight = max(1 - DECAY, 1 / (self.count + 1))
        self.count += 1
        self.mean += weight * above
        self.variance = (1 - weight) * (self.variance + weight * above**2)
        return warning


def _norm(leaf: jax.Array) -> jax.Array:
    return jnp.linalg.norm(leaf.astype(jnp.float32).ravel())


def _own_rows(array: jax.Array) -> np.ndarray:
    """Return the rows of a batch's array that are on this process's devices, each once."""
    shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[begin]) for begin in sorted(shards)])
