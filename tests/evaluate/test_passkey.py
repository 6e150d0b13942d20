"""PassKey results are those of a computation without streaming, and nothing of a prompt is left out."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from fam_jax.config import Config, UserError
from fam_jax.data.passkey import passkey_examples
from fam_jax.data.vocabulary import load_vocabulary
from fam_jax.evaluate import passkey
from fam_jax.evaluate.passkey import evaluate_passkey
from fam_jax.generate.streaming import Streamer
from tests.generate.tiny import CONFIG, forward, texts
from tests.model.tiny import params_of


def test_results_of_a_known_model(config: Config, parrot: dict, parrot_accuracy: float) -> None:
    """With the task's own data: 12 keys in batches of 8."""
    vocabulary, told = load_vocabulary("passkey"), []
    results = evaluate_passkey(config, parrot, vocabulary=vocabulary, on_progress=lambda *x: told.append(x))
    assert list(results["lengths"]) == ["1", "5"]
    for blocks, found in results["lengths"].items():
        filler = int(blocks) * config.model.block_size
        examples = passkey_examples(config.data, vocabulary, filler, 12, config.evaluate.seed)
        assert found["exact_match"] == found["teacher_forced_exact_match"] == 0
        assert found["keys"] == 12
        assert {found["tokens_read"], found["tokens_read_most"]} == {len(prompt) for prompt, _ in examples}
        assert found["seconds"] > 0
        own = [(done, total) for length, done, total in told if length == int(blocks)]
        assert own == sorted(own) and own[-1] == (12 * found["tokens_read"],) * 2
    assert results["lengths"]["1"]["answer_token_accuracy"] == parrot_accuracy
    read = [results["lengths"][blocks]["tokens_read"] for blocks in ("1", "5")]
    assert read[1] - read[0] == 4 * config.model.block_size


@pytest.fixture
def rigged(monkeypatch: pytest.MonkeyPatch) -> tuple[Config, list[tuple[np.ndarray, np.ndarray]]]:
    """Five prompts of different lengths whose answers are what the random model says, by forward passes alone."""
    examples = []
    for prompt, length in zip(texts(30, 9, 21, 14, 33), (3, 2, 3, 1, 3), strict=True):
        text = prompt
        for _ in range(length):
            text = np.append(text, forward(text)[-1].argmax()).astype(np.int32)
        examples.append((prompt, text[len(prompt) :]))
    monkeypatch.setattr(passkey, "passkey_examples", lambda *_: examples)
    config = Config(model=CONFIG)
    return dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, batch_size=3)), examples


class Sixteen:
    """All of a vocabulary that is looked at here."""

    vocab_size = 16


def evaluate(config: Config) -> dict[str, Any]:
    results = evaluate_passkey(config, params_of(CONFIG), vocabulary=Sixteen(), filler_blocks=[2], keys=5)
    return results["lengths"]["2"]


def test_right_answers_count(rigged: tuple) -> None:
    config, examples = rigged
    found = evaluate(config)
    assert found["exact_match"] == found["teacher_forced_exact_match"] == found["answer_token_accuracy"] == 1
    assert (found["tokens_read"], found["tokens_read_most"], found["keys"]) == (9, 33, 5)

    # Spoil the first answer's last token, and the second answer's first.
    for row, token in ((0, -1), (1, 0)):
        examples[row][1][token] = (examples[row][1][token] + 1) % CONFIG.vocab_size
    expected = []
    for prompt, answer in examples:
        expected.append(forward(np.append(prompt, answer))[len(prompt) - 1 : -1].argmax(-1) == answer)
    found = evaluate(config)
    assert found["exact_match"] == found["teacher_forced_exact_match"] == 3 / 5
    assert found["answer_token_accuracy"] == np.concatenate(expected).mean()
    assert 0.5 < found["answer_token_accuracy"] < 1


def test_truncation_does_not_go_unnoticed(rigged: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Streamer.read

    def truncated(self: Streamer, prompts: Any, *args: Any, **kwargs: Any) -> Any:
        return whole(self, [prompt[-20:] for prompt in prompts], *args, **kwargs)

    monkeypatch.setattr(Streamer, "read", truncated)
    with pytest.raises(RuntimeError, match=r"prompts of \[30, 9, 21\] tokens were read as \[20, 9, 20\]"):
        evaluate(rigged[0])


def test_vocabulary_must_fit_the_model(config: Config, parrot: dict) -> None:
    with pytest.raises(
        UserError, match=r"vocab_size: 51 is smaller than the vocabulary .*, which has 259 pieces"
    ):
        evaluate_passkey(config, parrot, vocabulary=load_vocabulary("bytes"))
