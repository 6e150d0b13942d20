"""PassKey with keys within the filler, and with rows that go on and are asked again."""

import dataclasses
import re
from typing import Any

import numpy as np
import pytest

from fam_jax.config import Config, ConfigError, DataConfig, TrainConfig
from fam_jax.data.curriculum import MIN_REPORTS
from fam_jax.data.interface import Batch, BatchSpec
from fam_jax.data.passkey import make_template, passkey_examples
from fam_jax.data.passkey_curriculum import PasskeyCurriculum
from fam_jax.data.passkey_text import FILLER, QUESTION
from fam_jax.data.vocabulary import load_vocabulary

C, ROWS = 16, 4
ASKED = DataConfig(stage_blocks=(2, 5), longest_fraction=0.5, late_keys=0.5, questions=3)
KEY = re.compile(r"The pass key is (\d+)\. Remember it\. \1 is the pass key\.")
VOCABULARY = load_vocabulary("passkey")


def make(data: DataConfig = ASKED, **options: Any) -> PasskeyCurriculum:
    return PasskeyCurriculum(data, BatchSpec(**{"block_size": C, "batch_size": ROWS, "seed": 0, **options}))


def text(batch: Batch, row: int) -> str:
    """Return a row without padding: the inputs, and the last target that counts."""
    end = np.flatnonzero(batch["weights"][row])[-1]
    return VOCABULARY.decode([*batch["inputs"][row, : end + 1].tolist(), int(batch["targets"][row, end])])


def answer(batch: Batch, row: int) -> str:
    return VOCABULARY.decode(batch["targets"][row][batch["answer"][row]].tolist()).strip()


def batches(curriculum: PasskeyCurriculum, count: int) -> list[Batch]:
    """Return batches of a model that is always right."""
    found = []
    for _ in range(count):
        found.append(curriculum.next())
        curriculum.observe({"exact_match": 1.0})
    return found


@pytest.mark.parametrize("before", [0, 1, 3])
def test_an_example_with_filler_in_front_of_its_key(before: int) -> None:
    size = len(make_template(VOCABULARY).filler)  # whole cycles, so the text can be read
    plain = passkey_examples(DataConfig(), VOCABULARY, 2 * size, 8, seed=0)
    found = passkey_examples(DataConfig(), VOCABULARY, 2 * size, 8, seed=0, before_tokens=before * size)
    for (prompt, key), (other, same) in zip(found, plain, strict=True):
        np.testing.assert_array_equal(key, same)
        assert len(prompt) == len(other) + before * size
        words = " ".join([*[FILLER] * before, VOCABULARY.decode(other.tolist())])
        assert VOCABULARY.decode(prompt.tolist()) == words


def test_late_keys_stand_at_any_block_border() -> None:
    data = DataConfig(stage_blocks=(3,), min_filler_blocks=2, filler_step=C, late_keys=0.5)
    curriculum, places = make(data), []
    statement = len(make_template(VOCABULARY).late_statement)
    for batch in (curriculum.next() for _ in range(150)):
        for row in range(ROWS):
            found = KEY.search(text(batch, row))
            assert found is not None and found[1] == answer(batch, row)
            number = VOCABULARY.encode(f"is {found[1]}")[1:]
            ids = batch["inputs"][row].tolist()
            first = next(i for i in range(len(ids)) if ids[i : i + len(number)] == number)
            places.append(first - statement)
    assert set(places) == {0, C, 2 * C, 3 * C}
    shares = [np.mean(np.array(places) == place) for place in (0, C, 2 * C, 3 * C)]
    # Half of the keys come first; the others are spread over four places. 600 rows: standard deviation 0.02.
    np.testing.assert_allclose(shares, [0.625, 0.125, 0.125, 0.125], atol=0.07)


def test_without_late_keys_nothing_changes() -> None:
    """The draws of place and key are independent: late keys are the keys that would come first."""
    plain = DataConfig(stage_blocks=(3,), filler_step=C)
    late = dataclasses.replace(plain, late_keys=1.0)
    one, other = (make(data).next() for data in (plain, late))
    assert [answer(one, row) for row in range(ROWS)] == [answer(other, row) for row in range(ROWS)]
    assert "late_keys" not in make(plain).state()["stream"] and "late_keys" in make(late).state()["stream"]


def test_rows_go_on_and_are_asked_again() -> None:
    """On the last stage, a key is asked for in three batches in a row. The later two do not show it."""
    curriculum = make()
    found = batches(curriculum, MIN_REPORTS + 12)
    last = MIN_REPORTS  # the first batch that may go on is the one after this
    assert all(batch["start"].all() for batch in found[: last + 1])
    begun: list[dict[str, Any]] = [{} for _ in range(ROWS)]
    for number, batch in enumerate(found):
        for row in range(ROWS):
            content = text(batch, row)
            assert content.endswith(f"{QUESTION} {answer(batch, row)}")
            shown = KEY.search(content)
            assert batch["start"][row] == (shown is not None)
            if shown:
                begun[row] = {"number": number, "key": shown[1]}
            assert answer(batch, row) == begun[row]["key"]
            assert number - begun[row]["number"] < ASKED.questions
    ages = [number for number, batch in enumerate(found[last + 1 :]) if not batch["start"].all()]
    assert len(ages) > 8
    # Rows begin in turn.
    assert all(0 < batch["start"].sum() < ROWS for batch in found[last + 3 :])


def test_rows_go_on_once_keeping_over_one_row_has_been_trained() -> None:
    """After max_stage_steps batches of the last stage."""
    data = dataclasses.replace(ASKED, advance_accuracy=0, max_stage_steps=6, longest_fraction=1)
    found = batches(PasskeyCurriculum(data, BatchSpec(C, ROWS, 0)), 20)
    assert all(batch["start"].all() for batch in found[:13])
    assert not any(batch["start"].all() for batch in found[13:])


def test_no_answer_lies_in_a_complete_block() -> None:
    """The memory is written at block borders only, so it never reads an answer, whatever the row goes on with."""
    for batch in batches(make(), MIN_REPORTS + 4):
        length = batch["inputs"].shape[1]
        assert length % C
        assert np.flatnonzero(batch["answer"].any(axis=0))[0] >= length - length % C


def fits(size: int) -> bool:
    """Return whether the inputs of an answer, all its tokens but the last, lie in the last block of a row."""
    template = make_template(VOCABULARY)
    parts = (template.late_statement, template.remember, template.repeated, template.question)
    # A space and five digits, three times.
    inputs = sum(map(len, parts)) + 3 * 6 - 1
    return inputs % size >= 6


def test_a_block_size_that_shows_answers_to_the_memory_is_refused() -> None:
    for size in range(8, 40):
        rows = make(block_size=size).stage_tokens if fits(size) else ()
        if not rows:
            with pytest.raises(ConfigError, match="puts part of an answer into a complete block"):
                make(block_size=size)
    assert {fits(size) for size in range(8, 40)} == {True, False}


def test_they_resume_and_shard() -> None:
    whole, resumed = make(), make()
    batches(whole, 15)
    resumed.restore(whole.state())
    shards = [make(shard=(i, 2)) for i in range(2)]
    for shard in shards:
        shard.restore(whole.state())
    for _ in range(4):
        expected = whole.next()
        parts = [shard.next() for shard in shards]
        for found in (resumed.next(), {k: np.concatenate([part[k] for part in parts]) for k in expected}):
            for name in expected:
                np.testing.assert_array_equal(found[name], expected[name])


def test_configs_that_contradict_themselves_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"config.data.questions: 3 .* set train.carry to memory"):
        Config(data=ASKED)
    assert Config(data=ASKED, train=TrainConfig(carry="memory")).data.questions == 3
    with pytest.raises(ConfigError, match="needs rows that go on"):
        Config(data=dataclasses.replace(ASKED, questions=1), train=TrainConfig(carry="memory"))
