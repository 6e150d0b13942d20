"""Run several tasks on a checkpoint: plan, resume, results in one file.

Tasks of items (`fam_jax.evaluation.item_tasks`) are answered item by item. Every answer is in a journal as soon as it
is known, so the same call goes on where a killed one stopped. Tasks of `fam_jax.evaluation.tasks` are run as a whole.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import rich.table
from etils import epath

from fam_jax.checkpoint import end_ids
from fam_jax.checkpoint.lock import WriterLock
from fam_jax.checkpoint.new_file import check_output_file, output_file
from fam_jax.config import Config, MeshConfig, UserError, resolve
from fam_jax.config.strict_json import dump_json
from fam_jax.data.vocabulary import bos_ids, check_vocabulary_size, first_input
from fam_jax.evaluation.answering import Answering, HowToAnswer
from fam_jax.evaluation.device_use import DeviceUse
from fam_jax.evaluation.harness_tasks import HarnessRun, harness_head, run_harness
from fam_jax.evaluation.item import Answered, Item, Request, question_first
from fam_jax.evaluation.item_tasks.long import of_the_paper
from fam_jax.evaluation.joining import Joiner
from fam_jax.evaluation.journal import Journal
from fam_jax.evaluation.midway import Midway, forget
from fam_jax.evaluation.planning import BEFORE, DOCUMENTS, HowToRun, Plan, Run, make_plan, within_tokens
from fam_jax.evaluation.record import FOLDER, provenance
from fam_jax.evaluation.rows import Data, MissingDataError
from fam_jax.evaluation.run import ALL_TOO_LONG, make_setting, prepare
from fam_jax.evaluation.sharing import check_alike, from_first
from fam_jax.evaluation.summary import fingerprint, limited, result_table, summarize
from fam_jax.evaluation.task import OnProgress
from fam_jax.evaluation.tasks import find_task
from fam_jax.generation import state_file
from fam_jax.generation.streaming import Streamer
from fam_jax.generation.text import TextModel
from fam_jax.restore import load_model, load_task_vocabulary
from fam_jax.sharding import make_mesh

# Of the file of results.
FORMAT = 1
# Longest name of the default file.
LONGEST_NAME = 60


@dataclasses.dataclass(frozen=True)
class SuiteResults:
    """The results of several tasks on one step of a run, as in the file."""

    path: str
    step: int
    # By task; a number of shots other than 0 is behind an @.
    suites: dict[str, dict[str, Any]]
    # Why tasks did not run.
    skipped: dict[str, str]

    def table(self, run: str = "") -> rich.table.Table:
        """Return a table with a row per task."""
        return result_table(self.suites, f"Step {self.step}" + (f" of {run}" if run else ""))


class _Model(NamedTuple):
    """A model of a run, and what reads text for it."""

    config: Config
    params: Any
    streamer: Streamer
    joiner: Joiner
    # Tokens that end a text.
    ends: Sequence[int]


def evaluate_tasks(
    checkpoint: str | os.PathLike[str],
    tasks: Sequence[str],
    *,
    how: HowToRun | None = None,
    step: int | None = None,
    mesh: MeshConfig | None = None,
    out: str | os.PathLike[str] | None = None,
    fresh: bool = False,
    imports: Sequence[str] = (),
    command: str = "fam_jax.evaluate_tasks",
    on_progress: OnProgress | None = None,
    **settings: Any,
) -> SuiteResults:
    """Evaluate a checkpoint on tasks, and write the results.

        found = evaluate_tasks("runs/text", ["boolq", "gpt3"], how=HowToRun(data=("data",), limit=200))
        found.suites["boolq"]["metrics"]["acc"]

    Answers go to OUT.items.jsonl beside the results. The same call goes on with the items that have none.

    In a job of several processes, call it in all of them, with the same data.

    Args:
      checkpoint: workdir of a training run.
      tasks: names of tasks and suites; NAME:LANGUAGE for one language of a task that has several, lm_eval:NAME for a
        task of lm-evaluation-harness.
      how: data, shots, limit and lengths.
      step: a saved step; None: the latest.
      mesh: mesh to divide the model over; None: all devices along the data axis.
      out: JSON file to write; None: CHECKPOINT/evaluations/STEP/suite-TASKS.json.
      fresh: whether to forget the answers of earlier calls.
      imports: modules that the config of the run may import; see :func:`fam_jax.restore.check_imports`.
      command: the command or function to record as the caller.
      on_progress: called with the name of a task, its items answered and its items.
      **settings: fields of config.evaluate to change, such as `batch_size=8`.

    Raises:
      UserError: a task is unknown, none has its data on disk, the checkpoint cannot be read, the results cannot be
        written, answers of another evaluation are in their place, or the processes of a job have different data.
    """
    how = how or HowToRun()
    data = Data(how.data)
    plan = make_plan([*dict.fromkeys(tasks)], how, data)
    if out is not None:
        from_first(lambda: check_output_file(os.path.expanduser(out)))
    model, step = _load(checkpoint, step, mesh or MeshConfig(), settings, imports)
    path = Path(_default_path(checkpoint, step, tasks) if out is None else os.path.expanduser(out))
    from_first(lambda: check_output_file(path))
    runs = _with_items(plan.runs, plan.skipped, how, data, model)
    head = _head(checkpoint, step, model, runs, how) | _measured_head(plan.measured, model.config)
    head |= harness_head(plan.harness, chat=how.lm_eval_chat)
    check_alike({**head, "checkpoint": ""})  # its place may differ
    with contextlib.ExitStack() as until_end:
        journal = _open_journal(path, head, fresh, until_end)
        found = _run_all(plan, runs, model, journal, path, how, on_progress)
        results = SuiteResults(os.fspath(path), step, found, plan.skipped)
        if jax.process_index() == 0:
            _write(results, provenance(model.config, command) | {"checkpoint": os.fspath(checkpoint)}, how)
    return results


def _open_journal(
    results: Path, head: Mapping[str, Any], fresh: bool, until_end: contextlib.ExitStack
) -> Journal:
    """Return the journal beside the file of results; that of the first process is on disk, the others' in memory.

    Args:
      results: the file of results, which is locked.
      head: of the journal.
      fresh: whether to begin again.
      until_end: ends the lock.

    Raises:
      UserError: the journal cannot be written, or does not fit. All processes raise it.
    """
    opened: list[Journal] = []

    def open_first() -> list[dict[str, Any]]:
        until_end.enter_context(WriterLock(epath.Path(results.parent), results.name))
        if fresh:
            forget(results)
        opened.append(Journal(results.with_suffix(".items.jsonl"), head, fresh=fresh))
        return opened[0].lines()

    lines = from_first(open_first)
    return opened[0] if opened else Journal.of(lines)


def _run_all(
    plan: Plan,
    runs: Sequence[Run],
    model: _Model,
    journal: Journal,
    path: Path,
    how: HowToRun,
    on_progress: OnProgress | None,
) -> dict[str, dict[str, Any]]:
    """Return the results of all tasks by name; those without a document to measure go to `plan.skipped`."""
    found: dict[str, dict[str, Any]] = {}
    for run in runs:
        name = f"{run.key} {fingerprint(run.items)}"
        midway = Midway(path, name, model.streamer, how.save_minutes) if jax.process_count() == 1 else None
        found[run.key] = _answer(run, model, journal, midway, on_progress) | _limits(how, run.over_limit)
    for name, folder in plan.measured.items():
        try:
            found[name] = _measure(name, folder, model, journal, how, on_progress)
        except MissingDataError as error:
            plan.skipped[name] = str(error)
    found |= _run_harness(plan.harness, model, journal, how, on_progress)
    return found


def _load(
    checkpoint: str | os.PathLike[str],
    step: int | None,
    mesh: MeshConfig,
    settings: Mapping[str, Any],
    imports: Sequence[str],
) -> tuple[_Model, int]:
    """Return the model of a run, with settings of the evaluation, and its step."""
    config, params, step = load_model(checkpoint, step, make_mesh(mesh), imports=imports)
    values = dataclasses.asdict(config)
    values["evaluate"] |= settings
    config = resolve({**values, "mesh": dataclasses.asdict(mesh)})
    streamer = Streamer(config.model, params)
    joiner = _joiner(config, load_task_vocabulary(config, checkpoint, step))
    return _Model(config, params, streamer, joiner, end_ids(config, checkpoint)), step


def _joiner(config: Config, vocabulary: Any) -> Joiner:
    check_vocabulary_size(vocabulary, config.model, config.data)
    begin, first = bos_ids(vocabulary, config.data), first_input(vocabulary, config.data)
    return Joiner(vocabulary, config.model.vocab_size, begin, first)


def _with_items(
    runs: Sequence[Run], skipped: dict[str, str], how: HowToRun, data: Data, model: _Model
) -> list[Run]:
    """Make the items of all tasks; those with too little data go to `skipped`."""
    found = []
    for run in runs:
        try:
            run.items = _items(run, how, data, model)
            found.append(run)
        except MissingDataError as error:
            skipped[run.key] = str(error)
    return found


def _items(run: Run, how: HowToRun, data: Data, model: _Model) -> list[Item]:
    request = Request(
        rows=functools.partial(data.rows, run.task),
        texts=data.texts,
        shots=run.shots,
        seed=how.seed,
        lengths=how.lengths,
        count=how.count,
        seeds=tuple(range(how.seed, how.seed + how.seeds)),
        block_size=model.config.model.block_size,
        joiner=model.joiner,
    )
    items = limited([*run.task.items(request)], how.limit, how.seed)
    items, run.over_limit = within_tokens(items, how.limit_tokens, model.joiner)
    if run.over_limit and not items:
        raise MissingDataError(f"task {run.task.name}: {ALL_TOO_LONG}")
    if how.question == BEFORE:
        items = [question_first(item) for item in items]
    if not items:
        raise UserError(f"task {run.task.name}: has no items; give its data")
    if len({item.id for item in items}) < len(items):
        raise UserError(f"task {run.task.name}: two items have the same id; remove repeated rows")
    return items


def _head(
    checkpoint: str | os.PathLike[str], step: int, model: _Model, runs: Sequence[Run], how: HowToRun
) -> dict[str, Any]:
    """Return what the answers depend on."""
    data = model.config.data
    return {
        "format": FORMAT,
        "checkpoint": os.path.abspath(checkpoint),
        "step": step,
        "weights": state_file.fingerprint(model.streamer.params)[:16],
        "model": json.loads(dump_json(dataclasses.asdict(model.config.model))),
        "vocabulary": data.vocabulary.rpartition("/")[2],
        "add_bos": data.add_bos,
        "limit": how.limit,
        "seed": how.seed,
        # Only where they are set, so that answers of earlier versions stay valid.
        **({"limit_tokens": how.limit_tokens} if how.limit_tokens else {}),
        "tasks": {
            run.key: {
                "version": run.task.version,
                "shots": run.shots,
                "sources": run.sources,
                "items": len(run.items),
                "fingerprint": fingerprint(run.items),
            }
            for run in runs
        },
    }


def _measured_head(measured: Mapping[str, str | None], config: Config) -> dict[str, Any]:
    """Return what results of tasks that are measured as a whole depend on, beside the model."""
    if not measured:
        return {}
    settings = dataclasses.asdict(config.evaluate)
    own = {
        name: value for name, value in settings.items() if name not in ("every", "batch_size", "chunk_blocks")
    }
    sources = {}
    for name, folder in measured.items():
        files = sorted(path for path in Path(folder or "").rglob("*") if path.is_file()) if folder else []
        sizes = [(str(path.relative_to(folder or "")), path.stat().st_size) for path in files]
        sources[name] = hashlib.blake2b(repr((folder, sizes)).encode(), digest_size=8).hexdigest()
    data = {"heldout_files": [*config.data.heldout_files], "digits": config.data.digits}
    return json.loads(dump_json({"measured": {**own, **data, "sources": sources}}))


def _answer(
    run: Run, model: _Model, journal: Journal, midway: Midway | None, on_progress: OnProgress | None
) -> dict[str, Any]:
    """Answer the items of a task that have no answer, and return its results."""
    eos, evaluate = model.joiner.vocabulary.eos_id, model.config.evaluate
    stops = {*model.ends} | ({eos} if eos is not None and eos >= 0 else set())
    how = HowToAnswer(evaluate.batch_size, evaluate.chunk_blocks, run.task.max_tokens, run.task.stop)
    answering, use = Answering(model.streamer, model.joiner, how, sorted(stops), midway), DeviceUse()
    left = [item for item in run.items if journal.find(run.key, item) is None]
    began, read, done = time.perf_counter(), 0, len(run.items) - len(left)
    for answers in answering.run(left):
        journal.add(run.key, answers)
        done += len(answers)
        read += sum(each.tokens_read + each.tokens_generated for each in answers)
        if on_progress is not None:
            on_progress(run.key, done, len(run.items))
    if midway is not None:
        midway.clear()
    seconds = time.perf_counter() - began
    answered = [each for each in (journal.find(run.key, item) for item in run.items) if each is not None]
    assert len(answered) == len(run.items)
    return {
        **summarize(run.task, answered),
        "version": run.task.version,
        "shots": run.shots,
        "source": run.sources,
        "published_of_other_models": dict(run.task.published),
        "fingerprint": fingerprint(run.items),
        "longest_prompt": max(_longest(answered), answering.longest_document),
        "seconds": round(seconds, 3),
        "tokens_per_second": round(read / seconds, 1) if read else None,
        "padding": round(answering.cost.paid / answering.cost.needed, 4) if answering.cost.needed else None,
        **use.figures(),
    }


def _limits(how: HowToRun, over: int) -> dict[str, Any]:
    """Return what results say of documents that are too long; nothing without a limit."""
    return {"limit_tokens": how.limit_tokens, "documents_over_limit": over} if how.limit_tokens else {}


def _longest(answered: Sequence[Answered]) -> int:
    """Return the tokens of the longest stream, over items that read one context."""
    return max((a.tokens_read // max(1, len(a.item.contexts)) for a in answered), default=0)


def _measure(
    name: str,
    folder: str | None,
    model: _Model,
    journal: Journal,
    how: HowToRun,
    on_progress: OnProgress | None,
) -> dict[str, Any]:
    """Return the results of a task that is measured as a whole; `folder` may be tfds:NAME:SPLIT as well."""
    found = journal.find_result(name)
    if found is None:
        if folder is None:
            task, setting = name, make_setting(model.config)
            headline = next(iter(find_task(name).metrics))
        else:
            task, setting = "text", make_setting(model.config, [folder], DOCUMENTS[name][0])
            headline = "next_token_accuracy"
        use = DeviceUse()
        measured = prepare(task, setting, on_progress, limit_tokens=how.limit_tokens)(model.params)
        over = measured.details.pop("documents_over_limit", 0)
        found = {
            "headline": headline,
            "value": measured.scalars[headline],
            "ci95": None,
            "chance": None,
            "metrics": measured.scalars,
            "details": measured.details,
            "source": folder,
            "published_of_other_models": of_the_paper(name),
            **use.figures(),
            **_limits(how, over),
        }
        found = json.loads(dump_json(found))
        journal.add_result(name, found)
    return found


def _run_harness(
    runs: Sequence[HarnessRun], model: _Model, journal: Journal, how: HowToRun, on_progress: OnProgress | None
) -> dict[str, dict[str, Any]]:
    """Return the results of tasks of lm-evaluation-harness."""
    found: dict[str, dict[str, Any]] = {}
    if not runs:
        return found
    from fam_jax.evaluation.lm_eval import HarnessLM  # needs the package lm_eval

    text = TextModel(model.config, model.params, model.joiner.vocabulary, end_ids=model.ends)
    for run in runs:
        report = None if on_progress is None else functools.partial(on_progress, run.key)
        harness = HarnessLM(text, seed=how.seed, on_progress=report)
        found |= run_harness(run, harness, journal, chat=how.lm_eval_chat, limit=how.limit)
    return found


def _default_path(checkpoint: str | os.PathLike[str], step: int, names: Sequence[str]) -> Path:
    name = "+".join(names).replace(":", "-").replace("/", "-")
    if len(name) > LONGEST_NAME:
        digest = hashlib.blake2b(name.encode(), digest_size=4).hexdigest()
        name = f"{name[: LONGEST_NAME - 9]}-{digest}"
    return Path(checkpoint).expanduser() / FOLDER / str(step) / f"suite-{name}.json"


def _write(results: SuiteResults, made_by: dict[str, Any], how: HowToRun) -> None:
    values = {
        "format": FORMAT,
        "step": results.step,
        "provenance": made_by | {"how": dataclasses.asdict(how)},
        "suites": results.suites,
        "skipped": results.skipped,
    }
    with output_file(results.path) as file:
        file.write(f"{dump_json(values, indent=2)}\n".encode())
