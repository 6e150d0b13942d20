"""Instruction data: the weight of every token, for every shape of rows; the data task; mistakes."""

import itertools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fam_jax.config import Config, resolve
from fam_jax.data import build
from fam_jax.data.chat import Run
from fam_jax.data.instructions import SHAPES, Pair, pair_run
from fam_jax.data.interface import Example
from fam_jax.data.token_weights import TokenWeights
from fam_jax.data.vocabulary import load_vocabulary
from tests.data.chat_templates import write_folder

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
