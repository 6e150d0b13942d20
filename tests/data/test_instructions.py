"""Instruction data: the weight of every token, for every shape of rows; the data task; mistakes."""

import itertools
import json
import operator
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fam_jax.config import Config, ConfigError, UserError, resolve
from fam_jax.data import build
from fam_jax.data.chat import Run
from fam_jax.data.instructions import SHAPES, Pair, pair_run
from fam_jax.data.interface import Example
from fam_jax.data.token_weights import TokenWeights
from fam_jax.data.vocabulary import load_vocabulary
from tests.data.chat_templates import TEMPLATES, unmarked, write_folder

BYTES = load_vocabulary("bytes")
EOS = BYTES.eos_id
# Chats as text, for the vocabulary of bytes.
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token if m.role == 'assistant' }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TURNS = [("system", "be kind"), ("user", "hé?"), ("assistant", "ho"), ("user", "and?"), ("assistant", "")]
MESSAGES = [{"role": role, "content": text} for role, text in TURNS]
CHAT = [
    ("system: be kind\nuser: hé?\nassistant: ", 0),
    ("ho</s>", 1),
    ("\nuser: and?\nassistant: ", 0),
    ("</s>", 1),
    ("\n", 0),
]
TASK = {
    "Definition": ["Answer.", "Be brief."],
    "Positive Examples": [
        {"input": "a", "output": ["b"], "explanation": "e"},
        {"input": "c", "output": ["d"]},
    ],
    "Instances": [{"id": "t-1", "input": "x", "output": ["y"]}, {"id": "t-2", "input": "", "output": ["z"]}],
}
HEAD = "Answer. Be brief.\n\nInput: a\nOutput: b\n\nInput: c\nOutput: d"
# Rows of each shape, and their examples as (text, weight). "</s>" is the end token.
ROWS: dict[str, list[tuple[dict[str, Any], list[list[tuple[str, int]]]]]] = {
    "flan": [
        ({"inputs": "q: é", "targets": "ja", "task_name": "t"}, [[("q: é", 0), ("ja</s>", 1)]]),
        ({"inputs": "", "targets": "x"}, [[("x</s>", 1)]]),
        ({"inputs": "q:  ", "targets": ""}, [[("q:", 0), ("  </s>", 1)]]),
    ],
    "p3": [
        (
            {"inputs": [1, 2], "inputs_pretokenized": "q\n", "targets": [3], "targets_pretokenized": "a"},
            [[("q\n", 0), ("a</s>", 1)]],
        )
    ],
    "prompt_completion": [
        ({"prompt": "the sea", "completion": " is"}, [[("the sea", 0), (" is</s>", 1)]]),
        ({"prompt": MESSAGES[:4], "completion": MESSAGES[4:]}, [[
            ("system: be kind\nuser: hé?\nassistant: ho</s>\nuser: and?\nassistant: ", 0), ("</s>", 1), ("\n", 0),
        ]]),
    ],
    "natural_instructions": [
        (TASK, [
            [(f"{HEAD}\n\nInput: x\nOutput:", 0), (" y</s>", 1)],
            [(f"{HEAD}\n\nInput: \nOutput:", 0), (" z</s>", 1)],
        ]),
        ({"Definition": "D", "Instances": [{"input": "i", "output": "o"}]}, [[
            ("D\n\nInput: i\nOutput:", 0), (" o</s>", 1),
        ]]),
    ],
    "alpaca": [
        ({"instruction": "do", "input": "it", "output": "done"}, [[("do\n\nit\n\n", 0), ("done</s>", 1)]]),
        ({"instruction": "do", "input": "", "output": "done"}, [[("do\n\n", 0), ("done</s>", 1)]]),
        ({"instruction": "do", "output": "done", "input": None}, [[("do\n\n", 0), ("done</s>", 1)]]),
    ],
    "dolly": [
        ({"instruction": "do", "context": "c", "response": "r", "category": "x"}, [[("do\n\nc\n\n", 0), ("r</s>", 1)]]),
        ({"instruction": "do", "context": "", "response": "r"}, [[("do\n\n", 0), ("r</s>", 1)]]),
    ],
    "sharegpt": [
        ({"conversations": [
            {"from": {"user": "human", "assistant": "gpt"}.get(role, role), "value": text} for role, text in TURNS
        ]}, [CHAT]),
        ({"system": "s", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, [[
            ("system: s\nuser: a\nassistant: ", 0), ("b</s>", 1), ("\n", 0),
        ]]),
        ({"conversations": {"from": ["human", "gpt"], "value": ["a", "b"]}}, [[
            ("user: a\nassistant: ", 0), ("b</s>", 1), ("\n", 0),
        ]]),
    ],
    "messages": [
        ({"messages": MESSAGES}, [CHAT]),
        ({"messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": None},
            {"role": "assistant", "content": [{"type": "text", "text": "c"}], "tool_calls": None},
        ]}, [[("user: ab\nassistant: ", 0), ("c</s>", 1), ("\n", 0)]]),
        ({"messages": [
            {"role": "assistant", "content": "hi"}, {"role": "user", "content": "x"}, {"role": "tool", "content": "t"},
            {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"},
        ]}, [[
            ("assistant: ", 0), ("hi</s>", 1), ("\nuser: x\ntool: t\nassistant: ", 0), ("a</s>", 1),
            ("\nassistant: ", 0), ("b</s>", 1), ("\n", 0),
        ]]),
    ],
    "text": [({"text": "all é"}, [[("all é</s>", 1)]]), ({"text": ""}, [])],
}  # fmt: skip


def config_of(files: Sequence[Any] = (), **data: Any) -> Config:
    fields = {
        "task": "instructions",
        "vocabulary": "bytes",
        "sequence_length": 32,
        "train_files": tuple(map(str, files)),
    }
    return resolve({"data": {**fields, **data}, "train": {"batch_size": 2}})


def source_of(config: Config, seed: int = 0) -> Any:
    return build.InstructionsTask(config.data).source(seed)


def examples_of(config: Config) -> list[Example]:
    source = source_of(config)
    return [source.source[i] for i in range(len(source.source))]


def written(path: pathlib.Path, rows: Sequence[Any]) -> pathlib.Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def naive(parts: list[tuple[str, int]]) -> list[tuple[int, float]]:
    """Return id and weight of every token, for the vocabulary of bytes."""
    found = []
    for text, weight in parts:
        for end, part in enumerate(text.split("</s>")):
            found += [(EOS, weight)] if end else []
            found += [(3 + byte, weight) for byte in part.encode()]
    return found


def pairs(example: Example) -> list[tuple[int, float]]:
    assert example.ids.dtype == np.int32 and example.weights.dtype == np.float32
    return [*zip(example.ids.tolist(), example.weights.tolist(), strict=True)]


@pytest.fixture
def template(tmp_path: pathlib.Path) -> str:
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    return str(tmp_path / "chat.jinja")


@pytest.mark.parametrize("format_", SHAPES)
def test_the_weight_of_every_token(format_: str, tmp_path: pathlib.Path, template: str) -> None:
    """Found by the keys, and by the name of the format; as JSON and as Parquet."""
    rows = [row for row, _ in ROWS[format_]]
    expected = [naive(parts) for _, examples in ROWS[format_] for parts in examples]
    path = written(tmp_path / "x.jsonl", rows)
    for chosen in ("auto", format_):
        found = examples_of(config_of([path], format=chosen, chat_template=template))
        assert [pairs(example) for example in found] == expected
        assert all(example.text_bytes == 0 for example in found)
    for number, row in enumerate(rows):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / f"{number}.parquet")
    columns = config_of([f"{tmp_path}/*.parquet"], chat_template=template)
    assert [pairs(example) for example in examples_of(columns)] == expected


def test_all_shapes_in_one_file(tmp_path: pathlib.Path, template: str) -> None:
    rows = [row for shape in ROWS.values() for row, _ in shape]
    expected = [naive(parts) for shape in ROWS.values() for _, examples in shape for parts in examples]
    config = config_of([written(tmp_path / "x.jsonl", rows)], chat_template=template)
    assert [*map(pairs, examples_of(config))] == expected
    source = source_of(config)
    assert [pairs(example) for example in source.source.read([3, 0, 3])] == [expected[i] for i in (3, 0, 3)]
    assert sorted(map(pairs, source.epoch(1))) == sorted(expected)


def test_options(tmp_path: pathlib.Path, template: str) -> None:
    path = written(tmp_path / "x.jsonl", [ROWS["flan"][0][0], TASK])
    task = [("Answer. Be brief.\n\nInput: a\nOutput: b\n\nInput: x\nOutput:", 0), (" y</s>", 1)]
    found = examples_of(config_of([path], separator=" -> ", positive_examples=1))
    assert pairs(found[0]) == naive([("q: é ->", 0), (" ja</s>", 1)]) and pairs(found[1]) == naive(task)
    found = examples_of(config_of([path], as_chat=True, positive_examples=0, chat_template=template))
    assert pairs(found[0]) == naive([("user: q: é\nassistant: ", 0), ("ja</s>", 1), ("\n", 0)])
    chat = [("user: Answer. Be brief.\n\nInput: x\nOutput:\nassistant: ", 0), ("y</s>", 1), ("\n", 0)]
    assert pairs(found[1]) == naive(chat)


def test_one_of_several_outputs_is_drawn(tmp_path: pathlib.Path) -> None:
    outputs = [f"o{i}" for i in range(5)]
    row = {"Definition": "D", "Instances": [{"input": f"i{n}", "output": outputs} for n in range(40)]}
    config = config_of([written(tmp_path / "x.jsonl", [row])])
    seeds = [
        [BYTES.decode(source_of(config, seed).source[i].ids.tolist())[-2:] for i in range(40)]
        for seed in (0, 0, 1)
    ]
    assert seeds[0] == seeds[1] != seeds[2] and {*seeds[0]} == {*outputs}


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_vocabulary(write_folder(tmp_path_factory.mktemp("bpe"), "qwen", None))


@settings(max_examples=40, deadline=None)
@given(parts=st.lists(st.tuples(st.text("the capital😀é\n "), st.sampled_from([0.0, 0.5, 1.0])), min_size=1))
def test_weights_of_tokens_of_several_characters(parts: Run, bpe: Any) -> None:
    """A token has the largest weight of its bytes, which are found without offsets."""
    run = [(text, weight) for text, weight in parts if text]
    [(ids, weights)] = TokenWeights(bpe).encode([[run] if run else []])
    assert ids.tolist() == bpe.encode("".join(text for text, _ in run))
    by_byte = [weight for text, weight in run for _ in text.encode()]
    begin, expected = 0, []
    for id_ in ids.tolist():
        # Each character of a piece stands for a byte.
        end = begin + len(bpe.piece(id_))
        expected.append(max(by_byte[begin:end]))
        begin = end
    assert begin == len(by_byte) and weights.tolist() == expected


@settings(max_examples=30, deadline=None)
@given(prompt=st.text("the sea é\n"), answer=st.text("the sea é\n", min_size=1))
def test_sentencepiece_cuts_where_the_prompt_ends(
    prompt: str, answer: str, vocabulary_names: dict[str, str]
) -> None:
    """The tokens are those of the whole text; those without weight are the beginning that it shares with the prompt."""
    vocabulary = load_vocabulary(vocabulary_names["unnormalised"])
    run = [part for part in pair_run(Pair(prompt, answer)) if part[0]]
    [(ids, weights)] = TokenWeights(vocabulary).encode([[run]])
    assert ids.tolist() == vocabulary.encode(prompt + answer)
    given_ids = vocabulary.encode(prompt.rstrip(" ")) if prompt.rstrip(" ") else []
    shared = [a == b for a, b in zip(given_ids, ids.tolist(), strict=False)]
    common = len([*itertools.takewhile(bool, shared)])
    assert (weights[common:] == 1).all() or common < len(given_ids)
    assert int((weights == 0).sum()) <= len(given_ids) + 1
    assert sorted(weights.tolist()) == weights.tolist()


def test_chats_of_a_sentencepiece_model(tmp_path: pathlib.Path, vocabulary_names: dict[str, str]) -> None:
    """Control tokens of the template are ids, those that a message spells are text."""
    name = vocabulary_names["unnormalised"]
    vocabulary = load_vocabulary(name)
    (tmp_path / "chat.jinja").write_text(unmarked(TEMPLATES["llama2"]))
    turns = ["the <s> sea", "is </s>green", "and?", ""]
    messages = [{"role": ["user", "assistant"][n % 2], "content": text} for n, text in enumerate(turns)]
    path = written(tmp_path / "x.jsonl", [{"messages": messages}])
    [example] = examples_of(config_of([path], vocabulary=name, chat_template=str(tmp_path / "chat.jinja")))
    # Prompt and answer of each run. A run ends within a control token that is spelled; between those of the template,
    # texts are encoded whole.
    runs = [
        ("[INST] the <", ""),
        ("s> sea [/INST]", " is <"),
        ("", "/s>green "),
        ("[INST] and? [/INST]", "  "),
    ]
    encoded: list[list[tuple[int, float]]] = []
    for prompt, answer in runs:
        ids, before = vocabulary.encode(prompt + answer), vocabulary.encode(prompt) if prompt else []
        common = sum(itertools.takewhile(bool, map(operator.eq, before, ids)))
        encoded.append([(id_, float(place >= common)) for place, id_ in enumerate(ids)])
    begin, end = (1, 0.0), (2, 1.0)
    assert pairs(example) == [begin, *encoded[0], *encoded[1], *encoded[2], end, begin, *encoded[3], end]


def batches_of(config: Config, shard: tuple[int, int] = (0, 1)) -> Any:
    return build.make_batches(config.data, block_size=16, batch_size=4, seed=0, shard=shard, vocab_size=300)


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
    batches = build.make_batches(config.data, block_size=16, batch_size=1, seed=0)
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
