"""Plots of evaluation results. They need no display and do not change matplotlib's global settings."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Color and marker of each curve, in order.
STYLES = (("#c0392b", "o"), ("#2c6fbb", "s"), ("#7f8c8d", "^"), ("#b9a44c", "v"), ("#27ae60", "D"))


def plot_passkey(
    curves: Mapping[str, Mapping[str, float]],
    path: str | Path | BinaryIO,
    *,
    trained_blocks: int,
    title: str = "",
) -> None:
    """Plot PassKey accuracy against filler length on a log scale, as in figure 3a of the paper.

    Args:
      curves: filler length in blocks -> accuracy between 0 and 1, by the label of each curve.
      path: path of the picture, whose suffix selects the format; or an open file, which becomes a PNG.
      trained_blocks: longest filler in training; the background is gray up to there.
      title: title above the axes.
    """
    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    axes = _axes(figure)
    lengths = sorted({int(length) for curve in curves.values() for length in curve})
    for number, (label, curve) in enumerate(curves.items(), 1):
        color, marker = STYLES[(number - 1) % len(STYLES)]
        blocks = sorted(map(int, curve))
        values = [100 * curve[str(length)] for length in blocks]
        # Curves that are drawn over by equal ones can be seen behind them.
        behind = len(curves) - number
        size = {"linewidth": 2 + 2 * behind, "markersize": 6 + 3 * behind}
        style: dict[str, Any] = {"color": color, "marker": marker, **size}
        axes.plot(blocks, values, label=label, clip_on=False, **style)
    axes.axvspan(lengths[0], trained_blocks, color="0.93", zorder=0)
    place: dict[str, Any] = {"rotation": 90, "va": "center", "ha": "right", "color": "0.45", "fontsize": 8}
    axes.text(trained_blocks, 50, " trained up to here", **place)
    axes.set_xscale("log")
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.minorticks_off()
    axes.set_xlim(lengths[0], lengths[-1])
    axes.set_ylim(0, 101)
    axes.set_xlabel("filler between key and question (blocks)")
    axes.set_ylabel("pass key retrieved (%)")
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False, fontsize=9, loc="center right", bbox_to_anchor=(1, 0.35))
    figure.savefig(path, dpi=150)


def plot_loss_by_position(
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    path: str | Path | BinaryIO,
    *,
    trained_tokens: int = 0,
    title: str = "",
) -> None:
    """Plot loss against the position in the document on a log scale.

    If buckets have a `difference`, a second panel shows it with its confidence interval. Differences between ablations
    are far smaller than those between positions, so the first panel cannot show them.

    Args:
      curves: buckets of positions (`by_position` of the task "text"), by the label of each curve.
      path: path of the picture, whose suffix selects the format; or an open file, which becomes a PNG.
      trained_tokens: longest row in training; the background is gray up to there. 0 shows no gray area.
      title: title above the axes.
    """
    compared = any(bucket.get("difference") for buckets in curves.values() for bucket in buckets)
    figure = Figure(figsize=(7.2, 6.4 if compared else 4.0), layout="constrained")
    panels = _panels(figure, 2 if compared else 1)
    for (label, buckets), (color, _) in zip(curves.items(), itertools.cycle(STYLES), strict=False):
        seen = [bucket for bucket in buckets if bucket["loss"] is not None]
        ends, losses = [bucket["end"] for bucket in seen], [bucket["loss"] for bucket in seen]
        style: dict[str, Any] = {"color": color, "marker": "o", "linewidth": 2, "markersize": 5}
        panels[0].plot(ends, losses, label=label, **style)
        if differing := [bucket for bucket in seen if bucket.get("difference")]:
            _plot_differences(panels[1], differing, style)
    for axes in panels:
        axes.set_xscale("log", base=2)
    low, high = panels[0].get_xlim()
    for axes in panels:
        if trained_tokens:
            axes.axvspan(low, trained_tokens, color="0.93", zorder=0, label="trained up to here")
            axes.set_xlim(low, max(high, trained_tokens))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    panels[-1].set_xlabel("position in the document (tokens, end of bucket)")
    panels[0].set_ylabel("loss (nats per token)")
    panels[0].set_title(title, fontsize=10)
    panels[0].legend(frameon=False, fontsize=9)
    if compared:
        panels[1].axhline(0, color="0.4", linewidth=1)
        panels[1].set_ylabel("loss added by the ablation\n(nats per token, 95 % interval)")
    figure.savefig(path, dpi=150)


def _plot_differences(axes: Axes, buckets: Sequence[Mapping[str, Any]], style: dict[str, Any]) -> None:
    """Plot the differences of buckets, and a band for the interval of those that have one."""
    axes.plot([each["end"] for each in buckets], [each["difference"]["mean"] for each in buckets], **style)
    sure = [each for each in buckets if each["difference"]["low"] is not None]
    lows, highs = ([each["difference"][limit] for each in sure] for limit in ("low", "high"))
    axes.fill_between(
        [each["end"] for each in sure], lows, highs, color=style["color"], alpha=0.2, linewidth=0
    )


def plot_by_fact(
    curves: Mapping[str, Mapping[float, float]],
    path: str | Path | BinaryIO,
    *,
    label: str,
    log: bool,
    title: str = "",
) -> None:
    """Plot scores against what a task's items differ in, such as their length.

    Args:
      curves: value -> score between 0 and 1, by the label of each curve.
      path: path of the picture, whose suffix selects the format; or an open file, which becomes a PNG.
      label: below the axis of the values.
      log: whether that axis is logarithmic. It is linear up to 1.
      title: title above the axes.
    """
    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    axes = _axes(figure)
    for (name, curve), (color, marker) in zip(curves.items(), itertools.cycle(STYLES), strict=False):
        places = sorted(curve)
        scores = [100 * curve[place] for place in places]
        axes.plot(places, scores, label=name, color=color, marker=marker, linewidth=2, clip_on=False)
    if log:
        axes.set_xscale("symlog", base=2, linthresh=1)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_ylim(0, 101)
    axes.set_xlabel(label)
    axes.set_ylabel("score (%)")
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def _axes(figure: Figure) -> Axes:
    [axes] = _panels(figure, 1)
    return axes


def _panels(figure: Figure, count: int) -> list[Axes]:
    """Return axes one below the other, of the same positions; the first is twice as high as the others."""
    heights = [2] + [1] * (count - 1)
    panels: list[Axes] = [*figure.subplots(count, squeeze=False, sharex=True, height_ratios=heights)[:, 0]]
    for axes in panels:
        axes.grid(axis="y", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    return panels
