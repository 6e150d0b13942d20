"""Run evaluation tasks and keep the results: the same for the training loop, the command line and Python."""

import dataclasses
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Sequence
from typing import Any

import jax
from etils import epath

from fam_jax.config import Config, MeshConfig, UserError, changed
from fam_jax.evaluate.tasks import OnProgress, Request, default_task, task_of
from fam_jax.model import lora
from fam_jax.restore import load_model
from fam_jax.sharding import make_mesh

FOLDER = "evaluations"
VERSIONS = ("fam-jax", "jax", "flax", "numpy")


def evaluate(
    checkpoint: str | os.PathLike[str],
    *,
    task: str | None = None,
    step: int | None = None,
    mesh: MeshConfig | None = None,
    files: Sequence[str] = (),
    suffixes: Sequence[str] = (),
    out: str | os.PathLike[str] | None = None,
    command: str = "",
    on_progress: OnProgress | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """Evaluate a checkpoint, and write the results.

    Args:
      checkpoint: workdir of a training run.
      task: a name in `fam_jax.evaluate.tasks.TASKS`; None: that of the run's data.
      step: saved step; None: the latest.
      mesh: devices to spread the model over; None: all along the data axis.
      files: texts to evaluate on, in place of config.data.heldout_files.
      suffixes: endings of files that count in folders.
      out: JSON file to write; None: CHECKPOINT/evaluations/STEP/TASK.json.
      command: how this was called, for the record.
      on_progress: called with the name of a pass, tokens read and tokens to read.
      **fields: of config.evaluate, such as `filler_blocks=(4, 36)`.

    Returns:
      The record: task, step, command, config, versions, devices, `scalars` (headline figures by name) and the task's
      details.

    Raises:
      UserError: the checkpoint or the data cannot be read, or a field is not allowed.
    """
    mesh = mesh or MeshConfig()
    config, params, step = load_model(checkpoint, step, make_mesh(mesh))
    config = changed(config, evaluate=fields, mesh=dataclasses.asdict(mesh))
    name = task or default_task(config)
    request = Request(config, params, files, suffixes, on_progress)
    results = task_of(name).prepare(request)(request)
    record = _record(config, name, step, command) | results
    if jax.process_index() == 0:
        default = results_file(epath.Path(os.fspath(checkpoint)).expanduser(), step, name)
        write(default if out is None else epath.Path(os.path.expanduser(os.fspath(out))), record)
    return record


def in_training(config: Config) -> Callable[[Any, int], dict[str, Any]]:
    """Return the evaluation that the training loop calls with (parameters, step); the data is loaded now."""
    merged = jax.jit(lambda params: lora.merge(params, config.lora))
    name = default_task(config)
    measure = task_of(name).prepare(Request(config, None))

    def evaluate_step(params: Any, step: int) -> dict[str, Any]:
        request = Request(config, merged(params) if config.lora.rank else params)
        return _record(config, name, step, "") | measure(request)

    return evaluate_step


def results_file(workdir: epath.Path, step: int, task: str) -> epath.Path:
    """Return where the results of a task belong."""
    return workdir / FOLDER / str(step) / f"{task}.json"


def write(path: epath.Path, record: dict[str, Any]) -> None:
    """Write a record as JSON, and its picture beside it; each file appears only when it is complete.

    Raises:
      UserError: a file cannot be written.
    """
    unfinished = path.parent / f"{path.name}.tmp"
    task = task_of(record["task"])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(record, indent=2) + "\n")
        unfinished.replace(path)
        if task.draw is not None:
            with path.with_suffix(".png").open("wb") as file:
                task.draw(record, file, _config_of(record), f"step {record['step']}")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); give another --out") from error


def line(record: dict[str, Any]) -> str:
    """Return the headline figures of a record in one line."""
    figures = (f"{name} {value:.4g}" for name, value in record["scalars"].items() if "/" not in name)
    return f"{record['task']}: {', '.join(figures)}"


def _record(config: Config, task: str, step: int, command: str) -> dict[str, Any]:
    """Return what made the results."""
    devices = jax.devices()
    return {
        "task": task,
        "step": step,
        "command": command,
        "config": dataclasses.asdict(config),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in VERSIONS},
        "devices": f"{len(devices)} x {devices[0].device_kind}",
    }


def _config_of(record: dict[str, Any]) -> Config:
    from fam_jax.config import resolve

    return resolve(json.loads(json.dumps(record["config"])))


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # run from a source tree that is not installed
        return "not installed"
