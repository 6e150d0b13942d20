"""Train on long documents whose rows go on from step to step, with and without what the last step left.

    python -m launch.demo_data --out=data --parts=books
    python -m benchmarks.continuous --text=data/books --workdir=runs/continuous --json=docs/results/continuous.json

All trainings of a seed see the same batches, of the layout continuous. They differ in the memory, and in what a row
that goes on starts from: an empty stream; a state that the last step left in some row, by random state passing; or the
memory and the window of its own document (`train.carry=all`). Each model is then evaluated on whole held-out documents,
and compared document by document with the training of the same memory and seed that starts from empty streams.

All files go below the workdir. Rerun the same command after an interruption: steps whose results exist are skipped.
"""

import concurrent.futures
import dataclasses
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.record import write_record
from fam_jax.config import UserError
from fam_jax.evaluation import read_evaluation
from fam_jax.evaluation.paired import difference_per_token
from launch.cli import ArgumentParser, at_least
from launch.errors import user_errors
from launch.workers import ONE_CORE

# Name of a training: memory, then flags.
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "bswa": ("bswa", {}),
    "bswa, all": ("bswa", {"train.carry": "all"}),
    "fam": ("fam", {}),
    "fam, random states": ("fam", {"train.random_state_passing": 0.8}),
    "fam, all": ("fam", {"train.carry": "all"}),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes of the trainings and evaluations."""

    steps: int
    seeds: int
    documents: int
    # C
    block_size: int = 64
    # m
    segments: int = 1
    # M
    length: int = 8
    # T of a step, tokens
    row: int = 512
    # B
    rows: int = 16

    def flags(self, text: Path, seed: int, arm: str) -> list[str]:
        """Return the flags of a training."""
        memory, own = ARMS[arm]
        config = {
            "data.layout": "continuous",
            "data.train_files": text / "train",
            "data.heldout_files": text / "heldout",
            "data.sequence_length": self.row,
            "model.num_layers": 3,
            "model.model_dim": 96,
            "model.num_heads": 4,
            "model.num_kv_heads": 4,
            "model.head_dim": 24,
            "model.ff_dim": 256,
            "model.block_size": self.block_size,
            "model.memory.segments": self.segments,
            "model.remat": "none",
            "optimizer.learning_rate": 4e-3,
            "optimizer.warmup_steps": self.steps // 10,
            "train.batch_size": self.rows,
            "train.steps": self.steps,
            "train.seed": seed,
            "train.checkpoint_every": self.steps,
            "evaluate.every": 0,
            **({"model.memory.length": self.length} if memory == "fam" else {}),
            **own,
        }
        return [
            f"--config=configs/text.py:{memory}",
            *(f"--config.{key}={value}" for key, value in config.items()),
        ]


FULL = Settings(steps=250, seeds=3, documents=8)
QUICK = Settings(steps=2, seeds=1, documents=2)


def folder_of(place: Path, arm: str, seed: int) -> Path:
    """Return the workdir of a training."""
    return place / f"{arm.replace(', ', '_').replace(' ', '_')}_{seed}"


def run(module: str, log: Path, *arguments: str) -> None:
    """Run a program on one core, with its output in a file.

    Raises:
      UserError: the program failed.
    """
    environment = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {ONE_CORE}"}
    with log.open("a") as output:
        command = [sys.executable, "-m", module, *arguments]
        code = subprocess.run(command, stdout=output, stderr=output, env=environment).returncode
    if code:
        raise UserError(f"{module}: failed with exit code {code}; see {log}")


def train_and_evaluate(place: Path, text: Path, settings: Settings, arm: str, seed: int) -> None:
    """Make one training and its evaluation, if they do not exist."""
    folder, log = folder_of(place, arm, seed), folder_of(place, arm, seed).with_suffix(".log")
    out = folder.with_suffix(".json")
    if out.exists():
        return
    run("launch.train", log, *settings.flags(text, seed, arm), f"--workdir={folder}", "--quiet")
    ablations = "" if ARMS[arm][0] == "bswa" else "zeroed"
    run(
        "launch.evaluate",
        log,
        f"--checkpoint={folder}",
        "--task=text",
        f"--files={text}/heldout",
        f"--documents={settings.documents}",
        f"--batch_size={min(settings.documents, 4)}",
        f"--ablations={ablations}",
        f"--out={out}",
    )
    print(f"done: {arm}, seed {seed}", file=sys.stderr, flush=True)


def collect(place: Path, settings: Settings) -> dict[str, Any]:
    """Return losses by position, and the differences to the training from empty streams, of every arm and seed."""
    found: dict[str, Any] = {}
    for arm, (memory, _) in ARMS.items():
        found[arm] = {}
        for seed in range(settings.seeds):
            own, plain = (
                read_evaluation(folder_of(place, name, seed).with_suffix(".json")).details
                for name in (arm, memory)
            )
            found[arm][str(seed)] = {
                "loss": own["loss"],
                "by_position": [
                    {key: bucket[key] for key in ("end", "documents", "tokens", "loss")}
                    for bucket in own["by_position"]
                ],
                "difference": {
                    str(bucket["end"]): difference(own, plain, index)
                    for index, bucket in enumerate(own["by_position"])
                },
                "difference_of_all": difference(own, plain, None),
                "ablations": {
                    name: part["difference_after_first_block"] for name, part in own["ablations"].items()
                },
            }
    return found


def difference(own: dict[str, Any], plain: dict[str, Any], bucket: int | None) -> dict[str, float | None]:
    """Return by how much the loss of `own` exceeds that of `plain`, in nats per token, with a 95 % interval.

    Args:
      own: details of the evaluation of one model.
      plain: details of the evaluation of another one, of the same documents.
      bucket: number of a bucket of positions; None: all of them.
    """
    chosen = slice(None) if bucket is None else slice(bucket, bucket + 1)
    tokens = np.array([sum(each["tokens"][chosen]) for each in own["by_document"]])
    if [each["tokens"] for each in own["by_document"]] != [each["tokens"] for each in plain["by_document"]]:
        raise ValueError("the evaluations are not of the same documents")
    sums = [
        sum(one["nats"][chosen]) - sum(other["nats"][chosen])
        for one, other in zip(own["by_document"], plain["by_document"], strict=True)
    ]
    return difference_per_token(np.array(sums), tokens)._asdict()


def show(results: dict[str, Any]) -> None:
    """Print losses and differences as tables."""
    table = Table(title="Held-out loss, nats per byte, and its difference to empty streams (95 % interval)")
    for heading in ("training", "seed", "loss", "difference", "memory zeroed"):
        table.add_column(heading, justify="right")
    for arm, seeds in results.items():
        for seed, found in seeds.items():
            told = (_told(found["difference_of_all"]), _told(found["ablations"].get("zeroed")))
            table.add_row(arm, seed, f"{found['loss']:.4f}", *told)
    Console().print(table)
    table = Table(title="Mean difference over seeds by position, nats per byte, up to byte")
    ends = list(next(iter(results["fam"].values()))["difference"])
    for heading in ("training", *(f"{int(end):,}" for end in ends)):
        table.add_column(heading, justify="right")
    for arm, seeds in results.items():
        means = [np.mean([found["difference"][end]["mean"] for found in seeds.values()]) for end in ends]
        table.add_row(arm, *(f"{mean:+.4f}" for mean in means))
    Console().print(table)


def _told(found: dict[str, float | None] | None) -> str:
    if found is None:
        return ""
    low, high = found["low"], found["high"]
    return f"{found['mean']:+.4f}" + (f" ({low:+.4f} to {high:+.4f})" if low is not None else "")


@user_errors()
def main(argv: Sequence[str]) -> None:
    """Train, evaluate, print, and write the record."""
    parser = ArgumentParser(prog="benchmarks.continuous", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="folder with train/ and heldout/")
    parser.add_argument("--workdir", type=Path, default=Path("runs/continuous"))
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, each on one core")
    parser.add_argument("--seeds", type=at_least(1), default=FULL.seeds, help=f"default: {FULL.seeds}")
    parser.add_argument("--quick", action="store_true", help="two steps each, to check that everything runs")
    parser.add_argument("--json", type=Path, help="file to write")
    arguments = parser.parse_args(argv)
    settings = QUICK if arguments.quick else dataclasses.replace(FULL, seeds=arguments.seeds)
    place: Path = arguments.workdir
    place.mkdir(parents=True, exist_ok=True)
    work = [(arm, seed) for seed in range(settings.seeds) for arm in ARMS]
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        begun = [pool.submit(train_and_evaluate, place, arguments.text, settings, *each) for each in work]
        for each in begun:
            each.result()
    results = collect(place, settings)
    show(results)
    if arguments.json:
        write_record(arguments.json, "continuous", argv, settings, results)


if __name__ == "__main__":
    main(sys.argv[1:])
