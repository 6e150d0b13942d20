"""Suites that are read from their published files: RULER, BABILong, LongBench, InfiniteBench, NoLiMa."""

import importlib.util
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import pytest

from fam_jax.config import UserError
from fam_jax.evaluation.answering import Answering, HowToAnswer
from fam_jax.evaluation.item import CHOOSE, GENERATE, Answered, Item, Likelihood
from fam_jax.evaluation.item_tasks import ITEM_TASKS, infinitebench, longbench
from fam_jax.evaluation.item_tasks.nolima import BOOKS
from fam_jax.evaluation.planning import SUITES, availability, find_tasks
from fam_jax.evaluation.rows import Data, MissingDataError
from fam_jax.evaluation.summary import summarize
from tests.evaluation.fake import FakeStreamer, joiner, model_for, request_for, rows_of, whole_text
from tests.evaluation.fixtures import NAMES, PLACES, THINGS

NEEDS_ROUGE = pytest.mark.skipif(importlib.util.find_spec("rouge_score") is None, reason="needs rouge-score")


def items_of(name: str, *rows: dict[str, Any]) -> list[Item]:
    return [*ITEM_TASKS[name].items(request_for(rows_of(test=rows)))]


def values(name: str, item: Item, text: str) -> dict[str, float]:
    return ITEM_TASKS[name].values(Answered(item, text=text))


def write(path: pathlib.Path, *rows: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def ruler(**fields: Any) -> dict[str, Any]:
    return {
        "index": 0,
        "input": "The grass is green. One of the numbers for drum is: 71. What is the number?",
        "outputs": ["71", "82"],
        "length": 4000,
        **fields,
    }


def test_ruler_counts_answers_wherever_they_stand() -> None:
    row = ruler(answer_prefix=" The numbers are", token_position_answer=1000)
    (item,) = items_of("ruler:niah_multivalue", row)
    assert whole_text(item) == f"{row['input']} The numbers are"
    assert item.facts == {"length": 4096, "depth": 0.25}
    assert values("ruler:niah_multivalue", item, "82 or 9") == {"recall": 0.5, "any": 1}
    (word,) = items_of("ruler:qa_1", ruler(outputs=["Ada L"]))
    assert values("ruler:qa_1", word, "it was ADA LOVELACE") == {"recall": 1, "any": 1}
    assert word.context == "" and values("ruler:qa_1", word, "ada") == {"recall": 0, "any": 0}
    assert (ITEM_TASKS["ruler:qa_1"].headline, ITEM_TASKS["ruler:vt"].headline) == ("any", "recall")
    with pytest.raises(UserError, match="row 1: outputs is empty"):
        items_of("ruler:vt", ruler(outputs=[]))


def test_lengths_come_from_the_names_of_folders(tmp_path: pathlib.Path) -> None:
    for length in ("4096", "128k", "notes"):
        write(tmp_path / "ruler" / length / "data/vt/validation.jsonl", ruler(), ruler(index=1))
    task, data = ITEM_TASKS["ruler:vt"], Data([str(tmp_path)])
    source = f"{tmp_path}/ruler/*/data/vt/validation.jsonl"
    assert data.source(task, "test") == source
    rows = data.rows(task, "test")
    assert [row.id for row in rows] == ["128k/0", "128k/1", "4096/0", "4096/1", "notes/0", "notes/1"]
    assert rows[3].where == f"{tmp_path}/ruler/4096/data/vt/validation.jsonl: row 2"
    items = [*task.items(request_for(lambda split: data.rows(task, split)))]
    assert [item.facts["length"] for item in items] == [131072, 131072, 4096, 4096, 4096, 4096]
    (line,) = availability(["ruler:vt"], data)
    assert line[2] == source


def test_files_of_a_pattern_may_differ_in_their_own_names(tmp_path: pathlib.Path) -> None:
    row = {"input": "Ada went to the office.", "question": "Where is Ada?", "target": "office"}
    for name in ("0k", "16k", ".hidden"):
        write(tmp_path / "babilong/qa1" / f"{name}.jsonl", row)
    write(tmp_path / "babilong/qa1/8k.txt", row)
    task, data = ITEM_TASKS["babilong:qa1"], Data([str(tmp_path)])
    assert [row.id for row in data.rows(task, "test")] == ["0k/0", "16k/0"]
    items = [*task.items(request_for(lambda split: data.rows(task, split)))]
    assert [item.facts["length"] for item in items] == [0, 16384]
    with pytest.raises(MissingDataError, match=r"put babilong/LENGTH/qa2\.jsonl into a folder of --data"):
        data.source(ITEM_TASKS["babilong:qa2"], "test")


@pytest.mark.parametrize(
    ("task", "question", "target", "text", "exact", "official"),
    [
        ("qa1", "Where is Mary?", "office", " Mary is in the office. The garden", 1, 1),
        ("qa1", "Where is Mary?", "office", "the office or the garden", 0, 0),
        ("qa1", "Where is Mary?", "office", "", 0, 0),
        # Named by the question, so no answer.
        ("qa3", "Where was the milk before the kitchen?", "garden", "Before the kitchen, the garden", 1, 1),
        # Two faults of the published scorer: "one" is a part of "none", "no" of "north".
        ("qa7", "How many things has Mary?", "none", "none", 1, 0),
        ("qa6", "Is Mary there?", "yes", "yes, north of it", 1, 0),
        ("qa8", "What has Mary?", "apple,milk", "the milk and the apple", 1, 1),
        ("qa8", "What has Mary?", "apple,milk", "the milk", 0, 0),
        ("qa19", "How do you go there?", "n,w", "n, w", 1, 0),
        ("qa19", "How do you go there?", "n,w", "n,w", 1, 1),
    ],
)
def test_babilong_counts_the_answers_that_are_named(
    task: str, question: str, target: str, text: str, exact: float, official: float
) -> None:
    name = f"babilong:{task}"
    (item,) = items_of(name, {"input": "Mary went away.", "question": question, "target": target})
    assert values(name, item, text) == {"exact": exact, "official": official}


def test_babilong_asks_behind_the_text() -> None:
    row = {"input": " Mary went away.\n", "question": "Where is Mary? ", "target": "office"}
    (item,) = items_of("babilong:qa1", row)
    assert whole_text(item) == "Mary went away.\n\nQuestion: Where is Mary?\nAnswer:".lstrip()
    assert item.kind == GENERATE and item.facts == {"question": "Where is Mary?"}


def long_row(**fields: Any) -> dict[str, Any]:
    return {
        "_id": "a1",
        "context": "Ada left the lamp at the mill.",
        "input": "Where is the lamp?",
        "answers": ["at the mill", "the old mill"],
        "length": 5000,
        "language": "en",
        "all_classes": None,
        **fields,
    }


def test_longbench_asks_and_takes_the_best_reference() -> None:
    (item,) = items_of("longbench:hotpotqa", long_row())
    assert whole_text(item) == "Ada left the lamp at the mill.\n\nQuestion: Where is the lamp?\nAnswer:"
    assert item.id == "a1" and item.facts == {"language": "en", "length": 8192}
    assert values("longbench:hotpotqa", item, " The old mill\nat the sea") == {"f1": 1}
    assert values("longbench:hotpotqa", item, "sea") == {"f1": 0}
    with pytest.raises(UserError, match="answers is no list of texts"):
        items_of("longbench:hotpotqa", long_row(answers="mill"))


def test_words_in_chinese_are_characters() -> None:
    (item,) = items_of("longbench:multifieldqa_zh", long_row(answers=["红灯"]))
    assert values("longbench:multifieldqa_zh", item, "红") == {"f1": pytest.approx(2 / 3)}
    assert values("longbench:multifieldqa_zh", item, "") == {"f1": 0}


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Number of something", 1),
        # "Number" is a part of the right class, and does not count against it.
        ("Number of something, or Date", 0.5),
        ("Number", 0),
        ("Date", 0),
        ("", 0),
    ],
)
def test_classes_that_are_named(text: str, score: float) -> None:
    classes = ["Number", "Number of something", "Date"]
    (item,) = items_of("longbench:trec", long_row(answers=["Number of something"], all_classes=classes))
    for _ in range(2):  # scoring changes nothing
        assert values("longbench:trec", item, text) == {"accuracy": score}


def test_numbers_and_code() -> None:
    (count,) = items_of("longbench:passage_count", long_row(answers=["7"]))
    assert values("longbench:passage_count", count, "7 of 14") == {"accuracy": 0.5}
    assert values("longbench:passage_count", count, "seven") == {"accuracy": 0}
    (found,) = items_of("longbench:passage_retrieval_en", long_row(answers=["Paragraph 17"]))
    assert values("longbench:passage_retrieval_en", found, " 17") == {"accuracy": 1}
    (code,) = items_of("longbench:lcc", long_row(input="", answers=["return x + 1"]))
    assert whole_text(code) == code.document.load()
    assert values("longbench:lcc", code, "\n# a comment\nreturn x + 1\nreturn 2") == {"edit_similarity": 1}
    assert 0 < values("longbench:lcc", code, "return y")["edit_similarity"] < 1
    assert values("longbench:lcc", code, "# nothing") == {"edit_similarity": 0}


@NEEDS_ROUGE
def test_summaries_are_whole_texts() -> None:
    (item,) = items_of("longbench:gov_report", long_row(answers=["one two three"]))
    assert values("longbench:gov_report", item, "one\ntwo three") == {"rouge_l": 1}
    (chinese,) = items_of("longbench:vcsum", long_row(answers=["红灯"]))
    assert values("longbench:vcsum", chinese, "红灯") == {"rouge_l": 1}


def test_longbench_2_has_four_options() -> None:
    row = {
        "_id": "b", "context": "word " * 3000, "question": "Which?", "answer": "C",
        **{f"choice_{letter}": f"option {letter}" for letter in "ABCD"},
    }  # fmt: skip
    (item,) = items_of("longbench_v2", row)
    assert item.kind == CHOOSE and item.gold == 2 and item.choices[2] == " option C"
    assert item.facts == {"length": 4096}
    with pytest.raises(UserError, match="answer is 'E', not a letter"):
        items_of("longbench_v2", {**row, "answer": "E"})


def infinite(**fields: Any) -> dict[str, Any]:
    return {
        "id": 3,
        "context": "Some text. ",
        "input": "What is it?",
        "answer": ["71"],
        "options": [],
        **fields,
    }


@pytest.mark.parametrize(
    ("task", "answer", "text", "score"),
    [
        ("passkey", ["71"], " 71.", 1),
        ("passkey", ["71"], "7 71", 0),
        ("number_string", ["0071"], "0071", 1),
        ("number_string", ["0071"], "71", 0),
        ("kv_retrieval", ["de3f-a1"], '"de3f-a1".', 1),
        ("kv_retrieval", ["de3f-a1"], "de3f-a12", 0),
        ("longdialogue_qa_eng", ["ACKLEY", "BOB"], "It is Bob!", 1),
        ("longdialogue_qa_eng", ["ACKLEY"], "Ack", 0),
        ("math_find", [7.5], "7.50 or 8", 1),
        ("math_find", [7], "8 or 7", 0),
        ("math_find", [7], "", 0),
        ("math_calc", [[1, -4, 8, 2]], "[1, -4, 8, 3]", 0.75),
        ("math_calc", [[1, 4]], "4", 0),
        ("code_run", [-12], "so it is -12", 1),
        ("code_run", [-12], "none", 0),
        ("longbook_qa_eng", ["the mill", "a tower"], "tower", 1),
        ("longbook_qa_chn", ["红灯"], "红", pytest.approx(2 / 3)),
    ],
)
def test_infinitebench_scores(task: str, answer: Any, text: str, score: float) -> None:
    name = f"infinitebench:{task}"
    (item,) = items_of(name, infinite(answer=answer))
    assert item.kind == GENERATE and item.id == "3"
    assert [*values(name, item, text).values()] == [score]


def test_infinitebench_options() -> None:
    options = ["one", "two", "three", "four"]
    for answer in (["three"], "three", ["C"], ["three", "C"]):
        (item,) = items_of("infinitebench:code_debug", infinite(answer=answer, options=options))
        assert item.kind == CHOOSE and item.gold == 2 and item.choices[2] == " three"
    likelihoods = tuple(Likelihood(-1.0 - (n != 2), 1, 3) for n in range(4))
    found = ITEM_TASKS["infinitebench:code_debug"].values(Answered(item, likelihoods))
    assert found["acc_token"] == 1
    with pytest.raises(UserError, match="the answer 'five' is none of the options"):
        items_of("infinitebench:code_debug", infinite(answer=["five"], options=options))
    with pytest.raises(UserError, match="answer is empty"):
        items_of("infinitebench:passkey", infinite(answer=[]))


NEEDLES = [
    {
        "id": "0001",
        "needle": "Actually, {CHAR} lives next to the {1}.",
        "questions": {"onehop": "Which character has been to {2}?", "twohop": "Who knows {2} and {1}?"},
        "tests": {"T1": {"input_args": ["opera", "Dresden"]}, "T2": {"input_args": ["tower", "Paris"]}},
        "character_set": ["Yuki", "Stuart"],
    }
]
BOOK = "\n".join(f"{name} saw the {thing}." for name in NAMES for thing in THINGS)


def nolima_items(**fields: Any) -> list[Item]:
    request = request_for(
        rows_of(test=NEEDLES),
        texts=lambda name: {"a": BOOK, "b": BOOK.upper()} if name == BOOKS else {},
        **fields,
    )
    return [*ITEM_TASKS["nolima"].items(request)]


def test_nolima_hides_a_needle_at_every_depth() -> None:
    items = nolima_items(lengths=(400, 800), count=8, seeds=(0, 1))
    assert len({item.id for item in items}) == 32
    for item in items:
        (name,) = item.references
        text = item.document.load()
        assert isinstance(text, str)
        lines = text.split("\n")
        place = next(number for number, line in enumerate(lines) if line.startswith("Actually, "))
        assert name in ("Yuki", "Stuart") and f"Actually, {name} lives next to the" in lines[place]
        assert abs(place / (len(lines) - 1) - item.facts["depth"]) < 0.1
        count = len(joiner().encode(whole_text(item)))
        assert 0.9 * item.facts["length"] < count <= item.facts["length"]
        assert "{" not in item.context and ("Dresden" in item.context) == ("opera" in lines[place])
    # An item depends on its seed, length and index alone, and depths spread evenly.
    assert nolima_items(lengths=(800,), count=2, seeds=(1,)) == [
        i for i in items if i.id in ("800/1/0", "800/1/1")
    ]
    for seed in (0, 1):
        depths = sorted(
            i.facts["depth"] for i in items if i.facts["seed"] == seed and i.facts["length"] == 800
        )
        assert all(n / 8 <= depth <= (n + 1) / 8 for n, depth in enumerate(depths))
    assert (
        ITEM_TASKS["nolima"].values(Answered(items[0], text=f" It is {items[0].references[0]}."))["contains"]
        == 1
    )


def test_nolima_says_which_lengths_do_not_fit() -> None:
    with pytest.raises(UserError, match="--lengths=20 is shorter than a needle and its question"):
        nolima_items(lengths=(20,), count=1)
    with pytest.raises(UserError, match="--lengths=100000 is longer than a book"):
        nolima_items(lengths=(100_000,), count=1)


def test_books_are_text_files_of_a_folder(tmp_path: pathlib.Path) -> None:
    data = Data([str(tmp_path)])
    with pytest.raises(
        MissingDataError, match=r"nolima/haystack/rand_shuffle: is not on disk; put its \.txt files"
    ):
        data.texts(BOOKS)
    folder = tmp_path / BOOKS
    folder.mkdir(parents=True)
    (folder / "rand_book_1.txt").write_text("A line.\n")
    (folder / "notes.md").write_text("no book")
    assert data.texts(BOOKS) == {"rand_book_1": "A line.\n"}
    (folder / "rand_book_2.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="rand_book_2"):
        data.texts(BOOKS)


ROWS: dict[str, dict[str, Any]] = {
    **{f"ruler:{name}": ruler(outputs=[THINGS[0]]) for name in ("niah_single_1", "vt", "cwe", "fwe", "qa_2")},
    "babilong:qa2": {"input": "Ada has the milk.", "question": "Where is the milk?", "target": "office"},
    **{f"longbench:{name}": long_row(answers=[PLACES[0]]) for name in ("qasper", "triviaqa", "musique")},
    "longbench:lsht": long_row(answers=["Date"], all_classes=["Date"]),
    "longbench:repobench-p": long_row(answers=["x = 1"]),
    **{f"infinitebench:{name}": infinite() for name in ("passkey", "number_string", "math_find", "code_run")},
    "infinitebench:longbook_choice_eng": infinite(answer="two", options=["one", "two", "three", "four"]),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_model_that_says_the_right_answer_scores_1(name: str) -> None:
    task, items = ITEM_TASKS[name], items_of(name, ROWS[name])

    def answered(model: FakeStreamer) -> Sequence[Answered]:
        how = HowToAnswer(2, 2, task.max_tokens, task.stop)
        return [each for part in Answering(model, joiner(), how, [0]).run(items) for each in part]

    said = items[0].references[0]
    begin = "" if task.headline == "edit_similarity" else " "
    model = model_for(task, items, lambda item, number: -1.0 - (item.kind == CHOOSE and number != item.gold))
    if items[0].kind == GENERATE:
        whole = whole_text(items[0])
        model = FakeStreamer(
            lambda *_: 0.0, answer=lambda text: f"{begin}{said}" if text == whole.rstrip() else ""
        )
    found = summarize(task, answered(model))
    assert found["value"] == 1 and found["tokens_read"] == found["tokens_expected"] > 0


def test_every_suite_can_be_asked_for() -> None:
    assert {"ruler", "babilong", "longbench", "longbench_v2", "infinitebench", "nolima"} <= {*SUITES}
    counts = {"ruler": 13, "babilong": 20, "longbench": 21, "infinitebench": 12}
    for suite, count in counts.items():
        assert len(find_tasks([suite])) == count
    assert longbench.SUITE == "longbench" and infinitebench.SUITE == "infinitebench"
