"""The PassKey curriculum: its batches, when stages begin, and that it resumes exactly."""

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
from fam_jax.data.curriculum import MIN_REPORTS
from fam_jax.data.interface import Batch, BatchSpec
from fam_jax.data.passkey import make_template, passkey_examples
from fam_jax.data.passkey_curriculum import PasskeyCurriculum
from fam_jax.data.vocabulary import load_vocabulary

C = 16
SMALL = DataConfig(stage_blocks=(2, 3, 5), longest_fraction=0.5)


def make(data: DataConfig = SMALL, **options: Any) -> PasskeyCurriculum:
    return PasskeyCurriculum(data, BatchSpec(**{"block_size": C, "batch_size": 4, "seed": 0, **options}))


@pytest.fixture
def no_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make batches empty, for tests of the stages alone."""
    monkeypatch.setattr(PasskeyCurriculum, "_stage_batches", lambda self, stage: itertools.repeat({}))


def assert_equal(one: Batch, other: Batch) -> None:
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def step(curriculum: PasskeyCurriculum) -> Batch:
    """Take one step of a loop whose model is always right, so that stages end as soon as they may."""
    batch = curriculum.next()
    curriculum.observe({"exact_match": 1.0})
    return batch


def test_contents_of_a_batch(vocabulary_name: str) -> None:
    curriculum = make(DataConfig(vocabulary=vocabulary_name, stage_blocks=(2, 3), prompt_weight=0.25))
    vocabulary = load_vocabulary(vocabulary_name)
    batch = curriculum.next()
    shape = (4, curriculum.stage_tokens[0])
    start = batch.pop("start")
    assert start.dtype == np.bool_ and start.tolist() == [True] * 4
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
        # To predict the first answer token, the model sees the prompt and nothing more.
        seen = vocabulary.decode(inputs[: first + 1].tolist())
        assert seen.endswith("What is the pass key? The pass key is")
        key = vocabulary.decode(targets[answer].tolist()).strip()
        assert f"The pass key is {key}. Remember it." in seen and seen.count(key) == 2


@pytest.mark.parametrize("name", ["passkey", "bytes"])
@pytest.mark.parametrize("block_size", [1, 64])
def test_stage_tokens_are_the_fewest_blocks(name: str, block_size: int) -> None:
    data = DataConfig(vocabulary=name, stage_blocks=(2, 7))
    curriculum = make(data, block_size=block_size)
    for blocks, tokens in zip(data.stage_blocks, curriculum.stage_tokens, strict=True):
        [(prompt, answer)] = passkey_examples(data, curriculum.vocabulary, blocks * block_size, 1, seed=0)
        longest = len(prompt) + len(answer) - 1
        assert tokens % block_size == 0 and tokens - block_size < longest <= tokens


def test_longest_example_is_an_upper_bound_for_any_tokenization(vocabulary_name: str) -> None:
    vocabulary = load_vocabulary(vocabulary_name)
    bound = make_template(vocabulary).longest_example(20, digits=3)
    examples = passkey_examples(DataConfig(digits=3), vocabulary, 20, 300, seed=0)
    longest = max(len(prompt) + len(answer) for prompt, answer in examples)
    assert longest <= bound
    if vocabulary_name in ("passkey", "bytes"):
        assert longest == bound


def test_fillers_lie_within_their_stage() -> None:
    curriculum = make(
        DataConfig(stage_blocks=(1, 2, 4), min_filler_blocks=0, max_stage_steps=40, longest_fraction=1.0)
    )
    overhead = make_template(curriculum.vocabulary).longest_example(0, SMALL.digits) - 1
    for low, high in ((0, 1), (1, 2), (2, 4)):
        batches = [curriculum.next() for _ in range(40)]
        fillers = [int(n) - overhead for batch in batches for n in (batch["weights"] > 0).sum(axis=1)]
        assert low * C < min(fillers) <= low * C + C // 4
        assert high * C - C // 4 <= max(fillers) <= high * C


def test_fillers_are_multiples_of_the_step() -> None:
    curriculum = make(DataConfig(stage_blocks=(4,), min_filler_blocks=1, filler_step=C // 2))
    overhead = make_template(curriculum.vocabulary).longest_example(0, SMALL.digits) - 1
    batches = [curriculum.next() for _ in range(20)]
    fillers = {int(n) - overhead for batch in batches for n in (batch["weights"] > 0).sum(axis=1)}
    assert fillers == {halves * C // 2 for halves in range(3, 9)}


@dataclasses.dataclass
class Recorded:
    # Before the step.
    state: dict[str, Any]
    batch: Batch
    batch_stage: int
    # After its metrics were observed.
    stage: int


@pytest.fixture(scope="module")
def uninterrupted() -> list[Recorded]:
    """Record the steps of a run without interruption, through all three stages."""
    curriculum = make()
    steps = []
    for _ in range(50):
        state = json.loads(json.dumps(curriculum.state()))
        steps.append(Recorded(state, step(curriculum), curriculum.batch_stage, curriculum.stage))
    return steps


def assert_continues(curriculum: PasskeyCurriculum, uninterrupted: list[Recorded], start: int) -> None:
    curriculum.restore(uninterrupted[start].state)
    for recorded in uninterrupted[start : start + 4]:
        assert curriculum.state() == recorded.state
        assert_equal(step(curriculum), recorded.batch)
        assert (curriculum.batch_stage, curriculum.stage) == (recorded.batch_stage, recorded.stage)


@pytest.mark.parametrize("start", [0, 1, 8, 9, 10, 21, 30, 46])
def test_resume_continues_with_the_same_batches(uninterrupted: list[Recorded], start: int) -> None:
    """Also across the ends of stages; the first stage ends at step MIN_REPORTS."""
    assert_continues(make(), uninterrupted, start)


def test_restoring_can_go_back(uninterrupted: list[Recorded]) -> None:
    curriculum = make()
    for start in (40, 3, 12):
        assert_continues(curriculum, uninterrupted, start)


def test_the_recorded_steps_cover_all_stages(uninterrupted: list[Recorded]) -> None:
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


def test_no_example_is_repeated() -> None:
    curriculum = make(DataConfig(stage_blocks=(2, 3), digits=9, max_stage_steps=20, longest_fraction=0.5))
    rows = [row.tobytes() for _ in range(60) for row in curriculum.next()["inputs"]]
    assert len(set(rows)) == 240


def test_the_seed_changes_the_batches() -> None:
    assert (make(seed=0).next()["inputs"] != make(seed=1).next()["inputs"]).any()


@pytest.mark.usefixtures("no_examples")
@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_how_often_stages_are_drawn(fraction: float) -> None:
    curriculum = make(
        DataConfig(stage_blocks=(2, 3, 4), max_stage_steps=1, longest_fraction=fraction), batch_size=1
    )
    drawn = []
    for _ in range(602):
        curriculum.next()
        drawn.append(curriculum.batch_stage)
    assert drawn[0] == 0
    # From step 2 on, the last stage is the current one.
    counts = np.bincount(drawn[2:], minlength=3)
    expected = 600 * np.array([(1 - fraction) / 2, (1 - fraction) / 2, fraction])
    assert np.all(abs(counts - expected) <= 5 * np.sqrt(expected * (1 - expected / 600)))


@pytest.mark.usefixtures("no_examples")
def test_stage_choice_depends_on_seed_and_step_only() -> None:
    def drawn(seed: int, first_stage_steps: int, exact_match: float) -> list[int]:
        curriculum = make(DataConfig(stage_blocks=(2, 3), max_stage_steps=first_stage_steps), seed=seed)
        stages = []
        for _ in range(40):
            curriculum.next()
            curriculum.observe({"exact_match": exact_match})
            stages.append(curriculum.batch_stage)
        # The second stage has begun by then.
        return stages[9:]

    assert drawn(0, 1, 0.0) == drawn(0, 9, 0.5) != drawn(1, 1, 0.0)


def stages_of(exact_match: Callable[[int], float], steps: int, **fields: Any) -> list[int]:
    """Return the stage after each step, if all batches come from the current stage."""
    curriculum = make(DataConfig(stage_blocks=(2, 3), longest_fraction=1.0, **fields), batch_size=1)
    stages = []
    for i in range(steps):
        curriculum.next()
        curriculum.observe({"exact_match": exact_match(i)})
        stages.append(curriculum.stage)
    return stages


@pytest.mark.usefixtures("no_examples")
def test_a_stage_ends_at_its_accuracy_after_enough_batches() -> None:
    assert stages_of(lambda i: 1.0, 12) == [0] * (MIN_REPORTS - 1) + [1] * (13 - MIN_REPORTS)
    assert stages_of(lambda i: 1.0, 12, advance_accuracy=1.0)[-1] == 1
    assert set(stages_of(lambda i: 0.75, 40)) == {0}
    assert stages_of(lambda i: 0.75, 40, advance_accuracy=0.75)[-1] == 1


@pytest.mark.usefixtures("no_examples")
def test_the_running_accuracy_forgets() -> None:
    """Early failures do not delay a stage forever, and single good batches do not end it."""
    stages = stages_of(lambda i: float(i >= 30), 60)
    assert 35 < stages.index(1) < 50
    assert set(stages_of(lambda i: float(i % 10 == 9), 60)) == {0}


@pytest.mark.usefixtures("no_examples")
def test_the_last_stage_does_not_end_and_needs_no_metrics() -> None:
    curriculum = make(DataConfig(stage_blocks=(2, 3), longest_fraction=1.0))
    for _ in range(MIN_REPORTS):
        step(curriculum)
    assert (curriculum.stage, curriculum.stage_blocks, curriculum.accuracy) == (1, 3, 0.0)
    for _ in range(30):
        step(curriculum)
        assert not curriculum.needs_metrics
    assert (curriculum.stage, curriculum.state()["reports"]) == (1, 0)


@pytest.mark.usefixtures("no_examples")
def test_the_accuracy_starts_again_with_each_stage() -> None:
    curriculum = make(DataConfig(stage_blocks=(2, 3, 4), longest_fraction=1.0))
    for _ in range(MIN_REPORTS - 1):
        step(curriculum)
    assert (curriculum.stage, curriculum.accuracy) == (0, 1.0)
    step(curriculum)
    assert (curriculum.stage, curriculum.accuracy) == (1, 0.0)
    step(curriculum)
    assert (curriculum.stage, curriculum.accuracy) == (1, 1.0)


@pytest.mark.usefixtures("no_examples")
def test_batches_of_earlier_stages_do_not_count() -> None:
    curriculum = make(DataConfig(stage_blocks=(2, 3, 4), max_stage_steps=1, longest_fraction=0.0))
    curriculum.next()
    curriculum.next()
    assert (curriculum.batch_stage, curriculum.stage) == (0, 1)
    assert not curriculum.needs_metrics
    before = curriculum.state()
    curriculum.observe({"exact_match": 1.0})
    assert curriculum.state() == before


@pytest.mark.usefixtures("no_examples")
def test_batches_of_the_current_stage_count() -> None:
    curriculum = make(DataConfig(stage_blocks=(2, 3), longest_fraction=1.0))
    curriculum.next()
    assert curriculum.needs_metrics
    curriculum.observe({"exact_match": 0.5})
    assert curriculum.accuracy == 0.5


@pytest.mark.usefixtures("no_examples")
def test_a_stage_ends_after_max_stage_steps() -> None:
    curriculum = make(DataConfig(stage_blocks=(2, 3, 4), max_stage_steps=5, longest_fraction=1.0))
    drawn = []
    for _ in range(20):
        curriculum.next()
        curriculum.observe({"exact_match": 0.0})
        drawn.append(curriculum.batch_stage)
    assert drawn == [0] * 5 + [1] * 5 + [2] * 10


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_an_exact_match_out_of_range_is_rejected(value: float) -> None:
    with pytest.raises(ValueError, match="exact_match"):
        make().observe({"exact_match": value})


def test_a_state_of_other_examples_is_rejected() -> None:
    state = make().state()
    with pytest.raises(UserError, match="seed was 0 when it was saved and is 5 now"):
        make(seed=5).restore(state)
    with pytest.raises(UserError, match="stage_blocks"):
        make(DataConfig(stage_blocks=(2, 3))).restore(state)
    with pytest.raises(UserError, match="of another task or version"):
        make().restore({name: value for name, value in state.items() if name != "stage"})


def test_processes_must_divide_the_batch() -> None:
    with pytest.raises(UserError, match="batch_size: 4 is not divisible by the 3 processes"):
        make(shard=(0, 3))


@pytest.mark.slow
def test_another_process_makes_the_same_batch_without_any_output() -> None:
    code = (
        "import sys, hashlib\n"
        "import fam_jax.data.passkey_vocabulary\n"
        "assert 'tensorflow' not in sys.modules\n"
        "from fam_jax.config import DataConfig\n"
        "from fam_jax.data.passkey_curriculum import PasskeyCurriculum\n"
        "from fam_jax.data.interface import BatchSpec\n"
        "curriculum = PasskeyCurriculum(DataConfig(), BatchSpec(16, 4, 0))\n"
        "print(hashlib.sha256(curriculum.next()['inputs'].tobytes()).hexdigest())\n"
    )
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert other.stderr == ""
    here = make(DataConfig()).next()["inputs"]
    assert other.stdout.strip() == hashlib.sha256(here.tobytes()).hexdigest()
