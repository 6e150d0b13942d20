"""Measure peak memory and speed of `python -m launch.generate` for prompts of several lengths.

The benchmark writes a checkpoint with random parameters and a text file of each length. Every run is a new process.
"""

import dataclasses
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from benchmarks.decoding import CHUNK_BLOCKS, FLAT, MODEL
from benchmarks.record import ROOT, write_record
from benchmarks.report import print_table
from benchmarks.workload import random_parameters
from fam_jax.checkpoint import Checkpoints
from fam_jax.config import Config, DataConfig
from fam_jax.config.strict_json import dump_json
from launch.cli import ArgumentParser, integers
from launch.errors import user_errors

LENGTHS = (10_000, 100_000, 1_000_000)
GENERATED = 128
# Runs the command, then prints the peak memory of the process.
PROGRAM = (
    "import sys; from benchmarks.decoding import peak_rss; from launch.generate import main; main(); "
    "print(f'peak {peak_rss()}', file=sys.stderr)"
)


def make_checkpoint(folder: Path, seed: int) -> None:
    """Write a run whose vocabulary is bytes: a text then has as many tokens as letters."""
    model = dataclasses.replace(MODEL, vocab_size=259)
    config = Config(model=model, data=DataConfig(vocabulary="bytes"))
    with Checkpoints(folder, config=dataclasses.asdict(config), keep=1) as checkpoints:
        checkpoints.save(1, {"params": random_parameters(model, seed), "step": jnp.int32(1)}, {})


def write_prompt(path: Path, length: int, seed: int) -> None:
    """Write `length` ASCII characters of random words."""
    rng = random.Random(seed)
    with path.open("w") as file:
        for begin in range(0, length, 8):
            word = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=7)) + " "
            file.write(word[: length - begin])


def measure(checkpoint: Path, prompt: Path) -> dict[str, Any]:
    """Measure one run of the command."""
    command = [
        *(sys.executable, "-c", PROGRAM),
        f"--checkpoint={checkpoint}",
        f"--prompt-file={prompt}",
        f"--max-tokens={GENERATED}",
        f"--chunk-blocks={CHUNK_BLOCKS}",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = re.search(r"read ([\d,]+) tokens in ([\d.]+) s", done.stderr)
    peak = re.search(r"peak (\d+)", done.stderr)
    assert found is not None and peak is not None, done.stderr
    tokens, seconds = int(found[1].replace(",", "")), float(found[2])
    return {
        "tokens": tokens,
        "peak_rss_bytes": int(peak[1]),
        # Includes compilation.
        "seconds_reading": seconds,
        "tokens_per_second": tokens / seconds,
    }


@user_errors()
def main(argv: Sequence[str]) -> None:
    """Measure, print and write the record."""
    parser = ArgumentParser(prog="benchmarks.generation", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=integers, default=LENGTHS, help="lengths of the prompts in tokens")
    parser.add_argument("--seed", type=int, default=0, help="seed of parameters and prompts (default: 0)")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, prompt = Path(folder) / "run", Path(folder) / "prompt.txt"
        make_checkpoint(checkpoint, arguments.seed)
        samples = []
        for length in arguments.lengths:
            write_prompt(prompt, length, arguments.seed)
            samples.append(measure(checkpoint, prompt))
            print(dump_json(samples[-1]), file=sys.stderr, flush=True)
    growth = samples[-1]["peak_rss_bytes"] / samples[0]["peak_rss_bytes"]
    rows = [
        (
            s["tokens"],
            f"{s['peak_rss_bytes'] / 2**20:,.1f}",
            s["seconds_reading"],
            f"{s['tokens_per_second']:,.0f}",
        )
        for s in samples
    ]
    print_table("launch.generate", ("tokens read", "peak resident MiB", "seconds", "tokens/s"), rows)
    if arguments.json:
        settings = {
            "model": dataclasses.replace(MODEL, vocab_size=259),
            "generated": GENERATED,
            "chunk_blocks": CHUNK_BLOCKS,
            "seed": arguments.seed,
        }
        results = {"samples": samples, "peak_rss_growth": growth, "flat": growth <= FLAT}
        write_record(arguments.json, "generation", argv, settings, results)


if __name__ == "__main__":
    main(sys.argv[1:])
