"""Algorithmic tasks: what their texts ask for, their batches, and that a curriculum of them resumes exactly."""

import collections
import json
import re
from typing import Any

import numpy as np
import pytest

from configs.algorithmic import get_config
from fam_jax.config import Config, ConfigError, DataConfig, EvaluateConfig, ModelConfig, UserError, resolve
from fam_jax.config.data import ALGORITHMS
from fam_jax.data.algorithmic import (
    LETTERS,
    TASKS,
    AlgorithmicCurriculum,
    algorithmic_examples,
    algorithmic_stage_tokens,
)
from fam_jax.data.build import find_task, make_batches
from fam_jax.data.interface import BatchSpec
from fam_jax.data.vocabulary import load_vocabulary
from fam_jax.evaluation.task import Setting
from fam_jax.evaluation.tasks import algorithmic_questions, default_task

C = 12
VOCABULARY = load_vocabulary("bytes")


def data_of(name: str, **fields: Any) -> DataConfig:
    known = {
        "task": f"algorithmic:{name}",
        "vocabulary": "bytes",
        "min_filler_blocks": 0,
        "stage_blocks": (1, 2, 4),
    }
    return DataConfig(**{**known, "key_letters": 2, "value_letters": 2, **fields})


def make(name: str, shard: tuple[int, int] = (0, 1), **fields: Any) -> AlgorithmicCurriculum:
    return AlgorithmicCurriculum(data_of(name, **fields), BatchSpec(C, 4, 0, shard))


def texts(name: str, blocks: int, count: int = 40, **fields: Any) -> list[tuple[str, str]]:
    found = algorithmic_examples(data_of(name, **fields), C, blocks, count, 7)
    return [
        (VOCABULARY.decode(prompt.tolist()), VOCABULARY.decode(answer.tolist())) for prompt, answer in found
    ]


@pytest.mark.parametrize("name", ["remember", "rewrite"])
def test_the_answer_is_the_last_value_of_the_key_that_is_asked_for(name: str) -> None:
    asked_at: collections.Counter[int] = collections.Counter()
    written = set()
    for prompt, answer in texts(name, 4):
        pairs, query = re.findall(r"([a-p]{2})=([a-p]{2});", prompt), prompt[-3:]
        assert "".join(f"{key}={value};" for key, value in pairs) + query == prompt
        assert len(pairs) == 4 * C // 6 and query[2] == "?"
        assert answer == dict(pairs)[query[:2]] + ";"
        asked_at[[key for key, _ in pairs].index(query[:2])] += 1
        written.add(len({key for key, _ in pairs}))
    assert len(asked_at) > 4  # any of the 8 keys is asked for
    assert written == {8} if name == "remember" else min(written) < 8


def test_rewritten_keys_are_equally_likely_to_be_asked_for() -> None:
    # One letter: 16 keys. Of a key that was written often and one that was written once, each is asked for in turn.
    counts: collections.Counter[int] = collections.Counter()
    for prompt, _ in texts("rewrite", 4, 300, key_letters=1, value_letters=1):
        keys = re.findall(r"([a-p])=", prompt)
        counts[keys.count(prompt[-2])] += 1
        assert len(keys) == 12
    assert counts[1] > counts[2] > counts[3] > 0


def test_lists_come_back_twice_or_backwards() -> None:
    for prompt, answer in texts("copy", 2):
        assert re.fullmatch(r"[a-h]{24}=", prompt) and answer == prompt[:-1] * 2
    for prompt, answer in texts("reverse", 2):
        assert re.fullmatch(r"[a-h]{24}=", prompt) and answer == prompt[-2::-1]


def test_keys_are_spelled_with_the_least_significant_letter_first() -> None:
    keys = {prompt[:2] for prompt, _ in texts("remember", 4, 400)}
    assert {key[0] for key in keys} == {key[1] for key in keys} == {*LETTERS}


def test_the_config_and_the_tasks_have_the_same_names() -> None:
    assert tuple(TASKS) == ALGORITHMS


@pytest.mark.parametrize("name", ALGORITHMS)
def test_contents_of_a_batch(name: str) -> None:
    curriculum = make(name, prompt_weight=0.25, advance_accuracy=0, max_stage_steps=2, longest_fraction=1)
    lengths = {"remember": (1, 2), "rewrite": (1, 2), "copy": (3,), "reverse": (2,)}[name]
    assert curriculum.stage_tokens == tuple(
        C * (blocks * lengths[0] + (1 if len(lengths) > 1 else 0)) for blocks in (1, 2, 4)
    )
    assert curriculum.longest_row == find_task(curriculum.data).longest_row(C)
    seen = set()
    for step in range(12):
        batch = curriculum.next()
        assert curriculum.stage == min(step // 2, 2)
        assert batch["start"].all() and batch["inputs"].shape == (
            4,
            curriculum.stage_tokens[curriculum.stage],
        )
        for inputs, targets, weights, answer in zip(
            *(batch[key] for key in ("inputs", "targets", "weights", "answer")), strict=True
        ):
            end = np.flatnonzero(weights)[-1] + 1
            np.testing.assert_array_equal(inputs[1:end], targets[: end - 1])
            assert set(weights[:end]) <= {0.25, 1.0} and not weights[end:].any() and not targets[end:].any()
            np.testing.assert_array_equal(weights == 1, answer)
            prompt = VOCABULARY.decode(inputs[: end - answer.sum() + 1].tolist())
            text = VOCABULARY.decode(targets[answer].tolist())
            pairs = dict(re.findall(r"([a-p]{2})=([a-p]{2});", prompt))
            expected = {
                "remember": lambda pairs=pairs, prompt=prompt: pairs[prompt[-3:-1]] + ";",
                "rewrite": lambda pairs=pairs, prompt=prompt: pairs[prompt[-3:-1]] + ";",
                "copy": lambda prompt=prompt: prompt[:-1] * 2,
                "reverse": lambda prompt=prompt: prompt[-2::-1],
            }[name]
            assert text == expected()
            seen.add((curriculum.stage, len(prompt) // C))
    # Lengths of the last stage are 3 and 4 blocks.
    assert seen == {(0, 1), (1, 2), (2, 3), (2, 4)}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_curriculum_resumes_and_is_the_same_on_any_number_of_processes(name: str) -> None:
    fields = {"longest_fraction": 0.5, "max_stage_steps": 3}
    whole, parts = make(name, **fields), [make(name, (index, 2), **fields) for index in range(2)]
    other = make(name, **fields)
    for step in range(9):
        batch, halves = whole.next(), [part.next() for part in parts]
        resumed = other.next()
        for key, rows in batch.items():
            np.testing.assert_array_equal(rows, np.concatenate([half[key] for half in halves]))
            np.testing.assert_array_equal(rows, resumed[key])
        for curriculum in (whole, *parts, other):
            curriculum.observe({"exact_match": 0.5})
        if step % 2:
            state = json.loads(json.dumps(whole.state()))
            other = make(name, **fields)
            other.restore(state)
    with pytest.raises(UserError, match="data state: stage_blocks was"):
        make(name, stage_blocks=(1, 2)).restore(whole.state())


def test_only_steps_end_a_stage_if_the_accuracy_is_0() -> None:
    curriculum = make("copy", advance_accuracy=0, max_stage_steps=30)
    for step in range(60):
        curriculum.next()
        assert curriculum.stage == step // 30 and not curriculum.needs_metrics
        curriculum.observe({"exact_match": 1.0})


def test_evaluation_asks_what_training_never_asked() -> None:
    config = resolve(get_config("remember,smoke"))
    setting = Setting(
        ModelConfig(block_size=C), data_of("remember"), EvaluateConfig(filler_blocks=(1, 2), keys=5)
    )
    questions = algorithmic_questions(setting)
    assert {*questions.groups} == {"1", "2"} and len(questions.groups["2"]()) == 5
    assert all(len(prompt) == 2 * C + 3 and len(answer) == 3 for prompt, answer in questions.groups["2"]())
    assert default_task(config.data) == "algorithmic" and default_task(Config().data) == "passkey"
    with pytest.raises(
        UserError, match=r"for runs that were trained on algorithmic:NAME, but data.task is passkey"
    ):
        algorithmic_questions(setting._replace(data=DataConfig()))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "algorithmic:sort"}, "config.data.task: expected .* got 'algorithmic:sort'"),
        ({"task": "algorithmic"}, "config.data.task: expected .* got 'algorithmic'"),
        (
            {"vocabulary": "passkey"},
            "config.data.vocabulary: algorithmic:remember is spelled letter by letter; set it",
        ),
        ({"add_bos": True}, "config.data.add_bos: belongs to the task"),
    ],
)
def test_impossible_configs(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config(data=data_of("remember", **fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"key_letters": 3},
            "config.model.block_size: 12 is not a multiple of 7, the tokens of a pair with 3 letters",
        ),
        (
            {"key_letters": 1, "value_letters": 3, "stage_blocks": (9,)},
            "18 pairs need as many keys, but 1 letters",
        ),
    ],
)
def test_impossible_sizes(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_batches(data_of("remember", **fields), BatchSpec(C, 4, 0))


def test_a_stage_without_an_end_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"config.data.max_stage_steps: must say how long a stage lasts"):
        data_of("copy", advance_accuracy=0)


@pytest.mark.parametrize("task", ALGORITHMS)
def test_the_config_file_fits_its_tasks(task: str) -> None:
    for memory in ("fam", "fam_bounded", "bswa", "armt", "rmt"):
        config = resolve(get_config(f"{task},{memory}"))
        tokens = algorithmic_stage_tokens(config.data, config.model.block_size)
        assert len(tokens) == len(config.data.stage_blocks)
        assert config.model.memory.kind == memory.removesuffix("_bounded")
