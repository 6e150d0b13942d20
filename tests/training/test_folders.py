"""The files that a run writes beside checkpoints: the profiler's trace, and all files in a (simulated) bucket."""

import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import pytest
from etils import epath
from etils.epath import gpath
from etils.epath.testing import mock_epath

from fam_jax import sharding
from fam_jax.checkpoint import absolute, read_config
from fam_jax.checkpoint.run_config import settle_config
from fam_jax.config import UserError
from fam_jax.data.passkey_curriculum import PasskeyCurriculum
from fam_jax.training import loop, metrics
from fam_jax.training.loop import train
from fam_jax.training.metrics import MetricsWriter
from fam_jax.training.trace import StepTrace
from tests.training.tiny import changed

STEPS = 5
RUN = changed(
    model__vocab_size=64,
    model__block_size=8,
    model__num_layers=1,
    data__digits=1,
    data__stage_blocks=(2,),
    train__steps=STEPS,
    train__batch_size=4,
    train__log_every=1,
    evaluate__every=4,
)
BUCKET = "gs://bucket"


@pytest.fixture(scope="module", autouse=True)
def one_device() -> Iterator[None]:
    make_mesh, make_trainer = sharding.make_mesh, loop.make_trainer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda mesh, _=None: make_mesh(mesh, jax.devices()[:1]))
        trainer = make_trainer(RUN)
        patch.setattr(loop, "make_trainer", lambda _: trainer)
        yield


@pytest.fixture
def bucket(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pathlib.Path]:
    """Redirect `gs://bucket` to a local folder and return that; other ways to write to the bucket fail."""

    def moved(original: Callable[..., Any], *paths: Any, **how: Any) -> Any:
        def inside(path: Any) -> Any:
            text = os.fspath(path) if isinstance(path, os.PathLike) else path
            return text.replace(BUCKET, str(tmp_path / "objects")) if isinstance(text, str) else text

        return original(*map(inside, paths), **how)

    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    names = (
        "open",
        "exists",
        "isdir",
        "listdir",
        "makedirs",
        "mkdir",
        "replace",
        "rename",
        "stat",
        "walk",
        "glob",
    )
    with mock_epath(**dict.fromkeys(names, moved)):
        yield tmp_path / "objects"


class NoCheckpoints:
    """Stand-in for Orbax, which accesses buckets in its own way."""

    folders: list[epath.Path]
    notes: tuple[str, ...] = ()
    failed = False

    def __init__(self, folder: epath.Path, **_: Any):
        self.folders.append(folder)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def latest_step(self) -> None:
        return None

    def save(self, *_: Any, **__: Any) -> None:
        pass

    def wait(self) -> None:
        pass


def traces(folder: pathlib.Path) -> list[pathlib.Path]:
    return list((folder / "profile").rglob("*.xplane.pb"))


def test_a_bucket_keeps_its_name() -> None:
    folder = absolute("gs://bucket/runs/one")
    assert os.fspath(folder / "1" / "params") == "gs://bucket/runs/one/1/params"
    assert os.fspath(absolute("runs/one")) == os.path.abspath("runs/one")


def test_a_run_in_a_bucket(bucket: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "Checkpoints", NoCheckpoints)
    NoCheckpoints.folders = []
    before = set(os.listdir())
    train(
        RUN, "gs://bucket/run", evaluate=lambda *_: {"some": {"score": 1}}, profile_steps=(2, 3), quiet=True
    )
    assert [os.fspath(folder) for folder in NoCheckpoints.folders] == ["gs://bucket/run"]
    lines = (bucket / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 4, 5]
    assert json.loads(lines[4]) == {"step": 4, "evaluation": {"some": {"score": 1}}}
    assert list((bucket / "run" / "tensorboard").iterdir()) and traces(bucket / "run")
    assert set(os.listdir()) == before, "a folder called gs:"


def test_the_config_of_a_run_in_a_bucket(bucket: pathlib.Path) -> None:
    settle_config(absolute("gs://bucket/run"), {"train": {"steps": 3}}, ())
    assert read_config("gs://bucket/run") == {"train": {"steps": 3}}
    assert (bucket / "run" / "config.json").exists()


def test_metrics_in_a_bucket_are_there_before_the_end_and_go_on(
    bucket: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bucket / "run" / "metrics.jsonl"
    with MetricsWriter(epath.Path("gs://bucket/run"), resume_step=0) as writer:
        writer.write(1, {"loss": 2.0})
        writer.flush()
        assert path.read_text() == '{"step": 1, "loss": 2.0}\n'
        writer.write(2, {"loss": 1.0})
        assert path.read_text().count("\n") == 1
        later = time.monotonic() + metrics.UPLOAD_SECONDS + 1
        monkeypatch.setattr(time, "monotonic", lambda: later)
        writer.write(3, {"loss": 1.0})
        assert path.read_text().count("\n") == 3
    with MetricsWriter(epath.Path("gs://bucket/run"), resume_step=2) as writer:
        writer.write(3, {"loss": 0.5})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["loss"] for line in lines] == [2.0, 1.0, 0.5]
    assert list((bucket / "run" / "tensorboard").iterdir())


@pytest.mark.slow
def test_a_trace_of_some_steps(tmp_path: pathlib.Path) -> None:
    """The file holds the annotations of these steps and of no others."""
    train(RUN, str(tmp_path), profile_steps=(2, 3), quiet=True)
    (trace,) = traces(tmp_path)
    from jax.profiler import ProfileData

    steps = set()
    for plane in ProfileData.from_file(str(trace)).planes:
        for line in plane.lines:
            for event in line.events:
                if event.name == "train":
                    steps |= {value for name, value in event.stats if name == "step_num"}
    assert steps == {2, 3}


@pytest.mark.parametrize("steps", [(0, 2), (3, 2), (4, STEPS + 1)])
def test_a_trace_of_steps_that_never_come_is_refused(steps: tuple[int, int], tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError) as caught:
        train(RUN, str(tmp_path), profile_steps=steps, quiet=True)
    first, last = steps
    assert str(caught.value) == (
        f"--profile_steps={first},{last}: expected FIRST,LAST, from 1 to the {STEPS} steps of the run"
    )


def test_the_same_command_resumes_a_run_that_was_traced(tmp_path: pathlib.Path) -> None:
    with StepTrace(epath.Path(tmp_path), (2, 4), remaining=range(3, STEPS + 1)) as trace:
        for step in range(3, STEPS + 1):
            with trace.step(step):
                pass
            trace.end(step, ())
    assert not traces(tmp_path)


@pytest.mark.slow
def test_an_interrupted_trace_is_kept(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PasskeyCurriculum, "next", interrupt_at(PasskeyCurriculum.next, batch=3))
    with pytest.raises(KeyboardInterrupt):
        train(RUN, str(tmp_path), profile_steps=(2, 4), quiet=True)
    assert traces(tmp_path)


def interrupt_at(make: Callable[[Any], Any], batch: int) -> Callable[[Any], Any]:
    def interrupting(batches: Any) -> Any:
        if batches.state()["step"] + 1 == batch:
            raise KeyboardInterrupt
        return make(batches)

    return interrupting
