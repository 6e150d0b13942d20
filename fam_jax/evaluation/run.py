"""The runner of all evaluation tasks, for checkpoints and during training."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from fam_jax.checkpoint import read_config
from fam_jax.config import Config, ConfigError, EvaluateConfig, MeshConfig, UserError, resolve
from fam_jax.config.data import SEQIO
from fam_jax.config.fields import constraint_of
from fam_jax.data.vocabulary import check_vocabulary_size
from fam_jax.evaluation.documents import Documents
from fam_jax.evaluation.probes import find_probe
from fam_jax.evaluation.record import Evaluation, check_output, evaluation_path, make_evaluation
from fam_jax.evaluation.rows import MissingDataError
from fam_jax.evaluation.task import Measured, OnProgress, Setting
from fam_jax.evaluation.tasks import default_task, find_task
from fam_jax.generation.streaming import Streamer
from fam_jax.model import lora
from fam_jax.restore import load_model, load_task_vocabulary
from fam_jax.sharding import make_mesh

ALL_TOO_LONG = "all its documents have more tokens than --limit_tokens; raise it"


def evaluate(
    checkpoint: str | os.PathLike[str],
    *,
    task: str | None = None,
    step: int | None = None,
    mesh: MeshConfig | None = None,
    files: Sequence[str] = (),
    suffixes: Sequence[str] = (),
    probes: Sequence[str] = (),
    out: str | os.PathLike[str] | None = None,
    imports: Sequence[str] = (),
    command: str = "fam_jax.evaluate",
    on_progress: OnProgress | None = None,
    **settings: Any,
) -> Evaluation:
    """Evaluate a checkpoint and write the results.

        found = evaluate("runs/passkey", filler_blocks=(4, 36), keys=16)
        found.metrics["exact_match"]

    In a job of several processes, call it in all of them. All get the results, and the first one writes them.

    Args:
      checkpoint: workdir of a training run.
      task: a name in `fam_jax.evaluation.tasks.TASKS`; None: that of the run's data.
      step: a saved step; None: the latest.
      mesh: mesh to divide the model over; None: all devices along the data axis.
      files: files, folders or patterns to evaluate on, in place of config.data.heldout_files.
      suffixes: endings of the files to read in a folder, in place of config.data.file_suffixes.
      probes: names in `fam_jax.evaluation.PROBES`, to measure and plot beside the task.
      out: JSON file to write, with the plot beside it; None: CHECKPOINT/evaluations/STEP/TASK.json.
      imports: modules that the config of the run may import; see :func:`fam_jax.restore.check_imports`.
      command: the command or function to record as the caller.
      on_progress: called with the name of a pass, the tokens read and the tokens to read.
      **settings: fields of config.evaluate to change, such as `batch_size=8`.

    Raises:
      UserError: the checkpoint or the data cannot be read, the results cannot be written, or a setting is not allowed.
    """
    name = task or default_task(resolve(read_config(checkpoint)).data)
    check_probes(name, probes)
    _check_meaning(name, settings, files=files, suffixes=suffixes)
    if out is not None and jax.process_index() == 0:
        check_output(os.path.expanduser(out), name, probes)
    mesh = mesh or MeshConfig()
    config, params, step = load_model(checkpoint, step, make_mesh(mesh), imports=imports)
    if config.data.task.startswith(f"{SEQIO}:"):
        load_task_vocabulary(config, checkpoint, step)  # checks it
    values = dataclasses.asdict(config)
    values["evaluate"] |= settings
    config = resolve({**values, "mesh": dataclasses.asdict(mesh)})
    path = evaluation_path(checkpoint, step, name) if out is None else os.path.expanduser(out)
    if jax.process_index() == 0:
        check_output(path, name, probes)
    measure = prepare(name, make_setting(config, files, suffixes), on_progress, probes=probes)
    found = make_evaluation(config, name, step, measure(params), command=command, path=path)
    if jax.process_index() == 0:
        found.write(os.fspath(checkpoint))
    return found


def _check_meaning(task: str, settings: Mapping[str, Any], **places: Sequence[str]) -> None:
    """Raise :class:`ConfigError` if a setting, or a place of documents, has no meaning for a task.

    A task that is not of this package may use any of them.
    """
    users = {field.name: constraint_of(field).tasks for field in dataclasses.fields(EvaluateConfig)}
    if not any(task in tasks for tasks in users.values()):
        return
    for name, tasks in users.items():
        if name in settings and tasks and task not in tasks:
            raise ConfigError(
                f"config.evaluate.{name}: has no meaning for the task {task}, only for {' and '.join(tasks)}; "
                "leave it out"
            )
    for name, given in places.items():
        if given and task != "text":
            raise ConfigError(f"{name}: have no meaning for the task {task}, only for text; leave them out")


def evaluate_in_training(
    config: Config, workdir: str | os.PathLike[str], on_progress: OnProgress | None = None
) -> Callable[[Any, int], dict[str, dict[str, float]]]:
    """Load the data, and return the evaluation for the training loop.

    Args:
      config: of the run.
      workdir: of the run.
      on_progress: as for :func:`evaluate`; it may raise an exception to leave the evaluation.

    Returns:
      A function of (the parameters in training, step). It measures the task of config.data, writes the results below
      the workdir as :func:`evaluate` does, and returns {name of the task: {name: figure}}.
    """
    name = default_task(config.data)
    measure = prepare(name, make_setting(config), on_progress)
    merge = (
        jax.jit(lambda params: lora.merge(params, config.lora)) if config.lora.rank else lambda params: params
    )

    def evaluate_step(params: Any, step: int) -> dict[str, dict[str, float]]:
        measured, path = measure(merge(params)), evaluation_path(workdir, step, name)
        found = make_evaluation(config, name, step, measured, command="training", path=path)
        if jax.process_index() == 0:
            found.write(os.fspath(workdir))
        return {name: found.scalars}

    return evaluate_step


def make_setting(config: Config, files: Sequence[str] = (), suffixes: Sequence[str] = ()) -> Setting:
    """Return what a task may depend on; `files` and `suffixes` come in place of those of the config."""
    return Setting(config.model, config.data, config.evaluate, config.train.loss_chunk, files, suffixes)


def check_probes(name: str, probes: Sequence[str]) -> None:
    """Raise :class:`UserError` if a task or a probe is unknown, or the task has no documents to probe a model on."""
    task = find_task(name)
    for probe in probes:
        find_probe(probe)
        if task.documents is None:
            raise UserError(
                f"--probe={probe}: task {name} has no documents to probe a model on; choose another --task"
            )


def prepare(
    name: str,
    setting: Setting,
    on_progress: OnProgress | None = None,
    *,
    probes: Sequence[str] = (),
    limit_tokens: int = 0,
) -> Callable[[Any], Measured]:
    """Make the items of a task; return a function that measures parameters on them, and probes them.

    Args:
      name: of the task.
      setting: what it may depend on.
      on_progress: as for :func:`evaluate`.
      probes: names of probes, which need a task with documents.
      limit_tokens: leave out documents with more tokens, and count them in the details; 0: read all.

    Raises:
      UserError: the items cannot be made.
      MissingDataError: all documents are longer.
    """
    task = find_task(name)
    items = task.items(setting)
    check_vocabulary_size(items.vocabulary, setting.model, setting.data)
    over: dict[str, int] = {}
    if limit_tokens and isinstance(items, Documents):
        kept = [example for example in items.examples if len(example.ids) <= limit_tokens]
        if not kept:
            raise MissingDataError(f"task {name}: {ALL_TOO_LONG}")
        over = {"documents_over_limit": len(items.examples) - len(kept)}
        items = items._replace(examples=kept)

    def measure(params: Any) -> Measured:
        streamer = Streamer(setting.model, params)
        measured = task.measure(streamer, items, setting, on_progress)
        measured = measured._replace(details=measured.details | over)
        if not probes:
            return measured
        assert task.documents is not None
        documents = task.documents(items)
        found = {
            probe: find_probe(probe).measure(streamer, documents, setting, on_progress) for probe in probes
        }
        return measured._replace(probes=found)

    return measure
