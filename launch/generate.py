"""Read text of any length through constant memory, then continue it.

    python -m launch.generate --checkpoint=runs/book --prompt-file=book.txt --question="Who did it?"

`--save-memory=FILE` saves what was read, and `--load-memory=FILE` continues it. `--batch=IN.jsonl --out=OUT.jsonl`
answers many lines. Text goes to standard output as it is generated, everything else to standard error.
docs/generation.md has the details, and the same in Python.
"""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import rich.console
import rich.progress

from fam_jax.config import UserError
from fam_jax.generate.batch import complete_lines, open_text
from fam_jax.generate.sampling import Sampling
from fam_jax.generate.text import Completion, TextModel, TextState
from fam_jax.sharding import make_mesh
from launch import cli


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line.

    Raises:
      UserError: an argument is unknown, missing or malformed, or contradicts another.
    """
    parser = cli.Parser("generate", __doc__)
    cli.add_checkpoint(parser)
    add = parser.add_argument
    add(
        "--mesh",
        type=cli.mesh,
        metavar="AXIS=N,...",
        help="spread the parameters over devices: data=1,fsdp=8",
    )
    add("--prompt", metavar="TEXT", help="text to read")
    add("--prompt-file", metavar="FILE", help="UTF-8 text to read; - or no prompt: standard input")
    add("--question", metavar="TEXT", help="text to read after the prompt, once the memory is saved")
    add("--load-memory", metavar="FILE", help="continue what --save-memory wrote")
    add("--save-memory", metavar="FILE", help="save the memory after the prompt")
    add("--batch", type=Path, metavar="FILE.jsonl", help="lines with prompt_file, prompt or question")
    add("--out", type=Path, metavar="FILE.jsonl", help="results of --batch; continued if it exists")
    add("--max-tokens", type=int, default=256, help="tokens to generate; 0: read only (default: %(default)s)")
    add("--temperature", type=float, default=0.0, help="0: take the likeliest token (default)")
    add("--top-k", type=int, default=0, help="sample among the k likeliest tokens; 0: off")
    add(
        "--top-p",
        type=float,
        default=1.0,
        help="sample among the likeliest tokens of this total probability; 1: off",
    )
    add("--seed", type=int, default=0, help="of the sampling")
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="string that ends the text; may be repeated",
    )
    add("--chunk-blocks", type=int, default=16, help="blocks to read at once (default: %(default)s)")
    found = parser.parse_args(arguments)
    _check(found)
    return found


def _check(found: argparse.Namespace) -> None:
    """Raise :class:`UserError` for what is wrong before the checkpoint is loaded."""

    def refuse(condition: bool, message: str) -> None:
        if condition:
            raise UserError(message)

    Sampling(found.temperature, found.top_k, found.top_p)
    for flag, place in (("--save-memory", found.save_memory), ("--out", found.out)):
        if place is not None:  # reading may take hours
            file = Path(place)
            writable = not file.is_dir() and os.access(file if file.exists() else file.parent, os.W_OK)
            refuse(
                not writable,
                f"argument {flag}: {place} cannot be written; give a file in a folder that exists",
            )
    refuse(
        found.prompt is not None and found.prompt_file is not None, "give --prompt or --prompt-file, not both"
    )
    refuse("" in (found.prompt, found.question), "--prompt and --question must not be empty")
    refuse("" in found.stop, "argument --stop: must not be empty")
    refuse(found.chunk_blocks < 1, f"argument --chunk-blocks: must be at least 1, got {found.chunk_blocks}")
    refuse(found.max_tokens < 0, f"argument --max-tokens: must be at least 0, got {found.max_tokens}")
    refuse((found.batch is None) != (found.out is None), "--batch and --out belong together")
    refuse(
        found.save_memory is not None
        and found.batch is not None
        and (found.prompt, found.prompt_file, found.load_memory) == (None, None, None),
        "--save-memory: with --batch, it takes a --prompt-file or --prompt that all lines continue",
    )
    refuse(found.batch is not None and found.question is not None, "with --batch, questions are in its lines")
    refuse(
        found.max_tokens == 0 and (found.batch is not None or found.save_memory is None),
        "argument --max-tokens: 0 reads only, so it needs --save-memory",
    )
    refuse(
        found.max_tokens > 0 and found.batch is None and found.load_memory is not None
        and (found.prompt, found.prompt_file, found.question) == (None, None, None),
        "--load-memory: a memory does not say what comes next; give a --question or a prompt too",
    )  # fmt: skip


@contextlib.contextmanager
def prompt(found: argparse.Namespace) -> Iterator[BinaryIO | str | None]:
    """Open the text that the command line names; None if it names none."""
    alone = found.load_memory is None and found.batch is None
    if found.prompt is not None:
        yield found.prompt
    elif found.prompt_file == "-" or (found.prompt_file is None and alone):
        if sys.stdin.isatty():
            print("reading standard input; end it by Ctrl-D", file=sys.stderr)
        yield sys.stdin.buffer
    elif found.prompt_file is not None:
        with open_text(found.prompt_file) as file:
            yield file
    else:
        yield None


@contextlib.contextmanager
def reading_progress() -> Iterator[Callable[[int], None]]:
    """Show tokens and tokens/s on stderr while a prompt is read, and a line at the end."""
    console = rich.console.Console(stderr=True)
    columns = (rich.progress.SpinnerColumn(), rich.progress.TextColumn("{task.description}"))
    began, read = time.perf_counter(), 0

    def line() -> str:
        seconds = time.perf_counter() - began
        return f"read {read:,} tokens in {seconds:.1f} s ({read / seconds:,.0f} tokens/s)"

    with rich.progress.Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("reading", total=None)

        def show(tokens: int) -> None:
            nonlocal read
            read = tokens
            progress.update(task, description=line())

        yield show
    if read:
        print(line(), file=sys.stderr)


def completer(
    model: TextModel, found: argparse.Namespace, *, aloud: bool
) -> Callable[[TextState], Completion]:
    """Return a function that generates as the command line says; `aloud` prints the text as it comes."""
    sampling = Sampling(found.temperature, found.top_k, found.top_p)

    def tell(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    return lambda state: model.generate(
        state, max_tokens=found.max_tokens, sampling=sampling, seed=found.seed, stop=found.stop,
        on_text=tell if aloud else None,
    )  # fmt: skip


def run_batch(model: TextModel, found: argparse.Namespace, state: TextState | None) -> None:
    """Answer the lines of --batch.

    Raises:
      UserError: some lines could not be answered; all others are.
    """
    console = rich.console.Console(stderr=True)
    with rich.progress.Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        bar = progress.add_task("lines", total=None)
        count, failed = complete_lines(
            model, found.batch, found.out, completer(model, found, aloud=False), state=state,
            on_line=lambda done, total: progress.update(bar, completed=done, total=total),
        )  # fmt: skip
    print(f"{count} lines are answered in {found.out}", file=sys.stderr)
    if failed:
        raise UserError(f"{failed} of {count} lines could not be answered; their errors are in {found.out}")


def main(argv: Sequence[str] | None = None) -> int:
    """Generate; return the exit code."""
    found = parse_arguments(argv)
    mesh = None if found.mesh is None else make_mesh(found.mesh)
    with prompt(found) as source:
        model = TextModel.restore(found.checkpoint, found.step, mesh)
        state = None if found.load_memory is None else model.load(found.load_memory)
        if source is not None:
            with reading_progress() as show:
                state = model.read(source, state, chunk_blocks=found.chunk_blocks, on_progress=show)
    if found.save_memory is not None and state is not None:
        model.save(found.save_memory, state)
        print(f"memory of {state.tokens_read:,} tokens written to {found.save_memory}", file=sys.stderr)
    if found.batch is not None:
        run_batch(model, found, state)
    elif found.max_tokens:
        if found.question is not None:
            state = model.read(found.question, state)
        assert state is not None
        began = time.perf_counter()
        done = completer(model, found, aloud=True)(state)
        print(flush=True)
        seconds = time.perf_counter() - began
        print(
            f"{done.tokens} tokens in {seconds:.1f} s ({done.tokens / seconds:,.1f} tokens/s); ended by "
            f"{done.ended_by!r}",
            file=sys.stderr,
        )
    return 0


if __name__ == "__main__":
    cli.run(main)
