"""The parts of an evaluation task: its items, how a model is measured on them, and how results are shown."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple, Protocol

import rich.table

from fam_jax.config import DataConfig, EvaluateConfig, ModelConfig
from fam_jax.generation.streaming import Streamer

# Called with the name of a pass, the tokens read, and the tokens to read.
OnProgress = Callable[[str, int, int], None]


class Setting(NamedTuple):
    """The settings that a task may depend on: groups of the run's config, and texts named by the user."""

    model: ModelConfig
    data: DataConfig
    evaluate: EvaluateConfig
    # Tokens, in all rows together, whose logits exist at one time.
    tokens_at_once: int = 4096
    # Files, folders or patterns in place of data.heldout_files; empty: those of the config.
    files: Sequence[str] = ()
    # Endings of the files to read in a folder; empty: data.file_suffixes.
    suffixes: Sequence[str] = ()


class Items(Protocol):
    """The inputs that a model is measured on. Tasks add attributes that their `measure` uses."""

    @property
    def vocabulary(self) -> Any:
        """Return the vocabulary that made the token ids."""


class Measured(NamedTuple):
    """The results of a task. Both parts consist of JSON values."""

    # Figures under names that do not change between runs, such as loss and loss_by_position/1024.
    scalars: dict[str, float]
    # The data of the task's tables and plot, and how the items were made.
    details: dict[str, Any]
    # The figures of probes, by name.
    probes: Mapping[str, dict[str, Any]] = {}


class Metric(NamedTuple):
    """How a headline figure is shown."""

    label: str
    # For `format`, such as ".1%".
    form: str = ".4f"

    def show(self, value: float) -> str:
        """Return label and value, for a line of figures."""
        return f"{self.label} {value:{self.form}}"


@dataclasses.dataclass(frozen=True)
class Task:
    """A task. To add one, write `items` and add a line to `fam_jax.evaluation.tasks.TASKS`."""

    name: str
    # Begins the title of its tables and plot.
    title: str
    # One line for `launch.evaluate --list`.
    doc: str
    # Make or load the items. Called once per run, however often the run is evaluated.
    items: Callable[[Setting], Any]
    # Measure a model.
    measure: Callable[[Streamer, Any, Setting, OnProgress | None], Measured]
    # The headline figures, by their names in `Measured.scalars`.
    metrics: Mapping[str, Metric]
    # Return tables of the details, below a title.
    tables: Callable[[dict[str, Any], str], list[rich.table.Table]]
    # Write a PNG of the details, below a title; None: there is no plot.
    plot: Callable[[dict[str, Any], BinaryIO, str], None] | None = None
    # Return the items as `fam_jax.evaluation.documents.Documents`, for probes; None: the task cannot be probed.
    documents: Callable[[Any], Any] | None = None


def make_table(title: str, headings: Sequence[str]) -> rich.table.Table:
    """Return an empty table of figures, which are aligned to the right."""
    table = rich.table.Table(title=title)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table
