"""Run tasks of lm-evaluation-harness beside those of fam_jax: plan before a model is loaded, and give like results.

The harness makes prompts and scores; the model reads and answers as for all tasks of items.
"""

import dataclasses
import difflib
import hashlib
import importlib.metadata
import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fam_jax.config import UserError
from fam_jax.evaluation.device_use import DeviceUse
from fam_jax.evaluation.journal import Journal
from fam_jax.evaluation.summary import draw, interval

if TYPE_CHECKING:
    from fam_jax.evaluation.lm_eval import HarnessLM  # needs the package lm_eval

# Begins the names of such tasks.
PREFIX = "lm_eval:"
# Fields of a task of the harness that say where its data comes from.
_SOURCE = (
    "dataset_path",
    "dataset_name",
    "dataset_kwargs",
    "test_split",
    "validation_split",
    "fewshot_split",
)


@dataclasses.dataclass
class HarnessRun:
    """A task, or a group of tasks, of the harness with a number of shots."""

    # With the prefix; a number of shots that was asked for is behind an @.
    key: str
    # None: that of the task.
    shots: int | None
    # Tasks by name, as the harness made them; and what to ask the harness for.
    tasks: dict[str, Any]
    roots: list[Any]
    manager: Any
    # Numbers of the rows to ask about, by task; None: all.
    drawn: dict[str, list[int]] | None


def plan_harness(
    names: Sequence[str], *, shots: Sequence[str], folders: Sequence[str], limit: int, seed: int
) -> tuple[list[HarnessRun], dict[str, str]]:
    """Load tasks of the harness with their data.

    Args:
      names: of tasks, groups or tags, with the prefix.
      shots: numbers of solved examples to show; empty: as many as each task says.
      folders: with task files (YAML) to add to those of the harness.
      limit: rows of a task, drawn by the seed; 0: all.
      seed: of the draw.

    Returns:
      What to run, and why other tasks cannot run.

    Raises:
      UserError: the package is missing, a name is unknown, or `shots` are no numbers.
    """
    if not names:
        return [], {}
    from fam_jax.evaluation.lm_eval import TaskManager  # its error says how to install the harness

    for text in shots:
        if not text.isdecimal():
            raise UserError(f"--shots={text}: tasks of the harness take numbers; leave it out for their own")
    manager = TaskManager(include_path=[*folders] or None)
    runs, skipped = [], {}
    for name in names:
        own = name.removeprefix(PREFIX)
        if own not in manager.all_tasks and not own.endswith((".yaml", ".yml")):
            close = difflib.get_close_matches(own, manager.all_tasks, 3)
            advice = f"did you mean {', '.join(close)}?" if close else "`lm-eval ls tasks` shows all"
            raise UserError(f"task {name}: the harness has no such task; {advice}")
        for number in shots or (None,):
            key = name if number is None else f"{name}@{number}"
            try:
                loaded = manager.load([own])
                for task in loaded["tasks"].values():
                    task.doc_to_text(next(iter(task.eval_docs)))  # fails if the rows are of another format
                drawn = _drawn(loaded["tasks"], limit, seed)
            # The data and the code of a task come from anywhere, so anything may fail.
            except Exception as error:
                skipped[key] = f"task {name}: {_reason(error)}"
                continue
            runs.append(
                HarnessRun(
                    key,
                    None if number is None else int(number),
                    loaded["tasks"],
                    _roots(loaded),
                    manager,
                    drawn,
                )
            )
    return runs, skipped


def _reason(error: Exception) -> str:
    told = " ".join(str(error).split()) or "no reason given"
    return (
        f"the harness cannot load it ({type(error).__name__}: {told:.200}); without a network, give a task file with "
        "local data by --lm_eval_tasks"
    )


def _drawn(tasks: Mapping[str, Any], limit: int, seed: int) -> dict[str, list[int]] | None:
    """Return rows of every task, drawn as the items of other tasks are: a larger limit holds those of a smaller."""
    sizes = {name: len(task.eval_docs) for name, task in tasks.items()}
    if not limit:
        return None
    return {
        name: sorted(sorted(range(size), key=lambda row: draw(seed, str(row)))[:limit])
        for name, size in sizes.items()
    }


def _roots(loaded: Mapping[str, Any]) -> list[Any]:
    """Return the groups and tasks that are in no group."""
    inner = {name for names in loaded.get("group_map", {}).values() for name in names}
    found = {**loaded.get("groups", {}), **loaded["tasks"]}
    return [each for name, each in found.items() if name not in inner]


def harness_head(runs: Sequence[HarnessRun], *, chat: bool) -> dict[str, Any]:
    """Return what the answers depend on, beside the texts of the requests, which name the answers."""
    if not runs:
        return {}
    tasks = {run.key: {name: str(task.VERSION) for name, task in run.tasks.items()} for run in runs}
    return {"lm_eval": {"version": version(), "chat": chat, "tasks": tasks}}


def version() -> str:
    """Return the version of the harness."""
    return importlib.metadata.version("lm_eval")


def run_harness(
    run: HarnessRun, model: "HarnessLM", journal: Journal, *, chat: bool, limit: int
) -> dict[str, dict[str, Any]]:
    """Run a task of the harness.

    Args:
      run: from :func:`plan_harness`.
      model: answers its requests.
      journal: holds the answers of a killed run, and gets new ones.
      chat: whether to ask by the tokenizer's chat template.
      limit: as in `plan_harness`, for the results.

    Returns:
      The results, as those of other tasks, by the names of the task, or of the group and its tasks.
    """
    from fam_jax.evaluation.lm_eval import simple_evaluate

    model.write_to(journal, run.key)
    began, use = time.perf_counter(), DeviceUse()
    found = simple_evaluate(
        model=model,
        tasks=run.roots,
        num_fewshot=run.shots,
        samples=run.drawn,
        # Its bootstrap forks processes, which a process with JAX must not do; intervals are ours.
        bootstrap_iters=0,
        apply_chat_template=chat,
        task_manager=run.manager,
    )
    seconds = time.perf_counter() - began
    cost = model.requests.cost
    shared = {
        "harness": {"name": "lm_eval", "version": version()},
        "chat": chat,
        "limit": limit,
        "chance": None,
        "longest_prompt": model.requests.longest,
        "seconds": round(seconds, 3),
        "padding": round(cost.paid / cost.needed, 4) if cost.needed else None,
        **use.figures(),
    }
    results = {}
    for name in found["results"]:
        part = _result(name, run, found, model)
        if part is not None:
            results[_key(run, name, alone=len(found["results"]) == 1)] = {**part, **shared}
    return results


def _key(run: HarnessRun, name: str, *, alone: bool) -> str:
    if alone:
        return run.key
    return f"{PREFIX}{name}" + ("" if run.shots is None else f"@{run.shots}")


def _result(
    name: str, run: HarnessRun, found: Mapping[str, Any], model: "HarnessLM"
) -> dict[str, Any] | None:
    """Return the results of a task or group; None for a group without scores of its own."""
    metrics = {
        _metric(key): float(value)
        for key, value in found["results"][name].items()
        if "," in key and "_stderr" not in key and isinstance(value, int | float)
    }
    if not metrics:
        return None
    config = found.get("configs", {}).get(name, {})
    headline = next(iter(metrics))
    samples = found.get("samples", {}).get(name, [])
    own = _values(samples, headline, metrics[headline])
    result: dict[str, Any] = {
        "headline": headline,
        "value": metrics[headline],
        "ci95": interval([*own.values()], [*own]) if own else None,
        "metrics": metrics,
        "higher_is_better": found.get("higher_is_better", {}).get(name, {}),
        "n": int(found["results"][name].get("sample_len") or 0),
        "version": found.get("versions", {}).get(name),
        "shots": found.get("n-shot", {}).get(name),
        "source": {key: config[key] for key in _SOURCE if config.get(key)},
        "fingerprint": _fingerprint(samples),
    }
    answers = model.read_for(name)
    if name in run.tasks:
        for count in ("tokens_read", "tokens_expected", "tokens_generated"):
            result[count] = sum(getattr(each, count) for each in answers)
        if result["tokens_read"] != result["tokens_expected"]:
            raise RuntimeError(f"{name}: the model did not read all tokens; the results would be misleading")
    if own:
        result |= {"items": own, "document_of": {row: row for row in own}}
    return result


def _metric(key: str) -> str:
    """Return the name of a score, which the harness names NAME,FILTER."""
    name, _, kept = key.partition(",")
    return name if kept == "none" else key


def _values(samples: Sequence[Mapping[str, Any]], headline: str, total: float) -> dict[str, float]:
    """Return the score of every row, by its number; empty if `total` is not their mean, as with perplexity."""
    metric, _, kept = headline.partition(",")
    found = {}
    for sample in samples:
        if sample.get("filter", "none") == (kept or "none"):
            value = sample.get(metric)
            if not isinstance(value, int | float) or not math.isfinite(value):
                return {}
            found[str(sample["doc_id"])] = float(value)
    is_mean = found and math.isclose(sum(found.values()) / len(found), total, rel_tol=1e-6, abs_tol=1e-9)
    return found if is_mean else {}


def _fingerprint(samples: Sequence[Mapping[str, Any]]) -> str:
    """Return a short text that changes with any row, prompt or answer of the data."""
    digest = hashlib.blake2b(digest_size=8)
    for sample in samples:
        fields = [sample.get(name) for name in ("doc_id", "doc_hash", "prompt_hash", "target_hash")]
        digest.update(repr(fields).encode())
    return digest.hexdigest()
