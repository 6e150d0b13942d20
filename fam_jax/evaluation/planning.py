"""What to run, before a model is loaded: tasks by their names, where their data is, and why others are skipped."""

import dataclasses
from collections.abc import Iterator, Sequence

from fam_jax.config import UserError
from fam_jax.evaluation.harness_tasks import PREFIX, HarnessRun, plan_harness
from fam_jax.evaluation.item import Document, Encoded, Item, ItemTask
from fam_jax.evaluation.item_tasks import ITEM_TASKS
from fam_jax.evaluation.joining import Joiner
from fam_jax.evaluation.rows import Data, MissingDataError
from fam_jax.evaluation.tasks import TASKS, find_task
from fam_jax.generation.tokenize import encode_pieces

SUITES = (*dict.fromkeys(task.suite for task in ITEM_TASKS.values()), "perplexity", "passkey")
# Suites of tasks that are measured as a whole.
_MEASURED = {"perplexity": "text", "passkey": "passkey"}
# Tasks that measure documents as the task "text" does, those of a folder of --data or of a TFDS dataset: endings of
# files, the dataset if there is one, and the line for --list.
DOCUMENTS = {
    "pg19": (
        (".txt",),
        "tfds:pg19:validation",
        "PG-19: next-token accuracy and loss on the 50 books of its validation split, by position",
    ),
    "isabelle": ((".thy",), "", "Isabelle: next-token accuracy and loss on theories, by position"),
}
PUBLISHED_SHOTS = "gpt3"
# Places of a question.
AFTER, BEFORE = QUESTIONS = ("after", "before")


@dataclasses.dataclass(frozen=True)
class HowToRun:
    """What the results of tasks of items depend on, beside the model."""

    # Folders, and "tfds" for datasets that TFDS has prepared.
    data: tuple[str, ...] = ("tfds",)
    # Numbers of solved examples to show, as text; "gpt3": those of GPT-3. Empty: 0, or what a task of
    # lm-evaluation-harness says.
    shots: tuple[str, ...] = ()
    # Items of a task, or documents with all their questions, drawn by seed; 0: all.
    limit: int = 0
    seed: int = 1
    # Leave out documents with more tokens, and count them; 0: read all.
    limit_tokens: int = 0
    # Where the question on a document stands: "after" it, or "before" it as well, as SCROLLS has it.
    question: str = AFTER
    # For synthetic tasks: tokens of a prompt, items of each length and seed, and how many seeds.
    lengths: tuple[int, ...] = (1024, 4096)
    count: int = 50
    seeds: int = 1
    # For tasks of lm-evaluation-harness: folders with task files, and whether to ask by the chat template.
    lm_eval_tasks: tuple[str, ...] = ()
    lm_eval_chat: bool = False
    # Results do not depend on it: the memory of a document that takes longer to read is saved as often. 0: never.
    save_minutes: float = 10.0


@dataclasses.dataclass
class Run:
    """A task with a number of shots."""

    key: str
    task: ItemTask
    shots: int
    sources: dict[str, str]
    items: list[Item] = dataclasses.field(default_factory=list)
    # Documents that were left out, as they are longer than the limit.
    over_limit: int = 0


@dataclasses.dataclass
class Plan:
    """What to run."""

    # Tasks of items.
    runs: list[Run]
    # Tasks that are measured as a whole, with the folder or the TFDS dataset of their documents if they have one.
    measured: dict[str, str | None]
    # Tasks of lm-evaluation-harness.
    harness: list[HarnessRun]
    # Why other tasks are skipped.
    skipped: dict[str, str]


def find_tasks(names: Sequence[str]) -> list[str]:
    """Return the tasks that names of tasks and suites stand for.

    Raises:
      UserError: a name is unknown, or there is none.
    """
    found: dict[str, None] = {}
    for name in names:
        if name in ITEM_TASKS or name in TASKS or name in DOCUMENTS:
            found[name] = None
        elif name in _MEASURED:
            found[_MEASURED[name]] = None
        elif name.startswith(PREFIX):  # the harness knows them
            found[name] = None
        elif name in SUITES:
            found |= dict.fromkeys(task.name for task in ITEM_TASKS.values() if task.suite == name)
            found |= dict.fromkeys(DOCUMENTS if name == "long_context" else ())
        else:
            found |= dict.fromkeys(_variants(name))
    if not found:
        raise UserError("--tasks: names no task; --list shows all")
    return [*found]


def _variants(name: str) -> list[str]:
    """Return the tasks NAME:PART for a name without its part, such as all languages."""
    found = [task for task in ITEM_TASKS if task.startswith(f"{name}:")]
    if not found:
        find_task(name)  # its message names the choices
    return found


def availability(names: Sequence[str], data: Data) -> Iterator[tuple[str, str, str]]:
    """Yield the name of each task, its line for --list, and where its data is or how to prepare it."""
    for name in names:
        if name.startswith(PREFIX):
            yield name, "task of lm-evaluation-harness", "finds its data itself"
            continue
        if name in DOCUMENTS:
            yield name, DOCUMENTS[name][-1], documents_of(name, data) or f"missing: {_missing(name)}"
            continue
        if name not in ITEM_TASKS:
            yield name, TASKS[name].doc, "needs no data of --data"
            continue
        task = ITEM_TASKS[name]
        try:
            sources = {split: data.source(task, split) for split in _splits(task, shots=0)}
            place = ", ".join(sources.values()) or "makes its own text"
        except MissingDataError as error:
            place = f"missing: {str(error).partition('; ')[2]}"
        yield name, task.doc, place


def _splits(task: ItemTask, shots: int) -> list[str]:
    """Return the splits that a task needs."""
    return [split for split in task.sources if split != "train" or shots]


def within_tokens(items: Sequence[Item], limit: int, joiner: Joiner) -> tuple[list[Item], int]:
    """Return the items whose documents have at most `limit` tokens, and how many documents have more; 0: all."""
    documents = {item.document.key: item.document for item in items} if limit else {}
    long = {key for key, document in documents.items() if _is_longer(document, limit, joiner)}
    return [item for item in items if item.document.key not in long], len(long)


def _is_longer(document: Document, limit: int, joiner: Joiner) -> bool:
    found = document.load()
    text, count = (found.held, len(found.ids)) if isinstance(found, Encoded) else (found, 0)
    for piece in encode_pieces(joiner.encode, [text]):
        count += len(piece)
        if count > limit:
            return True
    return count > limit


def make_plan(names: Sequence[str], how: HowToRun, data: Data) -> Plan:
    """Return what to run of the tasks and suites that are named.

    Raises:
      UserError: a name is unknown, a number of shots is none, or no task can run.
    """
    if how.question not in QUESTIONS:
        raise UserError(f"--question={how.question}: expected {' or '.join(QUESTIONS)}")
    found = find_tasks(names)
    harness, skipped = plan_harness(
        [name for name in found if name.startswith(PREFIX)],
        shots=how.shots,
        folders=how.lm_eval_tasks,
        limit=how.limit,
        seed=how.seed,
    )
    plan = Plan([], {}, harness, skipped)
    for name in found:
        if not name.startswith(PREFIX):
            _add_to_plan(plan, name, how, data)
    if not plan.runs and not plan.measured and not plan.harness:
        more = f", and {len(skipped) - 1} other tasks cannot run either" if len(skipped) > 1 else ""
        raise UserError(f"{next(iter(skipped.values()))}{more}")
    return plan


def _add_to_plan(plan: Plan, name: str, how: HowToRun, data: Data) -> None:
    if name in DOCUMENTS and documents_of(name, data) is None:
        plan.skipped[name] = f"task {name}: its data is not on disk; {_missing(name)}"
        return
    if name not in ITEM_TASKS:
        plan.measured[name] = documents_of(name, data) if name in DOCUMENTS else None
        return
    task = ITEM_TASKS[name]
    for number, shots in _shots(task, how.shots).items():
        key = task.name if number == "0" else f"{task.name}@{number}"
        try:
            task.check()
            sources = {split: data.source(task, split) for split in _splits(task, shots)}
            plan.runs.append(Run(key, task, shots, sources))
        except UserError as error:
            plan.skipped[key] = str(error)


def _missing(name: str) -> str:
    """Return what puts documents on disk."""
    endings, dataset, _ = DOCUMENTS[name]
    build = f"run `tfds build {dataset.split(':')[1]}` and use --data=tfds, or " if dataset else ""
    return f"{build}put {', '.join(endings)} files into the folder {name} of a folder of --data"


def documents_of(name: str, data: Data) -> str | None:
    """Return the folder, or tfds:NAME:SPLIT, with the documents of a task of :data:`DOCUMENTS`; None: there is none."""
    return data.folder(name) or data.dataset(DOCUMENTS[name][1])


def _shots(task: ItemTask, wanted: Sequence[str]) -> dict[str, int]:
    """Return the numbers of shots by the text that asks for each; a task that shows no examples has 0 alone."""
    if not task.published_shots:
        return {"0": 0}
    found = {}
    for text in wanted or ("0",):
        if text != PUBLISHED_SHOTS and not text.isdecimal():
            raise UserError(f"--shots={text}: expected numbers, or gpt3 for those of GPT-3")
        found[text] = task.published_shots if text == PUBLISHED_SHOTS else int(text)
    return found
