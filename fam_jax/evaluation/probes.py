"""The registry of probes: what can be found out about a model on the items of any task that has documents."""

import difflib
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import rich.table

from fam_jax.config import UserError
from fam_jax.evaluation.documents import Documents
from fam_jax.evaluation.memory_probe import memory_tables, plot_memory, probe_memory
from fam_jax.evaluation.task import OnProgress, Setting
from fam_jax.generation.streaming import Streamer


class Probe(NamedTuple):
    """A probe. Its figures are in the record of an evaluation under `probes`, and its plot is a file of its own."""

    measure: Callable[[Streamer, Documents, Setting, OnProgress | None], dict[str, Any]]
    # Return tables of the figures, below a title.
    tables: Callable[[dict[str, Any], str], list[rich.table.Table]]
    # Write a PNG of the figures, below a title.
    plot: Callable[[dict[str, Any], BinaryIO, str], None]


PROBES = {"memory": Probe(probe_memory, memory_tables, plot_memory)}


def find_probe(name: str) -> Probe:
    """Return the probe called `name`.

    Raises:
      UserError: there is no such probe.
    """
    if name in PROBES:
        return PROBES[name]
    near = difflib.get_close_matches(name, PROBES, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"--probe={name}: is unknown; {hint}choose one of {', '.join(PROBES)}")
