"""Measure decoding after a thousand and after a million tokens, and the process memory while reading them.

A new process reads one stream in chunks of whole blocks, and samples its peak memory and the bytes of all live arrays.
Then it decodes alternately from two states: one saved near the start of the stream, and the one at its end.
"""

import gc
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.record import write_record
from benchmarks.report import print_decoding
from benchmarks.timing import interleave
from benchmarks.workload import random_parameters
from fam_jax.config import ModelConfig
from fam_jax.generation.streaming import Streamer
from fam_jax.memories.fam import FamConfig
from fam_jax.model import StreamState
from launch.cli import ArgumentParser
from launch.errors import user_errors

MODEL = ModelConfig(
    vocab_size=64,
    num_layers=2,
    model_dim=64,
    num_heads=2,
    num_kv_heads=2,
    head_dim=32,
    ff_dim=256,
    block_size=64,
    memory=FamConfig(length=4),
)
CHUNK_BLOCKS = 16
# Tokens of a chunk: 1024.
CHUNK = CHUNK_BLOCKS * MODEL.block_size
# Numbers of chunks after which memory is sampled.
MARKS = (10, 30, 100, 300, 1000)
QUICK_MARKS = (2, 4, 8)
# Memory counts as flat if its peak at the last mark is at most this many times that at the first.
FLAT = 1.02


def stream(streamer: Streamer, marks: Sequence[int], seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read random tokens up to the last mark.

    Returns:
      The samples of all marks, and (logits, state) after the first chunk ("near") and after the last ("far").
    """
    random = np.random.default_rng(seed)
    samples: list[dict[str, Any]] = []
    state: StreamState | None = None
    for _ in range(2):  # compile both programs: one starts a stream, one continues it
        _, state = streamer.read([np.zeros(CHUNK, np.int32)], state, chunk_blocks=CHUNK_BLOCKS)
    state = None
    started = time.perf_counter()
    kept: dict[str, Any] = {}
    before = 0
    for chunk in range(1, marks[-1] + 1):
        # Draw tokens chunk by chunk, because an array of a million tokens would itself take memory.
        tokens = random.integers(0, streamer.config.vocab_size, CHUNK)
        logits, state = streamer.read([tokens], state, chunk_blocks=CHUNK_BLOCKS)
        if chunk == 1:
            kept["near"] = (logits, state)
        if chunk in marks:
            jax.block_until_ready((logits, state))
            elapsed = time.perf_counter() - started
            samples.append(
                {
                    "tokens": chunk * CHUNK,
                    "peak_rss_bytes": peak_rss(),
                    "live_array_bytes": live_bytes(),
                    "tokens_per_second": (chunk - before) * CHUNK / elapsed,
                }
            )
            before, started = chunk, time.perf_counter()
    kept["far"] = (logits, state)
    return _stream_result(samples), kept


def _stream_result(samples: list[dict[str, Any]]) -> dict[str, Any]:
    first, last = samples[0], samples[-1]
    peaks = first["peak_rss_bytes"], last["peak_rss_bytes"]
    growth = peaks[1] / peaks[0]
    arrays_equal = len({sample["live_array_bytes"] for sample in samples}) == 1
    spans = [b["tokens"] - a["tokens"] for a, b in zip([{"tokens": 0}, *samples], samples, strict=False)]
    seconds = sum(span / sample["tokens_per_second"] for span, sample in zip(spans, samples, strict=True))
    return {
        "samples": samples,
        "peak_rss_growth": growth,
        "live_arrays_equal": arrays_equal,
        "flat": growth <= FLAT and arrays_equal,
        "tokens_per_second": sum(spans) / seconds,
    }


def compare_positions(streamer: Streamer, kept: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Time greedy decoding of two blocks, including two updates of FAM, from each state."""
    size = streamer.config.block_size
    count = 2 * size

    def call(name: str) -> Any:
        logits, state = kept[name]
        out = streamer.generate(logits, state, max_tokens=count, tokens_per_call=size)
        return out.logits, out.state

    times = interleave({name: lambda name=name: call(name) for name in kept}, seconds)  # type: ignore[misc]
    return {
        "positions": {name: int(state.tokens_read[0]) for name, (_, state) in kept.items()},
        "tokens_per_call": count,
        "seconds_per_token": {
            name: times.over_rounds(lambda t, name=name: t[name] / count)  # type: ignore[misc]
            for name in kept
        },
        "ratio": times.ratio("far", "near"),
    }


def peak_rss() -> int:
    """Return the peak resident memory of this process in bytes."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak
    # On Linux, ru_maxrss would include the peak of the parent process.
    return next(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def live_bytes() -> int:
    """Return the bytes of all live JAX arrays."""
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


def measure(marks: Sequence[int], seconds: float, seed: int) -> dict[str, Any]:
    """Measure streaming, then decoding for `seconds`."""
    streamer = Streamer(MODEL, random_parameters(MODEL, seed))
    print(f"decoding: streaming {marks[-1] * CHUNK:,} tokens", file=sys.stderr, flush=True)
    streamed, kept = stream(streamer, marks, seed)
    print("decoding: near and far", file=sys.stderr, flush=True)
    return {"stream": streamed, "decode": compare_positions(streamer, kept, seconds)}


@user_errors()
def main(argv: Sequence[str]) -> None:
    """Measure, print and write the record."""
    parser = ArgumentParser(prog="benchmarks.decoding", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="duration of timing decoding (default: 20)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of parameters and tokens (default: 0)")
    parser.add_argument("--quick", action="store_true", help="read a few thousand tokens, as a test")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    arguments = parser.parse_args(argv)
    marks = QUICK_MARKS if arguments.quick else MARKS
    seconds = 0.0 if arguments.quick else arguments.seconds
    results = measure(marks, seconds, arguments.seed)
    print_decoding(results)
    if arguments.json:
        settings = {
            "model": MODEL,
            "chunk_tokens": CHUNK,
            "marks": [mark * CHUNK for mark in marks],
            "seconds": seconds,
            "seed": arguments.seed,
            "quick": arguments.quick,
        }
        write_record(arguments.json, "decoding", argv, settings, results)


if __name__ == "__main__":
    main(sys.argv[1:])
