"""The probe "memory": whether, where and how far back a model uses its memory.

docs/evaluation.md says how to read the results.
"""

import functools
import time
from typing import Any, BinaryIO

import rich.table

from fam_jax.config import UserError
from fam_jax.evaluation.documents import DocumentReader, Documents
from fam_jax.evaluation.memory_inspection import gradient_reach, inspect_documents
from fam_jax.evaluation.memory_scores import memory_scores, retention
from fam_jax.evaluation.paired import Difference
from fam_jax.evaluation.task import OnProgress, Setting, make_table
from fam_jax.generation.streaming import Streamer


def probe_memory(
    streamer: Streamer, documents: Documents, setting: Setting, on_progress: OnProgress | None = None
) -> dict[str, Any]:
    """Probe the memory of a model on documents.

    Args:
      streamer: the model.
      documents: the documents, at least one.
      setting: `setting.evaluate` sets the batch size.
      on_progress: called with the name of a pass, such as "memory: zeroed", and the tokens read and to read.

    Returns:
      JSON values: kind, block_size and window_blocks (m) of the model; `scores` and `skipped` of
      :func:`~fam_jax.evaluation.memory_scores.memory_scores`; `retention`; `gradients` of
      :func:`~fam_jax.evaluation.memory_inspection.gradient_reach`; the figures of
      :func:`~fam_jax.evaluation.memory_inspection.inspect_documents`; `alarms`; and `seconds`.

    Raises:
      UserError: no token of the documents has a loss weight.
    """
    began = time.perf_counter()
    if not any((each.weights > 0).any() for each in documents.examples):
        raise UserError("--probe=memory: no token of the documents has a loss weight; name other files")
    report = None if on_progress is None else functools.partial(_report, on_progress)
    reader = DocumentReader(streamer, documents, setting, report)
    inspected = inspect_documents(reader, report)
    gradients = gradient_reach(reader, report)
    intact = reader.read_by_block("intact")
    scores, skipped = memory_scores(reader, intact)
    model = streamer.config
    return {
        "kind": model.memory.kind,
        "block_size": model.block_size,
        "window_blocks": model.memory_segments,
        "documents": len(documents.examples),
        "tokens": sum(len(each.ids) for each in documents.examples),
        "alarms": inspected["vectors"]["alarms"] if inspected["vectors"] else [],
        "scores": scores,
        "skipped": skipped,
        "retention": retention(reader, intact),
        "gradients": gradients,
        "inspected": inspected,
        "seconds": round(time.perf_counter() - began, 3),
    }


def _report(on_progress: OnProgress, name: str, done: int, total: int) -> None:
    on_progress(f"memory: {name}", done, total)


def memory_tables(found: dict[str, Any], title: str) -> list[rich.table.Table]:
    """Return tables of the scores, of the distance that the memory reaches, and of the layers; alarms come first."""
    exact = found["scores"]["intact"]["exact_match"] is not None
    headings = ["memory", "tokens", "loss", "accuracy", *(["exact match"] if exact else []), "loss added"]
    scores = make_table(f"Memory of {title}", headings)
    scores.caption = "\n".join(f"ALARM {alarm}" for alarm in found["alarms"]) or None
    for name, row in found["scores"].items():
        whole = [f"{row['exact_match']:.1%}"] if exact else []
        change = str(Difference(**row["difference"])) if "difference" in row else ""
        scores.add_row(
            name, f"{row['tokens']:,}", f"{row['loss']:.4f}", f"{row['accuracy']:.1%}", *whole, change
        )
    tables = [scores]
    if found["retention"]:
        distances = make_table(
            "What is used from further back", ("blocks kept", "tokens", "loss added without the rest")
        )
        for row in found["retention"]:
            kept = {row["blocks"], row["most_blocks"]}
            name = " to ".join(map(str, sorted(kept)))
            distances.add_row(name, f"{row['tokens']:,}", str(Difference(**row["difference"])))
        tables.append(distances)
    attention = found["inspected"]["attention"]
    layers = make_table(
        "Share of attention, mean of the heads", ("layer", "memory", "past blocks", "own block")
    )
    for number, parts in enumerate(
        zip(*(attention[name] for name in ("memory", "past", "own")), strict=True)
    ):
        layers.add_row(str(number), *(f"{sum(heads) / len(heads):.1%}" for heads in parts))
    return [*tables, layers]


def plot_memory(found: dict[str, Any], file: BinaryIO, title: str) -> None:
    """Write a PNG of all figures on one page."""
    from fam_jax.evaluation.memory_plot import plot_probe  # imports matplotlib

    plot_probe(found, file, title=title)
