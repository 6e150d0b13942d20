"""Measure the speed of the memories that `benchmarks.reproduce` compares: training, and decoding a token at a time.

    python -m benchmarks.memories --json=docs/results/laboratory/speed.json

All models have the size of the laboratory's PassKey task, with as many parameters as FAM, within 5 %. They are timed
alternately in one process: a training step on rows of several blocks, and greedy decoding of two blocks of one stream,
which ends in two updates of the memory.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.experiments import ARMS, REFERENCE, TASKS, config_fields, config_of, matched, state_floats
from benchmarks.record import write_record
from benchmarks.timing import Times, interleave
from benchmarks.workload import Workload, random_batch, random_parameters, training_call
from fam_jax.config import ModelConfig
from fam_jax.generation.streaming import Streamer
from launch import cli
from launch.errors import user_errors

TASK = "passkey"
BATCH, BLOCKS = 16, 10
# Blocks that a stream reads before it is decoded, and blocks to decode.
READ, DECODED = 4, 2
# Arms that differ from another one in what training does outside of the model, and so not in speed.
SAME_SPEED = ("fam_rsp_02", "fam_rsp_08")


def model_of(arm: str) -> ModelConfig:
    """Return the model of an arm, with its matched width."""
    task = TASKS[TASK]
    return config_of(task, config_fields(task, ARMS[arm], 0, ff_dim=matched(task, ARMS[arm]))).model


def compare_training(models: dict[str, ModelConfig], seconds: float, seed: int) -> dict[str, Any]:
    """Time training steps; return tokens/s, and the time of a step as a multiple of the reference's."""
    calls = {}
    for name, model in models.items():
        work = Workload(model, BATCH, BLOCKS * model.block_size, seed)
        calls[name] = training_call(work, model, random_batch(work))
        print(f"memories: training, {name}", file=sys.stderr, flush=True)
        jax.block_until_ready(calls[name]())
    times = interleave(calls, seconds)
    tokens = BATCH * BLOCKS * models[REFERENCE].block_size
    return _per_arm(times, "tokens_per_second", lambda t: tokens / t)


def compare_decoding(models: dict[str, ModelConfig], seconds: float, seed: int) -> dict[str, Any]:
    """Time decoding; return milliseconds per token, and the time as a multiple of the reference's."""
    calls = {}
    for name, model in models.items():
        streamer, size = Streamer(model, random_parameters(model, seed)), model.block_size
        tokens = np.random.default_rng(seed).integers(0, model.vocab_size, READ * size).astype(np.int32)
        logits, state = streamer.read([tokens])

        def call(streamer: Streamer = streamer, start: Any = (logits, state), size: int = size) -> Any:
            out = streamer.generate(*start, max_tokens=DECODED * size, tokens_per_call=size)
            return out.logits, out.state

        calls[name] = call
        print(f"memories: decoding, {name}", file=sys.stderr, flush=True)
        jax.block_until_ready(call())
    times = interleave(calls, seconds)
    count = DECODED * models[REFERENCE].block_size
    return _per_arm(times, "milliseconds_per_token", lambda t: 1e3 * t / count)


def _per_arm(times: Times, figure: str, of_seconds: Any) -> dict[str, Any]:
    return {
        name: {
            figure: times.over_rounds(lambda t, name=name: of_seconds(t[name])),  # type: ignore[misc]
            f"{figure.partition('_per_')[0]}_time_ratio": times.ratio(name, REFERENCE),
        }
        for name in times.rounds[0]
    }


def measure(arms: Sequence[str], seconds: float, seed: int, *, quick: bool = False) -> dict[str, Any]:
    """Return the figures of each arm."""
    models = {arm: model_of(arm) for arm in dict.fromkeys((REFERENCE, *arms))}
    if quick:
        models = {arm: dataclasses.replace(model, num_layers=1) for arm, model in models.items()}
    training = compare_training(models, seconds / 2, seed)
    decoding = compare_decoding(models, seconds / 2, seed)
    return {
        arm: {
            "label": ARMS[arm].label,
            "state_floats": state_floats(model),
            **training[arm],
            **decoding[arm],
        }
        for arm, model in models.items()
    }


def show(results: dict[str, Any]) -> None:
    """Print the figures as a table."""
    table = Table(
        title=f"Training on {BATCH} rows of {BLOCKS} blocks; decoding of one stream; median (quartiles)"
    )
    table.add_column("memory", no_wrap=True)
    for heading in ("tokens/s", "ms/token"):
        table.add_column(heading, justify="right")
    for row in results.values():
        speed = row["tokens_per_second"]
        table.add_row(
            row["label"],
            f"{speed.median:,.0f} ({speed.q1:,.0f}-{speed.q3:,.0f})",
            str(row["milliseconds_per_token"]),
        )
    Console().print(table)


@user_errors()
def main(argv: Sequence[str]) -> None:
    """Measure, print and write the record."""
    parser = cli.ArgumentParser(prog="benchmarks.memories", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    every = tuple(arm for arm in ARMS if arm not in SAME_SPEED)
    add("--arms", type=cli.words, default=every, metavar="NAME,...", help="memories to time; default: all")
    add("--seconds", type=float, default=240.0, help="of all measurements, without compilation; default: 240")
    add("--seed", type=cli.seed, default=0, help="of parameters and tokens; default: 0")
    add("--quick", action="store_true", help="one layer and three rounds, as a test")
    add("--json", type=Path, help="write the record to this file")
    arguments = parser.parse_args(argv)
    unknown = [arm for arm in arguments.arms if arm not in ARMS]
    if unknown:
        parser.error(f"argument --arms: unknown {unknown[0]!r}; use some of {', '.join(ARMS)}")
    seconds = 0.0 if arguments.quick else arguments.seconds
    results = measure(arguments.arms, seconds, arguments.seed, quick=arguments.quick)
    show(results)
    if arguments.json:
        settings = {"batch": BATCH, "blocks": BLOCKS, "read": READ, "decoded": DECODED, "seconds": seconds}
        write_record(arguments.json, "memories", argv, settings, results)


if __name__ == "__main__":
    main(sys.argv[1:])
