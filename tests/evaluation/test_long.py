"""Long tasks: rows of SCROLLS, of the published files and of XL-Sum, and scores over several references."""

import importlib.util

import numpy as np
import pytest

from fam_jax.config import UserError
from fam_jax.evaluation.item import Answered, Document, Encoded, Item, Likelihood, question_first
from fam_jax.evaluation.item_tasks import ITEM_TASKS
from fam_jax.evaluation.item_tasks.long import OF_THE_PAPER
from fam_jax.evaluation.planning import within_tokens
from fam_jax.evaluation.summary import fingerprint, summarize
from tests.evaluation.fake import FakeStreamer, joiner, model_for, request_for, rows_of, whole_text
from tests.evaluation.fixtures import NAMES, PLACES, THINGS
from tests.evaluation.test_gpt3 import right, run, wrong

ARTICLES = [
    f"{name} walked to the {place}.\n\nThere lay a {thing}.\n"
    for name, place, thing in zip(NAMES, PLACES, THINGS, strict=True)
]
NEEDS_ROUGE = pytest.mark.skipif(importlib.util.find_spec("rouge_score") is None, reason="needs rouge-score")


def scrolls(name: str, question: str, article: str, *outputs: str) -> list[dict]:
    row = {"id": name, "input": f"{question}\n\n{article}"}
    return [{**row, "pid": f"{name}_{n}", "output": output} for n, output in enumerate(outputs)]


def items_of(name: str, rows: list[dict]) -> list[Item]:
    return [*ITEM_TASKS[name].items(request_for(rows_of(test=rows)))]


def test_rows_of_scrolls_are_grouped_by_question() -> None:
    rows = scrolls("a", "Who walked?", ARTICLES[0], "Ada", "It was Ada") + scrolls(
        "b", "Where?", ARTICLES[0], "there"
    )
    first, second = items_of("narrative_qa", rows)
    assert (first.id, first.references, second.references) == ("a", ("Ada", "It was Ada"), ("there",))
    assert whole_text(first) == f"{ARTICLES[0].strip()}\n\nQuestion: Who walked?\nAnswer:"
    # One document, which is read once.
    assert first.document.key == second.document.key == first.group and first.kind == "generate"
    with pytest.raises(UserError, match="row 2: has another input than the row before with the same id"):
        items_of("narrative_qa", [rows[0], {**rows[1], "input": "other\n\ntext"}])
    with pytest.raises(UserError, match="has no output, as in test splits"):
        items_of("narrative_qa", [{**rows[0], "output": None}])


def test_the_published_rows_of_narrative_qa_say_the_same() -> None:
    rows = scrolls("0", "Who walked?", ARTICLES[0], "Ada", "It was Ada")
    row = {
        "document": {"id": "x", "text": ARTICLES[0]},
        "question": {"text": "Who walked?"},
        "answers": [{"text": "Ada"}, {"text": "It was Ada"}],
    }
    assert items_of("narrative_qa", [row]) == items_of("narrative_qa", rows)


def test_yes_and_no_are_ranked_in_qasper() -> None:
    rows = [
        *scrolls("a", "Is it so?", ARTICLES[1], "Yes", "No"),
        *scrolls("b", "Is it?", ARTICLES[1], "Yes", "Unanswerable"),
    ]
    ranked, free = items_of("qasper", rows)
    assert (ranked.kind, ranked.choices) == ("choose", (" Yes", " No"))
    assert (free.kind, free.choices, free.references) == ("generate", (), ("Yes", "Unanswerable"))


def quality_rows() -> list[dict]:
    rows = []
    for n, article in enumerate(ARTICLES):
        options = [f"the {PLACES[n - k]}" for k in range(4)]
        listed = "\n".join(f" ({letter}) {option}" for letter, option in zip("ABCD", options, strict=True))
        rows += scrolls(f"q{n}", "Where did\nthey go?", f"{listed}\n\n{article}", options[n % 4])
    return rows


def test_quality_of_scrolls_and_of_the_published_file() -> None:
    items = items_of("quality", quality_rows())
    assert [item.gold for item in items] == [n % 4 for n in range(10)]
    assert items[1].choices == tuple(f" the {PLACES[1 - k]}" for k in range(4))
    assert whole_text(items[0]).startswith(
        "Ada walked to the harbour.\n\nThere lay a lamp.\n\nQuestion: Where did"
    )
    published = [
        {
            "article": article,
            "questions": [
                {
                    "question": "Where did\nthey go?",
                    "question_unique_id": f"q{n}",
                    "options": [f"the {PLACES[n - k]}" for k in range(4)],
                    "gold_label": n % 4 + 1,
                }
            ],
        }
        for n, article in enumerate(ARTICLES)
    ]
    assert items_of("quality", published) == items
    with pytest.raises(UserError, match="row 1: its input has no options"):
        items_of("quality", scrolls("a", "Where?", ARTICLES[0], "x"))
    with pytest.raises(UserError, match="its output is none of its options"):
        items_of("quality", [{**quality_rows()[0], "output": "nowhere"}])


def test_scores_of_quality() -> None:
    task, items = ITEM_TASKS["quality"], items_of("quality", quality_rows())
    for how, value in ((right, 1), (wrong, 0)):
        found = summarize(task, run(task, items, model_for(task, items, how)))
        assert (found["value"], found["chance"], found["documents"]) == (value, 0.25, 10)


def test_xlsum() -> None:
    rows = [{"id": "x-1", "url": "", "title": "t", "summary": "要約", "text": " 本文\n です "}]
    (item,) = items_of("xlsum:ja", rows)
    assert whole_text(item) == "本文\n です\n\nSummary:" and item.facts == {"language": "ja"}
    assert ITEM_TASKS["xlsum:ja"].sources == {"test": ("xlsum/japanese_test", "xlsum/japanese_val")}


@NEEDS_ROUGE
def test_scores_over_several_references() -> None:
    task = ITEM_TASKS["qasper"]
    rows = scrolls("a", "Who?", ARTICLES[0], "Ada went", "Bert") + scrolls("b", "So?", ARTICLES[0], "No")
    items = items_of("qasper", rows)
    answered = [
        Answered(items[0], text=" Bert"),
        Answered(items[1], (Likelihood(-3, 1, 2), Likelihood(-1, 1, 2))),
    ]
    found = summarize(task, answered)
    assert found["metrics"] == pytest.approx({"f1": 1, "rouge_l": 1, "f1_rows": 2 / 3, "rouge_l_rows": 2 / 3})
    xlsum = ITEM_TASKS["xlsum:ja"]
    item = Item("x", "generate", references=("東京",), facts={"language": "ja"})
    assert xlsum.values(Answered(item, text="東京へ"))["rouge_l"] == pytest.approx(0.8)


@NEEDS_ROUGE
def test_questions_on_a_document_read_it_once() -> None:
    article = "word " * 100
    rows = [row for n in range(4) for row in scrolls(f"{n}", f"Question {n}?", article, "word")]
    task, items = ITEM_TASKS["narrative_qa"], items_of("narrative_qa", rows)
    model = FakeStreamer(lambda *_: 0.0, lambda text: " word" if text.endswith("Answer:") else "")
    found = summarize(task, run(task, items, model))
    assert found["value"] == 1 and found["documents"] == 1
    assert sum(model.calls) < 2 * len(article) < found["tokens_read"]


def test_the_papers_scores_stand_beside_ours() -> None:
    assert ITEM_TASKS["narrative_qa"].published["paper's FAM 24B"] == 0.230
    assert ITEM_TASKS["quality"].published["paper's BSWA 1B"] == 0.261
    assert ITEM_TASKS["qasper"].published["paper's FAM 8B, ROUGE-L"] == 0.185
    assert ITEM_TASKS["xlsum:ja"].published["paper's BSWA 24B, all languages"] == 0.247
    for scores in OF_THE_PAPER.values():
        assert all(bswa <= fam for bswa, fam in scores.values())


def test_a_question_before_its_document() -> None:
    """Each question is read with its document; intervals are over documents as ever."""
    rows = scrolls("a", "Who walked?", ARTICLES[0], "Ada") + scrolls("b", "Where?", ARTICLES[0], "there")
    items = items_of("narrative_qa", rows)
    before = [question_first(item) for item in items]
    asked = "Question: Where?"
    assert whole_text(before[1]) == f"{asked}\n\n{ARTICLES[0].strip()}\n\n{asked}\nAnswer:"
    assert len({item.document.key for item in before}) == 2 and len({item.group for item in before}) == 1
    assert fingerprint(before) != fingerprint(items)
    (quality,) = items_of("quality", quality_rows()[:1])
    options = "".join(f"\n({letter}) the {PLACES[-k]}" for k, letter in enumerate("ABCD"))
    assert whole_text(question_first(quality)).startswith(
        f"Question: Where did\nthey go?{options}\n\nAda walked"
    )
    task = ITEM_TASKS["quality"]
    items = items_of("quality", quality_rows() + scrolls_of_one_article())
    found = summarize(task, run(task, items, model_for(task, items, right)))
    first = [question_first(item) for item in items]
    again = summarize(task, run(task, first, model_for(task, first, right)))
    for name in ("value", "ci95", "documents", "document_of", "n"):
        assert again[name] == found[name]
    assert found["documents"] == 10 < found["n"] and again["tokens_read"] > found["tokens_read"]
    # What has no question stays.
    rows = [{"id": "x", "url": "", "title": "t", "summary": "s", "text": "text"}]
    (summary,) = items_of("xlsum:en", rows)
    assert question_first(summary) is summary


def scrolls_of_one_article() -> list[dict]:
    """Return a second question on the first article of `quality_rows`."""
    (row,) = [row for row in quality_rows() if row["id"] == "q0"]
    return [{**row, "id": "again", "input": row["input"].replace("Where did", "And where did")}]


def test_documents_with_too_many_tokens() -> None:
    """A token is a byte here. Documents count, not the questions on them."""
    items = items_of("quality", quality_rows() + scrolls_of_one_article())
    sizes = sorted({len(whole_text(item).partition("\n\nQuestion")[0].encode()) for item in items})
    for limit in (sizes[0] - 1, sizes[0], sizes[-1] - 1, sizes[-1]):
        kept, over = within_tokens(items, limit, joiner())
        fits = [item for item in items if len(whole_text(item).partition("\n\nQuestion")[0]) <= limit]
        assert kept == fits and over == len({item.document.key for item in items if item not in fits})
    assert within_tokens(items, 0, joiner()) == (items, 0)
    encoded = Document("d", "", 3, lambda: Encoded(np.zeros(5, np.int32), "", "ab"))
    item = Item("i", "generate", document=encoded)
    assert within_tokens([item], 7, joiner()) == ([item], 0)
    assert within_tokens([item], 6, joiner()) == ([], 1)
