"""`python -m launch.generate`: read, ask, remember, batches; every mistake in one line."""

import dataclasses
import io
import json
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from fam_jax.checkpoint import Checkpoints
from fam_jax.config import Config, DataConfig
from fam_jax.generation.text import TextModel
from launch import generate
from launch.errors import user_errors
from tests.generation.tiny import CONFIG
from tests.launch.running import ROOT, command, environment
from tests.model.tiny import params_of

BOOK = "The quick brown fox jumps over the lazy dog.\n" * 9
LIMIT = "--max-tokens=12"


def save(folder: pathlib.Path, seed: int = 0) -> str:
    config = Config(model=dataclasses.replace(CONFIG, vocab_size=259), data=DataConfig(vocabulary="bytes"))
    with Checkpoints(folder, config=dataclasses.asdict(config), keep=1) as checkpoints:
        params = jax.tree.map(jnp.asarray, params_of(config.model, seed))
        checkpoints.save(5, {"params": params, "step": jnp.int32(5)}, {})
    return str(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def book(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "book.txt"
    path.write_text(BOOK)
    return path


Launch = Callable[..., tuple[int, str, str]]


@pytest.fixture
def launch(capsys: pytest.CaptureFixture[str], checkpoint: str) -> Launch:
    """Run the command; return its exit code, standard output and standard error."""

    def run(*arguments: object, of: str = checkpoint) -> tuple[int, str, str]:
        try:
            with user_errors():
                code = generate.main([f"--checkpoint={of}", *map(str, arguments)])
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        return (code, *capsys.readouterr())

    return run


def expected(checkpoint: str, *texts: str, tokens: int = 12) -> str:
    model = TextModel.restore(checkpoint)
    state = None
    for text in texts:
        state = model.read(text, state)
    assert state is not None
    return model.generate(state, max_tokens=tokens).text


def test_a_book_and_a_question(launch: Launch, checkpoint: str, book: pathlib.Path) -> None:
    code, out, err = launch(f"--prompt-file={book}", "--question=Who?", LIMIT)
    assert code == 0, err
    assert out == expected(checkpoint, BOOK, "Who?") + "\n"
    assert f"read {len(BOOK):,} tokens in " in err and "12 tokens in " in err and "tokens/s" in err
    assert launch(f"--prompt_file={book}", "--question=Who?", "--max_tokens=12")[1] == out


def test_standard_input(
    launch: Launch, checkpoint: str, monkeypatch: pytest.MonkeyPatch, book: pathlib.Path
) -> None:
    want = expected(checkpoint, BOOK) + "\n"
    for arguments in ([], ["--prompt-file=-"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(BOOK.encode())))
        assert launch(*arguments, LIMIT)[1] == want
    assert launch(f"--prompt={BOOK}", LIMIT)[1] == want


def test_read_once_ask_often(
    launch: Launch, checkpoint: str, book: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    memory = tmp_path / "book.memory"
    code, out, err = launch(f"--prompt-file={book}", f"--save-memory={memory}", "--max-tokens=0")
    assert (code, out) == (0, "") and f"memory of {len(BOOK):,} tokens written to {memory}" in err
    for question in ("Who?", "Why?", "Who?"):
        code, out, err = launch(f"--load-memory={memory}", f"--question={question}", LIMIT)
        assert code == 0, err
        assert out == expected(checkpoint, BOOK, question) + "\n"
    chapter = launch(f"--load-memory={memory}", "--prompt=More.", f"--save-memory={memory}.2", LIMIT)
    assert chapter[1] == expected(checkpoint, BOOK, "More.") + "\n"
    assert launch(f"--load-memory={memory}.2", "--question=Who?", LIMIT)[0] == 0


def test_sampling_and_stops(launch: Launch, book: pathlib.Path) -> None:
    drawn = ["--prompt-file", book, "--temperature=1", "--top-k=20", "--top-p=0.9", "--max-tokens=40"]
    text = launch(*drawn, "--seed=3")[1]
    assert launch(*drawn, "--seed=3")[1] == text != launch(*drawn, "--seed=4")[1]
    place = next(i for i in range(2, len(text)) if text[i] not in text[:i])
    code, out, err = launch(*drawn, "--seed=3", "--stop", "never this", "--stop", text[place])
    assert (code, out) == (0, text[:place] + "\n")
    assert f"ended by {text[place]!r}" in err


def lines(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


QUESTIONS = [
    {"question": "Who?", "id": 7}, {"prompt": "A \u2028 B", "question": "Why?"}, {"prompt": 3}, {"text": "x"},
    {"prompt_file": "missing.txt"}, {"question": "How?"},
]  # fmt: skip


def test_a_batch_answers_what_can_be_answered(
    launch: Launch, checkpoint: str, book: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    texts = [json.dumps(question, ensure_ascii=False) for question in QUESTIONS]
    source.write_text("\n".join([*texts[:3], "{no json", *texts[3:]]) + "\n")
    arguments = [f"--batch={source}", f"--out={out}", f"--prompt-file={book}", LIMIT]
    code, printed, err = launch(*arguments)
    assert (code, printed) == (2, "")
    assert err.splitlines()[-1] == f"error: 4 of 7 lines could not be answered; their errors are in {out}"
    found = lines(out)
    assert [record["line"] for record in found] == [1, 2, 3, 4, 5, 6, 7]
    assert [record["input"] for record in found] == [*QUESTIONS[:3], "{no json", *QUESTIONS[3:]]
    assert found[0]["text"] == expected(checkpoint, BOOK, "Who?")
    assert found[0]["tokens_read"] == len(BOOK) + 4 and found[0]["tokens"] == 12
    assert found[1]["text"] == expected(checkpoint, BOOK, "A \u2028 B", "Why?")
    assert found[6]["text"] == expected(checkpoint, BOOK, "How?")
    errors = [record.get("error", "") for record in found]
    assert [bool(error) for error in errors] == [False, False, True, True, True, True, False]
    assert "missing.txt: cannot be read" in errors[5]
    assert re.search(r"^36 tokens in [\d.]+ s \([\d,.]+ tokens/s\)$", err, re.MULTILINE)

    # Killed in the middle of a line, and taken up again.
    whole = out.read_bytes()
    kept = whole.splitlines(keepends=True)
    out.write_bytes(b"".join(kept[:5]) + kept[5][:9])
    assert launch(*arguments)[0] == 2
    assert out.read_bytes() == whole
    # Nothing is overwritten by the results of others.
    source.write_text("\n".join(texts[::-1]))
    code, _, err = launch(*arguments)
    assert code == 2 and "does not hold results of these lines" in err
    assert out.read_bytes() == whole


def test_a_batch_of_separate_streams(launch: Launch, checkpoint: str, tmp_path: pathlib.Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "One."}\n{"prompt": "Two."}\n')
    code, _, err = launch(f"--batch={source}", f"--out={out}", LIMIT)
    assert code == 0 and err.splitlines()[-1] == f"2 lines are answered in {out}"
    assert [record["text"] for record in lines(out)] == [
        expected(checkpoint, text) for text in ("One.", "Two.")
    ]


def test_streams_and_settings_of_a_batch(
    launch: Launch, checkpoint: str, book: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    source, memory = tmp_path / "in.jsonl", tmp_path / "book.memory"
    source.write_text("".join(json.dumps({"question": "W" * (1 + 9 * i)}) + "\n" for i in range(5)))
    assert launch(f"--prompt-file={book}", f"--save-memory={memory}", "--max-tokens=0")[0] == 0
    how = [f"--batch={source}", f"--load-memory={memory}", LIMIT, "--temperature=1", "--seed=3", r"--stop=\n"]
    found = []
    for streams in (1, 3, 8):
        out = tmp_path / f"{streams}.jsonl"
        assert launch(*how, f"--out={out}", f"--streams={streams}")[0] == 0
        found.append(out.read_bytes())
    assert found[0] == found[1] == found[2] and found[0].count(b"\n") == 5

    kept = [*how, f"--out={out}"]
    assert launch(*kept, "--chunk-blocks=1")[0] == 0  # it changes no result
    plain, other = [how[0], f"--out={tmp_path}/plain.jsonl", LIMIT], save(tmp_path / "other", seed=1)
    assert launch(*plain)[0] == 0
    assert launch("--prompt=x", f"--save-memory={tmp_path}/x.memory", "--max-tokens=0")[0] == 0
    book.write_text("another")
    for arguments, of, names in (
        ([*kept, "--max-tokens=11"], checkpoint, ["max_tokens was 12, is 11"]),
        (
            [*kept, "--temperature=0.5", "--seed=4"],
            checkpoint,
            ["temperature was 1.0, is 0.5", "seed was 3, is 4"],
        ),
        ([*kept, "--top-k=3", "--top-p=0.5"], checkpoint, ["top_k was 0, is 3", "top_p was 1.0, is 0.5"]),
        ([*kept, "--stop=b"], checkpoint, ['stop was ["\\n"], is ["\\n", "b"]']),
        ([*kept, f"--load-memory={tmp_path}/x.memory"], checkpoint, ["load_memory was "]),
        ([*kept, "--prompt=more"], checkpoint, ["prompt was null, is "]),
        ([*kept, f"--prompt-file={book}"], checkpoint, ["prompt_file was null, is "]),
        (plain, other, [f'checkpoint was "{checkpoint}", is "{other}"', "weights was "]),
    ):
        message = one_line(launch(*arguments, of=of))
        assert "was made with other settings" in message and all(name in message for name in names)
    assert out.read_bytes() == found[0]
    moved = shutil.copytree(checkpoint, tmp_path / "moved")
    assert launch(*kept, of=str(moved))[0] == 0


def test_progress_of_a_batch(launch: Launch, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "REPORT_SECONDS", 0.0)
    (tmp_path / "in.jsonl").write_text('{"question": "Who?"}\n' * 4)
    code, _, err = launch(f"--batch={tmp_path}/in.jsonl", f"--out={tmp_path}/out.jsonl", LIMIT, "--streams=2")
    rate = r"tokens in [\d.]+ s \([\d.,]+ tokens/s\)"
    for line in (
        f"0 of 4 lines, 24 {rate}",
        rf"2 of 4 lines, 24 {rate}, 0:\d\d:\d\d left",
        f"4 of 4 lines, 48 {rate}",
    ):
        assert re.search(f"^{line}$", err, re.MULTILINE), err
    assert code == 0 and err.endswith(f"4 lines are answered in {tmp_path}/out.jsonl\n")


@pytest.mark.slow
def test_command_lines_that_are_not_text(checkpoint: str) -> None:
    for flag, value in (("prompt", b"bad \xff"), ("question", b"\xe9"), ("stop", b"a\x80")):
        arguments = [
            *command("launch.generate", f"--checkpoint={checkpoint}", "--prompt=a"),
            b"--%s=%s" % (flag.encode(), value),
        ]
        done = subprocess.run(
            arguments, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: argument --{flag}: is not valid Unicode at character ")
        assert done.stderr.count("\n") == 1 and "half of a surrogate pair" in done.stderr


def test_escapes_of_stops() -> None:
    texts = [r"\n", r"a\tb\r", r"\\n", r"\d\.", "\n", r"\\\n"]
    assert [generate.unescape(text) for text in texts] == ["\n", "a\tb\r", r"\n", r"\d\.", "\n", "\\\n"]


def test_a_byte_order_mark_is_dropped(launch: Launch, checkpoint: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbf" + BOOK.encode())
    code, out, err = launch(f"--prompt-file={tmp_path}/marked.txt", LIMIT)
    assert (code, out) == (0, expected(checkpoint, BOOK) + "\n") and f"read {len(BOOK):,} tokens" in err
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbf")
    assert "mark.txt: holds no tokens" in one_line(launch(f"--prompt-file={tmp_path}/mark.txt"))


def one_line(result: tuple[int, str, str]) -> str:
    code, out, err = result
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err.removeprefix("error: ").strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature=-1"], "temperature: must be 0 (greedy) or from 1e-37 to 1e+37, got -1.0"),
        (["--top-p=0", "--temperature=1"], "top_p: must be above 0"),
        (["--top-k=5"], "temperature: 0 is greedy and ignores top_k"),
        (["--max-tokens=-1"], "argument --max-tokens: must be at least 0, got -1"),
        (["--max-tokens=0"], "argument --max-tokens: 0 reads only"),
        (["--chunk-blocks=0"], "argument --chunk-blocks: must be at least 1, got 0"),
        (["--mesh=1,2"], "argument --mesh: expected the devices along some of"),
        (["--prompt=a", "--prompt-file=b"], "--prompt and --prompt-file: give only one of them"),
        (["--question="], "--prompt and --question must not be empty"),
        (["--stop="], "argument --stop: must not be empty"),
        (["--batch=a"], "--batch and --out: give both or neither"),
        (["--load-memory=a"], "--load-memory: a memory does not say what comes next"),
        (["--batch=a", "--out=b", "--question=c"], "--question: cannot be combined with --batch"),
        (["--batch=a", "--out=b", "--save-memory=c"], "--save-memory: with --batch, it needs a --prompt-file"),
        (["--prompt=a", "--streams=2"], "--streams: has a meaning for --batch alone"),
        (["--batch=a", "--out=b", "--streams=0"], "argument --streams: must be at least 1, got 0"),
        (["--batch=a", "--out=b", "--prompt-file=-"], "--prompt-file: with --batch, it must be a file"),
        (["--seed=12345678901234567890"], "seed: must be from 0 to 4294967295, got 12345678901234567890"),
        (["--seed=-1"], "seed: must be from 0 to 4294967295, got -1"),
        (["--tempratur=1"], "unrecognized arguments: --tempratur=1; --help lists the flags"),
        (["--prompt=a", "--step=4"], ": has no step 4; saved are 5"),
        (["--prompt-file=missing.txt"], "missing.txt: cannot be read (No such file or directory)"),
        (["--load-memory=missing.memory", "--question=a"], "missing.memory: cannot be read"),
        (["--load-memory=missing.memory", "--batch=a", "--out=b"], "missing.memory: cannot be read (No such file or"),
        (["--batch=missing.jsonl", "--out=out.jsonl"], "missing.jsonl: cannot be read"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_a_mistake_is_one_line(launch: Launch, arguments: list[str], message: str) -> None:
    assert message in one_line(launch(*arguments))


def test_a_missing_checkpoint(launch: Launch, tmp_path: pathlib.Path) -> None:
    assert "missing: no such folder" in one_line(launch("--prompt=a", of=str(tmp_path / "missing")))


def test_prompts_that_cannot_be_read(launch: Launch, tmp_path: pathlib.Path) -> None:
    (tmp_path / "empty.txt").write_bytes(b"")
    assert "empty.txt: is empty" in one_line(launch(f"--prompt-file={tmp_path / 'empty.txt'}"))
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    message = one_line(launch(f"--prompt-file={tmp_path / 'latin.txt'}"))
    assert "latin.txt: is not valid UTF-8 at byte 2 (0xef: invalid continuation byte)" in message


def test_other_encodings_are_named(launch: Launch, tmp_path: pathlib.Path) -> None:
    """UTF-16 without a mark is valid UTF-8 with zero bytes."""
    path = tmp_path / "in.jsonl"
    for encoding, says in {
        "utf-16": "is UTF-16",
        "utf-16-le": "holds zero bytes",
        "utf-16-be": "holds zero",
    }.items():
        path.write_text('{"prompt": "abc"}\n', encoding=encoding)
        assert f"in.jsonl: {says}" in one_line(launch(f"--prompt-file={path}", LIMIT))
        assert "convert it to UTF-8" in one_line(launch(f"--batch={path}", f"--out={tmp_path}/out", LIMIT))
        assert not (tmp_path / "out").exists()


def test_memories_that_cannot_be_loaded(launch: Launch, book: pathlib.Path, tmp_path: pathlib.Path) -> None:
    memory = tmp_path / "book.memory"
    assert launch(f"--prompt-file={book}", f"--save-memory={memory}", "--max-tokens=0")[0] == 0
    other = save(tmp_path / "other", seed=1)
    message = one_line(launch(f"--load-memory={memory}", "--question=a", of=other))
    assert "is of a model of the same shape with other weights" in message
    memory.write_bytes(memory.read_bytes()[:-1])
    assert "is damaged" in one_line(launch(f"--load-memory={memory}", "--question=a"))


def test_a_memory_that_cannot_be_written(launch: Launch, tmp_path: pathlib.Path) -> None:
    """The error comes before anything is read, which may take hours."""
    for place in (tmp_path / "missing" / "some.memory", tmp_path):
        message = one_line(launch("--prompt=a", f"--save-memory={place}", LIMIT))
        assert f"argument --save-memory: {place} cannot be written" in message
    message = one_line(launch("--prompt=a", "--batch=a", f"--out={tmp_path}/missing/out.jsonl"))
    assert "argument --out: " in message


@pytest.mark.slow
def test_a_closed_pipe(checkpoint: str) -> None:
    write = shlex.join(command("launch.generate", f"--checkpoint={checkpoint}", "--prompt=abc"))
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {write} | head -c 0"], cwd=ROOT, env=environment(), capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 141
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
