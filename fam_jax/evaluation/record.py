"""The record of an evaluation: its results, how they were made, and its files."""

import dataclasses
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from typing import Any

import jax
import rich.table
from etils import epath

from fam_jax.checkpoint.new_file import check_output_file, output_file
from fam_jax.config import Config, UserError
from fam_jax.config.strict_json import dump_json, parse_json
from fam_jax.evaluation.probes import find_probe
from fam_jax.evaluation.task import Measured
from fam_jax.evaluation.tasks import find_task

FOLDER = "evaluations"
VERSIONS = ("fam-jax", "jax", "flax", "numpy")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The results of one task on one step of a run."""

    task: str
    step: int
    # The command line or the function that evaluated.
    command: str
    # The whole config of the run, with the settings of this evaluation.
    config: dict[str, Any]
    versions: dict[str, str]
    # Such as "4 x TPU v5e".
    devices: str
    # The task's headline figures by name.
    metrics: dict[str, float]
    # All figures by names that do not change between runs.
    scalars: dict[str, float]
    # The data of the task's tables and plot.
    details: dict[str, Any]
    # The JSON file that holds the record. It is not in the file itself.
    path: str = dataclasses.field(default="", compare=False)
    # The figures of probes, by name.
    probes: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def files(self) -> list[epath.Path]:
        """Return the JSON file, and the PNG files beside it: that of the task, if it has a plot, and of each probe."""
        return _files(self.path, self.task, [*self.probes])

    def line(self) -> str:
        """Return the headline figures in one line."""
        known = find_task(self.task).metrics
        return f"{self.task}: " + ", ".join(known[name].show(value) for name, value in self.metrics.items())

    def tables(self, run: str = "") -> list[rich.table.Table]:
        """Return tables of the results; `run` names the run in their titles."""
        title = self._title(run)
        tables = find_task(self.task).tables(self.details, title)
        for name, found in self.probes.items():
            tables += find_probe(name).tables(found, title)
        return tables

    def _title(self, run: str) -> str:
        return f"{find_task(self.task).title}, step {self.step}" + (f" of {run}" if run else "")

    def write(self, run: str = "") -> None:
        """Write the record to `path` as JSON, and plots as PNG files beside it.

        The folder is created if needed. Each file appears only when it is complete.

        Args:
          run: names the run in the title of the plot.

        Raises:
          UserError: a file cannot be written.
        """
        values = dataclasses.asdict(self)
        del values["path"]
        plot, (path, *beside) = find_task(self.task).plot, self.files
        with output_file(path) as file:
            file.write(f"{dump_json(values, indent=2)}\n".encode())
        drawn = [] if plot is None else [(plot, self.details)]
        drawn += [(find_probe(name).plot, found) for name, found in self.probes.items()]
        for (draw, details), place in zip(drawn, beside, strict=True):
            with output_file(place) as file:
                draw(details, file, self._title(run))


def read_evaluation(path: str | os.PathLike[str]) -> Evaluation:
    """Read a record that :meth:`Evaluation.write` wrote.

    Raises:
      UserError: the file is missing, or is not such a record.
    """
    try:
        return Evaluation(**parse_json(epath.Path(path).read_bytes()), path=os.fspath(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); evaluate the run first") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not the record of an evaluation; evaluate the run again") from error


def make_evaluation(
    config: Config, task: str, step: int, measured: Measured, *, command: str, path: str | os.PathLike[str]
) -> Evaluation:
    """Return the record of a task's results, measured in this process, with `path` as the file to write."""
    headline = find_task(task).metrics
    return Evaluation(
        task=task,
        step=step,
        **provenance(config, command),
        metrics={name: measured.scalars[name] for name in headline if name in measured.scalars},
        scalars=measured.scalars,
        details=measured.details,
        probes=dict(measured.probes),
        path=os.fspath(path),
    )


def provenance(config: Config, command: str) -> dict[str, Any]:
    """Return what makes the results of this process: command, config, versions and devices."""
    devices = jax.devices()
    return {
        "command": command,
        "config": json.loads(json.dumps(dataclasses.asdict(config))),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in VERSIONS},
        "devices": f"{len(devices)} x {devices[0].device_kind}",
    }


def evaluation_path(workdir: str | os.PathLike[str], step: int, task: str) -> epath.Path:
    """Return the file for the results of a task: WORKDIR/evaluations/STEP/TASK.json."""
    return epath.Path(workdir).expanduser() / FOLDER / str(step) / f"{task}.json"


def check_output(path: str | os.PathLike[str], task: str, probes: Sequence[str] = ()) -> None:
    """Raise :class:`UserError` if the results of a task could not be written to `path` and beside it."""
    if epath.Path(path).suffix.lower() == ".png":
        raise UserError(f"--out={path}: .png is the ending of the plot; give FILE.json")
    for file in _files(path, task, probes):
        check_output_file(file)


def _files(path: str | os.PathLike[str], task: str, probes: Sequence[str]) -> list[epath.Path]:
    whole = epath.Path(path)
    plots = [] if find_task(task).plot is None else [".png"]
    return [whole, *(whole.with_suffix(ending) for ending in [*plots, *(f".{name}.png" for name in probes)])]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a source tree that is not installed
        return "not installed"
