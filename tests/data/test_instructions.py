"""Instruction data: the weight of every token, for every shape of rows."""

import itertools
import operator
import pathlib
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fam_jax.data.chat import Run
from fam_jax.data.instructions import SHAPES, Pair, pair_run
from fam_jax.data.token_weights import TokenWeights
from fam_jax.data.vocabulary import load_vocabulary
from tests.data.chat_templates import TEMPLATES, unmarked, write_folder
from tests.data.instruction_rows import (
    BYTES,
    ROWS,
    TASK,
    config_of,
    examples_of,
    naive,
    pairs,
    source_of,
    written,
)


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
