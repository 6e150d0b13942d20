"""`make demo`: feedback memory remembers a pass key across hundreds of blocks, and the same model without it does not.

Trains the three models of `configs/passkey.py`, two at a time on a core each, evaluates each by generation from
streamed memory, prints a table and writes `passkey.json` and `passkey.png` below --workdir. Run again, it resumes what
was interrupted and reuses what is finished; --clean starts over.
"""

import argparse
import concurrent.futures
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from configs.passkey import get_config
from fam_jax.config import UserError, resolve, to_json
from fam_jax.config.overrides import apply_overrides
from launch import cli

VARIANTS = ("fam", "bswa_m1", "bswa_m1_sg")
LENGTHS = (4, 9, 18, 36, 72, 130, 260, 520)
CONFIG = "configs/passkey.py"
REPORT_SECONDS = 10.0  # between two lines of a training's progress


class Workers:
    """Runs commands side by side, each on its own share of the cores, and passes their progress on."""

    def __init__(self, count: int):
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self._shares: queue.Queue[list[int]] = queue.Queue()
        for index in range(count):
            self._shares.put(cores[index::count])
        self._running: list[subprocess.Popen[str]] = []
        self._printing = threading.Lock()
        self._stopped = False

    def run(self, name: str, commands: Sequence[Sequence[str]]) -> None:
        """Runs commands one after the other; raises :class:`UserError` if one fails."""
        share = self._shares.get()
        try:
            for command in commands:
                self._run_one(name, command, share)
        finally:
            self._shares.put(share)

    def stop(self) -> None:
        """Asks all that runs to save and end, and waits for it."""
        self._stopped = True
        running = list(self._running)
        for process in running:
            process.terminate()
        for process in running:
            process.wait()

    def _run_one(self, name: str, command: Sequence[str], share: list[int]) -> None:
        if self._stopped:
            return
        process = subprocess.Popen(
            command,
            env={**os.environ, "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu")},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=(lambda: os.sched_setaffinity(0, share)) if share else None,
            start_new_session=True,  # Ctrl-C comes here first; stop() passes it on
        )
        self._running.append(process)
        assert process.stderr is not None
        tail: list[str] = []
        printed = 0.0
        for line in process.stderr:
            tail = [*tail[-19:], line]
            if line.startswith("step ") and time.perf_counter() - printed < REPORT_SECONDS:
                continue
            printed = time.perf_counter()
            with self._printing:
                print(f"{name:>10}  {line.rstrip()}", flush=True)
        code = process.wait()
        self._running.remove(process)
        if code and not self._stopped:
            raise UserError(f"{' '.join(command[1:])} failed with exit code {code}:\n{''.join(tail)}")


def wanted_config(variant: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the resolved config of a model of this demo as nested dict.

    Raises:
      ConfigError: an override names no field, or is not allowed.
    """
    config = get_config(variant)
    config.train.seed = arguments.seed
    config.evaluate.update(filler_blocks=arguments.lengths, keys=arguments.keys)
    values = config.to_dict()
    apply_overrides(values, arguments.overrides)
    return json.loads(to_json(resolve(values)))


def finished(result: Path, config: dict[str, Any]) -> bool:
    """Whether `result` holds what this config asks for; where evaluation took place does not matter."""
    if not result.exists():
        return False
    found = json.loads(result.read_text())
    lengths = {str(length) for length in config["evaluate"]["filler_blocks"]}
    made_by = {**found["config"], "mesh": config["mesh"]}
    made_by["evaluate"] = {**made_by["evaluate"], "filler_blocks": config["evaluate"]["filler_blocks"]}
    return (
        lengths <= set(found["lengths"]) and made_by == config and found["step"] == config["train"]["steps"]
    )


def commands(variant: str, arguments: argparse.Namespace) -> list[list[str]]:
    """Training, then evaluation; none if the result is there."""
    folder: Path = arguments.workdir / variant
    result = folder / "result.json"
    if finished(result, wanted_config(variant, arguments)):
        return []
    fields = [f"--{path}={text}" for path, text in arguments.overrides]
    config = [f"--config={CONFIG}:{variant}", f"--config.train.seed={arguments.seed}", *fields]
    lengths = ",".join(map(str, arguments.lengths))
    return [
        [sys.executable, "-m", "launch.train", *config, f"--workdir={folder}"],
        [
            sys.executable, "-m", "launch.evaluate", f"--checkpoint={folder}", f"--out={result}",
            f"--lengths={lengths}", f"--keys={arguments.keys}",
        ],
    ]  # fmt: skip


def collect(workdir: Path, lengths: Sequence[int]) -> dict[str, dict[str, float]]:
    """Exact match of every model by filler length in blocks."""
    models = {}
    for variant in VARIANTS:
        found = json.loads((workdir / variant / "result.json").read_text())["lengths"]
        models[variant] = {str(length): found[str(length)]["exact_match"] for length in lengths}
    return models


def show(models: dict[str, dict[str, float]], keys: int) -> None:
    """Prints the table."""
    table = Table(title=f"Pass key retrieved, by blocks of filler ({keys} keys each)")
    table.add_column("model")
    lengths = next(iter(models.values()))
    for length in lengths:
        table.add_column(length, justify="right")
    for name, accuracies in models.items():
        table.add_row(name, *(f"{value:.2f}" for value in accuracies.values()))
    Console().print(table)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line of the demo."""
    parser = cli.Parser("demo", __doc__, fields=True)
    add = parser.add_argument
    add("--workdir", type=Path, default=Path("runs/demo"), metavar="DIR", help="default: %(default)s")
    add("--clean", action="store_true", help="delete the workdir first")
    add("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    add("--keys", type=int, default=64, metavar="N", help="examples per length (default: %(default)s)")
    add("--lengths", type=cli.integers, default=LENGTHS, metavar="N,N,...", help="filler lengths in blocks")
    add("--workers", type=int, default=2, metavar="N", help="trainings side by side (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Train, evaluate, print and draw; return the exit code."""
    arguments = parse(argv)
    workdir: Path = arguments.workdir
    if arguments.clean and workdir.exists():
        shutil.rmtree(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    plan = {variant: commands(variant, arguments) for variant in VARIANTS}
    clock = workdir / "seconds.json"
    before = json.loads(clock.read_text()) if clock.exists() else 0.0
    began = time.perf_counter()
    workers = Workers(arguments.workers)
    try:
        with concurrent.futures.ThreadPoolExecutor(len(VARIANTS)) as pool:
            jobs = [pool.submit(workers.run, name, todo) for name, todo in plan.items()]
            try:
                for job in concurrent.futures.as_completed(jobs):
                    job.result()
            except BaseException:
                workers.stop()
                raise
    finally:
        seconds = before + time.perf_counter() - began
        clock.write_text(json.dumps(seconds))
    models = collect(workdir, arguments.lengths)
    result = {"models": models, "keys": arguments.keys, "seconds": round(seconds, 1), "seed": arguments.seed}
    (workdir / "passkey.json").write_text(json.dumps(result, indent=2) + "\n")
    _draw(workdir, models)
    show(models, arguments.keys)
    print(f"{seconds / 60:.1f} minutes; wrote {workdir}/passkey.json and {workdir}/passkey.png")
    return 0


def _draw(workdir: Path, models: dict[str, dict[str, float]]) -> None:
    from fam_jax.evaluate.plot import plot_passkey

    config = json.loads((workdir / "fam" / "config.json").read_text())
    plot_passkey(
        models,
        workdir / "passkey.png",
        trained_blocks=config["data"]["stage_blocks"][-1],
        title=f"PassKey retrieval, {config['model']['num_layers']} layers of width {config['model']['model_dim']}, "
        f"blocks of {config['model']['block_size']} tokens",
    )


if __name__ == "__main__":
    cli.run(main)
