"""Evaluations of each task: how they run, with progress on the terminal, and how their results are shown."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import rich.console
import rich.progress
import rich.table
from etils import epath

from fam_jax.config import Config
from fam_jax.data.build import heldout_examples, task_vocabulary
from fam_jax.evaluate.passkey import evaluate_passkey
from fam_jax.evaluate.text import evaluate_text
from fam_jax.model import lora


def run_passkey(config: Config, params: Any) -> dict[str, Any]:
    """PassKey retrieval at the lengths of config.evaluate."""
    with progress_bars() as show:
        return evaluate_passkey(
            config,
            params,
            vocabulary=task_vocabulary(config),
            on_progress=lambda blocks, done, total: show(f"{blocks} blocks", done, total),
        )


def run_text(
    config: Config, params: Any, files: Sequence[str] = (), suffixes: Sequence[str] = ()
) -> dict[str, Any]:
    """Loss on the documents of `files`, of `suffixes` in folders, or on those that the config holds out."""
    heldout = heldout_examples(config, files, suffixes)
    with progress_bars() as show:
        return evaluate_text(
            config, params, examples=heldout.examples, vocabulary=heldout.vocabulary, on_progress=show
        )


def in_training(config: Config) -> Callable[[Any, int], dict[str, Any]]:
    """The evaluation of the config's task, for the training loop; what it needs is loaded now."""
    merged = jax.jit(lambda params: lora.merge(params, config.lora))
    if config.data.task == "passkey":
        vocabulary = task_vocabulary(config)

        def measure(params: Any) -> dict[str, Any]:
            return evaluate_passkey(config, params, vocabulary=vocabulary)
    else:
        heldout = heldout_examples(config)

        def measure(params: Any) -> dict[str, Any]:
            return evaluate_text(config, params, **heldout._asdict())

    def evaluate(params: Any, step: int) -> dict[str, Any]:
        return {"step": step, **measure(merged(params) if config.lora.rank else params)}

    return evaluate


@contextlib.contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr for each name, to be told (name, done, total); none if that is no terminal."""
    console = rich.console.Console(stderr=True)
    with rich.progress.Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        bars: dict[str, rich.progress.TaskID] = {}

        def show(name: str, done: int, total: int) -> None:
            if name not in bars:
                bars[name] = progress.add_task(name)
            progress.update(bars[name], completed=done, total=total)

        yield show


def show_passkey(results: dict[str, Any], step: str) -> None:
    """Prints a row per length."""
    table = rich.table.Table(title=f"PassKey retrieval, {step}")
    for heading in (
        "blocks",
        "tokens read",
        "keys",
        "exact match",
        "teacher-forced",
        "answer tokens",
        "seconds",
    ):
        table.add_column(heading, justify="right")
    for blocks, row in results["lengths"].items():
        shares = (
            row[name] for name in ("exact_match", "teacher_forced_exact_match", "answer_token_accuracy")
        )
        size = (blocks, f"{row['tokens_read']:,}", f"{row['keys']:,}")
        table.add_row(*size, *(f"{share:.1%}" for share in shares), f"{row['seconds']:.1f}")
    _print(table)


def show_text(results: dict[str, Any], step: str) -> None:
    """Prints totals, then a row per bucket of positions."""
    total = rich.table.Table(title=f"Held-out text, {step}", show_header=False)
    total.add_row(
        "documents", f"{results['documents']:,}, the longest of {results['longest_document']:,} tokens"
    )
    total.add_row("tokens read", f"{results['tokens_read']:,} of {results['tokens']:,}")
    total.add_row("loss", f"{results['loss']:.4f} nats per token, perplexity {results['perplexity']:.2f}")
    if results["bits_per_byte"] is not None:
        total.add_row("bits per byte", f"{results['bits_per_byte']:.4f}")
    total.add_row("next token right", f"{results['accuracy']:.1%}")
    for name, found in [("", results), *results["ablations"].items()]:
        after = found["loss_after_first_block"]
        if results["ablations"] and after is not None:
            total.add_row(f"after block 1{', FAM ' * bool(name)}{name}", f"{after:.4f}")
    _print(total)
    table = rich.table.Table(title="Loss by position in the document")
    for heading in (
        "from",
        "to",
        "documents",
        "tokens",
        "loss",
        *(f"FAM {name}" for name in results["ablations"]),
    ):
        table.add_column(heading, justify="right")
    ablated = [found["by_position"] for found in results["ablations"].values()]
    for bucket, *others in zip(results["by_position"], *ablated, strict=True):
        size = (f"{bucket[name]:,}" for name in ("begin", "end", "documents", "tokens"))
        table.add_row(*size, *("" if b["loss"] is None else f"{b['loss']:.4f}" for b in (bucket, *others)))
    _print(table)


def draw(results: dict[str, Any], path: epath.Path, config: Config, step: str) -> None:
    """A picture of the loss by position, and of the ablations."""
    from fam_jax.evaluate.plot import plot_loss_by_position  # matplotlib; trainings that evaluate need none

    lines = {"all": results["by_position"]} if not results["ablations"] else {"FAM": results["by_position"]}
    lines |= {f"FAM {name}": found["by_position"] for name, found in results["ablations"].items()}
    trained = config.data.sequence_length if config.data.task != "passkey" else 0
    with path.open("wb") as file:
        plot_loss_by_position(lines, file, trained_tokens=trained, title=f"Held-out text, {step}")


def _print(table: rich.table.Table) -> None:
    rich.console.Console(width=None if sys.stdout.isatty() else 100).print(table)


SHOW = {"passkey": show_passkey, "text": show_text}
