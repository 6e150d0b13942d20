"""The plot of `benchmarks.retrofit`: loss by position, and PassKey retrieval by length."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from benchmarks.retrofit_settings import BLOCK, CONTEXT

LINES = {
    "full": ("base, full attention", "#7f8c8d", "^"),
    "window": ("base, window of 2 blocks", "#b9a44c", "v"),
    "bswa": ("BSWA, retrofitted", "#2c6fbb", "s"),
    "fam": ("FAM, retrofitted", "#c0392b", "o"),
}


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Plot the results of :func:`benchmarks.retrofit.collect` to a file; its suffix selects the format."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11.0, 4.2), layout="constrained")
    for name, (label, color, marker) in LINES.items():
        if name not in results["by_position"]:
            continue
        buckets = [b for b in results["by_position"][name] if b["loss"] is not None]
        left.plot(
            [b["end"] for b in buckets], [b["loss"] for b in buckets], label=label, color=color, marker=marker
        )
        if name in results["passkey"]:
            right.plot(
                *_curve(results["passkey"][name]), label=label, color=color, marker=marker, clip_on=False
            )
    repeats = [found for name, found in results["passkey"].items() if name not in LINES]
    for number, shares in enumerate(repeats):
        once = None if number else "FAM, other seeds"
        right.plot(*_curve(shares), label=once, color=LINES["fam"][1], linewidth=0.8, clip_on=False)
    left.axvline(CONTEXT, color="0.6", linestyle=":", label="context of the base's training")
    left.set_xlabel("position in the document (tokens, end of bucket)")
    left.set_ylabel("held-out loss (nats per token)")
    right.axvline(results["longest_filler"], color="0.6", linestyle=":", label="longest filler in training")
    right.set_ylim(0, 101)
    right.set_xlabel("filler between key and question (tokens)")
    right.set_ylabel("pass key retrieved (%)")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.grid(axis="y", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _curve(shares: Mapping[str, float]) -> tuple[list[int], list[float]]:
    """Return tokens of filler, and the percentage retrieved with each."""
    return [int(blocks) * BLOCK for blocks in shares], [100 * share for share in shares.values()]
