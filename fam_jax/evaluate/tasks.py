"""Evaluation tasks: one function and one line in the registry each.

A task measures parameters and returns a nested dict for JSON: `scalars`, its headline figures by stable names, which go
to the log line and to TensorBoard, and whatever details its tables and pictures show. docs/add_a_task.md adds one.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import rich.table

from fam_jax.config import Config, UserError

# (name of a pass, tokens read, tokens to read)
OnProgress = Callable[[str, int, int], None]


class Request(NamedTuple):
    """What a task is to measure."""

    config: Config
    # Nested dict, on any devices.
    params: Any
    # Files in place of config.data.heldout_files, and endings of files that count in folders.
    files: Sequence[str] = ()
    suffixes: Sequence[str] = ()
    on_progress: OnProgress | None = None


class Task(NamedTuple):
    """How a task is run and shown."""

    # One line for --list.
    doc: str
    # Load the data and vocabulary now; return what measures a request.
    prepare: Callable[[Request], Callable[[Request], dict[str, Any]]]
    # Tables of the results, under a title.
    tables: Callable[[dict[str, Any], str], list[rich.table.Table]]
    # Draw the results into a PNG file, under a title; None: there is no picture.
    draw: Callable[[dict[str, Any], Any, Config, str], None] | None = None


def _prepare_passkey(request: Request) -> Callable[[Request], dict[str, Any]]:
    from fam_jax.data.build import task_vocabulary
    from fam_jax.evaluate.passkey import evaluate_passkey

    vocabulary = task_vocabulary(request.config)

    def measure(request: Request) -> dict[str, Any]:
        show = request.on_progress
        return evaluate_passkey(
            request.config,
            request.params,
            vocabulary=vocabulary,
            on_progress=show and (lambda blocks, done, total: show(f"{blocks} blocks", done, total)),
        )

    return measure


def _prepare_text(request: Request) -> Callable[[Request], dict[str, Any]]:
    from fam_jax.data.build import heldout_examples
    from fam_jax.evaluate.text import evaluate_text

    heldout = heldout_examples(request.config, request.files, request.suffixes)

    def measure(request: Request) -> dict[str, Any]:
        return evaluate_text(
            request.config,
            request.params,
            examples=heldout.examples,
            vocabulary=heldout.vocabulary,
            on_progress=request.on_progress,
        )

    return measure


def _passkey_tables(results: dict[str, Any], title: str) -> list[rich.table.Table]:
    headings = ("blocks", "tokens read", "keys", "exact match", "teacher-forced", "answer tokens", "seconds")
    table = _table(f"PassKey retrieval, {title}", headings)
    shares = ("exact_match", "teacher_forced_exact_match", "answer_token_accuracy")
    for blocks, row in results["lengths"].items():
        size = (blocks, f"{row['tokens_read']:,}", f"{row['keys']:,}")
        table.add_row(*size, *(f"{row[name]:.1%}" for name in shares), f"{row['seconds']:.1f}")
    return [table]


def _text_tables(results: dict[str, Any], title: str) -> list[rich.table.Table]:
    total = rich.table.Table(title=f"Held-out text, {title}", show_header=False)
    total.add_row("documents", f"{results['documents']:,}, longest {results['longest_document']:,} tokens")
    total.add_row("tokens read", f"{results['tokens_read']:,} of {results['tokens']:,}")
    total.add_row("loss", f"{results['loss']:.4f} nats per token, perplexity {results['perplexity']:.2f}")
    if results["bits_per_byte"] is not None:
        total.add_row("bits per byte", f"{results['bits_per_byte']:.4f}")
    total.add_row("next-token accuracy", f"{results['accuracy']:.1%}")
    for name, found in [("", results), *results["ablations"].items()]:
        after = found["loss_after_first_block"]
        if results["ablations"] and after is not None:
            total.add_row(f"after block 1{', memory ' + name if name else ''}", f"{after:.4f}")
    ablated = [f"memory {name}" for name in results["ablations"]]
    places = _table(
        "Loss by position in the document", ("from", "to", "documents", "tokens", "loss", *ablated)
    )
    others = [found["by_position"] for found in results["ablations"].values()]
    for bucket, *rest in zip(results["by_position"], *others, strict=True):
        size = (f"{bucket[name]:,}" for name in ("begin", "end", "documents", "tokens"))
        places.add_row(*size, *("" if b["loss"] is None else f"{b['loss']:.4f}" for b in (bucket, *rest)))
    return [total, places]


def _draw_text(results: dict[str, Any], file: Any, config: Config, title: str) -> None:
    from fam_jax.evaluate.plot import plot_loss_by_position  # matplotlib, which training does not need

    kind = config.model.memory.kind.upper()
    lines = {kind if results["ablations"] else "loss": results["by_position"]}
    lines |= {f"memory {name}": found["by_position"] for name, found in results["ablations"].items()}
    trained = config.data.sequence_length if config.data.task != "passkey" else 0
    plot_loss_by_position(lines, file, trained_tokens=trained, title=f"Held-out text, {title}")


def _table(title: str, headings: Sequence[str]) -> rich.table.Table:
    table = rich.table.Table(title=title)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


TASKS = {
    "passkey": Task(
        "PassKey retrieval by length of filler, by generation", _prepare_passkey, _passkey_tables
    ),
    "text": Task(
        "loss on held-out documents, by position, with ablations", _prepare_text, _text_tables, _draw_text
    ),
}


def default_task(config: Config) -> str:
    """Return the task that evaluates what a run was trained on: that of its data, or "text"."""
    return config.data.task if config.data.task in TASKS else "text"


def task_of(name: str) -> Task:
    """Return a task.

    Raises:
      UserError: there is no such task.
    """
    if name not in TASKS:
        raise UserError(f"--task={name}: there is no such task; there are {', '.join(TASKS)}")
    return TASKS[name]
