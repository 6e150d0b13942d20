"""Print tables of results."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

NOTE = "Median (quartiles) of rounds; ratios are taken within a round."


def print_training(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the results of `benchmarks.training.measure`."""
    memory = _table("Training step with FAM (M = C / 16) against BSWA", "C", "M")
    for name in ("BSWA tokens/s", "FAM tokens/s", "time FAM / BSWA", "by operations"):
        memory.add_column(name, justify="right")
    for size, found in results["memory"].items():
        speed = found["tokens_per_second"]
        memory.add_row(
            size,
            str(found["fam_length"]),
            _whole(speed["bswa"]),
            _whole(speed["fam"]),
            str(found["ratio"]),
            f"{found['expected_ratio']:.3f}",
        )

    forms = _table(
        "Loss and gradients: scan over blocks against the library; dense against XLA attention", "C"
    )
    for name in ("scan ms", "library ms", "time scan / library", "time dense / XLA"):
        forms.add_column(name, justify="right")
    for size, found in results["gradients"].items():
        milliseconds = [_milli(found["seconds"][name]) for name in ("naive_gradient", "fam_gradient")]
        dense = str(results["attention"][size]["ratio"])
        forms.add_row(size, *milliseconds, str(found["naive_ratio"]), dense)

    overhead = _table(
        "Time of FAM, ms per batch: difference to BSWA, and the chains of all layers alone", "C"
    )
    columns = ("forward_overhead", "all_chains_forward", "backward_overhead", "all_chains_backward")
    for name in ("forward", "its chains", "backward", "its chains", "chain gradient, plain / deferred"):
        overhead.add_column(name, justify="right")
    for size, found in results["gradients"].items():
        overhead.add_row(size, *(_milli(found[name]) for name in columns), str(found["deferral_ratio"]))

    _print(memory, forms, overhead)


def print_decoding(results: Mapping[str, Any]) -> None:
    """Print the results of `benchmarks.decoding.measure`."""
    stream = _table("Memory while streaming", "tokens read")
    for name in ("peak RSS MiB", "live arrays KiB", "tokens/s since the row above"):
        stream.add_column(name, justify="right")
    for sample in results["stream"]["samples"]:
        stream.add_row(
            f"{sample['tokens']:,}",
            f"{sample['peak_rss_bytes'] / 2**20:.1f}",
            f"{sample['live_array_bytes'] / 2**10:.1f}",
            f"{sample['tokens_per_second']:,.0f}",
        )
    decode = _table("Decoding", "position")
    decode.add_column("ms per token", justify="right")
    decode.add_column("time against the first", justify="right")
    for name in ("near", "far"):
        found = results["decode"]
        ratio = str(found["ratio"]) if name == "far" else ""
        decode.add_row(f"{found['positions'][name]:,}", _milli(found["seconds_per_token"][name]), ratio)
    _print(stream, decode)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table of values."""
    table = _table(title, *columns)
    for row in rows:
        table.add_row(*(f"{value:,}" if isinstance(value, int) else str(value) for value in row))
    Console().print(table)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _print(*tables: Table) -> None:
    console = Console()
    for table in tables:
        console.print(table)
    console.print(NOTE)


def _milli(seconds: Any) -> str:
    return f"{1e3 * seconds.median:.3g} ({1e3 * seconds.q1:.3g}-{1e3 * seconds.q3:.3g})"


def _whole(speed: Any) -> str:
    return f"{speed.median:,.0f} ({speed.q1:,.0f}-{speed.q3:,.0f})"
