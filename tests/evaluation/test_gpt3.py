"""GPT-3's tasks: prompts as published, and scores of models that are right, wrong or guessing."""

import zlib
from collections.abc import Callable

import pytest

from fam_jax.config import UserError
from fam_jax.evaluation.answering import Answering, HowToAnswer
from fam_jax.evaluation.item import Answered, Item, ItemTask
from fam_jax.evaluation.item_tasks import ITEM_TASKS
from fam_jax.evaluation.item_tasks.gpt3 import PUBLISHED, TASKS
from fam_jax.evaluation.summary import summarize
from tests.evaluation.fake import FakeStreamer, joiner, model_for, request_for, rows_of
from tests.evaluation.fixtures import GPT3

NAMES = [task.name for task in TASKS]


def items_of(name: str, shots: int = 0, **fields: object) -> list[Item]:
    rows = GPT3[name]
    return [*ITEM_TASKS[name].items(request_for(rows_of(test=rows, train=rows[:-1]), shots=shots, **fields))]


def run(task: ItemTask, items: list[Item], model: FakeStreamer, batch_size: int = 4) -> list[Answered]:
    how = HowToAnswer(batch_size, 2, task.max_tokens, task.stop)
    answers = {
        each.item.id: each for part in Answering(model, joiner(), how, [0]).run(items) for each in part
    }
    return [answers[item.id] for item in items]


def right(item: Item, number: int) -> float:
    return -1.0 if number == item.gold else -3.0


def wrong(item: Item, number: int) -> float:
    return -3.0 if number == item.gold else -1.0


def random(item: Item, number: int) -> float:
    return -1.0 - zlib.crc32(f"{item.id} {number}".encode()) / (1 << 32)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shots", [0, 2])
def test_a_model_that_is_right_scores_1(name: str, shots: int) -> None:
    task, items = ITEM_TASKS[name], items_of(name, shots)
    found = summarize(task, run(task, items, model_for(task, items, right)))
    assert found["value"] == 1 and found["ties"] == 0 and found["n"] == len(items)
    assert found["tokens_read"] == found["tokens_expected"] > 0
    assert set(found["metrics"].values()) == {1.0}
    assert found["ci95"] is None or found["ci95"][1] == 1


@pytest.mark.parametrize("name", [task.name for task in TASKS if task.max_tokens == 0])
def test_a_model_that_is_wrong_scores_0(name: str) -> None:
    task, items = ITEM_TASKS[name], items_of(name)
    assert summarize(task, run(task, items, model_for(task, items, wrong)))["value"] == 0


def test_a_guesser_scores_chance() -> None:
    task = ITEM_TASKS["winogrande"]
    rows = [{**row, "sentence": f"{n} {row['sentence']}"} for n, row in enumerate(GPT3["winogrande"] * 40)]
    items = [*task.items(request_for(rows_of(test=rows)))]
    found = summarize(task, run(task, items, model_for(task, items, random)))
    assert found["chance"] == 0.5 and found["ci95"][0] < 0.5 < found["ci95"][1]


def test_equal_choices_are_ties_and_the_first_is_taken() -> None:
    task, items = ITEM_TASKS["wic"], items_of("wic")
    found = summarize(task, run(task, items, model_for(task, items, lambda *_: -1.0)))
    assert found["ties"] == len(items)
    assert found["metrics"]["acc_token"] == sum(item.gold == 0 for item in items) / len(items)


@pytest.mark.parametrize("name", NAMES)
def test_shots_depend_on_seed_and_item_alone(name: str) -> None:
    few, again, other = items_of(name, 3), items_of(name, 3), items_of(name, 3, seed=1)
    assert few == again != other
    for item, bare in zip(few, items_of(name), strict=True):
        assert item.references == bare.references
        # No item is among its own examples, if both come from the same rows.
        if name in ("winograd", "wsc285"):
            whole = bare.contexts[bare.gold] + bare.choices[0]
            assert not any(whole in context for context in item.contexts)


def context_of(name: str, number: int = 0, shots: int = 0) -> str:
    return items_of(name, shots)[number].context


def test_prompts() -> None:
    assert context_of("anli_r1") == (
        "anli 1: anli 1: Ada left the lamp at the mill.\nQuestion: The lamp is at the moon True, False, or Neither?"
    )
    assert context_of("boolq").endswith("\nquestion: does Ada keep a lamp?\nanswer:")
    assert context_of("copa") == "The lamp of Ada fell because" and context_of("copa", 1).endswith(
        "therefore"
    )
    assert items_of("copa")[0].choices == (" the wind blew.", " it broke.")
    assert context_of("hellaswag") == (
        "Finding a lamp: How to find a lamp. Look in the mill. Ada opens the door"
    )
    assert items_of("hellaswag")[0].choices[2] == " and sings to it."
    assert context_of("multirc").startswith("READING COMPREHENSION ANSWER KEY\n\nAda and Bert went out.")
    assert context_of("multirc", shots=2).count("READING COMPREHENSION") == 1
    assert items_of("multirc")[1].choices == ("- [True] nobody", "- [False] nobody")
    assert context_of("race_high", 1).endswith(
        "Q: What did Ada lose?\n\nA: a lamp\n\nQ: Where did it lie?\n\nA:"
    )
    assert context_of("record") == "Ada showed Zoe a lamp.\n\n- It came from the mill\n- Zoe was glad"
    assert items_of("record")[0].choices == ("\n- The lamp of Ada was old.", "\n- The lamp of Zoe was old.")
    assert items_of("winograd")[0].contexts == (
        "The lamp fell on the mill because Ada",
        "The lamp fell on the mill because Zoe",
    )
    assert items_of("winograd")[1].contexts[1].endswith("because Zoe's")
    assert items_of("winograd")[1].choices == (" hands were small.",)
    assert context_of("lambada") == "Ada had a lamp . the mill was closed to"
    assert context_of("lambada", shots=1).endswith(
        "Fill in blank:\n\nAda had a lamp . the mill was closed to ____. ->"
    )
    assert context_of("squad_v2", 1) == (
        "Title: Things 0\n\nBackground: Ada keeps a lamp in the harbour.\n\n"
        "Q: Who keeps it?\n\nA: Ada\n\nQ: When was it bought?\n\nA:"
    )


def test_the_published_files_of_super_glue_and_squad_say_the_same() -> None:
    """They nest their rows; TFDS has a row per answer, or per question."""
    nested: dict = {}
    for row in GPT3["multirc"]:
        index = row["idx"]
        text = nested.setdefault(index["paragraph"], {"text": row["paragraph"], "questions": {}})
        asked = text["questions"].setdefault(
            index["question"], {"idx": index["question"], "question": row["question"], "answers": []}
        )
        asked["answers"].append({"text": row["answer"], "label": row["label"]})
    rows = [
        {"idx": number, "passage": {"text": each["text"], "questions": [*each["questions"].values()]}}
        for number, each in nested.items()
    ]
    assert [*ITEM_TASKS["multirc"].items(request_for(rows_of(test=rows)))] == items_of("multirc")
    articles = []
    for begin in range(0, 30, 3):
        three = GPT3["squad_v2"][begin : begin + 3]
        asked = [
            {"question": r["question"], "answers": [{"text": t} for t in r["answers"]["text"]]} for r in three
        ]
        articles.append(
            {"title": three[0]["title"], "paragraphs": [{"context": three[0]["context"], "qas": asked}]}
        )
    found = [*ITEM_TASKS["squad_v2"].items(request_for(rows_of(test=articles)))]
    assert [item.context for item in found] == [item.context for item in items_of("squad_v2")]


def test_rows_of_tfds_and_of_the_published_files_say_the_same() -> None:
    """TFDS has numbers for labels, and other fields."""

    def arc(row: dict) -> dict:
        labels = row["choices"]["label"]
        number = "ABC".index(row["answerKey"])
        return {**row, "choices": {**row["choices"], "label": [*range(len(labels))]}, "answerKey": number}

    def openbookqa(row: dict) -> dict:
        choices = zip("ABCD", row["choices"]["text"], strict=True)
        question = {"stem": row["question_stem"], **{f"choice_{letter}": text for letter, text in choices}}
        return {"question": question, "answerKey": "ABCD".index(row["answerKey"])}

    def openbookqa_file(row: dict) -> dict:
        choices = [{"text": t, "label": x} for t, x in zip(row["choices"]["text"], "ABCD", strict=True)]
        return {"question": {"stem": row["question_stem"], "choices": choices}, "answerKey": row["answerKey"]}

    def named(*names: str) -> Callable[[dict], dict]:
        return lambda row: {**row, "label": names[row["label"]]}

    def winogrande(row: dict) -> dict:
        return {**{k: v for k, v in row.items() if k != "answer"}, "label": int(row["answer"]) - 1}

    def hellaswag(row: dict) -> dict:
        return {
            "context": row["ctx"],
            **{k: v for k, v in row.items() if k != "ctx"},
            "label": int(row["label"]),
        }

    others = (
        ("arc_easy", arc),
        ("openbookqa", openbookqa),
        ("openbookqa", openbookqa_file),
        ("anli_r1", named("e", "n", "c")),
        ("cb", named("entailment", "contradiction", "neutral")),
        ("boolq", lambda row: {**row, "label": bool(row["label"])}),
        ("rte", lambda row: {**row, "label": int(row["label"] == "not_entailment")}),
        ("winogrande", winogrande),
        ("hellaswag", hellaswag),
    )
    for name, change in others:
        rows = [change(row) for row in GPT3[name]]
        assert [*ITEM_TASKS[name].items(request_for(rows_of(test=rows)))] == items_of(name), name


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("boolq", {"label": -1}, "row 1: the label -1 is none of false, true; use a split with labels"),
        ("rte", {"label": "maybe"}, "the label 'maybe' is none of entailment, not_entailment"),
        ("piqa", {"goal": None}, "row 1: has no field 'goal'"),
        ("arc_easy", {"answerKey": ""}, "the answer '' is none of its choices; use a split with answers"),
        ("web_questions", {"answers": []}, "has no answer; use a split with answers"),
    ],
)
def test_rows_that_are_wrong(name: str, change: dict, message: str) -> None:
    row = {key: value for key, value in {**GPT3[name][0], **change}.items() if value is not None}
    with pytest.raises(UserError, match=message):
        [*ITEM_TASKS[name].items(request_for(rows_of(test=[row])))]


def test_too_many_shots() -> None:
    with pytest.raises(UserError, match=r"--shots=20: train has only 9 examples to show; ask for fewer"):
        items_of("boolq", 20)


def test_published_figures_belong_to_tasks() -> None:
    assert {*PUBLISHED} <= {*NAMES}
    assert ITEM_TASKS["trivia_qa"].published == {
        "GPT-3 175B, 0 shots": 0.643,
        "GPT-3 175B, 1 shots": 0.680,
        "GPT-3 175B, 64 shots": 0.712,
    }


def test_answers_of_the_known_edges() -> None:
    """TriviaQA's normalisation, the first word of LAMBADA, and what says that there is no answer."""

    def values(name: str, text: str, *references: str, **facts: object) -> dict[str, float]:
        item = Item("0", "generate", references=references, facts=facts)
        return ITEM_TASKS[name].values(Answered(item, text=text))

    assert values("trivia_qa", " U.S.", "u s") == {"exact_match": 1}
    assert values("natural_questions", " The U.S.", "us") == {"exact_match": 1}
    assert values("lambada", " Mill, and more", "mill") == {"exact_match": 1}
    assert values("lambada", "", "mill") == values("lambada", " the mill", "mill") == {"exact_match": 0}
    for said in ("Unanswerable.", "", " "):
        assert values("squad_v2", said, "") == {"exact_match": 1, "f1": 1}
        assert values("squad_v2", said, "mill") == {"exact_match": 0, "f1": 0}


def test_questions_on_one_text_are_one_group() -> None:
    """They are resampled and drawn together, as they are not independent."""
    for name, each in (("race_high", 2), ("squad_v2", 3), ("multirc", 3)):
        groups = [item.group for item in items_of(name)]
        assert all(groups) and {groups.count(group) for group in groups} == {each}
    task, items = ITEM_TASKS["multirc"], items_of("multirc")
    found = summarize(task, run(task, items, model_for(task, items, lambda *_: -1.0)))
    assert found["documents"] == 10 and found["ci95"][0] <= found["value"] <= found["ci95"][1]
