import dataclasses
import hashlib
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fam_jax.config import DataConfig, UserError
from fam_jax.data.curriculum import MIN_REPORTS, Batch, PasskeyStream
from fam_jax.data.passkey import make_template, passkey_examples
from fam_jax.data.vocabulary import load_vocabulary

C = 16
SMALL = DataConfig(stage_blocks=(2, 3, 5), longest_fraction=0.5)


def make(data: DataConfig = SMALL, **options: Any) -> PasskeyStream:
    return PasskeyStream(data, **{"block_size": C, "batch_size": 4, "seed": 0, **options})


@pytest.fixture
def no_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches are empty: for what does not depend on them."""
    monkeypatch.setattr(PasskeyStream, "_stage_batches", lambda self, stage: itertools.repeat({}))


def assert_equal(one: Batch, other: Batch) -> None:
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def step(stream: PasskeyStream) -> Batch:
    """One step of a loop whose model answers everything right: stages advance as soon as they may."""
    batch = stream.next_batch()
    stream.report(1.0)
    return batch


def test_batches_follow_the_convention(vocabulary_name: str) -> None:
    stream = make(DataConfig(vocabulary=vocabulary_name, stage_blocks=(2, 3), prompt_weight=0.25))
    vocabulary = load_vocabulary(vocabulary_name)
    batch = stream.next_batch()
    shape = (4, stream.stage_tokens[0])
    types = {"inputs": np.int32, "targets": np.int32, "weights": np.float32, "answer": np.bool_}
    assert {name: array.dtype for name, array in batch.items()} == types
    assert all(array.shape == shape for array in batch.values())
    for inputs, targets, weights, answer in zip(*(batch[name] for name in types), strict=True):
        length = np.flatnonzero(targets)[-1] + 1
        np.testing.assert_array_equal(inputs[1:length], targets[: length - 1])
        assert not inputs[length:].any() and not targets[length:].any()
        first = np.flatnonzero(answer)[0]
        np.testing.assert_array_equal(answer, (np.arange(shape[1]) >= first) & (np.arange(shape[1]) < length))
        expected = np.where(answer, 1.0, 0.25) * (np.arange(shape[1]) < length)
        np.testing.assert_array_equal(weights, expected.astype(np.float32))
        # The model sees the prompt and nothing more when it has to give the first answer token.
        seen = vocabulary.decode(inputs[: first + 1].tolist())
        assert seen.endswith("What is the pass key? The pass key is")
        key = vocabulary.decode(targets[answer].tolist()).strip()
        assert f"The pass key is {key}. Remember it." in seen and seen.count(key) == 2


@pytest.mark.parametrize("name", ["passkey", "bytes"])
@pytest.mark.parametrize("block_size", [1, 64])
def test_stage_tokens_are_the_fewest_blocks(name: str, block_size: int) -> None:
    data = DataConfig(vocabulary=name, stage_blocks=(2, 7))
    stream = make(data, block_size=block_size)
    for blocks, tokens in zip(data.stage_blocks, stream.stage_tokens, strict=True):
        [(prompt, answer)] = passkey_examples(data, stream.vocabulary, blocks * block_size, 1, seed=0)
        longest = len(prompt) + len(answer) - 1
        assert tokens % block_size == 0 and tokens - block_size < longest <= tokens


def test_longest_example_bounds_keys_of_any_tokenization(vocabulary_name: str) -> None:
    vocabulary = load_vocabulary(vocabulary_name)
    bound = make_template(vocabulary).longest_example(20, digits=3)
    examples = passkey_examples(DataConfig(digits=3), vocabulary, 20, 300, seed=0)
    longest = max(len(prompt) + len(answer) for prompt, answer in examples)
    assert longest <= bound
    if vocabulary_name in ("passkey", "bytes"):
        assert longest == bound


def test_fillers_lie_within_their_stage() -> None:
    stream = make(
        DataConfig(stage_blocks=(1, 2, 4), min_filler_blocks=0, max_stage_steps=40, longest_fraction=1.0)
    )
    overhead = make_template(stream.vocabulary).longest_example(0, SMALL.digits) - 1
    for low, high in ((0, 1), (1, 2), (2, 4)):
        batches = [stream.next_batch() for _ in range(40)]
        fillers = [int(n) - overhead for batch in batches for n in (batch["weights"] > 0).sum(axis=1)]
        assert low * C < min(fillers) <= low * C + C // 4
        assert high * C - C // 4 <= max(fillers) <= high * C


def test_fillers_are_multiples_of_the_step() -> None:
    stream = make(DataConfig(stage_blocks=(4,), min_filler_blocks=1, filler_step=C // 2))
    overhead = make_template(stream.vocabulary).longest_example(0, SMALL.digits) - 1
    batches = [stream.next_batch() for _ in range(20)]
    fillers = {int(n) - overhead for batch in batches for n in (batch["weights"] > 0).sum(axis=1)}
    assert fillers == {halves * C // 2 for halves in range(3, 9)}


@dataclasses.dataclass
class Recorded:
    state: dict[str, Any]  # before the step
    batch: Batch
    batch_stage: int
    stage: int  # after its report


@pytest.fixture(scope="module")
def uninterrupted() -> list[Recorded]:
    """Steps of a stream that never stopped, through all three stages."""
    stream = make()
    steps = []
    for _ in range(50):
        state = json.loads(json.dumps(stream.state()))
        steps.append(Recorded(state, step(stream), stream.batch_stage, stream.stage))
    return steps


def assert_continues(stream: PasskeyStream, uninterrupted: list[Recorded], start: int) -> None:
    stream.restore(uninterrupted[start].state)
    for recorded in uninterrupted[start : start + 4]:
        assert stream.state() == recorded.state
        assert_equal(step(stream), recorded.batch)
        assert (stream.batch_stage, stream.stage) == (recorded.batch_stage, recorded.stage)


@pytest.mark.parametrize("start", [0, 1, 8, 9, 10, 21, 30, 46])
def test_resume_continues_with_the_same_batches(uninterrupted: list[Recorded], start: int) -> None:
    """Also over the changes of stage, the first of which comes with step MIN_REPORTS."""
    assert_continues(make(), uninterrupted, start)


def test_a_running_stream_goes_back(uninterrupted: list[Recorded]) -> None:
    stream = make()
    for start in (40, 3, 12):
        assert_continues(stream, uninterrupted, start)


def test_the_resume_tests_cross_all_stages(uninterrupted: list[Recorded]) -> None:
    stages = [recorded.stage for recorded in uninterrupted]
    assert stages[MIN_REPORTS - 2 : MIN_REPORTS] == [0, 1]
    assert stages[45] == 2


def joined(parts: list[Batch]) -> Batch:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def test_shards_make_up_the_global_batch(uninterrupted: list[Recorded]) -> None:
    shards = [make(shard=(index, 4)) for index in range(4)]
    for recorded in uninterrupted[:15]:
        assert all(shard.state() == recorded.state for shard in shards)
        assert_equal(joined([step(shard) for shard in shards]), recorded.batch)


def test_a_state_restores_with_another_number_of_processes(uninterrupted: list[Recorded]) -> None:
    shards = [make(shard=(index, 2)) for index in range(2)]
    for shard in shards:
        shard.restore(uninterrupted[17].state)
    for recorded in uninterrupted[17:20]:
        assert_equal(joined([step(shard) for shard in shards]), recorded.batch)


def test_no_example_comes_twice() -> None:
    stream = make(DataConfig(stage_blocks=(2, 3), digits=9, max_stage_steps=20, longest_fraction=0.5))
    rows = [row.tobytes() for _ in range(60) for row in stream.next_batch()["inputs"]]
    assert len(set(rows)) == 240


def test_seeds_give_other_batches() -> None:
    assert (make(seed=0).next_batch()["inputs"] != make(seed=1).next_batch()["inputs"]).any()


@pytest.mark.usefixtures("no_examples")
@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_how_often_stages_are_drawn(fraction: float) -> None:
    stream = make(
        DataConfig(stage_blocks=(2, 3, 4), max_stage_steps=1, longest_fraction=fraction), batch_size=1
    )
    drawn = []
    for _ in range(602):
        stream.next_batch()
        drawn.append(stream.batch_stage)
    assert drawn[0] == 0
    counts = np.bincount(drawn[2:], minlength=3)  # from step 2 on the last stage is current
    expected = 600 * np.array([(1 - fraction) / 2, (1 - fraction) / 2, fraction])
    assert np.all(abs(counts - expected) <= 5 * np.sqrt(expected * (1 - expected / 600)))


@pytest.mark.usefixtures("no_examples")
def test_stage_choice_depends_on_seed_and_step_only() -> None:
    def drawn(seed: int, first_stage_steps: int, reported: float) -> list[int]:
        stream = make(DataConfig(stage_blocks=(2, 3), max_stage_steps=first_stage_steps), seed=seed)
        stages = []
        for _ in range(40):
            stream.next_batch()
            stream.report(reported)
            stages.append(stream.batch_stage)
        return stages[9:]  # the second stage has begun

    assert drawn(0, 1, 0.0) == drawn(0, 9, 0.5) != drawn(1, 1, 0.0)


def run_reports(exact_match: Callable[[int], float], steps: int, **fields: Any) -> list[int]:
    """The stage after each step of a stream that draws from the current stage only."""
    stream = make(DataConfig(stage_blocks=(2, 3), longest_fraction=1.0, **fields), batch_size=1)
    stages = []
    for i in range(steps):
        stream.next_batch()
        stream.report(exact_match(i))
        stages.append(stream.stage)
    return stages


@pytest.mark.usefixtures("no_examples")
def test_a_stage_ends_at_its_accuracy_and_not_before_enough_reports() -> None:
    assert run_reports(lambda i: 1.0, 12) == [0] * (MIN_REPORTS - 1) + [1] * (13 - MIN_REPORTS)
    assert run_reports(lambda i: 1.0, 12, advance_accuracy=1.0)[-1] == 1
    assert set(run_reports(lambda i: 0.75, 40)) == {0}
    assert run_reports(lambda i: 0.75, 40, advance_accuracy=0.75)[-1] == 1


@pytest.mark.usefixtures("no_examples")
def test_the_running_accuracy_forgets() -> None:
    """A bad beginning does not hold a stage for ever; one good batch does not end it."""
    stages = run_reports(lambda i: float(i >= 30), 60)
    assert 35 < stages.index(1) < 50
    assert set(run_reports(lambda i: float(i % 10 == 9), 60)) == {0}


@pytest.mark.usefixtures("no_examples")
def test_the_last_stage_stays_and_accuracy_starts_anew() -> None:
    stream = make(DataConfig(stage_blocks=(2, 3), longest_fraction=1.0))
    for _ in range(MIN_REPORTS):
        step(stream)
    assert (stream.stage, stream.stage_blocks, stream.accuracy) == (1, 3, 0.0)
    for _ in range(30):
        step(stream)
    assert (stream.stage, stream.accuracy) == (1, 1.0)


@pytest.mark.usefixtures("no_examples")
def test_reports_on_earlier_stages_do_not_count() -> None:
    stream = make(DataConfig(stage_blocks=(2, 3, 4), max_stage_steps=1, longest_fraction=0.0))
    stream.next_batch()
    stream.next_batch()
    assert (stream.batch_stage, stream.stage) == (0, 1)
    before = stream.state()
    stream.report(1.0)
    assert stream.state() == before
    stream.report(0.5, batch_stage=1)
    assert stream.accuracy == 0.5


@pytest.mark.usefixtures("no_examples")
def test_a_stage_ends_after_its_most_steps() -> None:
    stream = make(DataConfig(stage_blocks=(2, 3, 4), max_stage_steps=5, longest_fraction=1.0))
    drawn = []
    for _ in range(20):
        stream.next_batch()
        stream.report(0.0)
        drawn.append(stream.batch_stage)
    assert drawn == [0] * 5 + [1] * 5 + [2] * 10


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_report_refuses_what_is_no_fraction(value: float) -> None:
    with pytest.raises(ValueError, match="exact_match"):
        make().report(value)


def test_restore_refuses_a_state_of_other_examples() -> None:
    state = make().state()
    with pytest.raises(UserError, match="seed was 0 when it was saved and is 5 now"):
        make(seed=5).restore(state)
    with pytest.raises(UserError, match="stage_blocks"):
        make(DataConfig(stage_blocks=(2, 3))).restore(state)
    with pytest.raises(UserError, match="another version"):
        make().restore({name: value for name, value in state.items() if name != "stage"})


def test_processes_must_divide_the_batch() -> None:
    with pytest.raises(UserError, match="batch_size 4 is not divisible by the 3 processes"):
        make(shard=(0, 3))


def test_another_process_makes_the_same_batch_and_importing_is_silent() -> None:
    code = (
        "import sys, hashlib\n"
        "import fam_jax.data.train_vocabulary\n"
        "assert 'tensorflow' not in sys.modules\n"
        "from fam_jax.config import DataConfig\n"
        "from fam_jax.data.curriculum import PasskeyStream\n"
        "stream = PasskeyStream(DataConfig(), block_size=16, batch_size=4, seed=0)\n"
        "print(hashlib.sha256(stream.next_batch()['inputs'].tobytes()).hexdigest())\n"
    )
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert other.stderr == ""
    here = make(DataConfig()).next_batch()["inputs"]
    assert other.stdout.strip() == hashlib.sha256(here.tobytes()).hexdigest()
