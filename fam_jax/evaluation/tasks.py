"""The registry of evaluation tasks: for each, a function that makes its items, and an entry of `TASKS`.

docs/evaluation.md shows step by step how to add a task. TensorFlow is imported only when items are made.
"""

import difflib
import functools

from fam_jax.config import DataConfig, UserError
from fam_jax.config.data import ALGORITHMIC
from fam_jax.evaluation import answers, text
from fam_jax.evaluation.answers import (
    Question,
    Questions,
    answer_tables,
    measure_answers,
    question_documents,
)
from fam_jax.evaluation.documents import Documents
from fam_jax.evaluation.item_tasks import ITEM_TASKS
from fam_jax.evaluation.task import Setting, Task
from fam_jax.evaluation.text import document_tables, measure_documents, plot_documents


def passkey_questions(setting: Setting) -> Questions:
    """Make PassKey examples (section 3.2 of the paper), with exactly blocks * C tokens of filler in each group.

    Groups with filler in front of the key too are named by both lengths, as in "18+260".
    """
    from fam_jax.data.build import task_vocabulary
    from fam_jax.data.passkey import passkey_examples

    data, evaluate, size = setting.data, setting.evaluate, setting.model.block_size
    vocabulary = task_vocabulary(setting.data)

    def make(before: int, blocks: int) -> list[Question]:
        return passkey_examples(
            data, vocabulary, blocks * size, evaluate.keys, evaluate.seed, before_tokens=before * size
        )

    groups = {
        f"{before}+{blocks}" if before else str(blocks): functools.partial(make, before, blocks)
        for before in evaluate.before_blocks
        for blocks in evaluate.filler_blocks
    }
    facts = {"block_size": size, "digits": data.digits, "seed": evaluate.seed}
    return Questions(groups, "blocks", vocabulary, facts)


def algorithmic_questions(setting: Setting) -> Questions:
    """Make examples of the run's algorithmic task, with so many blocks of pairs, or of the list, in each group.

    Raises:
      UserError: the run was trained on another task.
    """
    from fam_jax.data.algorithmic import algorithmic_examples
    from fam_jax.data.build import task_vocabulary

    data, evaluate, size = setting.data, setting.evaluate, setting.model.block_size
    if data.task.partition(":")[0] != ALGORITHMIC:
        raise UserError(
            f"task {ALGORITHMIC}: is for runs that were trained on {ALGORITHMIC}:NAME, but data.task is {data.task}"
        )
    groups = {
        str(blocks): functools.partial(algorithmic_examples, data, size, blocks, evaluate.keys, evaluate.seed)
        for blocks in evaluate.filler_blocks
    }
    facts = {"block_size": size, "task": data.task, "seed": evaluate.seed}
    return Questions(groups, "blocks", task_vocabulary(data), facts)


def text_documents(setting: Setting) -> Documents:
    """Load the held-out documents that `setting.files` or the config names."""
    from fam_jax.data.build import heldout_examples, longest_row
    from fam_jax.data.vocabulary import check_ids, check_vocabulary_size, first_input

    data = setting.data
    examples, vocabulary = heldout_examples(data, setting.evaluate, setting.files, setting.suffixes)
    check_vocabulary_size(vocabulary, setting.model, data)
    for example in examples:
        check_ids(example.ids, vocabulary, setting.model.vocab_size)
    trained_tokens = longest_row(data, block_size=setting.model.block_size)
    return Documents(examples, vocabulary, first_input(vocabulary, data), trained_tokens)


TASKS = {
    task.name: task
    for task in (
        Task(
            "passkey",
            "PassKey retrieval",
            "PassKey retrieval by length of the filler, by generation",
            passkey_questions,
            measure_answers,
            answers.METRICS,
            answer_tables,
            documents=question_documents,
        ),
        Task(
            ALGORITHMIC,
            "Algorithmic task",
            "pairs remembered, or lists copied or reversed, by length, by generation",
            algorithmic_questions,
            measure_answers,
            answers.METRICS,
            answer_tables,
            documents=question_documents,
        ),
        Task(
            "text",
            "Held-out text",
            "loss on held-out documents, by position, with the memory ablated on request",
            text_documents,
            measure_documents,
            text.METRICS,
            document_tables,
            plot_documents,
            documents=lambda documents: documents,
        ),
    )
}


def default_task(data: DataConfig) -> str:
    """Return the task that fits the data of a run: the one of the same name, or "text"."""
    kind = data.task.partition(":")[0]
    return kind if kind in TASKS else "text"


def find_task(name: str) -> Task:
    """Return the task called `name`.

    Raises:
      UserError: there is no such task.
    """
    if name in TASKS:
        return TASKS[name]
    if name in ITEM_TASKS:
        raise UserError(
            f"task {name!r}: is a task of items; run it with --tasks={name}, or by evaluate_tasks"
        )
    near = difflib.get_close_matches(name, (*TASKS, *ITEM_TASKS), 1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(
        f"task {name!r}: is unknown; {hint}choose one of {', '.join(TASKS)}, or one that --list shows"
    )
