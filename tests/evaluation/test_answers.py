"""Answers equal those of a computation without streaming, and every token of a prompt is read."""

from typing import Any

import jax
import numpy as np
import pytest

from fam_jax.config import Config, DataConfig, EvaluateConfig
from fam_jax.data.passkey import passkey_examples
from fam_jax.evaluation.answers import Question, Questions, answer_tables, measure_answers
from fam_jax.evaluation.task import Setting
from fam_jax.evaluation.tasks import passkey_questions
from fam_jax.generation.streaming import Streamer
from tests.generation.tiny import CONFIG, forward, texts
from tests.model.tiny import params_of


def setting_of(config: Config) -> Setting:
    return Setting(config.model, config.data, config.evaluate)


def test_passkey_of_a_known_model(config: Config, parrot: dict, parrot_accuracy: float) -> None:
    """The data is the task's own: 12 keys in batches of 8."""
    told: list[tuple[str, int, int]] = []
    questions = passkey_questions(setting_of(config))
    found = measure_answers(
        Streamer(config.model, parrot), questions, setting_of(config), lambda *x: told.append(x)
    )
    groups = found.details["groups"]
    assert list(groups) == ["1", "5"]
    for blocks, row in groups.items():
        filler = int(blocks) * config.model.block_size
        examples = passkey_examples(config.data, questions.vocabulary, filler, 12, config.evaluate.seed)
        assert row["exact_match"] == row["teacher_forced_exact_match"] == 0
        assert row["questions"] == 12
        assert {row["tokens_read"], row["tokens_read_most"]} == {len(prompt) for prompt, _ in examples}
        assert row["seconds"] > 0
        own = [(done, total) for name, done, total in told if name == f"{blocks} blocks"]
        assert own == sorted(own) and own[-1] == (12 * row["tokens_read"],) * 2
    assert groups["1"]["answer_token_accuracy"] == parrot_accuracy
    assert groups["5"]["tokens_read"] - groups["1"]["tokens_read"] == 4 * config.model.block_size
    assert found.scalars["answer_token_accuracy/1_blocks"] == parrot_accuracy
    both = [groups[blocks]["answer_token_accuracy"] for blocks in ("1", "5")]
    assert found.scalars["answer_token_accuracy"] == pytest.approx(np.mean(both))
    assert {key: found.details[key] for key in ("block_size", "digits", "seed")} == {
        "block_size": config.model.block_size,
        "digits": config.data.digits,
        "seed": config.evaluate.seed,
    }


def test_table(config: Config, parrot: dict) -> None:
    found = measure_answers(
        Streamer(config.model, parrot), passkey_questions(setting_of(config)), setting_of(config)
    )
    (table,) = answer_tables(found.details, "a title")
    assert table.title == "a title" and table.row_count == 2
    headings = [column.header for column in table.columns]
    assert headings[0] == "blocks" and "exact match" in headings and "answer-token accuracy" in headings


@pytest.fixture
def rigged() -> list[Question]:
    """Return five prompts of different lengths, with the answers that forward passes of the random model give."""
    questions = []
    for prompt, length in zip(texts(30, 9, 21, 14, 33), (3, 2, 3, 1, 3), strict=True):
        text = prompt
        for _ in range(length):
            text = np.append(text, forward(text)[-1].argmax()).astype(np.int32)
        questions.append((prompt, text[len(prompt) :]))
    return questions


SETTING = Setting(CONFIG, DataConfig(), EvaluateConfig(batch_size=3))


def measure(questions: list[Question], params: Any = None) -> dict[str, Any]:
    params = params_of(CONFIG) if params is None else params
    group = Questions({"all": lambda: questions}, "kinds", None, {})
    return measure_answers(Streamer(CONFIG, params), group, SETTING).details["groups"]["all"]


def test_right_answers_count(rigged: list[Question]) -> None:
    found = measure(rigged)
    assert found["exact_match"] == found["teacher_forced_exact_match"] == found["answer_token_accuracy"] == 1
    assert (found["tokens_read"], found["tokens_read_most"], found["questions"]) == (9, 33, 5)

    # Spoil the first answer's last token, and the second answer's first.
    for row, token in ((0, -1), (1, 0)):
        rigged[row][1][token] = (rigged[row][1][token] + 1) % CONFIG.vocab_size
    expected = []
    for prompt, answer in rigged:
        expected.append(forward(np.append(prompt, answer))[len(prompt) - 1 : -1].argmax(-1) == answer)
    found = measure(rigged)
    assert found["exact_match"] == found["teacher_forced_exact_match"] == 3 / 5
    assert found["answer_token_accuracy"] == np.concatenate(expected).mean()
    assert 0.5 < found["answer_token_accuracy"] < 1


def test_equal_logits_are_never_right() -> None:
    """Not even token 0 counts as right, which greedy generation takes first among equals."""
    params = jax.tree.map(np.zeros_like, params_of(CONFIG))
    found = measure([(prompt, np.zeros(2, np.int32)) for prompt in texts(9, 21, 14)], params)
    assert found["exact_match"] == found["teacher_forced_exact_match"] == found["answer_token_accuracy"] == 0


def test_truncation_does_not_go_unnoticed(rigged: list[Question], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Streamer.read

    def truncated(self: Streamer, prompts: Any, *args: Any, **kwargs: Any) -> Any:
        return whole(self, [prompt[-20:] for prompt in prompts], *args, **kwargs)

    monkeypatch.setattr(Streamer, "read", truncated)
    with pytest.raises(
        RuntimeError, match=r"the model read \[20, 9, 20\] tokens of prompts with \[30, 9, 21\]"
    ):
        measure(rigged)
