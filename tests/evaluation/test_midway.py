"""An evaluation that is killed in the middle of long documents goes on there."""

import json
import logging
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fam_jax.config import Config, changed
from fam_jax.evaluation import HowToRun, evaluate_tasks, suite
from fam_jax.evaluation.midway import Midway
from fam_jax.evaluation.reading import Unread, read_documents
from fam_jax.generation.streaming import Streamer
from tests.evaluation.runs import save_run
from tests.evaluation.test_suite import without_times
from tests.generation.tiny import CONFIG, texts
from tests.model.tiny import params_of

HOW = HowToRun(lengths=(1024,), count=2, save_minutes=1e-9)
NAMES, STATES = "out.midway.json", "out.midway.safetensors"


class KilledError(Exception):
    """Stands for the end of the process."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, config: Config) -> pathlib.Path:
    own = changed(
        config,
        model={"vocab_size": 259, "block_size": 64},
        data={"task": "text", "vocabulary": "bytes", "train_files": ("x",), "sequence_length": 64},
        evaluate={"batch_size": 2, "chunk_blocks": 1},
    )
    return save_run(tmp_path_factory.mktemp("runs") / "run", own)


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "make_mesh", lambda _: None)


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Return a function that lets the model read so many times, then kills it, and returns the tokens of each call."""
    read = Streamer.read

    def after(calls: int) -> list[int]:
        tokens: list[int] = []

        def watched(self: Streamer, prompts: Any, *arguments: Any, **how: Any) -> Any:
            if len(tokens) == calls:
                raise KilledError
            tokens.append(sum(map(len, prompts)))
            return read(self, prompts, *arguments, **how)

        monkeypatch.setattr(Streamer, "read", watched)
        return tokens

    return after


def evaluated(run: pathlib.Path, out: pathlib.Path, **how: Any) -> dict[str, Any]:
    evaluate_tasks(run, ["needle"], how=HOW, out=out, **how)
    return without_times(out)


def test_documents_are_not_read_twice(
    run: pathlib.Path, tmp_path: pathlib.Path, killed: Callable[[int], list[int]]
) -> None:
    tokens = killed(10**6)
    expected = evaluated(run, tmp_path / "whole.json")
    whole = sum(tokens)
    assert not [*tmp_path.glob("*.midway.*")]
    out = tmp_path / "out.json"
    killed(9)
    with pytest.raises(KilledError):
        evaluated(run, out)
    told = json.loads((tmp_path / NAMES).read_text())
    assert sorted(told["documents"].values()) == [9, 9] and (tmp_path / STATES).stat().st_size > 0
    tokens = killed(10**6)
    assert evaluated(run, out) == expected
    assert whole - sum(tokens) == 2 * 9 * 64  # what the first call had read
    assert not [*tmp_path.glob("*.midway.*")]


@pytest.mark.parametrize("damage", ["states", "names", "other items", "fresh"])
def test_what_does_not_fit_is_read_again(
    damage: str,
    run: pathlib.Path,
    tmp_path: pathlib.Path,
    killed: Callable[[int], list[int]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    tokens = killed(10**6)
    expected = evaluated(run, tmp_path / "whole.json")
    whole, out = sum(tokens), tmp_path / "out.json"
    killed(5)
    with pytest.raises(KilledError):
        evaluated(run, out)
    names, states = tmp_path / NAMES, tmp_path / STATES
    if damage == "states":
        content = bytearray(states.read_bytes())
        content[-1] ^= 1
        states.write_bytes(content)
    elif damage == "names":
        names.write_bytes(names.read_bytes()[:-4])
    elif damage == "other items":
        names.write_text(names.read_text().replace("needle ", "needle  "))
    tokens = killed(10**6)
    with caplog.at_level(logging.WARNING):
        found = evaluated(run, out, **({"fresh": True} if damage == "fresh" else {}))
    assert found == expected and sum(tokens) == whole
    assert ("cannot be used" in caplog.text) == (damage == "names")


def test_only_long_documents_are_saved(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that have been read for longer than the interval, and those at most once in it."""
    clock = [0.0]
    monkeypatch.setattr("fam_jax.evaluation.midway.time.monotonic", lambda: clock[0])
    streamer = Streamer(CONFIG, params_of(CONFIG))
    midway, size = Midway(tmp_path / "out.json", "a", streamer, 1.0), CONFIG.block_size
    state = streamer.start(2)
    _, state = streamer.read([*texts(2 * size, 2 * size)], state)
    times = []
    for second, names in ((0, "ab"), (30, "ab"), (61, "cb"), (90, "cb"), (125, "cb")):
        clock[0] = second
        midway.offer({0: (names[0], 2), 1: (names[1], 2)}, state)
        found = tmp_path / NAMES
        times.append(sorted(json.loads(found.read_text())["documents"]) if found.exists() else [])
    assert times == [[], [], ["b"], ["b"], ["b", "c"]]
    begun = midway.begun()
    assert {key: count for key, (count, _) in begun.items()} == {"b": 2, "c": 2}
    assert Midway(tmp_path / "out.json", "other", streamer, 1.0).begun() == {}
    Midway(tmp_path / "out.json", "other", streamer, 1.0).clear()
    assert (tmp_path / NAMES).exists()
    midway.clear()
    assert not [*tmp_path.iterdir()]


def test_a_document_goes_on_from_any_block(tmp_path: pathlib.Path) -> None:
    """The state after it is bit for bit that of one reading, in whatever row it was."""
    streamer, size = Streamer(CONFIG, params_of(CONFIG)), CONFIG.block_size
    lengths = {"long": 9 * size + 1, "middle": 6 * size + 2, "other": 5 * size + 3, "short": 2}
    ids = dict(zip(lengths, texts(*lengths.values()), strict=True))
    unread = [Unread(key, (lambda key=key: ids[key]), len(ids[key])) for key in ids]

    def read(midway: Midway | None, stop: int = 99) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for number, each in enumerate(
            read_documents(streamer, unread, rows=2, chunk_blocks=1, midway=midway)
        ):
            found[each.key] = each
            if number == stop:
                break
        return found

    whole = read(None)
    read(
        Midway(tmp_path / "out.json", "a", streamer, 1e-9), stop=0
    )  # the middle one is complete, the long one is not
    midway = Midway(tmp_path / "out.json", "a", streamer, 1e-9)
    assert {key: count for key, (count, _) in midway.begun().items()} == {"long": 5, "middle": 5}
    again = read(midway)
    assert again.keys() == whole.keys()
    for key, each in whole.items():
        np.testing.assert_array_equal(again[key].rest, each.rest)
        if each.state is None:
            assert again[key].state is None
            continue
        for left, right in zip(
            *(map(np.asarray, _leaves(found.state)) for found in (each, again[key])), strict=True
        ):
            np.testing.assert_array_equal(left, right)


def _leaves(state: Any) -> list[Any]:
    import jax

    return jax.tree.leaves(state)
