"""Compare a training step with LoRA to one with all parameters: time, and memory as planned by the compiler.

Both train the same model with FAM on the same rows, with Adafactor. One trains all parameters, the other low-rank
updates of all projections and the initial FAM. The frozen base is stored in float32, or in bfloat16 and converted at
every use. The steps run alternately in one process, and ratios are taken within a round.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from benchmarks.record import write_record
from benchmarks.timing import interleave
from benchmarks.workload import Workload, random_batch
from fam_jax.config import Config, LoraConfig, ModelConfig, TrainConfig
from fam_jax.memories.fam import FamConfig
from fam_jax.model import count_parameters, lora
from fam_jax.training.optimizer import make_optimizer
from fam_jax.training.state import init_state
from fam_jax.training.step import make_train_step
from launch.cli import ArgumentParser
from launch.errors import user_errors

SECONDS = 120.0
# Proportions of Llama 3 8B: four query heads per key head, and a feed-forward layer of 3.5 times the width.
FULL = Workload(
    ModelConfig(
        vocab_size=8192,
        num_layers=4,
        model_dim=1024,
        num_heads=8,
        num_kv_heads=2,
        head_dim=128,
        ff_dim=3584,
        block_size=128,
        memory=FamConfig(segments=1, length=8),
    ),
    batch=2,
    length=512,
    seed=0,
)
QUICK = Workload(
    ModelConfig(
        vocab_size=64,
        num_layers=2,
        model_dim=32,
        num_heads=4,
        num_kv_heads=1,
        head_dim=8,
        ff_dim=112,
        block_size=16,
        memory=FamConfig(segments=1, length=2),
    ),
    batch=2,
    length=64,
    seed=0,
)
SIDES = {
    "full": LoraConfig(),
    "lora": LoraConfig(rank=64),
    "lora_bfloat16": LoraConfig(rank=64, base_dtype="bfloat16"),
}


def compile_step(work: Workload, adaptation: LoraConfig) -> tuple[Callable[[], Any], dict[str, Any]]:
    """Compile a training step.

    Returns:
      A function that takes the next step at every call, and the sizes: parameters, trained_parameters, state_bytes
      (parameters and optimizer state) and step_bytes (memory of a step beside state and batch).
    """
    config = Config(model=work.model, lora=adaptation, train=TrainConfig(loss_chunk=work.tokens))
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    batch = random_batch(work)
    state = jax.jit(lambda: init_state(config, optimizer, work.seed))()
    step = jax.jit(make_train_step(config, optimizer), donate_argnums=0).lower(state, batch).compile()
    memory = step.memory_analysis()
    assert memory is not None
    trained, frozen = lora.divide(state.params, adaptation)
    parts = (state.params, state.optimizer)
    facts = {
        "parameters": count_parameters(trained) + count_parameters(frozen),
        "trained_parameters": count_parameters(trained),
        "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(parts)),
        "step_bytes": memory.temp_size_in_bytes,
    }

    def call() -> Any:
        nonlocal state
        state, metrics = step(state, batch)
        return metrics

    return call, facts


def measure(work: Workload, seconds: float) -> dict[str, Any]:
    """Return sizes, seconds per step and the ratio to full training for each of SIDES."""
    compiled = {name: compile_step(work, adaptation) for name, adaptation in SIDES.items()}
    times = interleave({name: call for name, (call, _) in compiled.items()}, seconds)
    taken = times.seconds()
    return {
        name: facts | {"seconds": taken[name], "ratio": times.ratio(name, "full")}
        for name, (_, facts) in compiled.items()
    }


def show(results: dict[str, Any]) -> None:
    """Print a table with a row per side."""
    table = Table(title="Training steps")
    headings = ("", "trained", "state MiB", "step MiB", "seconds", "of full")
    for heading in headings:
        table.add_column(heading, justify="right")
    for name, row in results.items():
        table.add_row(
            name,
            f"{row['trained_parameters']:,}",
            f"{row['state_bytes'] / 2**20:,.1f}",
            f"{row['step_bytes'] / 2**20:,.1f}",
            str(row["seconds"]),
            str(row["ratio"]),
        )
    Console().print(table)


@user_errors()
def main(argv: Sequence[str]) -> None:
    """Measure, print and write the record."""
    parser = ArgumentParser(prog="benchmarks.lora_step", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--seconds",
        type=float,
        default=SECONDS,
        help="duration of measuring, without compilation (default: 120)",
    )
    parser.add_argument("--quick", action="store_true", help="use a tiny model, as a test")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    arguments = parser.parse_args(argv)
    work = QUICK if arguments.quick else FULL
    results = measure(work, 0.0 if arguments.quick else arguments.seconds)
    show(results)
    if arguments.json:
        settings = {"workload": work, "sides": {name: dataclasses.asdict(s) for name, s in SIDES.items()}}
        write_record(arguments.json, "lora_step", argv, settings, results)


if __name__ == "__main__":
    main(sys.argv[1:])
