"""Read text of any length through constant memory, then continue it.

    python -m launch.generate --checkpoint=runs/book --prompt-file=book.txt --question="Who did it?"

`--save-memory=FILE` saves what was read, and `--load-memory=FILE` continues it. `--batch=IN.jsonl --out=OUT.jsonl`
answers many lines. Text goes to standard output as it is generated, everything else to standard error.
docs/generation.md has the details, and the same in Python.
"""

import argparse
import contextlib
import datetime
import hashlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import rich.console
import rich.progress

from fam_jax.config import UserError
from fam_jax.data.vocabulary import special_token_id
from fam_jax.generation.batch import Batch, BatchProgress, HowToComplete, open_text
from fam_jax.generation.sampling import Sampling
from fam_jax.generation.state_file import fingerprint
from fam_jax.generation.text import TextModel, TextState
from fam_jax.generation.tokenize import check_unicode
from fam_jax.generation.turn import Turn
from fam_jax.model.memory_health import MemoryHealth
from fam_jax.sharding import make_mesh

from . import cli

# What --stop understands beside the characters themselves.
ESCAPES = {r"\n": "\n", r"\t": "\t", r"\r": "\r", "\\\\": "\\"}
# Seconds between the progress lines of a batch where there is no terminal.
REPORT_SECONDS = 60.0


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line.

    Raises:
      UserError: an argument is unknown, missing or malformed, or contradicts another.
    """
    parser = cli.Parser("generate", __doc__)
    cli.add_checkpoint(parser)
    cli.add_imports(parser)
    mesh = "spread the parameters over devices, such as fsdp=8,data=1; default: use one device"
    parser.add_argument("--mesh", type=cli.mesh, metavar="AXIS=N,...", help=mesh)
    add = parser.add_argument_group("what to read").add_argument
    add("--prompt", metavar="TEXT", help="text to read")
    add("--prompt-file", metavar="FILE", help="UTF-8 text to read; - or no prompt: standard input")
    add("--question", metavar="TEXT", help="text to read after the prompt, once the memory is saved")
    chat = "make prompt and question the turn of a user, in the tokenizer's chat template"
    add("--chat", action="store_true", help=chat)
    add("--load-memory", metavar="FILE", help="continue what --save-memory wrote")
    add("--save-memory", metavar="FILE", help="save the memory after the prompt")
    add("--batch", type=Path, metavar="FILE.jsonl", help="lines with prompt_file, prompt or question")
    add("--out", type=Path, metavar="FILE.jsonl", help="results of --batch; continued if it exists")
    add(
        "--streams",
        type=cli.at_least(1),
        metavar="N",
        default=1,
        help="lines of --batch to generate together",
    )
    blocks = "blocks to read at once; default: %(default)s"
    add("--chunk-blocks", type=cli.at_least(1), metavar="N", default=16, help=blocks)
    add = parser.add_argument_group("what to generate").add_argument
    limit = "tokens to generate; 0: read only; default: %(default)s"
    add("--max-tokens", type=cli.at_least(0), metavar="N", default=256, help=limit)
    add("--temperature", type=float, metavar="T", default=0.0, help="default: 0, take the likeliest token")
    add("--top-k", type=int, metavar="K", default=0, help="sample among the K likeliest tokens; 0: off")
    top_p = "sample among the likeliest tokens of this total probability; 1: off"
    add("--top-p", type=float, metavar="P", default=1.0, help=top_p)
    add("--seed", type=int, metavar="N", default=0, help="seed of the sampling")
    stop = (
        r"string or special token that ends the text and is left out of it; \n: end of line; may be repeated"
    )
    add("--stop", action="append", default=[], type=unescape, metavar="TEXT", help=stop)
    found = parser.parse_args(arguments)
    _check(found)
    return found


def unescape(text: str) -> str:
    r"""Argument type: text in which \n, \t, \r and \\ are a line feed, a tab, a carriage return and a backslash."""
    return re.sub(r"\\[ntr\\]", lambda match: ESCAPES[match[0]], text)


def _check(found: argparse.Namespace) -> None:
    """Raise :class:`UserError` if flags contradict each other or a file cannot be written."""

    def refuse(condition: bool, message: str) -> None:
        if condition:
            raise UserError(message)

    how_to_complete(found)
    for flag, texts in (("prompt", [found.prompt]), ("question", [found.question]), ("stop", found.stop)):
        for text in texts:
            check_unicode(text or "", f"argument --{flag}")
    for flag, place in (("--save-memory", found.save_memory), ("--out", found.out)):
        if place is not None:  # found out now, as reading may take hours
            file = Path(place)
            is_free = file.is_file() or not file.exists()  # no folder, device or pipe
            writable = is_free and os.access(file if file.exists() else file.parent, os.W_OK)
            refuse(
                not writable,
                f"argument {flag}: {place} cannot be written; give a file in a folder that exists",
            )
    refuse(
        found.prompt is not None and found.prompt_file is not None,
        "--prompt and --prompt-file: give only one of them",
    )
    refuse("" in (found.prompt, found.question), "--prompt and --question must not be empty")
    refuse("" in found.stop, "argument --stop: must not be empty")
    refuse((found.batch is None) != (found.out is None), "--batch and --out: give both or neither")
    refuse(
        found.streams > 1 and found.batch is None, "--streams: has a meaning for --batch alone; leave it out"
    )
    refuse(
        found.save_memory is not None
        and found.batch is not None
        and (found.prompt, found.prompt_file, found.load_memory) == (None, None, None),
        "--save-memory: with --batch, it needs a --prompt-file or --prompt that all lines continue",
    )
    refuse(
        found.batch is not None and found.question is not None,
        "--question: cannot be combined with --batch; put the questions into its lines",
    )
    refuse(
        found.batch is not None and found.prompt_file == "-",
        "--prompt-file: with --batch, it must be a file; standard input cannot be read again to continue the batch",
    )
    refuse(
        found.max_tokens == 0 and (found.batch is not None or found.save_memory is None),
        "argument --max-tokens: 0 reads only, so it needs --save-memory",
    )
    nothing_to_read = (found.prompt, found.prompt_file, found.question) == (None, None, None)
    refuse(
        found.max_tokens > 0 and found.batch is None and found.load_memory is not None and nothing_to_read,
        "--load-memory: a memory does not say what comes next; give a --question or a prompt too",
    )


@contextlib.contextmanager
def prompt(found: argparse.Namespace) -> Iterator[BinaryIO | str | None]:
    """Open the text that the command line names; None if it names none."""
    alone = found.load_memory is None and found.batch is None
    if found.prompt is not None:
        yield found.prompt
    elif found.prompt_file == "-" or (found.prompt_file is None and alone):
        if sys.stdin.isatty():
            print("reading standard input; end it with Ctrl-D", file=sys.stderr)
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
        return f"read {rate(read, seconds)}"

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


def say_health(health: MemoryHealth) -> None:
    """Print figures of the memory after a long text."""
    means = health.means()
    print(
        f"memory: root mean square {means['memory_rms']:.3g}, the last block leaves {means['memory_unchanged']:.1%} of "
        "its entries unchanged",
        file=sys.stderr,
    )


def how_to_complete(found: argparse.Namespace, *stops: str) -> HowToComplete:
    """Return how the command line wants texts to be completed, with more strings that end them."""
    sampling = Sampling(found.temperature, found.top_k, found.top_p)
    return HowToComplete(found.max_tokens, sampling, found.seed, (*found.stop, *stops))


def stops_of(model: TextModel, turn: Turn) -> list[str]:
    """Return the end of an answer in the chat template, unless all texts of the model end there anyway."""
    token = special_token_id(model.vocabulary, turn.end) if turn.end else None
    return [] if token is None or token in model.end_ids else [turn.end]


def open_batch(model: TextModel, found: argparse.Namespace, turn: Turn) -> Batch:
    """Open --batch and --out.

    Raises:
      UserError: a file cannot be read, or --out holds results of other lines or settings.
    """
    settings: dict[str, Any] = {
        "checkpoint": os.path.abspath(found.checkpoint),
        "step": model.step,
        "weights": fingerprint(model.streamer.params)[:16],
        "end_ids": model.end_ids,
        "load_memory": None if found.load_memory is None else _digest(found.load_memory),
        "prompt": None if found.prompt is None else hashlib.sha256(found.prompt.encode()).hexdigest()[:16],
        "prompt_file": None if found.prompt_file is None else _digest(found.prompt_file),
    }
    for name in ("max_tokens", "temperature", "top_k", "top_p", "seed", "stop"):
        settings[name] = getattr(found, name)
    if found.chat:
        settings["chat"] = hashlib.sha256(repr(tuple(turn)).encode()).hexdigest()[:16]
    return Batch(found.batch, found.out, settings)


def _digest(path: str) -> str:
    with open_text(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


@contextlib.contextmanager
def batch_progress() -> Iterator[Callable[[BatchProgress], None]]:
    """Show lines, tokens, tokens/s and the time left on stderr: a bar on a terminal, elsewhere a line per minute."""
    console = rich.console.Console(stderr=True)
    columns = (rich.progress.BarColumn(bar_width=10), rich.progress.TextColumn("{task.description}"))
    began = reported = time.perf_counter()

    def text(now: BatchProgress, seconds: float) -> str:
        found = f"{now.done:,} of {now.lines:,} lines, {rate(now.tokens, seconds)}"
        if 0 < now.done < now.lines:
            left = datetime.timedelta(seconds=round(seconds * (now.lines - now.done) / now.done))
            found += f", {left} left"
        return found

    with rich.progress.Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("reading", total=None)

        def show(now: BatchProgress) -> None:
            nonlocal reported
            at = time.perf_counter()
            line = text(now, at - began)
            bar.update(task, description=line, completed=now.done, total=now.lines)
            if not console.is_terminal and at - reported > REPORT_SECONDS:
                reported = at
                print(line, file=sys.stderr, flush=True)

        yield show


def rate(tokens: int, seconds: float) -> str:
    """Return a number of tokens and their rate, for people."""
    return f"{tokens:,} tokens in {seconds:.1f} s ({tokens / seconds:,.1f} tokens/s)"


def run_batch(
    model: TextModel, batch: Batch, found: argparse.Namespace, state: TextState | None, turn: Turn
) -> None:
    """Answer the lines of --batch.

    Raises:
      UserError: some lines could not be answered; all others are.
    """
    began, tokens = time.perf_counter(), 0
    with batch_progress() as show:

        def on_progress(now: BatchProgress) -> None:
            nonlocal tokens
            tokens = now.tokens
            show(now)

        count, failed = batch.complete(
            model,
            how_to_complete(found, *stops_of(model, turn)),
            state=state,
            turn=turn,
            streams=found.streams,
            chunk_blocks=found.chunk_blocks,
            on_progress=on_progress,
        )
    seconds = time.perf_counter() - began
    print(rate(tokens, seconds), file=sys.stderr)
    if failed:
        raise UserError(f"{failed} of {count} lines could not be answered; their errors are in {found.out}")
    print(f"{count} lines are answered in {found.out}", file=sys.stderr)


def answer(model: TextModel, found: argparse.Namespace, state: TextState, turn: Turn) -> None:
    """Generate a text and print it as it comes."""

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    began, how = time.perf_counter(), how_to_complete(found, *stops_of(model, turn))
    done = model.generate(
        state,
        max_tokens=how.max_tokens,
        sampling=how.sampling,
        seed=how.seed,
        stop=how.stop,
        on_text=write,
    )
    print(flush=True)
    seconds = time.perf_counter() - began
    print(f"{rate(done.tokens, seconds)}; ended by {done.ended_by!r}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Generate; return the exit code."""
    found = parse_arguments(argv)
    mesh = None if found.mesh is None else make_mesh(found.mesh)
    with prompt(found) as source:
        model = TextModel.restore(found.checkpoint, found.step, mesh, imports=found.imports)
        turn = model.turn if found.chat else Turn()
        state = None if found.load_memory is None else model.load(found.load_memory)
        batch = None if found.batch is None else open_batch(model, found, turn)
        # The turn ends where generation begins.
        ends = found.question is None and found.save_memory is None and batch is None
        if source is not None:
            around = {"before": turn.before if state is None else "", "after": turn.after if ends else ""}
            with reading_progress() as show:
                state = model.read(
                    source,
                    state,
                    **around,
                    chunk_blocks=found.chunk_blocks,
                    on_progress=show,
                    on_health=say_health,
                )
    if found.save_memory is not None and state is not None:
        model.save(found.save_memory, state)
        print(f"memory of {state.tokens_read:,} tokens written to {found.save_memory}", file=sys.stderr)
    if batch is not None:
        run_batch(model, batch, found, state, turn)
    elif found.max_tokens:
        if found.question is not None or (turn.after and not ends):
            state = model.read(found.question or "", state, after=turn.after)
        assert state is not None
        answer(model, found, state, turn)
    return 0


if __name__ == "__main__":
    cli.run(main)
