"""Loss on held-out documents of any length, streamed through a state of constant size without truncation.

Each document is read in full, by blocks, from an empty state. Ablation shows whether the memory is used: the same
documents are read again, and the memory is zeroed, shuffled or frozen after each block. Each document is compared with
itself; docs/evaluation.md says how to read the differences.
"""

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import rich.table

from fam_jax.config import UserError
from fam_jax.evaluation.documents import DocumentReader, Documents, Scores, ablation
from fam_jax.evaluation.paired import Difference, difference_per_token
from fam_jax.evaluation.task import Measured, Metric, OnProgress, Setting, make_table
from fam_jax.generation.streaming import Streamer

if TYPE_CHECKING:
    from fam_jax.data.interface import Example  # imports TensorFlow, which takes seconds

# Positions before this one are a bucket; the next bucket ends at twice as many tokens, and so on.
FIRST_EDGE = 16

METRICS = {
    "loss": Metric("loss (nats per token)"),
    "perplexity": Metric("perplexity", ".2f"),
    "bits_per_byte": Metric("bits per byte"),
    "next_token_accuracy": Metric("next-token accuracy", ".1%"),
    "loss_after_first_block": Metric("loss after the first block"),
}


def measure_documents(
    streamer: Streamer, documents: Documents, setting: Setting, on_progress: OnProgress | None = None
) -> Measured:
    """Measure the loss per token, also by position and with the memory ablated.

    Args:
      streamer: the model.
      documents: the documents, at least one.
      setting: `setting.evaluate` sets the batch size, the blocks read at a time, and the ablations.
      on_progress: called with the name of a pass ("loss", or an ablation), its tokens read and its tokens to read.

    Returns:
      Scalars; those without any token to measure are left out:
        loss: nats per token, ends of documents included; perplexity: its exponential.
        bits_per_byte: bits per byte of the text in UTF-8.
        next_token_accuracy: fraction of tokens whose logit is above all others; a tie counts as wrong.
        loss_after_first_block: loss of the tokens that a memory could help with.
        loss_by_position/END: loss in the bucket of positions that ends at END.
        zeroed/loss and so on: the same with the memory ablated.
        zeroed/difference_after_first_block: its loss after the first block minus the intact one's.
      Details: documents, tokens, tokens_read (counted while reading, equal to tokens), longest_document (tokens),
      text_bytes, seconds, the figures above (or None), and
        by_position: buckets of positions in the document, each twice as long as the one before: begin, end, documents
          that reach it, tokens, loss, next_token_accuracy.
        by_document: for each document, in order, lists over the buckets that it reaches: tokens, and nats, the sum of
          their losses. Two evaluations of the same documents can be compared document by document with them.
        ablations: for each of evaluate.ablations, its loss, loss_after_first_block and by_position, and how much the
          memory's loss exceeds the intact one's (difference_after_first_block, and `difference` of every bucket): mean
          in nats per token, and low and high, the limits of a 95 % confidence interval over documents.

    Raises:
      UserError: no token has a loss weight, or a batch has only one document and states cannot be shuffled.
    """
    evaluate, examples = setting.evaluate, documents.examples
    if "shuffled" in evaluate.ablations and min(len(examples), evaluate.batch_size) < 2:
        raise UserError(
            "config.evaluate.ablations: shuffled needs two documents in a batch, to swap their states; "
            "add documents or raise evaluate.batch_size"
        )
    began = time.perf_counter()
    reader = DocumentReader(streamer, documents, setting, on_progress)
    scores = reader.read("loss")
    details = {**_totals(scores, examples), **_summary(scores, streamer.config.block_size)}
    details["perplexity"] = math.exp(min(details["loss"], 700.0))
    details |= {
        "by_document": [_by_bucket(each) for each in scores],
        "ablations": {
            name: _ablation(
                scores, reader.read_by_block(name, ablation(streamer, name)), streamer.config.block_size
            )
            for name in evaluate.ablations
        },
        "block_size": streamer.config.block_size,
        "trained_tokens": documents.trained_tokens,
        "seconds": round(time.perf_counter() - began, 3),
    }
    return Measured(_scalars(details), details)


def document_scores(streamer: Streamer, documents: Documents, setting: Setting) -> list[Scores]:
    """Return the scores of every document's tokens, in order; arguments are those of :func:`measure_documents`."""
    return DocumentReader(streamer, documents, setting).read("loss")


def _totals(scores: list[Scores], examples: "Sequence[Example]") -> dict[str, Any]:
    text_bytes = sum(each.text_bytes for each in examples)
    nats = sum(float(each.nats[each.counted].sum(dtype=np.float64)) for each in scores)
    return {
        "documents": len(examples),
        "tokens": sum(len(each.ids) for each in examples),
        "tokens_read": sum(len(each.nats) for each in scores),
        "longest_document": max(len(each.ids) for each in examples),
        "text_bytes": text_bytes,
        "bits_per_byte": nats / math.log(2) / text_bytes if text_bytes else None,
    }


def _scalars(details: dict[str, Any]) -> dict[str, float]:
    """Return all figures that have a value, by names such as loss, loss_by_position/1024 and zeroed/loss."""
    found = {name: details[name] for name in METRICS}
    for prefix, part in [("", details), *((f"{name}/", part) for name, part in details["ablations"].items())]:
        found |= {f"{prefix}{name}": part[name] for name in ("loss", "loss_after_first_block")}
        found |= {f"{prefix}loss_by_position/{each['end']}": each["loss"] for each in part["by_position"]}
    for name, part in details["ablations"].items():
        difference = part["difference_after_first_block"]
        found[f"{name}/difference_after_first_block"] = difference and difference["mean"]
    return {name: value for name, value in found.items() if value is not None}


def _summary(scores: list[Scores], block_size: int) -> dict[str, Any]:
    """Return loss, next_token_accuracy, loss_after_first_block and by_position of all counted tokens."""
    nats, correct = (np.concatenate([part[i][part.counted] for part in scores]) for i in (0, 1))
    places = [np.flatnonzero(part.counted) for part in scores]
    position, document = np.concatenate(places), np.repeat(np.arange(len(places)), [*map(len, places)])
    if not len(nats):
        raise UserError(
            "held-out examples: no token has a loss weight, so there is nothing to measure; name other files"
        )

    def mean(chosen: np.ndarray, of: np.ndarray = nats) -> float | None:
        return float(of[chosen].mean(dtype=np.float64)) if chosen.any() else None

    buckets, begin, end = [], 0, FIRST_EDGE
    while begin <= position.max():
        chosen = (position >= begin) & (position < end)
        bucket = {"begin": begin, "end": end, "documents": len(np.unique(document[chosen]))}
        figures = {"loss": mean(chosen), "next_token_accuracy": mean(chosen, correct)}
        buckets.append({**bucket, "tokens": int(chosen.sum()), **figures})
        begin, end = end, 2 * end
    everything = np.ones(len(nats), bool)
    return {
        "loss": mean(everything),
        "next_token_accuracy": mean(everything, correct),
        "loss_after_first_block": mean(position >= block_size),
        "by_position": buckets,
    }


def _by_bucket(scores: Scores) -> dict[str, list[Any]]:
    """Return the number of counted tokens and the sum of their losses in each bucket of positions."""
    found: dict[str, list[Any]] = {"tokens": [], "nats": []}
    begin, end = 0, FIRST_EDGE
    while begin < len(scores.nats):
        counted = scores.counted[begin:end]
        found["tokens"].append(int(counted.sum()))
        found["nats"].append(float(scores.nats[begin:end][counted].sum(dtype=np.float64)))
        begin, end = end, 2 * end
    return found


def _ablation(intact: list[Scores], ablated: list[Scores], block_size: int) -> dict[str, Any]:
    """Return the losses with the memory ablated, and their differences to those with the memory intact."""

    def difference(begin: int, end: int | None) -> dict[str, float | None] | None:
        sums, tokens = [], []
        for before, after in zip(intact, ablated, strict=True):
            counted = before.counted[begin:end]
            changes = (after.nats[begin:end] - before.nats[begin:end])[counted]
            sums.append(changes.sum(dtype=np.float64))
            tokens.append(int(counted.sum()))
        if not any(tokens):
            return None
        return difference_per_token(np.array(sums), np.array(tokens))._asdict()

    found = _summary(ablated, block_size)
    for bucket in found["by_position"]:
        bucket["difference"] = difference(bucket["begin"], bucket["end"])
    kept = {name: found[name] for name in ("loss", "loss_after_first_block", "by_position")}
    return {**kept, "difference_after_first_block": difference(block_size, None)}


def document_tables(details: dict[str, Any], title: str) -> list[rich.table.Table]:
    """Return a table of totals, and one with a row per bucket of positions."""
    total = rich.table.Table(title=title, show_header=False)
    total.add_row("documents", f"{details['documents']:,}, longest {details['longest_document']:,} tokens")
    total.add_row("tokens read", f"{details['tokens_read']:,} of {details['tokens']:,}")
    for name, metric in METRICS.items():
        if details[name] is not None:
            total.add_row(metric.label, f"{details[name]:{metric.form}}")
    for name, found in details["ablations"].items():
        if found["loss_after_first_block"] is not None:
            label = f"{METRICS['loss_after_first_block'].label}, memory {name}"
            change = Difference(**found["difference_after_first_block"])
            total.add_row(label, f"{found['loss_after_first_block']:.4f}  ({change})")
    ablations = [f"memory {name}" for name in details["ablations"]]
    headings = ("from", "to", "documents", "tokens", "loss", *ablations)
    places = make_table("Loss by position in the document", headings)
    others = [found["by_position"] for found in details["ablations"].values()]
    for bucket, *rest in zip(details["by_position"], *others, strict=True):
        counts = (f"{bucket[name]:,}" for name in ("begin", "end", "documents", "tokens"))
        places.add_row(*counts, *("" if b["loss"] is None else f"{b['loss']:.4f}" for b in (bucket, *rest)))
    return [total, places]


def plot_documents(details: dict[str, Any], file: BinaryIO, title: str) -> None:
    """Write a PNG of the loss by position, with a curve per ablation."""
    from fam_jax.evaluation.plot import plot_loss_by_position  # imports matplotlib

    curves = {"memory intact" if details["ablations"] else "loss": details["by_position"]}
    curves |= {f"memory {name}": found["by_position"] for name, found in details["ablations"].items()}
    plot_loss_by_position(curves, file, trained_tokens=details["trained_tokens"], title=title)
