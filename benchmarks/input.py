"""Measure the input pipeline: tokens per second that a process delivers, and what a resume costs.

    python -m benchmarks.input --json docs/results/input.json

The text is Python's own library, a document per file. Rates are those of the whole batch: a process that delivers a
quarter of each batch's rows counts all rows, as training waits for the slowest process. The cases take turns in every
round. A case ends when the batches that are made ahead are ready, so all CPU time belongs to it.
"""

import functools
import itertools
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from benchmarks.record import write_record
from benchmarks.report import print_table
from benchmarks.timing import Spread
from fam_jax.config import DataConfig
from fam_jax.config.strict_json import dump_json
from fam_jax.data import bookmarks as bookmarks_module
from fam_jax.data.build import make_batches, seqio_batches
from fam_jax.data.interface import BatchSpec
from fam_jax.data.packing import PackedBatches
from fam_jax.data.quiet_seqio import seqio, tf
from fam_jax.data.seqio_source import SeqioSource
from fam_jax.data.sharded_batches import ShardedBatches
from fam_jax.data.sources import Shuffled, TextSource
from fam_jax.data.text_vocabulary import train_text_vocabulary
from fam_jax.data.vocabulary import load_vocabulary
from launch.cli import ArgumentParser
from launch.errors import user_errors

ROWS, TOKENS, SEED, BLOCK = 16, 2048, 0, 1024
PIECES = 8000
# Files that vocabularies are trained on.
SAMPLE = 150
PROCESSES = (1, 2, 4)
LAYOUTS = ("packed", "by_row", "continuous")
SEQIO_LAYOUTS = ("packed", "by_row")
ONE_BY_ONE = "packed, text by text"
# Batches of a measurement: four times as many as are made ahead at a time.
BATCHES = 32
DATASET = "fam_input"


class OneByOne(TextSource):
    """Tokenize one text at a time, as for any vocabulary that cannot take several."""

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [self.vocabulary.encode(text) for text in texts]


def library_texts(limit: int) -> list[str]:
    """Return the files of Python's own library that are UTF-8, up to a number of them."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for path in sorted(root.rglob("*.py")):
        if not {"site-packages", "dist-packages"} & {*path.parts}:
            try:
                texts.append(path.read_text(encoding="utf-8"))
            except UnicodeDecodeError:
                continue
    texts = [text for text in texts if text]
    # Files of one folder are similar, and long ones are together.
    order = np.random.default_rng(SEED).permutation(len(texts))[:limit]
    return [texts[number] for number in order]


def prepare(folder: Path, texts: Sequence[str]) -> dict[str, str]:
    """Write the texts as JSON Lines and as a TFDS dataset; return the vocabularies by name."""
    import tensorflow_datasets as tfds

    (folder / "texts.jsonl").write_text("".join(dump_json({"text": text}) + "\n" for text in texts))
    tfds.dataset_builders.store_as_tfds_dataset(
        name=DATASET,
        version="1.0.0",
        features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
        split_datasets={"train": [(n, {"text": text}) for n, text in enumerate(texts)]},
        data_dir=folder / "tfds",
        download_config=tfds.download.DownloadConfig(num_shards=8),
    )
    tfds.core.utils.file_utils.add_data_dir(folder / "tfds")
    (folder / "text.model").write_bytes(train_text_vocabulary(texts[:SAMPLE], PIECES))
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(texts[:SAMPLE], PIECES, special_tokens=["<end>"], show_progress=False)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(dump_json({"eos_token": "<end>"}))
    return {
        "SentencePiece": str(folder / "text.model"),
        "tokenizer.json": str(folder / "tokenizer.json"),
    }


def config(vocabulary: str, layout: str, files: str) -> DataConfig:
    """Return the data of a case."""
    return DataConfig(
        task="text",
        vocabulary=vocabulary,
        layout=layout,
        train_files=(files,),
        sequence_length=TOKENS,
        seqio_shards=max(PROCESSES),
    )


def batches_of(vocabulary: str, case: str, processes: int, files: str) -> Any:
    """Return the batches of the first process of a job."""
    layout = case.partition(",")[0]
    data = config(vocabulary, layout, files)
    spec = BatchSpec(BLOCK, ROWS, SEED, shard=(0, processes))
    batches = make_batches(data, spec)
    if case == ONE_BY_ONE:
        source = batches.source.source  # type: ignore[attr-defined]
        alone = Shuffled(OneByOne(source.documents, source.vocabulary), SEED)
        return PackedBatches(data, alone, spec)
    return batches


def settle(batches: Any) -> None:
    """Wait until everything that is made ahead is ready."""
    for part in batches.parts if isinstance(batches, ShardedBatches) else [batches]:
        thread: ThreadPoolExecutor = part._thread
        thread.submit(lambda: None).result()


def spent(work: Callable[[], Any]) -> tuple[float, float]:
    """Return the wall and the CPU seconds of this process for some work."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def deliver(batches: Any) -> tuple[int, float, float]:
    """Return the tokens, without padding, in the next BATCHES batches of a process, and their wall and CPU seconds."""
    tokens = [0]

    def work() -> None:
        for _ in range(BATCHES):
            tokens[0] += int((batches.next()["weights"] > 0).sum())
        settle(batches)

    wall, cpu = spent(work)
    return tokens[0], wall, cpu


def measure_rates(vocabularies: dict[str, str], files: str, rounds: int) -> list[dict[str, Any]]:
    """Return tokens of the global batch per second for every vocabulary, layout and number of processes."""
    rows = []
    for name, vocabulary in vocabularies.items():
        cases = {
            (case, count): batches_of(vocabulary, case, count, files)
            for case, count in ((ONE_BY_ONE, 1), *itertools.product(LAYOUTS, PROCESSES))
        }
        for layout, count in itertools.product(SEQIO_LAYOUTS, PROCESSES):
            cases[f"{layout}, seqio task", count] = streamed(vocabulary, layout, count, None)
        for batches in cases.values():
            deliver(batches)  # fills what is made ahead
        found: dict[Any, list[tuple[float, float]]] = {case: [] for case in cases}
        order = [*cases]
        for _ in range(rounds):
            for case in order:
                tokens, wall, cpu = deliver(cases[case])
                # Of all processes.
                found[case].append((case[1] * tokens / wall, case[1] * tokens / cpu))
            order.reverse()
        for (case, count), rates in found.items():
            wall_rate, cpu_rate = (spread([each[kind] for each in rates]) for kind in (0, 1))
            rows.append(
                {
                    "vocabulary": name,
                    "layout": case,
                    "processes": count,
                    "per_wall_s": wall_rate,
                    "per_cpu_s": cpu_rate,
                }
            )
    return rows


def spread(values: Sequence[float]) -> Spread:
    """Return median and quartiles."""
    q1, median, q3 = np.quantile(values, (0.25, 0.5, 0.75))
    return Spread(float(median), float(q1), float(q3), len(values))


def streamed(vocabulary: str, layout: str, processes: int, bookmarks: Path | None) -> Any:
    """Return the batches of the first process, from the dataset as a seqio task: seqio reads and tokenizes it.

    Args:
      vocabulary: as in :func:`batches_of`.
      layout: packed or by_row.
      processes: that share the batch.
      bookmarks: folder of bookmarks, one for every second of reading; None: there are none.
    """

    def rename(dataset: tf.data.Dataset) -> tf.data.Dataset:
        return dataset.map(lambda example: {"targets": example["text"]})

    task = seqio.Task(
        DATASET,
        source=seqio.TfdsDataSource(f"{DATASET}:1.0.0", splits=("train",)),
        preprocessors=[rename, seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features={"targets": seqio.Feature(load_vocabulary(vocabulary))},
    )
    # The default, 10 seconds, is more than the tokens here take to be read.
    bookmarks_module.SECONDS = 1.0
    place = str(bookmarks) if bookmarks else None
    spec = BatchSpec(BLOCK, ROWS, SEED, shard=(0, processes), bookmarks=place)
    return seqio_batches(config(vocabulary, layout, "-"), SeqioSource(task, "train", SEED), spec)


def measure_resumes(
    vocabularies: dict[str, str], files: str, tokens: int, rounds: int, scratch: Path
) -> list[dict[str, Any]]:
    """Return the seconds from making the batches to the first one, at the start and after a number of tokens."""
    rows = []
    for name, vocabulary in vocabularies.items():
        makers: dict[str, Callable[[], Any]] = {
            f"{kind}, {layout}": functools.partial(batches_of, vocabulary, layout, 1, source)
            for kind, source in (("text", files), ("tfds", f"tfds:{DATASET}:train"))
            for layout in LAYOUTS
        }
        for layout in SEQIO_LAYOUTS:
            place = scratch / "bookmarks" / name / layout
            makers[f"seqio task, {layout}"] = functools.partial(streamed, vocabulary, layout, 1, place)
        makers["seqio task, packed, no bookmarks"] = functools.partial(
            streamed, vocabulary, "packed", 1, None
        )
        states = {}
        for case, make in makers.items():
            batches = make()
            for _ in range(tokens // (ROWS * TOKENS)):
                batches.next()
            states[case] = batches.state()
            settle(batches)
        taken: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for _ in range(rounds):
            for case, make in makers.items():
                for when, state in (("start", None), ("resume", states[case])):
                    taken.setdefault((case, when), []).append(first_batch(make, state))
        for case in makers:
            row: dict[str, Any] = {"vocabulary": name, "source": case, "tokens": tokens}
            for when, (kind, unit) in itertools.product(("start", "resume"), enumerate(("wall_s", "cpu_s"))):
                row[f"{when}_{unit}"] = spread([each[kind] for each in taken[case, when]])
            rows.append(row)
    return rows


def first_batch(make: Callable[[], Any], state: dict[str, Any] | None) -> tuple[float, float]:
    """Return the wall and CPU seconds until the first batch after a state."""
    made = []

    def work() -> None:
        made.append(make())
        if state is not None:
            made[0].restore(state)
        made[0].next()

    seconds = spent(work)
    settle(made[0])
    return seconds


def show(results: dict[str, Any]) -> None:
    """Print both tables."""
    print_table(
        "Thousands of tokens of the global batch per second, by one process; median (quartiles)",
        ("vocabulary", "layout", "processes", "per CPU second", "per wall second"),
        [
            [
                row["vocabulary"],
                row["layout"],
                row["processes"],
                *(thousands(row[key]) for key in ("per_cpu_s", "per_wall_s")),
            ]
            for row in results.get("rates", [])
        ],
    )
    columns = ("start_wall_s", "resume_wall_s", "start_cpu_s", "resume_cpu_s")
    print_table(
        "Seconds to the first batch, at the start and after a resume",
        ("vocabulary", "source", "tokens", *(name.replace("_", " ") for name in columns)),
        [
            [row["vocabulary"], row["source"], row["tokens"], *(str(row[name]) for name in columns)]
            for row in results.get("resumes", [])
        ],
    )


def thousands(value: Spread) -> str:
    """Return a rate and its quartiles in thousands."""
    return f"{value.median / 1e3:,.0f} ({value.q1 / 1e3:,.0f}-{value.q3 / 1e3:,.0f})"


@user_errors()
def main(argv: Sequence[str]) -> None:
    """Measure, print tables and write the record."""
    parser = ArgumentParser(prog="benchmarks.input", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each case (default: 5)")
    parser.add_argument("--tokens", type=int, default=5_000_000, help="tokens read before a resume")
    parser.add_argument("--part", choices=("rates", "resumes"), help="one part of the measurement")
    parser.add_argument("--quick", action="store_true", help="use little text, as a test")
    parser.add_argument("--json", type=Path, default=Path("runs/bench/input.json"))
    arguments = parser.parse_args(argv)
    rounds, tokens = (1, 100_000) if arguments.quick else (arguments.rounds, arguments.tokens)
    texts = library_texts(200 if arguments.quick else 10**6)
    with tempfile.TemporaryDirectory() as scratch:
        vocabularies = prepare(Path(scratch), texts)
        files = f"{scratch}/texts.jsonl"
        results: dict[str, Any] = {}
        if arguments.part != "resumes":
            results["rates"] = measure_rates(vocabularies, files, rounds)
        if arguments.part != "rates":
            results["resumes"] = measure_resumes(vocabularies, files, tokens, min(rounds, 3), Path(scratch))
    show(results)
    settings = {
        "rows": ROWS,
        "tokens_per_row": TOKENS,
        "pieces": PIECES,
        "documents": len(texts),
        "characters": sum(map(len, texts)),
        "seed": SEED,
        "rounds": rounds,
    }
    write_record(arguments.json, "input", argv, settings, results)


if __name__ == "__main__":
    main(sys.argv[1:])
