"""The data task of instructions: batches, mixtures, held-out rows, start and end tokens, mistakes."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from fam_jax.config import Config, ConfigError, UserError, resolve
from fam_jax.data import build
from fam_jax.data.interface import BatchSpec
from fam_jax.data.vocabulary import load_vocabulary
from tests.data.chat_templates import TEMPLATES, unmarked, write_folder
from tests.data.instruction_rows import (
    CHAT,
    MESSAGES,
    TASK,
    config_of,
    examples_of,
    naive,
    pairs,
    source_of,
    written,
)


def batches_of(config: Config, shard: tuple[int, int] = (0, 1)) -> Any:
    return build.make_batches(config.data, BatchSpec(16, 4, 0, shard, vocab_size=300))


@pytest.fixture
def corpus(tmp_path: pathlib.Path) -> pathlib.Path:
    """Write three sources of different shapes and sizes; some rows are longer than a row of a batch."""
    flan = [{"inputs": f"q{n}" * (1 + n % 30), "targets": f"a{n}"} for n in range(40)]
    written(tmp_path / "flan, 1.jsonl", flan)
    written(tmp_path / "dolly:2.jsonl", [{"instruction": f"i{n}", "response": "r" * 50} for n in range(9)])
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "task.json").write_text(json.dumps(TASK))
    written(tmp_path / "held.jsonl", [{"inputs": "held?", "targets": "out"}])
    return tmp_path


def mixture_of(corpus: pathlib.Path, rates: Sequence[float] = (0.5, 0.3, 0.2)) -> Config:
    names = ("flan, *.jsonl", "dolly:2.jsonl", "folder")
    parts = tuple((f"{corpus}/{name}", rate) for name, rate in zip(names, rates, strict=True))
    return config_of(mixture=parts, shuffle_batches=2, heldout_files=(f"{corpus}/held.jsonl",))


@pytest.mark.parametrize("mixed", [False, True])
def test_batches_resume_on_any_number_of_processes(corpus: pathlib.Path, mixed: bool) -> None:
    """At any step, across epochs, with the files elsewhere."""
    single = config_of([corpus / "flan, 1.jsonl"], shuffle_batches=2, repeat_segment=2, sequence_length=64)
    config = mixture_of(corpus) if mixed else single
    batches, states, expected = batches_of(config), [], []
    for _ in range(25):
        states.append(batches.state())
        expected.append(batches.next())
    assert json.loads(json.dumps(states)) == states
    assert mixed or states[-1]["group"]["epoch"] > 0
    for step in (1, 6, 23):
        shards = [batches_of(config, (index, 2)) for index in range(2)]
        for shard in shards:
            shard.restore(states[step])
        for wanted in expected[step:]:
            found = [shard.next() for shard in shards]
            for part in wanted:
                np.testing.assert_array_equal(np.concatenate([each[part] for each in found]), wanted[part])
    weights = np.concatenate([batch["weights"].ravel() for batch in expected])
    assert {0, 1} <= {*weights.tolist()}


def test_every_token_of_a_row_is_used_and_learned_by_its_weight(corpus: pathlib.Path) -> None:
    """Rows of batches are the examples of an epoch, joined and cut, against a version that joins them by hand."""
    config = config_of([corpus / "flan, 1.jsonl"], shuffle_batches=1)
    batches = batches_of(config)
    ids, weights = (np.concatenate(each) for each in zip(*[
        (example.ids, example.weights) for epoch in range(2) for example in batches.source.epoch(epoch)
    ], strict=True))  # fmt: skip
    assert max(len(example.ids) for example in batches.source.epoch(0)) > 32
    for step in range(5):
        batch = batches.next()
        rows = {
            (tuple(ids[i : i + 32]), tuple(weights[i : i + 32]))
            for i in range(128 * step, 128 * step + 128, 32)
        }
        found = zip(batch["targets"].tolist(), batch["weights"].tolist(), strict=True)
        assert {(tuple(row), tuple(weight)) for row, weight in found} == rows
        np.testing.assert_array_equal(batch["answer"], batch["weights"] > 0)


def test_a_state_belongs_to_its_rows_rates_and_options(corpus: pathlib.Path) -> None:
    config = mixture_of(corpus)
    state = batches_of(config).state()
    (corpus / "folder" / "task.json").rename(corpus / "folder" / "moved.json")
    batches_of(config).restore(state)
    others = [
        mixture_of(corpus, (0.5, 0.2, 0.3)),
        resolve({"data": vars(config.data) | {"separator": " "}}),
        resolve({"data": vars(config.data) | {"positive_examples": 0}}),
    ]
    for other in others:
        with pytest.raises(
            UserError, match=r"^data state: contents was .* resume with the config and the data"
        ):
            batches_of(other).restore(state)


def test_held_out_rows_are_measured_on_their_targets(corpus: pathlib.Path) -> None:
    config = mixture_of(corpus)
    found = build.heldout_examples(config.data, config.evaluate)
    assert [*map(pairs, found.examples)] == [naive([("held?", 0), ("out</s>", 1)])]
    (corpus / "plain.txt").write_text("all é")
    plain = build.heldout_examples(config.data, config.evaluate, [f"{corpus}/plain.txt"])
    assert [*map(pairs, plain.examples)] == [naive([("all é</s>", 1)])]
    assert build.longest_row(config.data, block_size=16) == 32
    both = resolve({"data": vars(config.data) | {"heldout_files": (f"{corpus}/flan, 1.jsonl",)}})
    with pytest.raises(
        ConfigError, match=r"^config\.data\.heldout_files: .*flan, 1\.jsonl is in train_files too"
    ):
        batches_of(both)


MISTAKES = {
    "another shape": ({"question": "a", "answer": "b"}, {}, "expected the keys of one of natural_instructions (D"),
    "no keys": ({}, {}, "got no keys; rename them"),
    "missing": ({"inputs": "a", "target": "b"}, {}, "lacks targets (flan), got inputs, target; add it"),
    "one of two": ({"instruction": "a"}, {}, "lacks response (dolly) or output (alpaca), got instruction; add it"),
    "forced": ({"inputs": "a", "targets": "b"}, {"format": "alpaca"}, "format alpaca needs the key 'instruction', got"),
    "null": ({"inputs": "a", "targets": None}, {}, "expected a text under 'targets' (format flan), but it is null"),
    "type": ({"inputs": "a", "targets": ["b"]}, {}, "expected a text under 'targets' (format flan), but it is list"),
    "list": ({"messages": "a"}, {}, "expected a list of objects under 'messages' (format messages), but it is str"),
    "no content": ({"messages": [{"role": "user"}]}, {}, "messages 1: expected a text under 'content' (format mess"),
    "null content": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]}, {},
        "messages 2: expected a text under 'content' (format messages), but it is null",
    ),
    "image": ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, {}, "messages 1: expected a text"),
    "role": ({"conversations": [{"from": "bot", "value": "a"}]}, {}, "conversations 1: from 'bot' is unknown; expecte"),
    "nobody": ({"messages": [{"role": "system", "content": "a"}]}, {}, "has no turn of the assistant to learn from"),
    "outputs": ({"Definition": "a", "Instances": [{"input": "b", "output": []}]}, {}, "Instances 1: expected a text"),
    "input": ({"Definition": "a", "Instances": [{"output": "b"}]}, {}, "Instances 1: expected a text under 'input' ("),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_row_that_cannot_be_used_is_named_or_counted(
    mistake: str, tmp_path: pathlib.Path, template: str, caplog: pytest.LogCaptureFixture
) -> None:
    row, options, says = MISTAKES[mistake]
    good = {"instruction": "a", "output": "b"} if mistake == "forced" else {"inputs": "a", "targets": "b"}
    path = written(tmp_path / "x.jsonl", [good, row, good])
    with pytest.raises(ConfigError) as caught:
        source_of(config_of([path], chat_template=template, **options))
    message = str(caught.value)
    assert message.startswith(f"config.data.train_files: {path}: line 2: ") and says in message
    assert "data.skip_bad=true" in message and "\n" not in message
    source = source_of(config_of([path], chat_template=template, skip_bad=True, **options))
    assert (len(source.source), source.source.records.skipped) == (2, 1)
    assert "config.data.train_files: left out 1 rows, 2 examples are left" in caplog.text
    only = written(tmp_path / "only.jsonl", [row])
    with pytest.raises(ConfigError, match="no row of 1 files can be used"):
        source_of(config_of([only], chat_template=template, skip_bad=True, **options))


def test_mistakes_that_are_not_of_a_row(tmp_path: pathlib.Path, corpus: pathlib.Path) -> None:
    chats = written(tmp_path / "chats.jsonl", [{"messages": MESSAGES}])
    for skip_bad in (False, True):
        with pytest.raises(
            ConfigError, match=r"line 1: is a chat, but the vocabulary 'bytes' has no chat template"
        ):
            source_of(config_of([chats], skip_bad=skip_bad))
    with pytest.raises(ConfigError, match=r"^config\.data\.mixture: .*/none: no such file or folder"):
        source_of(config_of(mixture=((f"{tmp_path}/none", 1.0),)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ConfigError, match=r"the folder .*empty has no files that end in \.jsonl or \.ndjson or"
    ):
        source_of(config_of([tmp_path / "empty"]))
    no_end = write_folder(tmp_path / "no_end", "qwen", None, eos_token=None)
    with pytest.raises(ConfigError, match=r"^config\.data\.vocabulary: .* has no end-of-sequence id"):
        source_of(config_of([chats], vocabulary=no_end))


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("style", ["qwen", "llama3"])
def test_bos_stands_once_at_the_start(style: str, add_bos: bool, tmp_path: pathlib.Path) -> None:
    """Whether the template writes it, as that of Llama 3, or data.add_bos puts it there, or both."""
    bos = {"bos_token": "<|begin_of_text|>"}
    vocabulary = write_folder(tmp_path, style, unmarked(TEMPLATES[style]), **bos)
    path = written(tmp_path / "x.jsonl", [{"messages": [MESSAGES[1], MESSAGES[2]]}] * 9)
    config = config_of([path], vocabulary=vocabulary, add_bos=add_bos, shuffle_batches=1)
    batches = build.make_batches(config.data, BatchSpec(16, 1, 0))
    bos_id = batches.vocabulary.bos_id
    header = batches.vocabulary.token_id({"qwen": "<|im_start|>", "llama3": "<|start_header_id|>"}[style])
    size = len(batches.source.source[0].ids)
    inputs = np.concatenate([batches.next()["inputs"][0] for _ in range(5)])[: 4 * size]
    written_by_template = style == "llama3" and not add_bos
    assert (inputs == bos_id).sum() == (4 if add_bos or written_by_template else 0)
    starts = [*range(0, 4 * size, size)]
    assert (inputs[starts] == (bos_id if add_bos else batches.vocabulary.eos_id)).all()
    example = batches.source.source[0]
    assert example.ids[0] == (bos_id if written_by_template else header) and example.weights[0] == 0


def test_a_chat_ends_with_the_end_of_its_template(tmp_path: pathlib.Path) -> None:
    """A chat does not get another end token; an answer of a pair does."""
    vocabulary = write_folder(tmp_path, "gemma", unmarked(TEMPLATES["gemma"]))
    rows = [{"messages": [MESSAGES[1], MESSAGES[2]]}, {"inputs": "a <end_of_turn> b", "targets": "<eos>c"}]
    chat, pair = examples_of(config_of([written(tmp_path / "x.jsonl", rows)], vocabulary=vocabulary))
    loaded = load_vocabulary(vocabulary)
    end, turn = loaded.token_id("<eos>"), loaded.token_id("<end_of_turn>")
    assert (chat.ids == end).sum() == 0 and (chat.ids == turn).sum() == 2
    assert chat.weights[chat.ids == turn].tolist() == [0, 1] and chat.weights[-1] == 0
    assert (pair.ids == end).sum() == 1 and pair.ids[-1] == end and pair.weights[-1] == 1
    assert (pair.ids == turn).sum() == 0 and loaded._decode(pair.ids) == "a <end_of_turn> b<eos>c"


def test_rows_of_a_prepared_tfds_dataset(tmp_path: pathlib.Path, template: str, corpus: pathlib.Path) -> None:
    """Alone, as a part of a mixture, and held out; with nested features and those that no shape reads."""
    import tensorflow_datasets as tfds

    rows = [{"inputs": f"é{n}", "targets": f"a{n}", "score": n} for n in range(7)]
    chats = [{"messages": [dict(message) for message in MESSAGES[: 3 + 2 * (n % 2)]]} for n in range(4)]
    text, file_utils = tfds.features.Text(), tfds.core.utils.file_utils
    features = {
        "fam_pairs": {"inputs": text, "targets": text, "score": tfds.features.Scalar(np.int64)},
        "fam_chats": {"messages": tfds.features.Sequence({"role": text, "content": text})},
    }
    file_utils.add_data_dir(tmp_path)
    try:
        for name, examples in (("fam_pairs", rows), ("fam_chats", chats)):
            tfds.dataset_builders.store_as_tfds_dataset(
                name=name,
                version="1.0.0",
                features=tfds.features.FeaturesDict(features[name]),
                split_datasets={"train": [*enumerate(examples)]},
                data_dir=tmp_path,
                disable_shuffling=True,
            )
        config = config_of(
            ["tfds:fam_pairs:train[:5]", corpus / "held.jsonl"], heldout_files=("tfds:fam_pairs:train[5:]",)
        )
        expected = [naive([(f"é{n}", 0), (f"a{n}</s>", 1)]) for n in range(7)]
        found = [*map(pairs, examples_of(config))]
        assert found == [naive([("held?", 0), ("out</s>", 1)]), *expected[:5]]
        held = build.heldout_examples(config.data, config.evaluate).examples
        assert sorted(map(pairs, held)) == sorted(expected[5:])
        parts = (("tfds:fam_chats:train", 0.5), ("tfds:fam_pairs:train", 0.5))
        source = source_of(config_of(mixture=parts, chat_template=template))
        assert [*map(pairs, (source.parts[0][i] for i in (1, 3)))] == [naive(CHAT)] * 2
        for entry, says in {
            "tfds:fam_pairs": "expected tfds:NAME:SPLIT",
            "tfds:fam_pairs:test": "has no split test",
        }.items():
            with pytest.raises(ConfigError, match=rf"^config\.data\.train_files: .*{says}"):
                source_of(config_of([entry]))
    finally:
        file_utils.clear_registered_data_dirs()


@pytest.mark.parametrize("mixed", [False, True])
def test_rows_with_examples_of_their_own(corpus: pathlib.Path, mixed: bool) -> None:
    """Rows of the layout by_row are those of any number of processes, and hold whole examples of the source."""
    single = config_of([corpus / "flan, 1.jsonl"])
    fields = vars((mixture_of(corpus) if mixed else single).data) | {"layout": "by_row", "shuffle_batches": 8}
    config = resolve({"data": fields})
    whole, shards = batches_of(config), [batches_of(config, (index, 2)) for index in range(2)]
    targets = []
    for _ in range(20):
        batch, parts = whole.next(), [shard.next() for shard in shards]
        targets.append(batch["targets"])
        for name, array in batch.items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), array)
    known = {tuple(each.ids.tolist()) for each in whole.source.read(range(len(whole.source)))}
    for row in np.concatenate(targets, axis=1):
        ends = np.flatnonzero(row == whole.vocabulary.eos_id) + 1
        examples = [tuple(part.tolist()) for part in np.split(row, ends)[:-1]]
        assert examples and {*examples} <= known


TASKS = {"imports": ("tests.data.text_seqio_tasks",)}


def texts(example: Any) -> tuple[str, str]:
    """Return what an example is given, and what it is to write."""
    vocabulary = load_vocabulary("bytes")
    assert example.ids[-1] == vocabulary.eos_id and example.weights[-1] == 1
    ids, weights = example.ids[:-1], example.weights[:-1]
    return vocabulary.decode(ids[weights == 0].tolist()), vocabulary.decode(ids[weights == 1].tolist())


@pytest.mark.parametrize("mixed", [False, True])
def test_seqio_tasks_are_sources(corpus: pathlib.Path, mixed: bool) -> None:
    """Alone, as a part of a mixture, and held out: texts of a task, tokenized as those of files are."""
    entry = "seqio:fam_test_questions"
    if mixed:
        parts = ((entry, 0.5), (f"{corpus}/dolly:2.jsonl", 0.5))
        config = config_of(mixture=parts, heldout_files=(f"{entry}:validation",), **TASKS)
        source = source_of(config).parts[0]
    else:
        config = config_of([entry], heldout_files=(f"{entry}:validation",), **TASKS)
        source = source_of(config).source
    found = {texts(example) for example in source.read(range(len(source)))}
    assert found == {(f"question {n}?", f"answer {'x' * n}") for n in range(12)}
    held = build.heldout_examples(config.data, config.evaluate)
    assert len(held.examples) == 12
    assert {texts(example)[0] for example in held.examples} == {f"question {100 + n}?" for n in range(12)}
    batches = batches_of(config)
    assert batches.next()["inputs"].shape[0] == 4


def test_a_seqio_task_with_targets_alone_is_text() -> None:
    source = source_of(config_of(["seqio:fam_test_answers"], **TASKS)).source
    assert all(example.weights.all() for example in source.read(range(len(source))))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            "seqio:fam_test_mixture",
            "fam_test_mixture is a mixture of seqio; name its tasks, each with a rate",
        ),
        ("seqio:fam_test_nothing", "seqio has no task or mixture fam_test_nothing; add the module"),
        ("seqio:fam_test_questions:test", "fam_test_questions has no split test, only"),
        ("seqio:fam_test_no_targets", "fam_test_no_targets has no feature targets"),
        (
            "seqio:fam_test_passkey_ids",
            "fam_test_passkey_ids does not keep its texts as inputs_pretokenized and",
        ),
    ],
)
def test_seqio_tasks_that_cannot_be_mixed(entry: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^config\.data\.mixture: {message}"):
        source_of(config_of(mixture=((entry, 1.0),), **TASKS))
