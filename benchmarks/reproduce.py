"""Repeat the paper's comparisons, and those of other memories, at the size of a laptop.

    make reproduce                # everything: hours
    make reproduce FIGURE=3a
    python -m benchmarks.reproduce --list

Trains every model of an experiment (`benchmarks/experiments.py`) with several seeds, side by side on one core each,
evaluates each by generation from a streamed state, and writes OUT/FIGURE.json and OUT/FIGURE.png. All models of a task
see the same batches and have the same number of parameters, within 5 %.

Experiments share trainings, which go below the workdir. Run the same command again to resume what was interrupted:
finished trainings are used again, and --finished makes the results of those alone. So are trainings of another
machine, by the results that were recorded there: --recorded=docs/results/laboratory. The same trainings run on an
accelerator if JAX finds one and --workers is 1.
"""

import concurrent.futures
import json
import shlex
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.experiments import (
    ARMS,
    EXPERIMENTS,
    TASKS,
    Experiment,
    config_fields,
    config_of,
    matched,
    memory_of,
    parameters_of,
    state_floats,
)
from benchmarks.record import write_record
from fam_jax.config import UserError
from fam_jax.config.strict_json import dump_json, parse_json
from fam_jax.evaluation import read_evaluation
from fam_jax.evaluation.record import evaluation_path
from fam_jax.evaluation.tasks import default_task
from launch.cli import ArgumentParser, at_least, integers
from launch.errors import user_errors
from launch.workers import ONE_CORE, Workers

METRIC = "exact_match"


class Training(NamedTuple):
    """A model of a task with a seed."""

    task: str
    arm: str
    seed: int
    # Config fields, by path, without "config.".
    fields: dict[str, str]

    @property
    def name(self) -> str:
        """Return the name of its folder."""
        return f"{self.arm}_{self.seed}"

    def folder(self, place: Path) -> Path:
        """Return its workdir."""
        return place / self.task / self.name

    def result(self, place: Path) -> Path:
        """Return the file of its evaluation."""
        task = default_task(config_of(TASKS[self.task], self.fields).data)
        return Path(evaluation_path(self.folder(place), int(self.fields["train.steps"]), task))

    def command(self, place: Path) -> list[str]:
        """Return the command that trains and evaluates it."""
        flags = [f"--config.{path}={text}" for path, text in self.fields.items()]
        config = f"--config={TASKS[self.task].config}"
        return [sys.executable, "-m", "launch.train", config, *flags, f"--workdir={self.folder(place)}"]


def trainings_of(experiment: Experiment, seeds: Iterable[int], *, quick: bool) -> list[Training]:
    """Return the trainings of an experiment, all arms of a seed before the next seed."""
    found = []
    for seed in seeds:
        for task_name in experiment.tasks:
            task = TASKS[task_name]
            for name in experiment.arms:
                fields = config_fields(task, ARMS[name], seed, ff_dim=matched(task, ARMS[name]))
                if quick:
                    fields |= {"train.steps": "2", "train.checkpoint_every": "2", "evaluate.every": "2"}
                    fields |= {"evaluate.keys": "2", "evaluate.filler_blocks": "1,2"}
                found.append(Training(task_name, name, seed, fields))
    return found


class Recorded:
    """Results that earlier runs wrote, by training."""

    def __init__(self, folder: Path | None):
        """Read all files of a folder; None: there are none.

        Raises:
          UserError: the folder does not exist, or a file in it is damaged.
        """
        self._entries: dict[tuple[str, str], list[tuple[dict[str, Any], dict[str, Any]]]] = {}
        if folder is None:
            return
        if not folder.is_dir():
            raise UserError(f"--recorded={folder}: no such folder; name one with results of this program")
        for path in sorted(folder.glob("*.json")):
            try:
                record = parse_json(path.read_bytes())
                if record["benchmark"] != "reproduce":
                    continue
                for task, arms in record["results"].items():
                    for arm, entry in arms.items():
                        told = (record["settings"]["tasks"][task], entry)
                        self._entries.setdefault((task, arm), []).append(told)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f"{path}: is no file of results; remove it, or name another --recorded"
                ) from error

    def find(self, training: Training) -> dict[str, Any] | None:
        """Return the entry of a file that has the training's seed and its settings; None: there is none."""
        task = TASKS[training.task]
        wanted = {name: getattr(task, name) for name in ("config", "fields", "lengths")}
        for of_task, entry in self._entries.get((training.task, training.arm), ()):
            same_task = json.loads(dump_json(wanted)) == {name: of_task[name] for name in wanted}
            same_model = str(entry["ff_dim"]) == training.fields["model.ff_dim"] and entry[
                "memory"
            ] == memory_of(ARMS[training.arm], task)
            if same_task and same_model and str(training.seed) in entry["seeds"]:
                return entry
        return None


def run(
    place: Path, trainings: Sequence[Training], workers: int, recorded: Recorded | None = None
) -> list[str]:
    """Make the trainings whose results do not exist, as many at a time as there are workers.

    Returns:
      A line for each training that failed.
    """
    recorded = recorded or Recorded(None)
    todo = [
        training
        for training in trainings
        if not training.result(place).exists() and not recorded.find(training)
    ]
    if not todo:
        return []
    print(f"{len(todo)} of {len(trainings)} trainings to do", flush=True)
    cache = place.resolve() / "compiled"
    pool = Workers(
        workers, {"XLA_FLAGS": ONE_CORE, "JAX_COMPILATION_CACHE_DIR": str(cache)} if workers > 1 else None
    )
    failed: list[str] = []
    done = 0
    with concurrent.futures.ThreadPoolExecutor(len(todo)) as threads:
        jobs = {
            threads.submit(pool.run, training.name, [training.command(place)]): training for training in todo
        }
        try:
            for job in concurrent.futures.as_completed(jobs):
                training, done = jobs[job], done + 1
                try:
                    job.result()
                except UserError as error:
                    failed.append(f"{training.task}, {training.name}: {error}")
                print(f"{done} of {len(todo)} trainings done: {training.task}, {training.name}", flush=True)
        except BaseException:
            pool.stop()
            raise
    return failed


def collect(
    place: Path, experiment: Experiment, trainings: Sequence[Training], recorded: Recorded | None = None
) -> dict[str, Any]:
    """Return the results of the trainings that are finished, or recorded, by task and arm.

    Raises:
      UserError: a result was made with another config.
    """
    results: dict[str, Any] = {task: {} for task in experiment.tasks}
    for training in trainings:
        path = training.result(place)
        told = None if path.exists() or recorded is None else recorded.find(training)
        if not path.exists() and told is None:
            continue
        task, arm = TASKS[training.task], ARMS[training.arm]
        wanted = config_of(task, training.fields)
        entry = results[training.task].setdefault(
            training.arm,
            {
                "label": arm.label,
                "memory": memory_of(arm, task),
                "ff_dim": wanted.model.ff_dim,
                "parameters": parameters_of(wanted.model),
                "state_floats": state_floats(wanted.model),
                "seeds": {},
            },
        )
        if told is not None:
            entry["seeds"][str(training.seed)] = told["seeds"][str(training.seed)]
            entry |= {"command": told["command"], "versions": told["versions"]}
            continue
        found = read_evaluation(path)
        if found.config["model"]["ff_dim"] != wanted.model.ff_dim or found.step != wanted.train.steps:
            raise UserError(f"{path}: was made with other settings; remove {training.folder(place)}")
        entry["seeds"][str(training.seed)] = {
            length: row[METRIC] for length, row in found.details["groups"].items()
        }
        entry["command"] = shlex.join(["python", *training.command(place)[1:]])
        entry["versions"] = found.versions
    for arms in results.values():
        for entry in arms.values():
            entry["mean"] = mean_of(entry["seeds"].values())
    return results


def mean_of(seeds: Iterable[dict[str, float]]) -> dict[str, float]:
    """Return the mean over seeds of each length."""
    rows = [*seeds]
    return {length: statistics.fmean(row[length] for row in rows) for length in rows[0]}


def show(experiment: Experiment, results: dict[str, Any]) -> None:
    """Print a table for each task, with n seeds, and one with the sizes of the models on the first task."""
    for name, arms in results.items():
        if not arms:
            continue
        lengths = [*next(iter(arms.values()))["mean"]]
        task = TASKS[name]
        title = f"{experiment.title}: {task.label}, exact match in % by blocks ({task.length_of})"
        table = Table(title=title, box=box.SIMPLE)  # fits 80 columns
        table.add_column("memory", no_wrap=True)
        for heading in ("n", *lengths):
            table.add_column(heading, justify="right")
        for entry in arms.values():
            values = (f"{100 * entry['mean'][length]:.0f}" for length in lengths)
            table.add_row(entry["label"], str(len(entry["seeds"])), *values)
        Console().print(table)

    table = Table(title="Parameters, and numbers that a stream keeps")
    table.add_column("memory", no_wrap=True)
    for heading in ("parameters", "state"):
        table.add_column(heading, justify="right")
    for entry in next(iter(results.values())).values():
        table.add_row(entry["label"], f"{entry['parameters']:,}", f"{entry['state_floats']:,}")
    Console().print(table)


@user_errors()
def main(argv: Sequence[str]) -> None:
    """Train what is missing, print the results, and write them.

    Raises:
      UserError: the command line has a mistake, or a training failed.
    """
    parser = ArgumentParser(prog="benchmarks.reproduce", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--figure", choices=[*EXPERIMENTS], help="one experiment; default: all")
    add("--list", action="store_true", help="list the experiments and end")
    add("--seeds", type=integers, default=(0, 1, 2), metavar="N,N,...", help="default: 0,1,2")
    add("--workers", type=at_least(1), default=2, metavar="N", help="trainings side by side; default: 2")
    add("--workdir", type=Path, default=Path("runs/reproduce"), metavar="DIR", help="default: %(default)s")
    add("--out", type=Path, metavar="DIR", help="folder of the results; default: the workdir")
    told = "folder of earlier results, which count as finished trainings if their settings are the same"
    add("--recorded", type=Path, metavar="DIR", help=told)
    add("--finished", action="store_true", help="train nothing: use the trainings that are finished")
    add("--quick", action="store_true", help="two steps each, to check that everything runs")
    arguments = parser.parse_args(argv)
    if arguments.list:
        list_experiments(len(arguments.seeds))
        return
    place: Path = arguments.workdir / "quick" if arguments.quick else arguments.workdir
    recorded = Recorded(None if arguments.quick else arguments.recorded)
    failed: list[str] = []
    for name in [arguments.figure] if arguments.figure else EXPERIMENTS:
        experiment = EXPERIMENTS[name]
        trainings = trainings_of(experiment, arguments.seeds, quick=arguments.quick)
        if not arguments.finished:
            failed += run(place, trainings, arguments.workers, recorded)
        results = collect(place, experiment, trainings, recorded)
        if not any(results.values()):
            continue
        show(experiment, results)
        write(arguments.out or place, name, argv, results)
    if failed:
        raise UserError("; ".join(failed))


def write(out: Path, name: str, argv: Sequence[str], results: dict[str, Any]) -> None:
    """Write the results of an experiment as JSON, and a picture of them."""
    from benchmarks.reproduce_plot import draw  # matplotlib, which takes a second to import

    experiment = EXPERIMENTS[name]
    tasks = {task: TASKS[task]._asdict() for task in experiment.tasks}
    settings = {"figure": name, "title": experiment.title, "paper": experiment.paper, "tasks": tasks}
    write_record(out / f"{name}.json", "reproduce", argv, settings, results)
    draw(experiment, results, out / f"{name}.png")
    print(f"wrote {out / name}.json and {out / name}.png", flush=True)


def list_experiments(seeds: int) -> None:
    """Print the experiments, their trainings, and what the paper reports."""
    table = Table(title=f"Experiments, with {seeds} seeds")
    for heading in ("figure", "what", "trainings", "the paper"):
        table.add_column(heading)
    for name, experiment in EXPERIMENTS.items():
        count = len(experiment.arms) * len(experiment.tasks) * seeds
        table.add_row(name, experiment.title, str(count), experiment.paper)
    Console().print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
