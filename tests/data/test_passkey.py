import pathlib
import re

import numpy as np
import pytest

from fam_jax.config import DataConfig, UserError
from fam_jax.data import passkey
from fam_jax.data.passkey import make_template, passkey_examples, passkey_task, register_passkey
from fam_jax.data.passkey_text import example_text
from fam_jax.data.quiet_seqio import seqio, tf
from fam_jax.data.text_vocabulary import train_text_vocabulary
from fam_jax.data.vocabulary import load_vocabulary


def number(vocabulary: seqio.Vocabulary, answer: np.ndarray) -> str:
    return vocabulary.decode(answer.tolist()).strip()


def keys_of(task: seqio.Task, split: str, count: int) -> list[str]:
    dataset = passkey.examples_at(task, split, tf.data.Dataset.range(count))
    return [example["targets_pretokenized"].decode() for example in dataset.as_numpy_iterator()]


def test_text_of_an_example(vocabulary_name: str) -> None:
    """With whole cycles of filler, the ids decode to the text of section 3.2, with the key in it twice."""
    vocabulary = load_vocabulary(vocabulary_name)
    cycle = len(make_template(vocabulary).filler)
    for prompt, answer in passkey_examples(DataConfig(), vocabulary, 3 * cycle, 8, seed=0):
        assert prompt.dtype == answer.dtype == np.int32
        key = number(vocabulary, answer)
        assert re.fullmatch(r"[1-9]\d{4}", key)
        assert vocabulary.decode(prompt.tolist()) == example_text(key, 3)[0]
        assert vocabulary.decode([*prompt.tolist(), *answer.tolist()]) == " ".join(example_text(key, 3))


@pytest.mark.parametrize("filler_tokens", [0, 24, 517])
def test_filler_has_exactly_the_requested_length(vocabulary_name: str, filler_tokens: int) -> None:
    vocabulary = load_vocabulary(vocabulary_name)
    template = make_template(vocabulary)
    for prompt, answer in passkey_examples(DataConfig(), vocabulary, filler_tokens, 4, seed=0):
        key = number(vocabulary, answer)
        end = len(prompt) - len(template.question)
        assert prompt[end:].tolist() == template.question
        filler = np.resize(template.filler, filler_tokens)
        assert prompt[end - filler_tokens : end].tolist() == filler.tolist()
        head = vocabulary.decode(prompt[: end - filler_tokens].tolist())
        assert head.endswith(f"The pass key is {key}. Remember it. {key} is the pass key.")


def test_a_model_without_normalization_causes_no_output(
    tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "text.model"
    path.write_bytes(train_text_vocabulary([example_text("0 1 2 3 4 5 6 7 8 9", 1)[0]], 310))
    vocabulary = load_vocabulary(str(path))
    prompt, answer = passkey_examples(DataConfig(), vocabulary, 20, 1, 0)[0]
    assert (
        vocabulary.decode(prompt).endswith("The pass key is") and vocabulary.decode(answer).strip().isdigit()
    )
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("digits", [1, 5])
def test_keys_have_the_requested_digits_and_are_uniform(digits: int) -> None:
    task = passkey_task("keys", load_vocabulary("passkey"), (0, 0), seed=0, digits=digits)
    keys = keys_of(task, "train", 400)
    assert all(re.fullmatch(rf"[1-9]\d{{{digits - 1}}}", key) for key in keys)
    for position in range(digits):
        counts = np.bincount([int(key[position]) for key in keys], minlength=10)
        expected = 400 / (9 if position == 0 else 10)
        seen = counts[1:] if position == 0 else counts
        # Five standard deviations.
        assert np.all(abs(seen - expected) < 5 * np.sqrt(expected))


def test_keys_differ_between_splits_seeds_and_filler_lengths() -> None:
    vocabulary = load_vocabulary("passkey")
    base = passkey_task("base", vocabulary, (5, 9), seed=0)
    streams = [
        keys_of(base, "train", 20),
        keys_of(base, "validation", 20),
        keys_of(passkey_task("seed", vocabulary, (5, 9), seed=1), "train", 20),
        keys_of(passkey_task("filler", vocabulary, (5, 10), seed=0), "train", 20),
    ]
    for i, one in enumerate(streams):
        for other in streams[:i]:
            assert sum(a == b for a, b in zip(one, other, strict=True)) <= 1
    assert keys_of(passkey_task("again", vocabulary, (5, 9), seed=0), "train", 20) == streams[0]


def test_evaluation_never_sees_training_examples() -> None:
    data, vocabulary = DataConfig(digits=9), load_vocabulary("passkey")
    training = keys_of(passkey_task("t", vocabulary, (40, 40), seed=3, digits=9), "train", 200)
    evaluation = [
        number(vocabulary, answer) for _, answer in passkey_examples(data, vocabulary, 40, 200, seed=3)
    ]
    assert len(set(evaluation)) == 200
    assert not set(training) & set(evaluation)


def test_filler_lengths_fill_their_range() -> None:
    vocabulary = load_vocabulary("passkey")
    task = passkey_task("range", vocabulary, (10, 14), seed=0)
    dataset = passkey.examples_at(task, "train", tf.data.Dataset.range(200))
    shortest = len(passkey_examples(DataConfig(), vocabulary, 0, 1, seed=0)[0][0])
    lengths = [len(example["inputs"]) - shortest for example in dataset.as_numpy_iterator()]
    assert set(lengths) == {10, 11, 12, 13, 14}


def test_seqio_finds_and_reads_the_task() -> None:
    vocabulary = load_vocabulary("passkey")
    task = register_passkey("passkey_read", vocabulary, (5, 60), seed=0)
    with pytest.raises(ValueError, match="passkey_read"):
        register_passkey("passkey_read", vocabulary, (5, 60), seed=0)
    found = seqio.get_mixture_or_task("passkey_read")
    shuffled = list(found.get_dataset(split="train", seed=4).take(9).as_numpy_iterator())
    # Random access: the same examples, whatever was drawn before them.
    picked = passkey.examples_at(task, "train", tf.data.Dataset.from_tensor_slices(np.array([8, 2])))
    for index, example in zip([8, 2], picked.as_numpy_iterator(), strict=True):
        np.testing.assert_array_equal(example["inputs"], shuffled[index]["inputs"])
        np.testing.assert_array_equal(example["targets"], shuffled[index]["targets"])
    halves = [
        list(found.get_dataset(split="train", shard_info=seqio.ShardInfo(i, 2)).take(2).as_numpy_iterator())
        for i in (0, 1)
    ]
    interleaved = [halves[i % 2][i // 2]["targets"].tolist() for i in range(4)]
    assert interleaved == [example["targets"].tolist() for example in shuffled[:4]]


def test_seqio_evaluator_scores_the_task() -> None:
    vocabulary = load_vocabulary("passkey")
    register_passkey("passkey_scored", vocabulary, (5, 60), seed=0, validation_examples=10)
    evaluator = seqio.Evaluator("passkey_scored", seqio.EncDecFeatureConverter(pack=False))

    def answer_some(dataset: tf.data.Dataset) -> list[tuple[int, list[int]]]:
        """Copy the key from the prompt, with a wrong last digit in every fifth answer."""
        answers = []
        for index, example in dataset.as_numpy_iterator():
            text = vocabulary.decode(example["encoder_input_tokens"].tolist())
            key = re.findall(r"\d+", text)[0]
            if index % 5 == 0:
                key = key[:-1] + str((int(key[-1]) + 1) % 10)
            answers.append((int(index), vocabulary.encode(key + ".")))
        return answers

    metrics, _ = evaluator.evaluate(compute_metrics=True, predict_fn=answer_some)
    assert metrics.result()["passkey_scored"]["exact_match"] == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("text", "expected"), [(" 123", "123"), ("123 4", "123"), ("12a3", "12"), ("a12", ""), ("", "")]
)
def test_leading_number(text: str, expected: str) -> None:
    assert passkey.leading_number(text) == expected


def test_exact_match_compares_whole_answers() -> None:
    assert passkey.exact_match(["123", "456", "7", "8"], ["123", "457", "", "8"]) == {"exact_match": 0.5}
    with pytest.raises(ValueError, match="shorter"):
        passkey.exact_match(["1", "2"], ["1"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"filler_tokens": (5, 4)}, "filler_tokens"),
        ({"filler_tokens": (-1, 4)}, "filler_tokens"),
        ({"digits": 0}, "digits"),
        ({"digits": 10}, "digits"),
    ],
)
def test_arguments_out_of_range_are_rejected(arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        passkey_task("bad", load_vocabulary("bytes"), **{"filler_tokens": (1, 2), "seed": 0, **arguments})


def test_a_vocabulary_that_cannot_express_the_task_is_rejected() -> None:
    class NoSeven(seqio.ByteVocabulary):
        def _encode(self, s: str) -> list[int]:
            return [self.unk_id if byte == "7" else ord(byte) + 3 for byte in s]

    with pytest.raises(UserError, match="no tokens for '7'"):
        make_template(NoSeven())
