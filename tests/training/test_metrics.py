"""Metrics survive full disks and kills, and never stop or hang a run."""

import json
import pathlib
import resource
import time
from collections.abc import Iterator

import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st
from tensorboardX.proto.event_pb2 import Event

from fam_jax.config import UserError
from fam_jax.training import metrics
from fam_jax.training.metrics import MetricsWriter


def steps_of(folder: pathlib.Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events_of(folder: pathlib.Path) -> list[tuple[int, str, float]]:
    """Return step, name and value of everything that TensorBoard would read, which stops at a torn record of a file."""
    found = []
    for path in sorted((folder / "tensorboard").iterdir()):
        raw = path.read_bytes()
        while raw:
            size = int.from_bytes(raw[:8], "little")
            if len(raw) < 16 + size:
                break
            event, raw = Event.FromString(raw[12 : 12 + size]), raw[16 + size :]
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return found


@pytest.fixture
def size_limit() -> Iterator[None]:
    """Restore the limit of a file's size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def limit_size(size: int) -> None:
    """Make writes fail, as on a full disk, that would make a file larger than this many bytes; -1: no limit."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.usefixtures("size_limit")
def test_a_full_disk_stops_nothing_and_loses_no_line(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    began = time.monotonic()
    with MetricsWriter(epath.Path(tmp_path), resume_step=0) as writer:
        writer.write(1, {"loss": 1.0})
        limit_size((tmp_path / "metrics.jsonl").stat().st_size + 9)
        for step in range(2, 40):
            writer.write(step, {"loss": 1.0 / step})
        writer.flush()
        assert steps_of(tmp_path) == [1]
        limit_size(-1)
        writer.write(40, {"loss": 0.5})
    assert time.monotonic() - began < 30
    assert steps_of(tmp_path) == list(range(1, 41))
    events = events_of(tmp_path)
    assert (1, "loss", 1.0) in events and (40, "loss", 0.5) in events
    # A line when it begins and one when it ends, for each of the two.
    warnings = [record.getMessage() for record in caplog.records if "metrics" in record.getMessage()]
    assert len(warnings) == 4
    assert all("cannot be written to" in each and "training goes on" in each for each in warnings[:2])
    assert all(each.endswith("again") for each in warnings[2:])


@pytest.mark.usefixtures("size_limit")
def test_what_waits_for_a_disk_has_a_limit(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "MAX_WAITING", 3)
    with MetricsWriter(epath.Path(tmp_path), resume_step=0) as writer:
        limit_size(0)
        for step in range(1, 8):
            writer.write(step, {"loss": 1.0})
        limit_size(-1)
    assert steps_of(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize("name", ["metrics.jsonl", "tensorboard"])
def test_what_is_in_the_place_of_metrics_is_told(name: str, tmp_path: pathlib.Path) -> None:
    place = tmp_path / name
    place.mkdir() if name.endswith("jsonl") else place.touch()
    with pytest.raises(
        UserError, match=r"metrics.jsonl or tensorboard cannot be written \(.+\); remove"
    ) as caught:
        MetricsWriter(epath.Path(tmp_path), resume_step=0)
    assert caught.value.exit_code == 2


def test_a_full_disk_at_the_start_is_no_mistake(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics, "EventsWriter", full)
    with pytest.raises(metrics.MetricsError, match="No space left") as caught:
        MetricsWriter(epath.Path(tmp_path), resume_step=0)
    assert caught.value.exit_code == 75


def test_a_bucket_that_fails_stops_nothing(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("503")

    with MetricsWriter(epath.Path(tmp_path), resume_step=0) as writer, monkeypatch.context() as patch:
        patch.setattr(metrics.Mirror, "upload", fail)
        writer.write(1, {"loss": 1.0})
        writer.flush()
    assert steps_of(tmp_path) == [1]


@pytest.mark.parametrize("resumed", [0, 2, 3, 9])
def test_resuming_drops_later_lines_without_a_rewrite(tmp_path: pathlib.Path, resumed: int) -> None:
    """The file is cut in place, so that a kill at any time leaves the lines to keep."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 2, 3, 4)))
    inode = path.stat().st_ino
    with MetricsWriter(epath.Path(tmp_path), resume_step=resumed):
        pass
    assert steps_of(tmp_path) == [step for step in (1, 2, 2, 3, 4) if step <= resumed]
    assert path.stat().st_ino == inode


LINES = st.one_of(
    st.integers(0, 9).map(lambda step: json.dumps({"step": step}).encode()),
    st.sampled_from([
        b"", b"{", b"[1]", b"null", b"\xff\xfe", b'{"step": null}', b'{"step": "x"}', b'{"step": 1e999}', b'{"a": 1}',
        b'{"step": ' + b"9" * 400 + b"}", b"[" * 200_000, b'{"step": NaN}',
    ]),
)  # fmt: skip


@given(st.lists(LINES, max_size=8), st.booleans(), st.integers(0, 9))
def test_damaged_lines_are_dropped_and_all_others_kept(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], torn: bool, resumed: int
) -> None:
    folder = tmp_path_factory.mktemp("run")
    content = b"".join(line + b"\n" for line in lines)
    (folder / "metrics.jsonl").write_bytes(content[:-1] if torn else content)
    metrics._drop_later_lines(folder / "metrics.jsonl", resumed)
    whole = lines[:-1] if torn else lines
    expected = [line for line in whole if metrics._step_of(line) <= resumed]
    assert (folder / "metrics.jsonl").read_bytes() == b"".join(line + b"\n" for line in expected)


def test_later_events_hide_those_of_an_interrupted_run(tmp_path: pathlib.Path) -> None:
    for resumed in (0, 3):
        with MetricsWriter(epath.Path(tmp_path), resume_step=resumed) as writer:
            writer.write(resumed + 1, {"loss": 1.0, "text": {"loss": 2.0}, "bad": float("nan")})
    assert sorted(events_of(tmp_path)) == [
        (1, "loss", 1.0), (1, "text/loss", 2.0), (4, "loss", 1.0), (4, "text/loss", 2.0)
    ]  # fmt: skip
