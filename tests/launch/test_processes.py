"""A job of two processes equals that of one: results, checkpoints, and how it ends."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from fam_jax.checkpoint import Checkpoints, read_config
from fam_jax.config import Config, MeshConfig, resolve
from fam_jax.evaluation import evaluate, evaluate_in_training, read_evaluation
from fam_jax.training import loop
from launch import processes
from tests.launch.group import Group, finish, free_port, group
from tests.launch.running import ROOT, TINY, command, environment

STEPS, HALF = 6, 3
TRAIN = [
    "launch.train", "--config=configs/passkey.py:smoke",
    *(field for field in TINY if "stage_blocks" not in field and "heads" not in field), "--config.model.num_heads=8",
    "--config.model.num_kv_heads=8", "--config.model.head_dim=2", "--config.train.batch_size=8",
    "--config.data.stage_blocks=(2,3)", "--config.data.max_stage_steps=2", f"--config.train.checkpoint_every={HALF}",
    "--config.train.log_every=1",
]  # fmt: skip
CUBE = ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
# Every device holds the whole batch, and each process makes half of it.
TENSOR = ["--config.mesh.data=1", "--config.mesh.tensor=8"]
# Float32: other meshes, and gloo's all-reduce against XLA's own, sum the same terms in another order.
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}


def config_of(folder: pathlib.Path) -> Config:
    return resolve(read_config(folder))


def metrics(folder: pathlib.Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in found]


def saved(folder: pathlib.Path, step: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return all arrays of a checkpoint and the position of the data, read by this process alone."""
    config = config_of(folder)
    shapes = loop._as_dict(loop.make_trainer(config).state_shapes)
    with Checkpoints(folder, config=dataclasses.asdict(config), keep=9) as checkpoints:
        state, position = checkpoints.restore(step, shapes)
    state["key"] = jax.random.key_data(state["key"])
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}, position


def assert_same_run(one: pathlib.Path, other: pathlib.Path, steps: slice = slice(None)) -> None:
    (arrays, position), (wanted, wanted_position) = saved(one, STEPS), saved(other, STEPS)
    assert position == wanted_position
    assert arrays.keys() == wanted.keys() and len(arrays) > 20
    for name, array in arrays.items():
        np.testing.assert_allclose(array, wanted[name], err_msg=name, **ROUNDING)
    lines, wanted_lines = metrics(one)[steps], metrics(other)[steps]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))[steps]
    for line, expected in zip(lines, wanted_lines, strict=True):
        assert line == pytest.approx(expected, rel=1e-4, abs=1e-5)


# A process of a job in which JAX fails with an error.
FAILS = """
import argparse, sys
import jax
from launch import processes
from launch.errors import user_errors
processes._joined.append(argparse.Namespace(heartbeat_timeout=-10))
jax.distributed.is_initialized, jax.process_count = lambda: True, lambda: 2
with processes.leaving_together(), user_errors():
    raise jax.errors.JaxRuntimeError(sys.argv[1])
"""
SLOW = (
    "UNKNOWN: Gloo context initialization failed: DEADLINE_EXCEEDED: GetKeyValue() timed out with key: cpu:gloo/0/1",
    "UNAVAILABLE: Socket closed",
    "INTERNAL: [external/gloo/pair.cc:547] Connection closed by peer [10.0.0.1]:2048",
    "DEADLINE_EXCEEDED: Barrier timed out.\nmore",
)


def test_a_process_that_others_do_not_answer_is_started_again() -> None:
    assert all(processes.CONNECTION.search(message) for message in SLOW)
    done = subprocess.run(
        [*command("x")[:1], "-c", FAILS, SLOW[0]], cwd=ROOT, capture_output=True, text=True, env=environment()
    )
    assert done.returncode == processes.WORKER_LOST
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: another process does not answer or is too slow (")
    assert SLOW[0] in line and "start all processes again" in line


def test_other_errors_of_the_runtime_keep_their_tracebacks() -> None:
    done = subprocess.run(
        [*command("x")[:1], "-c", FAILS, "INTERNAL: bad program"],
        cwd=ROOT, capture_output=True, text=True, env=environment(),
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "bad program" in done.stderr


@pytest.fixture(scope="module", autouse=True)
def compilation_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Share compiled programs, as most of these jobs need the same ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        yield


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Train with two processes; the run is in the folder `run`."""
    folder = tmp_path_factory.mktemp("together")
    started = finish(folder, *TRAIN, *CUBE, f"--config.train.steps={STEPS}", f"--workdir={folder / 'run'}")
    assert started.errors(1) == started.outputs[1].read_text() == started.printed(0) == ""
    lines = started.errors(0).splitlines()
    reports = [line.partition("/")[0] for line in lines if line.startswith("step ")]
    assert reports == [f"step {step}" for step in range(1, STEPS + 1)]
    return folder


@pytest.fixture(scope="module")
def alone(together: pathlib.Path) -> pathlib.Path:
    """Train the same in this process, which has eight devices."""
    loop.train(config_of(together / "run"), str(together / "alone"), quiet=True)
    return together / "alone"


@pytest.mark.slow
def test_two_processes_train_on_text_as_one(tmp_path: pathlib.Path) -> None:
    """Train on text and PassKey in turns, with evaluation, ablations and a trace."""
    for name, word in (("train", "alpha"), ("heldout", "beta")):
        (tmp_path / name).mkdir()
        for number in range(4):
            (tmp_path / name / f"{number}.txt").write_text(f"{word} {number} " * 40)
    finish(
        tmp_path, "launch.train", "--config=configs/text.py:smoke", *CUBE, "--config.data.task=text+passkey",
        "--config.model.num_layers=1", "--config.model.num_heads=8", "--config.model.num_kv_heads=8",
        "--config.model.head_dim=2", "--config.data.stage_blocks=(2,)", "--config.train.batch_size=8",
        "--config.train.log_every=1", f"--config.train.steps={STEPS}", f"--config.train.checkpoint_every={STEPS}",
        f"--config.evaluate.every={STEPS}", f"--config.data.train_files={tmp_path}/train",
        f"--config.data.heldout_files={tmp_path}/heldout", "--config.data.file_suffixes=.txt",
        "--profile_steps=2,3", f"--workdir={tmp_path / 'run'}",
    )  # fmt: skip
    config = config_of(tmp_path / "run")
    workdir = str(tmp_path / "alone")
    loop.train(config, workdir, evaluate=evaluate_in_training(config, workdir), quiet=True)
    assert_same_run(tmp_path / "run", tmp_path / "alone", slice(STEPS))  # the last line is the evaluation
    assert {line["passkey_batch"] for line in metrics(tmp_path / "run")[:STEPS]} == {0, 1}
    found, wanted = (
        read_evaluation(tmp_path / run / "evaluations" / str(STEPS) / "text.json") for run in ("run", "alone")
    )
    assert found.details["ablations"].keys() == {"zeroed", "shuffled", "frozen"}
    assert found.scalars == pytest.approx(wanted.scalars, rel=1e-4)
    assert any((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


@pytest.mark.slow
def test_two_processes_train_on_a_seqio_task_as_one(tmp_path: pathlib.Path) -> None:
    """Each on its shards. A process alone goes on from the bookmarks of both."""

    def arguments(name: str, steps: int) -> tuple[str, ...]:
        return (
            "launch.train", "--config=configs/text.py:smoke", "--config.model.num_layers=1", *CUBE,
            "--config.model.num_heads=8", "--config.model.num_kv_heads=8", "--config.model.head_dim=2",
            "--config.data.task=seqio:fam_test_mixture", "--config.data.imports=tests.data.text_seqio_tasks",
            "--config.data.train_files=", "--config.data.heldout_files=", "--config.data.file_suffixes=.txt",
            "--config.data.vocabulary=passkey",
            "--config.data.shuffle_batches=1", "--config.data.seqio_shards=4", "--config.train.batch_size=8",
            "--config.train.log_every=1", f"--config.train.steps={steps}", "--config.train.checkpoint_every=4",
            "--config.evaluate.every=0", f"--workdir={tmp_path / name}",
        )  # fmt: skip

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAM_TEST_BOOKMARK_SECONDS", "0")
        finish(tmp_path, *arguments("run", STEPS))
    kept = [path for path in (tmp_path / "run" / "bookmarks").rglob("*") if path.is_file()]
    assert {path.parent.name for path in kept} == {f"{index}-of-4" for index in range(4)}
    config = config_of(tmp_path / "run")
    loop.train(config, str(tmp_path / "alone"), quiet=True)
    assert_same_run(tmp_path / "run", tmp_path / "alone", slice(None))
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=STEPS + 2))
    lines = []
    for name in ("run", "alone"):
        loop.train(longer, str(tmp_path / name), quiet=True)
        lines.append(metrics(tmp_path / name)[STEPS:])
    assert [line["step"] for line in lines[0]] == [STEPS + 1, STEPS + 2]
    assert lines[0][-1] == pytest.approx(lines[1][-1], rel=1e-4, abs=1e-5)


def first_half(folder: pathlib.Path, to: pathlib.Path) -> pathlib.Path:
    """Return a copy of a run that ends at step HALF."""
    shutil.copytree(folder, to)
    shutil.rmtree(to / str(STEPS))
    return to


@pytest.mark.slow  # tests/training/test_processes.py compares steps in every run of the tests
def test_two_processes_train_as_one(together: pathlib.Path, alone: pathlib.Path) -> None:
    assert_same_run(together / "run", alone)


@pytest.mark.slow
def test_one_process_resumes_a_run_of_two_on_another_mesh(
    together: pathlib.Path, alone: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    run = first_half(together / "run", tmp_path / "run")
    config = config_of(run)
    loop.train(dataclasses.replace(config, mesh=type(config.mesh)()), str(run), quiet=True)
    assert_same_run(run, alone)


@pytest.mark.slow
def test_two_processes_resume_a_run_of_one_on_another_mesh(
    alone: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """On this mesh every device needs the whole batch, and each process makes half of it."""
    run = first_half(alone, tmp_path / "run")
    finish(tmp_path, *TRAIN, *TENSOR, f"--config.train.steps={STEPS}", f"--workdir={run}")
    assert_same_run(run, alone)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["params", "contents"])
def test_two_processes_set_a_damaged_step_aside(
    part: str, together: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Both go back to the step before, whether arrays or the record are damaged."""
    shutil.copytree(together / "run", tmp_path / "run")
    step = tmp_path / "run" / str(STEPS)
    file = max((step / "params" / "d").iterdir()) if part == "params" else step / "contents" / "data.json"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    resumed = finish(
        tmp_path, *TRAIN, *CUBE, f"--config.train.steps={STEPS}", f"--workdir={tmp_path / 'run'}"
    )
    lines = [line for line in resumed.errors(0).splitlines() if "is damaged" in line]
    assert len(lines) == 1, resumed.everything()
    kept = tmp_path / "run" / f"{STEPS}.damaged"
    assert lines[0].endswith(f"it is kept as {kept}, and the run goes on from step {HALF}")
    assert resumed.errors(1) == "" and kept.is_dir()
    assert_same_run(tmp_path / "run", together / "run")


@pytest.mark.slow
def test_two_processes_evaluate_as_one(together: pathlib.Path, tmp_path: pathlib.Path) -> None:
    arguments = ["launch.evaluate", f"--checkpoint={together / 'run'}", "--lengths=2", "--keys=4"]
    started = finish(
        tmp_path,
        *arguments,
        "--batch_size=4",
        "--mesh=data=2,fsdp=2,tensor=2",
        f"--out={tmp_path / 'two.json'}",
    )
    assert "exact match" in started.printed(0)
    assert started.errors(1) == started.outputs[1].read_text() == ""
    found = read_evaluation(tmp_path / "two.json")
    assert found.step == STEPS and found.devices == "8 x cpu"

    wanted = evaluate(
        together / "run",
        filler_blocks=(2,),
        keys=4,
        batch_size=4,
        mesh=MeshConfig(data=1, fsdp=8),
        out=tmp_path / "one.json",
    )
    for row in (found.details["groups"]["2"], wanted.details["groups"]["2"]):
        assert row.pop("seconds") > 0
    assert found.details == wanted.details and found.scalars == wanted.scalars


def start(folder: pathlib.Path, *arguments: str, **how: str) -> Any:
    return group(
        folder, *TRAIN, *CUBE, "--config.train.steps=100000", *arguments, f"--workdir={folder / 'run'}", **how
    )


def steps_of(folder: pathlib.Path) -> list[int]:
    return sorted(int(path.name) for path in (folder / "run").iterdir() if path.name.isdigit())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_process_stops_both_at_the_same_step(
    number: signal.Signals, tmp_path: pathlib.Path
) -> None:
    with start(tmp_path, "--config.train.checkpoint_every=1000000") as running:
        running.await_line("step 2/")
        os.kill(running.processes[1].pid, number)
        assert running.wait() == [143, 143], running.everything()
    (step,) = steps_of(tmp_path)
    last = running.errors(0).splitlines()[-1]
    assert last == f"stopped at step {step}; everything is saved, run the same command to resume"
    assert running.errors(1) == ""


def survivor_stops(running: Group, victim: int) -> tuple[str, float]:
    """Kill a process; return what the other one prints about it, and the seconds until that one ends."""
    running.await_line("step 4/")
    began = time.monotonic()
    running.processes[victim].kill()
    assert running.processes[1 - victim].wait(90) == processes.WORKER_LOST, running.everything()
    took = time.monotonic() - began
    print(f"process {1 - victim} stopped after {took:.1f} seconds")
    last = [line for line in running.errors(1 - victim).splitlines() if "error: " in line]
    assert len(last) == 1, running.everything()
    return last[0], took


@pytest.mark.slow
def test_when_a_worker_dies_the_others_stop_and_a_restart_resumes(tmp_path: pathlib.Path) -> None:
    """Use the default timeout. The child dies with its parent."""
    with start(tmp_path) as running:
        line, took = survivor_stops(running, victim=1)
    assert line.startswith("error: process 1 died or cannot be reached")
    assert line.endswith("start all processes again to resume from the latest checkpoint")
    assert took < 60, took
    latest = steps_of(tmp_path)[-1]
    with start(tmp_path) as running:
        running.await_line(f"step {latest + 1}/")
        first = next(line for line in running.errors(0).splitlines() if line.startswith("step "))
        assert first.startswith(f"step {latest + 1}/")


@pytest.mark.slow
def test_when_the_first_process_dies_the_others_stop(tmp_path: pathlib.Path) -> None:
    with start(tmp_path) as running:
        line, took = survivor_stops(running, victim=0)
    assert line.startswith("[1/2] error: process 0, the coordinator, died or cannot be reached")
    assert took < 60, took


@pytest.mark.slow
def test_when_one_process_fails_alone_the_others_stop(tmp_path: pathlib.Path) -> None:
    """It must not wait for the others before it exits, as they wait for it."""
    wrong = "--config.data.vocabulary=missing.model"
    with start(tmp_path, "--heartbeat_timeout=10", last=wrong) as running:
        assert running.wait() == [processes.WORKER_LOST, 2], running.everything()
    assert running.errors(0).startswith("error: process 1 died or cannot be reached; its own log may say why")
    assert running.errors(1).startswith("[1/2] error: vocabulary 'missing.model': no such file")


def test_a_process_that_finds_no_others_says_so(tmp_path: pathlib.Path) -> None:
    placed = [
        f"--coordinator=localhost:{free_port()}",
        "--num_processes=2",
        "--process_id=0",
        "--join_timeout=3",
    ]
    result = subprocess.run(
        command(*TRAIN, f"--workdir={tmp_path / 'run'}", *placed), cwd=ROOT, env=environment(),
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == processes.WORKER_LOST, result.stderr
    assert result.stderr.startswith(
        "error: this process could not join its job; check that every process is started"
    )
    assert result.stderr.count("\n") == 1
