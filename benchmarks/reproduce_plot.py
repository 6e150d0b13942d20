"""The plots of `benchmarks.reproduce`: a panel per task, a curve per memory, and the range over seeds behind it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.experiments import TASKS, Experiment

COLORS = (
    "#c0392b", "#2c6fbb", "#27ae60", "#b9a44c", "#7f8c8d", "#8e44ad", "#e67e22", "#16a085", "#34495e", "#d35499",
    "#5d6d1e", "#00acc1", "#6d4c41",
)  # fmt: skip
MARKERS = "os^vDPX*<>hpd"


def draw(experiment: Experiment, results: Mapping[str, Any], path: Path) -> None:
    """Plot the results of :func:`benchmarks.reproduce.collect` to a file; its suffix selects the format."""
    found = {task: arms for task, arms in results.items() if arms}
    figure = Figure(figsize=(6.4 * len(found), 4.2), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, (name, arms) in zip(panels, found.items(), strict=True):
        task = TASKS[name]
        for arm, entry in arms.items():
            number = experiment.arms.index(arm)
            color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
            lengths = [int(length) for length in entry["mean"]]
            rows = [[100 * row[str(length)] for length in lengths] for row in entry["seeds"].values()]
            low, high = ([pick(column) for column in zip(*rows, strict=True)] for pick in (min, max))
            mean = [100 * share for share in entry["mean"].values()]
            axes.fill_between(lengths, low, high, color=color, alpha=0.12, linewidth=0)
            axes.plot(
                lengths, mean, label=entry["label"], color=color, marker=marker, markersize=5, clip_on=False
            )
        axes.axvspan(min(task.lengths), task.trained, color="0.94", zorder=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(task.lengths, [str(length) for length in task.lengths])
        axes.minorticks_off()
        axes.set_xlim(min(task.lengths), max(task.lengths))
        axes.set_ylim(0, 101)
        axes.set_xlabel(f"{task.length_of} (blocks; gray: lengths of training)")
        axes.set_ylabel("exact match (%)")
        axes.set_title(task.label, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(experiment.title, fontsize=11)
    figure.savefig(path, dpi=130)
