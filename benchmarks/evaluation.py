"""Measure what the evaluation of long documents costs beside reading their tokens once.

    python -m benchmarks.evaluation --json docs/results/evaluation.json

Padding: tokens paid for per token needed, with documents as long as those of the paper's tasks (log-normal, with the
means and deviations of its table 10). This needs no model. Throughput: tokens per second of questions on such
documents, 16 times shorter, against plain reading of as many tokens in rows that are all equally long, in turns.
Memory: the most bytes of arrays that exist while documents of one length, and of 16 times that length, are read.
"""

import dataclasses
import functools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.record import write_record
from benchmarks.report import print_table
from benchmarks.timing import interleave
from benchmarks.workload import random_parameters
from fam_jax.config import ModelConfig
from fam_jax.data.vocabulary import load_vocabulary
from fam_jax.evaluation.answering import Answering, HowToAnswer
from fam_jax.evaluation.item import CHOOSE, Document, Encoded, Item
from fam_jax.evaluation.joining import Joiner
from fam_jax.evaluation.reading import Cost, Unread, read_documents, rows_to_use
from fam_jax.generation.streaming import Streamer
from fam_jax.memories.fam import FamConfig
from launch.cli import ArgumentParser, at_least
from launch.errors import user_errors

SEEDS = range(5)
CHUNK_BLOCKS = 16
LONGER = 16


class Lengths(NamedTuple):
    """Documents of a task: their number, mean and standard deviation of their tokens, and rows to read them in."""

    documents: int
    mean: float
    deviation: float
    rows: int

    def draw(self, seed: int, shorter: int = 1) -> list[int]:
        """Return the tokens of each document, divided by `shorter`."""
        variance = math.log1p((self.deviation / self.mean) ** 2)
        middle = math.log(self.mean / shorter) - variance / 2
        normal = np.random.default_rng(seed).normal(middle, math.sqrt(variance), self.documents)
        return [max(2, int(tokens)) for tokens in np.exp(normal)]


# NarrativeQA has 115 documents in its validation split, and Qasper 281.
TASKS = {
    "PG-19": Lengths(50, 94_704, 82_677, 16),
    "NarrativeQA": Lengths(115, 85_449, 84_376, 16),
    "Qasper": Lengths(281, 5_027, 2_580, 64),
    "Isabelle": Lengths(16, 60_874, 65_008, 8),
}
MODEL = ModelConfig(
    vocab_size=259,
    num_layers=4,
    model_dim=256,
    num_heads=4,
    num_kv_heads=4,
    head_dim=64,
    ff_dim=1024,
    block_size=128,
    memory=FamConfig(length=8, segments=1),
)
SMALL = dataclasses.replace(
    MODEL, num_layers=1, model_dim=16, num_heads=2, num_kv_heads=2, head_dim=8, ff_dim=32, block_size=16
)


class NoModel:
    """Reads nothing: counts the tokens of the calls alone."""

    mesh = None
    config = dataclasses.replace(MODEL, block_size=1024)

    def start(self, _: int) -> "NoModel":
        """Return a state that holds nothing."""
        return self

    def read(self, _: Any, state: Any, **__: Any) -> tuple[None, Any]:
        """Return the state."""
        return None, state

    def select(self, _: Any) -> "NoModel":
        """Return the state."""
        return self

    def replace_row(self, _: int, __: Any) -> "NoModel":
        """Return the state."""
        return self


class Watching(Streamer):
    """A streamer that remembers the most bytes of arrays that existed after a call."""

    most = 0

    def read(self, *arguments: Any, **how: Any) -> Any:
        """Read, and look at all arrays."""
        found = super().read(*arguments, **how)
        self.most = max(self.most, sum(array.nbytes for array in jax.live_arrays()))
        return found


def padding(lengths: Lengths, seed: int) -> dict[str, float]:
    """Return tokens paid for per token needed, of refilled rows and of batches of similar length."""
    documents, size, cost = lengths.draw(seed), NoModel.config.block_size, Cost()
    unread = [
        Unread(str(n), functools.partial(np.zeros, tokens, np.int32), tokens)
        for n, tokens in enumerate(documents)
    ]
    streamer: Any = NoModel()
    for _ in read_documents(streamer, unread, rows=lengths.rows, chunk_blocks=CHUNK_BLOCKS, cost=cost):
        pass
    ordered = sorted(documents, reverse=True)
    batches = [ordered[begin : begin + lengths.rows] for begin in range(0, len(ordered), lengths.rows)]
    paid = sum(len(batch) * math.ceil(batch[0] / size) * size for batch in batches)
    return {"refilled": cost.paid / cost.needed, "sorted": paid / sum(documents)}


def documents_of(lengths: Sequence[int], seed: int) -> list[np.ndarray]:
    """Return random ids of bytes."""
    random = np.random.default_rng(seed)
    return [random.integers(3, 259, tokens).astype(np.int32) for tokens in lengths]


def throughput(streamer: Streamer, lengths: Lengths, shorter: int, seconds: float) -> dict[str, Any]:
    """Time questions on documents against plain reading of as many tokens."""
    vocabulary = load_vocabulary("bytes")
    joiner = Joiner(vocabulary, streamer.config.vocab_size, (), 0)
    documents = documents_of(lengths.draw(0, shorter), 0)
    items = [
        Item(
            str(n),
            CHOOSE,
            "\n\nQuestion: Is it so?\nAnswer:",
            Document(str(n), "", len(ids), functools.partial(Encoded, ids, "")),
            choices=(" yes", " no"),
            references=("0",),
        )
        for n, ids in enumerate(documents)
    ]
    total, size = sum(map(len, documents)), streamer.config.block_size
    rows = rows_to_use([len(ids) for ids in documents], lengths.rows)
    plain = documents_of([math.ceil(total / rows / size) * size] * rows, 1)

    tokens = {"read": sum(map(len, plain))}

    def evaluate() -> int:
        answering = Answering(streamer, joiner, HowToAnswer(lengths.rows, CHUNK_BLOCKS), [])
        answered = sum(len(part) for part in answering.run(items))
        tokens["evaluate"] = answering.cost.needed  # the questions count, and padding does not
        return answered

    def read() -> jax.Array:
        return streamer.read(plain, chunk_blocks=CHUNK_BLOCKS)[0]

    times = interleave({"evaluate": evaluate, "read": read}, seconds)

    def speed(name: str, each: dict[str, float]) -> float:
        return tokens[name] / each[name]

    return {
        "documents": len(documents),
        "rows": rows,
        "tokens": tokens,
        "tokens_per_second": {name: times.over_rounds(functools.partial(speed, name)) for name in tokens},
        "ratio": times.over_rounds(lambda each: speed("evaluate", each) / speed("read", each)),
    }


def memory(model: ModelConfig, tokens: int) -> dict[str, int]:
    """Return the most bytes of arrays while eight documents of a length, and of LONGER times that, are read."""
    found = {}
    for length in (tokens, LONGER * tokens):
        streamer = Watching(model, random_parameters(model, 0))
        unread = [
            Unread(str(n), functools.partial(np.asarray, ids), len(ids))
            for n, ids in enumerate(documents_of([length] * 8, 0))
        ]
        for _ in read_documents(streamer, unread, rows=4, chunk_blocks=4):
            pass
        found[str(length)] = streamer.most
    return found


def show(results: dict[str, Any]) -> None:
    """Print the results."""
    rows = [
        [
            name,
            str(TASKS[name].rows),
            *(f"{np.mean([each[way] for each in seeds]):.3f}" for way in ("refilled", "sorted")),
        ]
        for name, seeds in results["padding"].items()
    ]
    print_table("Tokens paid for per token needed", ("task", "rows", "refilled rows", "sorted batches"), rows)
    found = results["throughput"]
    rows = [[name, str(found["tokens_per_second"][name])] for name in found["tokens"]]
    print_table("Tokens per second", ("what", "median (quartiles)"), [*rows, ["ratio", str(found["ratio"])]])
    rows = [[tokens, f"{most:,}"] for tokens, most in results["memory"].items()]
    print_table("Most bytes of arrays", ("tokens of a document", "bytes"), rows)


@user_errors()
def main(argv: Sequence[str]) -> None:
    """Measure, print tables and write the record."""
    parser = ArgumentParser(prog="benchmarks.evaluation", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--seconds", type=at_least(1), default=180, help="of the timed rounds (default: 180)")
    parser.add_argument("--quick", action="store_true", help="a tiny model and short documents, as a test")
    parser.add_argument("--json", type=Path, default=Path("runs/bench/evaluation.json"))
    arguments = parser.parse_args(argv)
    model, shorter = (SMALL, 2048) if arguments.quick else (MODEL, 16)
    seconds = 1 if arguments.quick else arguments.seconds
    results = {
        "padding": {name: [padding(lengths, seed) for seed in SEEDS] for name, lengths in TASKS.items()},
        "memory": memory(model, 4 * model.block_size),
        "throughput": throughput(
            Streamer(model, random_parameters(model, 0)), TASKS["PG-19"], shorter, seconds
        ),
    }
    show(results)
    settings = {
        "model": model,
        "tasks": TASKS,
        "shorter": shorter,
        "chunk_blocks": CHUNK_BLOCKS,
        "seeds": [*SEEDS],
    }
    write_record(arguments.json, "evaluation", argv, settings, results)


if __name__ == "__main__":
    main(sys.argv[1:])
