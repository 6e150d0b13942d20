"""Rows of the data sets of GPT-3's evaluation, as prompts: section 2.4 and appendix G of arXiv 2005.14165.

A function here takes a row and whether solved examples come before it, and yields the examples of the row. It
understands the fields of TFDS and those of the published files where they differ.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from fam_jax.config import UserError
from fam_jax.evaluation.item import Row

ANSWER = "Answer:"
POSSESSIVE = ("his", "her", "their", "my", "your", "our", "its")


class Example(NamedTuple):
    """A question with its right answer."""

    context: str
    choices: tuple[str, ...] = ()
    # The number of the right choice; None: the answer is generated.
    gold: int | None = None
    # Right answers, if they are generated.
    answers: tuple[str, ...] = ()
    # Contexts of the one continuation in `choices`.
    contexts: tuple[str, ...] = ()
    unconditional: str | None = None
    group: str = ""
    facts: Mapping[str, Any] = {}
    # What follows the context in a solved example, if it is not the right choice or the first answer.
    solution: str = ""

    def shown(self) -> str:
        """Return the example with its solution, to be shown before a question."""
        if self.solution:
            return self.context + self.solution
        if self.gold is None:
            return f"{self.context} {self.answers[0]}"
        if self.contexts:
            return self.contexts[self.gold] + self.choices[0]
        return self.context + self.choices[self.gold]


def label(row: Row, names: Sequence[str], field: str = "label", first: int = 0) -> int:
    """Return the number of a row's label.

    Args:
      row: has the label as a number, a boolean, or one of the names.
      names: of the labels, in the order of their numbers.
      field: that holds it.
      first: the number of the first label.

    Raises:
      UserError: it is none of these, as in test splits whose labels are secret.
    """
    value = row[field]
    if isinstance(value, str):
        named = value.strip().lower()
        if named in names:
            return [*names].index(named)
        value = int(named) if named.isdigit() else -1
    number = int(value) - first if isinstance(value, int | float | bool) else -1
    if not 0 <= number < len(names):
        raise UserError(
            f"{row.where}: the label {row[field]!r} is none of {', '.join(names)}; use a split with labels"
        )
    return number


def anli(row: Row, shots: int) -> Iterator[Example]:
    """Yield the question of a row of ANLI."""
    question = f"{row['hypothesis']} True, False, or Neither?"
    context = f"anli 1: anli 1: {row.first('context', 'premise')}\nQuestion: {question}"
    gold = label(row, ("e", "n", "c")) if row["label"] in ("e", "n", "c") else label(row, LABELS_OF_NLI)
    yield Example(context, (" True", " Neither", " False"), gold)


LABELS_OF_NLI = ("entailment", "neutral", "contradiction")


def arc(row: Row, shots: int) -> Iterator[Example]:
    """Yield the question of a row of ARC, whose choices are labelled A to E or 1 to 5."""
    choices, key = row["choices"], row.first("answerKey", "answer_key")
    # TFDS has numbers in place of the letters.
    texts, labels, key = choices["text"], [*map(str, choices["label"])], str(key)
    digits, letters = "12345", "ABCDE"
    if key not in labels and key in [*digits, *letters]:
        key = letters[digits.index(key)] if key in digits else digits[letters.index(key)]
    if key not in labels:
        raise UserError(f"{row.where}: the answer {key!r} is none of its choices; use a split with answers")
    context = f"Question: {row['question']}\nAnswer:"
    yield Example(context, _spaced(texts), labels.index(key), unconditional=ANSWER)


def boolq(row: Row, shots: int) -> Iterator[Example]:
    """Yield the question of a row of BoolQ."""
    context = f"{row['passage']}\nquestion: {row['question']}?\nanswer:"
    gold = 1 - label(row, ("false", "true"), "label" if "label" in row else "answer")
    yield Example(context, (" yes", " no"), gold)


LABELS_OF_CB = ("entailment", "contradiction", "neutral")


def cb(row: Row, shots: int) -> Iterator[Example]:
    """Yield the question of a row of CB."""
    question = f"{row['hypothesis'].rstrip('.')}. true, false, or neither?"
    context = f"{row['premise']}\nquestion: {question}\nanswer:"
    yield Example(context, (" true", " false", " neither"), label(row, LABELS_OF_CB))


def copa(row: Row, shots: int) -> Iterator[Example]:
    """Yield the question of a row of COPA: what was the cause, or the effect?"""
    word = "because" if label(row, ("cause", "effect"), "question") == 0 else "therefore"
    context = f"{row['premise'].strip().removesuffix('.')} {word}"
    choices = [row[name][:1].lower() + row[name][1:] for name in ("choice1", "choice2")]
    yield Example(context, _spaced(choices), label(row, ("0", "1")))


def hellaswag(row: Row, shots: int) -> Iterator[Example]:
    """Yield the question of a row of HellaSwag. The half from WikiHow has marks, which are removed."""
    context = f"{row['activity_label']}: {row.first('context', 'ctx')}"
    endings = _spaced([_without_marks(ending) for ending in row["endings"]])
    yield Example(_without_marks(context), endings, label(row, ("0", "1", "2", "3")))


def _without_marks(text: str) -> str:
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r" {2,}", " ", re.sub(r"\[.*?\]", "", text)).strip()


HEADER_OF_MULTIRC = "READING COMPREHENSION ANSWER KEY\n\n"


def multirc(row: Row, shots: int) -> Iterator[Example]:
    """Yield an example for every answer to a question of MultiRC; see :func:`questions_of_multirc` for rows."""
    context = f"{row['paragraph']}\n\n{row['question']}\n"
    rights = [bool(right) for right in row["labels"]]
    solved = "\n".join(f"- [{right}] {answer}" for answer, right in zip(row["answers"], rights, strict=True))
    for answer, right in zip(row["answers"], rights, strict=True):
        choices = (f"- [True] {answer}", f"- [False] {answer}")
        yield Example(context, choices, 0 if right else 1, group=row["group"], solution=solved)


def questions_of_multirc(rows: Sequence[Row]) -> list[Row]:
    """Return a row per question, of rows per answer (TFDS) or per passage (the published file)."""
    questions: dict[str, Row] = {}

    def add(row: Row, numbers: tuple[Any, Any], texts: tuple[str, str], answer: str, right: Any) -> None:
        group = f"{numbers[0]}-{numbers[1]}"
        if group not in questions:
            values = {"paragraph": texts[0], "question": texts[1], "answers": [], "labels": []}
            questions[group] = Row(group, {**values, "group": group}, row.where)
        questions[group]["answers"].append(answer)
        questions[group]["labels"].append(right)

    for row in rows:
        if "passage" in row:
            for asked in row["passage"]["questions"]:
                for answer in asked["answers"]:
                    texts = (row["passage"]["text"], asked["question"])
                    add(row, (row["idx"], asked["idx"]), texts, answer["text"], answer["label"])
            continue
        index = row["idx"]
        texts = (row["paragraph"], row["question"])
        right = label(row, ("false", "true"))
        add(row, (index["paragraph"], index["question"]), texts, row["answer"], right)
    return [*questions.values()]


def openbookqa(row: Row, shots: int) -> Iterator[Example]:
    """Yield the question of a row of OpenbookQA, without the book's fact."""
    question: Any = row["question"] if isinstance(row.values.get("question"), dict) else {}
    stem = question["stem"] if question else row.first("question_stem", "stem")
    if "choice_A" in question:  # TFDS
        texts = [question[f"choice_{letter}"] for letter in "ABCD"]
    else:
        choices = question["choices"] if question else row["choices"]
        texts = choices["text"] if isinstance(choices, dict) else [choice["text"] for choice in choices]
    gold = label(row, ("a", "b", "c", "d"), "answerKey" if "answerKey" in row else "answer_key")
    yield Example(stem, _spaced(texts), gold, unconditional=ANSWER)


def piqa(row: Row, shots: int) -> Iterator[Example]:
    """Yield the question of a row of PIQA."""
    yield Example(row["goal"], _spaced([row["sol1"], row["sol2"]]), label(row, ("0", "1")))


def race(row: Row, shots: int) -> Iterator[Example]:
    """Yield the questions on an article of RACE, behind the earlier ones with their right answers."""
    context = f"Article:\n{row['article']}\n\n"
    single = "question" in row
    questions, options, answers = (
        [row[name if name in row else f"{name}s"]]
        if single
        else row[f"{name}s" if name != "options" else name]
        for name in ("question", "options", "answer")
    )
    for question, texts, answer in zip(questions, options, answers, strict=True):
        gold = "ABCD".index(answer) if isinstance(answer, str) else int(answer)
        asked = f"{context}Q: {question}\n\nA:"
        yield Example(asked, _spaced(texts), gold, unconditional="A:", group=f"article {row.id}")
        context = f"{asked} {texts[gold]}\n\n"


def record(row: Row, shots: int) -> Iterator[Example]:
    """Yield the questions of a row of ReCoRD: which entity belongs into the gap?"""
    whole = row["passage"]
    nested = isinstance(whole, dict)
    text = whole["text"] if nested else whole
    if nested:
        entities = sorted({text[each["start"] : each["end"] + 1] for each in whole["entities"]})
        asked = [(each["query"], sorted({a["text"] for a in each["answers"]})) for each in row["qas"]]
    else:
        entities, asked = [*row["entities"]], [(row["query"], [*row["answers"]])]
    passage, *highlights = text.split("\n@highlight\n")
    context = "\n".join([passage.strip(), "", *(f"- {each.strip()}" for each in highlights)])
    for query, answers in asked:
        choices = tuple(f"\n- {query.replace('@placeholder', entity)}" for entity in entities)
        gold = next((entities.index(answer) for answer in answers if answer in entities), None)
        if gold is None:
            raise UserError(f"{row.where}: no answer is among its entities; use a split with answers")
        yield Example(context, choices, gold, facts={"entities": entities, "answers": answers})


def rte(row: Row, shots: int) -> Iterator[Example]:
    """Yield the question of a row of RTE."""
    context = f"{row['premise']}\nquestion: {row['hypothesis']} True or False?\nanswer:"
    yield Example(context, (" True", " False"), label(row, ("entailment", "not_entailment")))


def storycloze(row: Row, shots: int) -> Iterator[Example]:
    """Yield the question of a row of StoryCloze, whose labels are 1 and 2."""
    if "context" in row:
        context, endings, field = row["context"], row["endings"], "label"
    else:
        context = " ".join(row[f"InputSentence{number}"] for number in range(1, 5))
        endings = [row[f"RandomFifthSentenceQuiz{number}"] for number in (1, 2)]
        field = "AnswerRightEnding"
    yield Example(context, _spaced(endings), label(row, ("1", "2"), field, first=1))


def wic(row: Row, shots: int) -> Iterator[Example]:
    """Yield the question of a row of WiC."""
    question = f"Is the word '{row['word']}' used in the same way in the two sentences above?"
    context = f"{row['sentence1']}\n{row['sentence2']}\nquestion: {question}\nanswer:"
    yield Example(context, (" yes", " no"), 1 - label(row, ("false", "true")))


def winograd(row: Row, shots: int) -> Iterator[Example]:
    """Yield the question of a row of Winograd's schemas: whom does the pronoun mean?"""
    text, begin, end = row["text"], row["pronoun_start"], row["pronoun_end"]
    options = [row[f"option{number}_normalized"] for number in (1, 2)]
    if row["pronoun_text"].lower() in POSSESSIVE:
        options = [f"{option}'s" for option in options]
    contexts = tuple(text[:begin] + option for option in options)
    yield Example("", (text[end:],), label(row, ("0", "1")), contexts=contexts)


def winogrande(row: Row, shots: int) -> Iterator[Example]:
    """Yield the question of a row of Winogrande: which option belongs into the gap?"""
    before, _, rest = row["sentence"].partition("_")
    contexts = (before + row["option1"], before + row["option2"])
    gold = label(row, ("1", "2"), "answer", first=1) if "answer" in row else label(row, ("0", "1"))
    yield Example("", (rest,), gold, contexts=contexts)


def lambada(row: Row, shots: int) -> Iterator[Example]:
    """Yield the question of a row of LAMBADA: what is the last word?"""
    passage, _, word = row.first("passage", "text").strip().rpartition(" ")
    if shots:
        passage = f"Fill in blank:\n\n{passage} ____. ->"
    yield Example(passage, answers=(word,))


def question_answer(row: Row, shots: int) -> Iterator[Example]:
    """Yield the question of a row of Natural Questions, WebQuestions or TriviaQA."""
    found = row.first("answer", "answers")
    if isinstance(found, dict):
        found = found.get("normalized_aliases") or found["NormalizedAliases"]
    answers = (found,) if isinstance(found, str) else tuple(found)
    if not answers:
        raise UserError(f"{row.where}: has no answer; use a split with answers")
    yield Example(f"Q: {row['question']}\n\nA:", answers=answers)


def squad(row: Row, shots: int) -> Iterator[Example]:
    """Yield the questions on a paragraph of SQuAD v2, behind the earlier ones with their answers."""
    context = f"Title: {row['title'].replace('_', ' ')}\n\nBackground: {row['context']}\n\n"
    for asked in row["questions"]:
        answers = tuple(asked["answers"]) or ("",)
        context = f"{context}Q: {asked['question']}\n\nA:"
        solution = f" {answers[0] or 'unanswerable'}"
        facts = {"answerable": bool(answers[0])}
        yield Example(context, answers=answers, facts=facts, solution=solution, group=f"paragraph {row.id}")
        context = f"{context}{solution}\n\n"


def paragraphs_of_squad(rows: Sequence[Row]) -> list[Row]:
    """Return a row per paragraph, of rows per question (TFDS) or per article (the published file)."""
    paragraphs: dict[tuple[str, str], Row] = {}

    def add(row: Row, title: str, context: str, question: str, answers: list[str]) -> None:
        key = (title, context)
        if key not in paragraphs:
            values = {"title": title, "context": context, "questions": []}
            paragraphs[key] = Row(row.id, values, row.where)
        paragraphs[key]["questions"].append({"question": question, "answers": answers})

    for row in rows:
        if "paragraphs" in row:
            for number, part in enumerate(row["paragraphs"]):
                for asked in part["qas"]:
                    answers = [answer["text"] for answer in asked["answers"]]
                    own = Row(f"{row.id}-{number}", row.values, row.where)
                    add(own, row["title"], part["context"], asked["question"], answers)
            continue
        add(row, row["title"], row["context"], row["question"], [*row["answers"]["text"]])
    return [*paragraphs.values()]


def _spaced(texts: Sequence[str]) -> tuple[str, ...]:
    """Return continuations that begin with a blank."""
    return tuple(f" {text.strip()}" for text in texts)
