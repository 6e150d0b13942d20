"""Reads text of any length through constant memory, then writes on.

    python -m launch.generate --checkpoint=runs/book --prompt-file=book.txt --question="Who did it?"

`--save-memory=FILE` keeps what was read, to be asked again by `--load-memory=FILE`. `--batch=IN.jsonl --out=OUT.jsonl`
answers many. Text goes to standard output as it is generated, everything else to standard error. docs/generation.md
has the details, and the same in Python.
"""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import rich.console
import rich.progress

from fam_jax.config import MeshConfig, UserError
from fam_jax.generate.batch import complete_lines, open_text
from fam_jax.generate.sampling import Sampling
from fam_jax.generate.text import Completion, TextModel, TextState
from fam_jax.sharding import make_mesh
from launch.errors import ArgumentParser, integers, user_errors


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line.

    Raises:
      UserError: an argument is unknown, missing or malformed, or contradicts another.
    """
    parser = ArgumentParser(prog="python -m launch.generate", description=str(__doc__).partition("\n")[0])
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="workdir of a training run")
    add("--step", type=int, help="saved step; default: the latest")
    add("--mesh", type=integers, metavar="DATA,FSDP,TENSOR", help="spreads the parameters over devices")
    add("--prompt", metavar="TEXT", help="text to read")
    add("--prompt-file", metavar="FILE", help="UTF-8 text to read; - is standard input, as is none at all")
    add("--question", metavar="TEXT", help="text to read after the prompt, and after the memory is saved")
    add("--load-memory", metavar="FILE", help="continue what --save-memory wrote")
    add("--save-memory", metavar="FILE", help="what is remembered after the prompt")
    add("--batch", type=Path, metavar="FILE.jsonl", help="lines with prompt_file, prompt or question")
    add("--out", type=Path, metavar="FILE.jsonl", help="results of --batch; continued if it is there")
    add("--max-tokens", type=int, default=256, help="to generate; 0 reads only (default: %(default)s)")
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    add("--top-k", type=int, default=0, help="draw among so many; 0 = off")
    add("--top-p", type=float, default=1.0, help="draw among the likeliest of this probability; 1 = off")
    add("--seed", type=int, default=0, help="of what is drawn")
    add("--stop", action="append", default=[], metavar="TEXT", help="ends the text; may be repeated")
    add("--chunk-blocks", type=int, default=16, help="blocks that are read at once (default: %(default)s)")
    found = parser.parse_args(arguments)
    _check(found)
    return found


def _check(found: argparse.Namespace) -> None:
    """What can be told before the checkpoint is loaded."""

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
                f"argument {flag}: {place} cannot be written; give a file in a folder that is there",
            )
    refuse(
        found.mesh is not None and len(found.mesh) != 3,
        "argument --mesh: expected three numbers such as 1,1,8",
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
        "argument --max-tokens: 0 reads only, which is of use with --save-memory alone",
    )
    refuse(
        found.max_tokens > 0 and found.batch is None and found.load_memory is not None
        and (found.prompt, found.prompt_file, found.question) == (None, None, None),
        "--load-memory: a memory does not say what comes next; give a --question or a prompt too",
    )  # fmt: skip


@contextlib.contextmanager
def prompt(found: argparse.Namespace) -> Iterator[BinaryIO | str | None]:
    """The text to read, as the command line names it; None if there is none."""
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
    """Shows tokens and tokens/s on stderr while a prompt is read, and a line at the end."""
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
    """Generation as the command line says; `aloud` prints it as it comes."""
    sampling = Sampling(found.temperature, found.top_k, found.top_p)

    def tell(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    return lambda state: model.generate(
        state, max_tokens=found.max_tokens, sampling=sampling, seed=found.seed, stop=found.stop,
        on_text=tell if aloud else None,
    )  # fmt: skip


def run_batch(model: TextModel, found: argparse.Namespace, state: TextState | None) -> None:
    """Answers the lines of --batch.

    Raises:
      UserError: some lines could not be answered; the others are.
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
        raise UserError(f"{failed} of {count} lines have an error in place of a text; {found.out} says which")


@user_errors()
def main() -> None:
    """Entry point."""
    found = parse_arguments()
    mesh = None if found.mesh is None else make_mesh(MeshConfig(*found.mesh))
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


if __name__ == "__main__":
    main()
