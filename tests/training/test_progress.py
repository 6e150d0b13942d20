"""The terminal output of training, and the FLOPs of its reported utilization."""

import contextlib
import io
import os
import pathlib
import re
import sys
import time

import pytest
from rich.console import Console

from fam_jax.training import progress
from fam_jax.training.flops import peak_flops
from fam_jax.training.loop import train
from fam_jax.training.progress import ProgressReport
from tests.training.test_loop import RUN, evaluate, one_device  # noqa: F401 (a fixture of every test)


def test_time_left_leaves_out_compilation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    report = ProgressReport(10, 0)
    for step, seconds in enumerate((60, 2, 2), 1):
        now[0] += seconds
        report.advance(step, compiled=step == 1)
    report.note(3, "loss 1")
    assert capsys.readouterr().err == "step 3/10  loss 1  14 s left\n"


def test_a_quiet_report_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressReport(10, 0, quiet=True) as report:
        report.advance(1, compiled=False)
        report.note(1, "loss 1")
        report.say("finished")
    assert capsys.readouterr().err == ""


def test_a_line_that_nobody_reads_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        report = ProgressReport(10, 0)
        for _ in range(2):
            report.say("lost")
        monkeypatch.undo()
        with pytest.raises(BrokenPipeError):
            stderr.flush()
        with contextlib.suppress(BrokenPipeError):
            stderr.close()


def test_what_a_run_says(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(RUN, str(tmp_path / "run"), evaluate=evaluate)
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("I0000")]
    folder = tmp_path / "run"
    steps, rows = RUN.train.steps, RUN.train.batch_size
    assert re.fullmatch(r"devices: 1 x cpu, mesh data=1 fsdp=1 tensor=1", said[0])
    assert re.fullmatch(r"parameters: [\d,]+ trained, 0 frozen", said[1])
    assert re.fullmatch(rf"batch: {rows} rows of up to \d+ tokens, [\d,]+ tokens per step", said[2])
    assert said[3] == f"starting {folder}"
    assert said[-1] == f"finished: {steps} steps, results in {folder}"
    assert f"checkpoint: step {steps} in {folder}" in said
    assert any(line.startswith("evaluation at step 3: some  step 3  sum ") for line in said)
    assert any(
        re.match(rf"step {steps}/{steps}  loss [\d.]+  exact match .* tokens/s$", line) for line in said
    )


@pytest.mark.parametrize("width", [60, 80, 120])
def test_step_and_time_can_be_read_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """A long note is cut instead."""
    shown = io.StringIO()
    terminal = Console(file=shown, force_terminal=True, width=width)
    monkeypatch.setattr(progress, "Console", lambda **_: terminal)
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    with ProgressReport(123_456, 98_764) as report:
        now[0] += 2
        report.advance(98_765, compiled=False)
        report.note(98_765, "loss 2.345  accuracy 0.456  epoch 12  1,234,567 tokens/s  MFU 45.6 %")
    last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.getvalue()).splitlines()[-1]
    assert "98765/123456" in last and "loss 2.345" in last and len(last) <= width
    assert last.rstrip().endswith(" 13:43:02")


@pytest.mark.parametrize(
    ("kind", "peak"),
    [("TPU v5 lite", 197e12), ("TPU v5", 459e12), ("TPU v6 lite", 918e12), ("NVIDIA H100 80GB HBM3", 989e12)],
)
def test_peaks_of_devices_by_their_names(kind: str, peak: float) -> None:
    assert peak_flops(kind) == peak
    assert peak_flops("cpu") is None
