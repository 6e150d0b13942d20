"""The planner on the command line: exit codes, output, and mistakes."""

import json
import pathlib
import signal
import subprocess
import sys

import pytest

from fam_jax.config import UserError
from launch.plan import parse_arguments, rounded, seconds_span
from tests.plan.programs import needs_compiler

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent

# Runs command lines, each in a fork of one process, as imports take seconds.
FORKS = """
import json, os, runpy, sys
import fam_jax.plan.serving, fam_jax.plan.training, launch.cli
folder, lines = sys.argv[1], json.loads(sys.argv[2])
for number, line in enumerate(lines):
    child = os.fork()
    if not child:
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{folder}/{number}.{name}", os.O_WRONLY | os.O_CREAT), stream)
        sys.argv = ["launch.plan", *line]
        runpy.run_module("launch.plan", run_name="__main__")
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""

SMALL = ("--config=configs/fam_1b.py:smoke", "--topology=v5e:2x2")
# Too much for a chip.
WIDE = (
    "--config=configs/fam_24b.py:smoke,pretrain", "--topology=v5e:1x1", "--config.model.num_layers=8",
    "--config.model.model_dim=8192", "--config.model.ff_dim=32768", "--config.model.num_heads=32",
    "--config.model.num_kv_heads=1", "--config.model.head_dim=128",
)  # fmt: skip


def run(folder: pathlib.Path, *lines: tuple[str, ...]) -> list[tuple[int, str, str]]:
    """Return the exit code, standard output and standard error of each command line."""
    command = [sys.executable, "-c", FORKS, str(folder), json.dumps(lines)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]

    def text(number: int, name: str) -> str:
        return (folder / f"{number}.{name}").read_text()

    codes = map(int, done.stdout.split())
    return [(code, text(number, "out"), text(number, "err")) for number, code in enumerate(codes)]


@pytest.mark.parametrize(
    ("value", "decimals", "text"),
    [
        (47.541, 2, "47.54"),
        (0.899, 2, "0.90"),
        (0.0042, 2, "0.0042"),
        (1_239_556.4, 0, "1,239,556"),
        (0.31, 0, "0.31"),
        (0.0, 2, "0.00"),
    ],
)
def test_a_small_figure_keeps_its_first_digits(value: float, decimals: int, text: str) -> None:
    assert rounded(value, decimals) == text


@pytest.mark.parametrize(
    ("given", "topology"),
    [
        ("v5p:4x4x8", "v5p:4x4x8"),
        ("v5p-256", "v5p:4x4x8"),
        ("v5litepod-16", "v5e:4x4"),
        ("v5e:2x2", "v5e:2x2"),
    ],
)
def test_a_slice_by_its_accelerator_type(given: str, topology: str) -> None:
    assert parse_arguments(["--config=c.py", f"--topology={given}"]).topology == topology


@pytest.mark.parametrize("given", ["v5p-9", "v5p", "", "tpu7x-8"])
def test_no_such_accelerator_type(given: str) -> None:
    with pytest.raises(UserError, match=f"slice '{given}': "):
        parse_arguments(["--config=c.py", f"--topology={given}"])


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        (0.899, 1.364, "0.899 to 1.364 s"),
        (0.0001, 0.5, "0.00010 to 0.500 s"),
        (0.0031, 0.0097, "3.1 to 9.7 ms"),
        (0.00000042, 0.0097, "0.00042 to 9.7 ms"),
        (0.0000185, 0.0000188, "18.5 to 18.8 µs"),
        (2e-9, 3e-9, "0.0020 to 0.0030 µs"),
        (0.0, 0.0, "0.000 to 0.000 s"),
    ],
)
def test_a_short_time_is_not_rounded_to_nothing(low: float, high: float, text: str) -> None:
    assert seconds_span(low, high, 3) == text


MISTAKES = {
    ("--config=configs/fam_1b.py:smoke", "--topology=v5q:2x2"): "unknown generation v5q",
    (
        "--config=configs/fam_1b.py:smoke",
        "--topology=v5e:3x5",
    ): "topology 'v5e:3x5': the compiler has no such slice (",
    (*SMALL, "--config.mesh.data=3"): "config.mesh: data * fsdp * tensor = 3, but there are 4 devices",
    (*SMALL, "--config.train.batch_size=6"): "config.train.batch_size: 6 rows cannot be divided",
    (
        *SMALL,
        "--what=serve",
        "--config.mesh.data=3",
        "--mesh=config",
    ): "config.mesh: data * fsdp * tensor = 3",
    (*SMALL, "--what=serve", "--topology=v5q:2x2"): "unknown generation v5q",
    (*SMALL, "--mesh=data=3"): "config.mesh: data * fsdp * tensor = 3, but there are 4 devices",
    (*SMALL, "--mesh=best"): "argument --mesh: expected the devices along some of data, fsdp, tensor",
    (*SMALL, "--what=serve", "--streams=0"): "argument --streams: must be at least 1, got 0",
    (*SMALL, "--what=serve", "--tokens=8"): "--tokens: has no meaning for --what=serve",
    (*SMALL, "--streams=8"): "--streams: has no meaning for --what=train",
}


@needs_compiler
@pytest.mark.slow
def test_a_mistake_is_one_line(tmp_path: pathlib.Path) -> None:
    for (code, _, err), message in zip(run(tmp_path, *MISTAKES), MISTAKES.values(), strict=True):
        assert code == 2, err
        assert "Traceback" not in err
        line = err.strip().splitlines()[-1]
        assert line.startswith("error: ") and message in line


@needs_compiler
@pytest.mark.slow
def test_the_plan_of_a_run_that_does_not_fit_gives_advice(tmp_path: pathlib.Path) -> None:
    report = tmp_path / "plan.json"
    serve = ("--what=serve", "--mesh=config")
    train, serving = run(tmp_path, (*WIDE, f"--out={report}"), (*WIDE, *serve))
    assert train[0] == serving[0] == 1
    found = json.loads(report.read_text())
    assert not found["fits"] and "step_seconds_low" not in found
    missing = found["hbm_peak_bytes"] - found["hbm_capacity_bytes"]
    assert missing > 2 * found["hbm_capacity_bytes"]
    assert found["advice"].startswith(
        f"{missing / 2**30:.1f} GiB too much for a chip's 16 GiB; try config.model.remat"
    )
    assert "GiB too much for a chip's 16 GiB" in " ".join(serving[1].split())


@needs_compiler
@pytest.mark.slow
def test_generation_is_planned_on_the_best_of_several_meshes(tmp_path: pathlib.Path) -> None:
    report = tmp_path / "plan.json"
    ((code, out, err),) = run(tmp_path, (*SMALL, "--what=serve", "--streams=2", f"--out={report}"))
    assert (code, err) == (0, "")  # no warnings of the compiler either
    found = json.loads(report.read_text())
    assert found["fits"] and found["streams"] == 2 and len(found["tried"]) > 1
    assert found["phases"].keys() == {"prefill", "decode"}
    assert "to read 1,000,000" in out


# Loads the compiler, then says that it is ready, and waits.
WAITS = """
import time
from fam_jax.plan import topology_devices
topology_devices("v5e:2x2")
print("ready", flush=True)
time.sleep(300)
"""


@needs_compiler
def test_a_plan_that_is_told_to_end_prints_nothing() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (-signal.SIGTERM, "", "")
