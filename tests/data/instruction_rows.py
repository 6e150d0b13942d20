"""Rows of every shape with the weights of their tokens, and how tests read them."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from fam_jax.config import Config, resolve
from fam_jax.data import build
from fam_jax.data.interface import Example
from fam_jax.data.vocabulary import load_vocabulary

BYTES = load_vocabulary("bytes")
EOS = BYTES.eos_id
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
