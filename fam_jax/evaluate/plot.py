"""Pictures of evaluation results."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed
from matplotlib import pyplot

STYLES = {
    "fam": ("FAM, no memory segment", "#c0392b", "o"),
    "bswa_m1": ("BSWA, 1 memory segment", "#2c6fbb", "s"),
    "bswa_m1_sg": ("BSWA, 1 memory segment, stop-gradient", "#7f8c8d", "^"),
}


def plot_passkey(
    models: Mapping[str, Mapping[str, float]], path: str | Path, *, trained_blocks: int, title: str = ""
) -> None:
    """Accuracy against filler length, log scale, one line per model: figure 3a of the paper.

    Args:
      models: name -> {filler length in blocks -> accuracy between 0 and 1}.
      path: of the picture; its suffix chooses the format.
      trained_blocks: longest filler in training, marked by a vertical line.
      title: above the axes.
    """
    axes = _axes()
    lengths = sorted({int(length) for accuracies in models.values() for length in accuracies})
    for name, accuracies in models.items():
        label, color, marker = STYLES.get(name, (name, None, "o"))
        blocks = sorted(int(length) for length in accuracies)
        values = [100 * accuracies[str(length)] for length in blocks]
        axes.plot(
            blocks, values, label=label, color=color, marker=marker, linewidth=2, markersize=6, clip_on=False
        )
    axes.axvspan(lengths[0], trained_blocks, color="0.93", zorder=0)
    axes.text(
        trained_blocks,
        50,
        " trained up to here",
        rotation=90,
        va="center",
        ha="right",
        color="0.45",
        fontsize=8,
    )
    axes.set_xscale("log")
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.minorticks_off()
    axes.set_xlim(lengths[0], lengths[-1])
    axes.set_ylim(0, 101)
    axes.set_xlabel("filler between key and question (blocks)")
    axes.set_ylabel("pass key retrieved (%)")
    _save(axes, title, path, loc="center right", bbox_to_anchor=(1, 0.35))


def plot_loss_by_position(
    models: Mapping[str, Sequence[Mapping[str, Any]]], path: Any, *, trained_tokens: int = 0, title: str = ""
) -> None:
    """Loss against position in the document, log scale, one line per model or ablation.

    Args:
      models: name -> buckets, as `by_position` of :func:`fam_jax.evaluate.text.evaluate_text` has them.
      path: of the picture, whose suffix chooses the format; or a file, to become a PNG.
      trained_tokens: longest row in training, up to where the background is grey; 0 = not shown.
      title: above the axes.
    """
    axes = _axes()
    for name, buckets in models.items():
        seen = [bucket for bucket in buckets if bucket["loss"] is not None]
        ends, losses = [bucket["end"] for bucket in seen], [bucket["loss"] for bucket in seen]
        axes.plot(ends, losses, label=name, marker="o", linewidth=2, markersize=5)
    axes.set_xscale("log", base=2)
    if trained_tokens:
        low, high = axes.get_xlim()
        axes.axvspan(low, trained_tokens, color="0.93", zorder=0, label="trained up to here")
        axes.set_xlim(low, max(high, trained_tokens))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("position in the document (tokens, end of bucket)")
    axes.set_ylabel("loss (nats per token)")
    _save(axes, title, path)


def _axes() -> Any:
    _, axes = pyplot.subplots(figsize=(7.2, 4.0), layout="constrained")
    axes.grid(axis="y", color="0.9")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return axes


def _save(axes: Any, title: str, path: Any, **legend: Any) -> None:
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False, fontsize=9, **legend)
    axes.figure.savefig(path, dpi=150)
    pyplot.close(axes.figure)
