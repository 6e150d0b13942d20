"""One page of plots of the probe "memory"."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fam_jax.evaluation.plot import STYLES

# Most layers whose maps are drawn, from the lowest to the highest.
MAPS = 4
_COLORS = "magma"


def plot_probe(found: Mapping[str, Any], path: str | Path | BinaryIO, *, title: str = "") -> None:
    """Plot all figures of the probe on one page.

    Args:
      found: the results of :func:`fam_jax.evaluation.memory_probe.probe_memory`.
      path: path of the picture, whose suffix selects the format; or an open file, which becomes a PNG.
      title: title above the page; alarms follow it.
    """
    figure = Figure(figsize=(12, 14.5), layout="constrained")
    alarms = [f"ALARM {alarm}" for alarm in found["alarms"]]
    shown = alarms[:4] + ([f"and {len(alarms) - 4} more alarms"] if len(alarms) > 4 else [])
    figure.suptitle(
        "\n".join(
            [
                f"Memory of {title}" if title else "Memory",
                *(shown or ["no alarm: the memory has not collapsed"]),
            ]
        ),
        fontsize=11,
        color="#c0392b" if alarms else "black",
    )
    parts: Any = figure.subfigures(2, 1, height_ratios=[9, 5.5])
    top, bottom = parts
    panels = iter(top.subplots(3, 3).flat)
    inspected = found["inspected"]
    _plot_differences(next(panels), found)
    _plot_scores(next(panels), found["scores"])
    _plot_retention(next(panels), found["retention"])
    _plot_heads(next(panels), inspected["attention"])
    _plot_by_place(next(panels), inspected["attention"], found["block_size"])
    _plot_by_block(next(panels), inspected["attention"]["memory_by_block"], "share of attention on memory")
    _plot_gradients(next(panels), found["gradients"])
    _plot_norms(next(panels), inspected["vectors"])
    _plot_spread(next(panels), inspected["vectors"])
    _plot_maps(bottom, inspected["maps"])
    figure.savefig(path, dpi=130)


def _dress(axes: Axes, title: str, x: str = "", y: str = "") -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _absent(axes: Axes, title: str, why: str) -> None:
    _dress(axes, title)
    axes.set_axis_off()
    axes.text(0.5, 0.5, why, ha="center", va="center", transform=axes.transAxes, fontsize=9, color="0.4")


def _error_bars(differences: Sequence[Mapping[str, float | None]]) -> tuple[np.ndarray, np.ndarray]:
    """Return means, and the lengths (2, n) of the intervals below and above; 0 where there is no interval."""
    means = np.array([each["mean"] for each in differences], float)
    lows, highs = (
        np.array([each["mean"] if each[limit] is None else each[limit] for each in differences], float)
        for limit in ("low", "high")
    )
    return means, np.array([means - lows, highs - means])


def _plot_differences(axes: Axes, found: Mapping[str, Any]) -> None:
    compared = {name: row["difference"] for name, row in found["scores"].items() if "difference" in row}
    title = "loss added, with 95 % intervals"
    if not compared:
        _absent(axes, title, "nothing to compare")
        return
    means, bars = _error_bars([*compared.values()])
    places = np.arange(len(means))
    axes.errorbar(means, places, xerr=bars, fmt="o", color=STYLES[1][0], capsize=4, linewidth=2)
    axes.set_yticks(places, [*compared])
    axes.invert_yaxis()
    axes.margins(y=0.15)
    axes.axvline(0, color="0.4", linewidth=1)
    _dress(axes, title, "nats per token, to the intact model on the same tokens")


def _plot_scores(axes: Axes, scores: Mapping[str, Any]) -> None:
    name = "accuracy" if scores["intact"]["exact_match"] is None else "exact_match"
    rows = {way: row[name] for way, row in scores.items() if row[name] is not None}
    axes.bar(
        [*rows], [100 * value for value in rows.values()], color=["#7f8c8d"] + ["#2c6fbb"] * (len(rows) - 1)
    )
    for place, value in enumerate(rows.values()):
        axes.text(place, 100 * value, f"{value:.0%}", ha="center", va="bottom", fontsize=8)
    axes.tick_params(axis="x", rotation=30)
    axes.set_ylim(0, 108)
    _dress(axes, "whole answers right" if name == "exact_match" else "tokens predicted right", y="%")


def _plot_retention(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    title = "used from further back than so many blocks"
    if not rows:
        _absent(axes, title, "no document is long enough")
        return
    means, bars = _error_bars([row["difference"] for row in rows])
    axes.errorbar(
        [row["blocks"] for row in rows], means, yerr=bars, color=STYLES[1][0], marker="o", capsize=4
    )
    axes.axhline(0, color="0.4", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    _dress(axes, title, "past blocks that a token knows of", "loss added (nats per token)")


def _plot_heads(axes: Axes, attention: Mapping[str, Any]) -> None:
    counted = attention["memory_at_counted"]
    shares = np.array(attention["memory"] if counted is None else counted)
    image = axes.imshow(100 * shares, aspect="auto", cmap=_COLORS, vmin=0, interpolation="nearest")
    if shares.size <= 64:
        for (layer, head), value in np.ndenumerate(shares):
            color = "black" if value > 0.6 * shares.max() else "white"
            axes.text(head, layer, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=color)
    axes.figure.colorbar(image, ax=axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    _dress(axes, "attention on memory (%), counted tokens", "head", "layer")


def _plot_lines(axes: Axes, x: Any, lines: np.ndarray, names: Sequence[str]) -> None:
    """Plot lines (n, places), the colors of which go from dark to light, with the first and the last in the legend."""
    from matplotlib import colormaps

    shades = colormaps["viridis"](np.linspace(0, 0.9, max(len(lines), 1)))
    for number, (line, name) in enumerate(zip(lines, names, strict=True)):
        label = name if len(lines) <= 6 or number in (0, len(lines) - 1) else None
        axes.plot(
            x, line, color=shades[number], label=label, linewidth=1.5, marker="." if len(line) < 40 else None
        )
    if len(lines):
        axes.legend(frameon=False, fontsize=8)


def _plot_by_place(axes: Axes, attention: Mapping[str, Any], block_size: int) -> None:
    lines = np.array(attention["memory_by_place"])
    places = np.arange(lines.shape[1]) * block_size / lines.shape[1]
    _plot_lines(axes, places, 100 * lines, [f"layer {n}" for n in range(len(lines))])
    _dress(axes, "attention on memory by place in the block", "token of the block", "%")


def _plot_by_block(axes: Axes, by_block: Sequence[Sequence[float]], title: str) -> None:
    lines = np.array(by_block).T
    _plot_lines(axes, np.arange(lines.shape[1]), 100 * lines, [f"layer {n}" for n in range(len(lines))])
    _dress(axes, title.replace("share of ", "") + " by block", "block of the document", "%")


def _plot_gradients(axes: Axes, gradients: Mapping[str, Any] | None) -> None:
    title = "gradient of the last block's loss"
    if gradients is None:
        _absent(axes, title, "no document is long enough")
        return
    norms = np.array(gradients["by_blocks_back"], float)
    axes.plot(
        np.arange(len(norms)),
        np.where(norms > 0, norms, np.nan),
        color=STYLES[0][0],
        marker="o",
        markersize=4,
    )
    if (norms > 0).any():
        axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _dress(axes, title, "blocks back", "norm, with respect to the block's inputs")


def _plot_norms(axes: Axes, vectors: Mapping[str, Any] | None) -> None:
    title = "norm of the memory's vectors"
    if vectors is None:
        _absent(axes, title, "no memory was written")
        return
    norms = np.array(vectors["norm"], float)
    names = [f"layer {n}" for n in vectors["layers"]] or ["shared"]
    _plot_lines(axes, 1 + np.arange(len(norms)), norms.T, names)
    _dress(axes, title, "blocks read", "mean norm")


def _plot_spread(axes: Axes, vectors: Mapping[str, Any] | None) -> None:
    title = "do the memory's vectors differ? (0: all alike)"
    if vectors is None:
        _absent(axes, title, "no memory was written")
        return
    names = vectors["layers"] or [0]
    for (key, label), (color, marker) in zip(
        (
            ("slots_spread", "within a document"),
            ("documents_spread", "between documents"),
            ("change", "from block to block"),
        ),
        STYLES,
        strict=False,
    ):
        if vectors[key] is not None:
            values = np.array(vectors[key], float)
            shown = np.where(values > 0, values, np.nan)
            axes.plot(names, shown, color=color, marker=marker, label=label, linewidth=1.5)
    axes.axhline(vectors["alike_below"], color="0.4", linestyle="--", linewidth=1, label="alarm below")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=8)
    _dress(axes, title, "layer", "distance from the mean / norm")


def _plot_maps(figure: Any, maps: Mapping[str, Any]) -> None:
    """Draw what tokens, and the rows of the memory, attend to in some layers (figure 11 of the paper)."""
    layers = len(maps["read"])
    chosen = sorted({*np.linspace(0, layers - 1, min(layers, MAPS)).round().astype(int).tolist()})
    figure.suptitle(
        "what attends to what, mean of the heads: tokens of a document's last block to memory (left of the line) and "
        "block; below, the memory's rows as they are written from the first block",
        fontsize=9,
    )
    rows = 1 if maps["write"] is None else 2
    panels = figure.subplots(rows, len(chosen), squeeze=False, height_ratios=[3, 1.2][:rows])
    for column, layer in enumerate(chosen):
        _plot_map(panels[0, column], np.array(maps["read"][layer]), maps["keys"])
        _dress(panels[0, column], f"layer {layer}", "", "token" if column == 0 else "")
        if maps["write"] is not None:
            _plot_map(panels[1, column], np.array(maps["write"][layer]), maps["write_keys"])
            _dress(panels[1, column], "", "memory, then tokens", "memory row" if column == 0 else "")


def _plot_map(axes: Axes, weights: np.ndarray, keys: int) -> None:
    axes.imshow(
        np.sqrt(weights), aspect="auto", cmap=_COLORS, vmin=0, interpolation="nearest"
    )  # the root shows small weights, too
    if keys:
        axes.axvline(keys - 0.5, color="white", linewidth=1)
