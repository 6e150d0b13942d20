"""The command-line kit."""

import argparse
import io
import os
import pathlib
import resource
import subprocess
import sys
from typing import Any

import jax
import pytest

from fam_jax.checkpoint import CheckpointError, SaveError
from fam_jax.config import ConfigError, MeshConfig, UserError
from fam_jax.config.overrides import Override
from launch import cli, errors
from tests.launch.running import ROOT, command, environment

DOC = """Do something.

    python -m launch.something
"""


def parser() -> cli.Parser:
    made = cli.Parser("something", DOC, config=True)
    made.add_argument("--top_k", type=cli.at_least(1), default=3)
    made.add_argument("--top-p", type=float, default=1.0)
    cli.add_checkpoint(made)
    cli.add_mesh(made)
    return made


REQUIRED = ["--config=c.py", "--checkpoint=run"]


def test_dashes_and_underscores_are_alike() -> None:
    for first, second in (("--top-k", "--top_p"), ("--top_k", "--top-p")):
        found = parser().parse_args([*REQUIRED, f"{first}=5", second, "0.5"])
        assert (found.top_k, found.top_p) == (5, 0.5)


def test_defaults() -> None:
    found = parser().parse_args(REQUIRED)
    assert (found.config, found.checkpoint, found.step, found.top_k) == ("c.py", "run", None, 3)
    assert found.mesh == MeshConfig() and found.overrides == []
    assert not hasattr(argparse.Namespace(), "help_config") and "help_config" not in vars(found)


def test_config_fields_stand_before_and_behind_the_file_in_one_word_or_two() -> None:
    given = ["--config.a.b=1=2", *REQUIRED, "--config.a.c", "-3", "--top_k=4", "--config.a.d="]
    found = parser().parse_args(given)
    assert found.overrides == [
        Override("config.a.b", "1=2"),
        Override("config.a.c", "-3"),
        Override("config.a.d", ""),
    ]
    assert found.top_k == 4


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "missing --config, --checkpoint; --help lists the flags"),
        ([*REQUIRED, "--top=5"], "unrecognized arguments: --top=5"),
        ([*REQUIRED, "--top-k=0"], "argument --top_k: must be at least 1, got 0"),
        ([*REQUIRED, "--top-k=x"], "argument --top_k: expected a whole number, got 'x'"),
        ([*REQUIRED, "--config.a.b"], "--config.a.b: has no value; write --config.a.b=VALUE"),
        ([*REQUIRED, "--config.a.b", "--top_k=1"], "--config.a.b: has no value"),
        ([*REQUIRED, "model.a=3"], "unrecognized arguments: model.a=3"),
        (
            [*REQUIRED, "--mesh=data=2,fdsp=4"],
            "argument --mesh: expected the devices along some of data, fsdp",
        ),
        ([*REQUIRED, "--mesh=2,2"], "argument --mesh: expected the devices"),
        ([*REQUIRED, "--mesh=data=2,data=2"], "argument --mesh: expected the devices"),
        ([*REQUIRED, "--mesh=data=x"], "argument --mesh: expected the devices"),
        ([*REQUIRED, "--mesh="], "argument --mesh: expected the devices"),
        ([*REQUIRED, "--mesh=0,0,1"], "argument --mesh: config.mesh: data and fsdp are both 0 (automatic)"),
        ([*REQUIRED, "--step=-1"], "argument --step: must be at least 0"),
        ([*REQUIRED, f"--step={10**30}"], "argument --step: must be at most 2147483647, got 1000"),
        ([*REQUIRED, "--checkpoint="], "--checkpoint: is empty; give a path, or leave the flag out"),
        ([*REQUIRED, "--checkpoint", ""], "--checkpoint: is empty"),
    ],
)
def test_mistakes_are_user_errors(arguments: list[str], says: str) -> None:
    with pytest.raises(UserError) as caught:
        parser().parse_args(arguments)
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "code"), [(UserError, 2), (ConfigError, 2), (CheckpointError, 2), (SaveError, 75)]
)
def test_exit_codes_tell_mistakes_from_failures(
    error: type[UserError], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught, errors.user_errors():
        raise error("disk:\nfull")
    assert caught.value.code == code and capsys.readouterr().err == "error: disk: full\n"


@pytest.mark.parametrize(
    ("text", "mesh"),
    [
        ("data=2,fsdp=4", MeshConfig(data=2, fsdp=4)),
        ("fsdp=8", MeshConfig(fsdp=8)),
        ("tensor=2,data=1", MeshConfig(data=1, tensor=2)),
        ("0,1,1", MeshConfig()),
        ("1,2,4", MeshConfig(data=1, fsdp=2, tensor=4)),
    ],
)
def test_a_mesh(text: str, mesh: MeshConfig) -> None:
    assert cli.mesh(text) == mesh


def test_words_and_integers() -> None:
    assert cli.words("a, b,") == ("a", "b") and cli.words("") == ()
    assert cli.paths("a,b") == cli.paths("('a', 'b')") == ("a", "b")
    assert cli.paths("('a, b.txt',)") == ("a, b.txt",)
    assert cli.seed("4294967295") == 2**32 - 1
    for text in ("-1", "9223372036854775808", "99999999999999999999"):
        with pytest.raises(argparse.ArgumentTypeError):
            cli.seed(text)
    assert cli.integers("1,2") == (1, 2)
    with pytest.raises(
        argparse.ArgumentTypeError, match="expected numbers with commas between them, got '1,x'"
    ):
        cli.integers("1,x")


def test_help_says_how_fields_are_set(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        parser().parse_args(["--help"])
    text = capsys.readouterr().out
    for says in (
        "Do something.",
        "--config FILE[:ARG]",
        "--config.GROUP.FIELD VALUE",
        "--help-config",
        "--top_k",
    ):
        assert says in text
    assert text.endswith("\n    python -m launch.something\n")


def test_help_config_lists_the_fields_of_every_group_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        parser().parse_args(["--help-config"])
    text = capsys.readouterr().out
    for says in (
        "config.train\n",
        "  steps: Optimizer steps of the run.",
        "its kind is full\n",
        "  context: ",
    ):
        assert says in text
    assert "  memory: The memory of global layers; `kind` names it and decides its other fields.\n" in text


def raising(error: BaseException) -> Any:
    def main() -> int:
        raise error

    return main


@pytest.mark.parametrize(
    ("main", "code", "says"),
    [
        (lambda: 0, 0, ""),
        (lambda: 7, 7, ""),
        (raising(UserError("two\n  lines")), 2, "error: two lines\n"),
        (raising(KeyboardInterrupt()), 130, "interrupted\n"),
        (
            raising(MemoryError("Unable to allocate 8. TiB")),
            2,
            "error: out of memory (Unable to allocate 8. TiB); raise config.train.accumulation or "
            "config.mesh.fsdp, set config.model.remat=full, or use shorter rows\n",
        ),
        (
            raising(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: HBM is full\nmore")),
            2,
            "error: out of memory (RESOURCE_EXHAUSTED: HBM is full); raise config.train.accumulation or "
            "config.mesh.fsdp, set config.model.remat=full, or use shorter rows\n",
        ),
        (
            lambda: pathlib.Path("n" * 300).stat().st_size,
            2,
            f"error: '{'n' * 79}...: no file can have such a long name\n",
        ),
    ],
)
def test_how_a_program_ends(main: Any, code: int, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.run(main)
    assert caught.value.code == code
    assert capsys.readouterr().err == says


@pytest.mark.parametrize(
    "error",
    [ZeroDivisionError(), RuntimeError("x"), OSError(5, "x"), jax.errors.JaxRuntimeError("INTERNAL: x")],
)
def test_a_bug_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        cli.run(raising(error))


def test_a_closed_pipe_is_no_error() -> None:
    code = "from launch import cli; cli.run(lambda: print('line\\n' * 100_000) or 0)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == errors.PIPE_CLOSED
    assert process.stderr.read() == ""


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("utf-8", "é 漢 \\udcff"), ("latin-1", "é \\u6f22 \\udcff"), ("ascii", "\\xe9 \\u6f22 \\udcff")],
)
def test_what_standard_output_cannot_show_is_no_error(
    monkeypatch: pytest.MonkeyPatch, encoding: str, shown: str
) -> None:
    """Text of another language, and a path that is not UTF-8."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: print("é 漢 \udcff", flush=True) or 0)
    assert (stopped.value.code, written.getvalue()) == (0, f"{shown}\n".encode(encoding))


def test_progress_bars_are_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    with cli.progress_bars() as show:
        show("reading", 1, 2)
        show("reading", 2, None)
    assert file.getvalue() == ""


FIELD = "--config.GROUP.FIELD VALUE"
# What the help of each program names, among others.
PROGRAMS = {
    "demo": [FIELD, "--help-config", "--workdir DIR", "--workers N"],
    "evaluate": ["--checkpoint DIR", "--step N", "--mesh AXIS=N", "--out FILE", "--coordinator HOST:PORT"],
    "export_hf": ["--checkpoint DIR", "--step N", "--out DIR", "--lora"],
    "generate": ["--checkpoint DIR", "--step N", "--mesh AXIS=N", "--out FILE"],
    "import_hf": ["--source DIR", "--mesh AXIS=N", "--coordinator HOST:PORT", "--out"],
    "plan": ["--config FILE[:ARG]", FIELD, "--help-config", "--topology", "--mesh", "--out FILE"],
    "tpu.jobset": [
        "--name",
        "--slice",
        "--num_slices",
        "--image",
        "--env NAME=VALUE",
        "--autopilot",
        "--xpk",
    ],
    "tpu.slices": ["SLICE", "FIELD"],
    "train": [
        "--config FILE[:ARG]",
        FIELD,
        "--help-config",
        "--workdir DIR",
        "--restore_step N",
        "--coordinator HOST:PORT",
    ],
    "report": ["FILE.json", "--out DIR", "--force"],
    "demo_data": ["--out DIR", "--parts PART,...", "--fresh"],
    "train_vocabulary": ["--files", "--size", "--out FILE"],
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_of_every_program(program: str, tmp_path: pathlib.Path) -> None:
    """It is quick, and TensorFlow, which takes seconds to import, is not needed for it."""
    for name in ("tensorflow", "seqio"):
        (tmp_path / f"{name}.py").write_text("raise AssertionError('imported for --help')")
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run(
        command(f"launch.{program}", "--help"), cwd=ROOT, capture_output=True, text=True, timeout=60,
        env=environment() | {"PYTHONPATH": str(tmp_path), "COLUMNS": "100"},
    )  # fmt: skip
    # Seconds of work, which other work on the machine does not change as it changes the time of day.
    took = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    assert done.returncode == 0, done.stderr
    for flag in PROGRAMS[program]:
        assert flag in done.stdout
    assert done.stderr == "" and took < 10, took


def test_every_program_has_its_help_tested() -> None:
    found = {
        ".".join(path.relative_to(ROOT / "launch").with_suffix("").parts)
        for path in (ROOT / "launch").rglob("*.py")
        if "\nif __name__ ==" in path.read_text()
    }
    assert found == PROGRAMS.keys(), os.linesep.join(sorted(found ^ PROGRAMS.keys()))


def test_closed_streams_are_no_error() -> None:
    """The shell's `2>&-` leaves Python without sys.stderr, and the next file that is opened would be file 2."""
    code = (
        "import os, sys; import launch; import fam_jax.data.quiet_seqio; "
        "print('lost'); print('lost', file=sys.stderr); sys.exit(os.open(os.devnull, os.O_WRONLY) < 3)"
    )
    found = subprocess.run(
        ["sh", "-c", f'"{sys.executable}" -c "{code}" >&- 2>&-'],
        cwd=ROOT,
        env=environment() | {"PYTHONPATH": str(ROOT)},
        timeout=120,
    )
    assert found.returncode == 0
