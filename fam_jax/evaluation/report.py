"""Compare the results of several evaluations of tasks: tables in Markdown, paired differences, and plots."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fam_jax.checkpoint.new_file import output_file
from fam_jax.config import UserError
from fam_jax.config.strict_json import parse_json
from fam_jax.evaluation.item_tasks.gpt3 import MEANS, MEANS_OF_THE_PAPER
from fam_jax.evaluation.plot import plot_by_fact
from fam_jax.evaluation.scores import paired_difference

# What must be equal for results of a task to compare. The fingerprint covers data, prompts, limit and seed.
MUST_BE_EQUAL = ("version", "shots", "fingerprint", "headline", "harness")
PLOTTED = {
    "length": "length of the prompt (tokens)",
    "depth": "depth of what is asked for",
    "blocks_back": "blocks between it and the question",
}

Results = Mapping[str, Any]


def read_results(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a file that `evaluate_tasks` wrote.

    Raises:
      UserError: it is missing, or no such file.
    """
    try:
        found = parse_json(Path(path).read_bytes())
        assert isinstance(found["suites"], dict) and isinstance(found["step"], int)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); run launch.evaluate --tasks first"
        ) from error
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(f"{path}: has no results of tasks; give a file of launch.evaluate --tasks") from error
    return found


def write_report(
    paths: Sequence[str | os.PathLike[str]], folder: str | os.PathLike[str], *, force: bool = False
) -> list[Path]:
    """Write report.md and plots of several files of results into a folder.

    Args:
      paths: of the files. Differences are to the first one.
      folder: to write into; it is created if needed.
      force: whether to compare results of different versions or items too. The report marks them.

    Returns:
      The files written.

    Raises:
      UserError: a file has no results, the files share no task, results do not compare, or a file cannot be written.
    """
    names = _names(paths)
    results = dict(zip(names, map(read_results, paths), strict=True))
    tasks = [*dict.fromkeys(task for each in results.values() for task in each["suites"])]
    if not tasks:
        raise UserError(f"{paths[0]}: has no results of tasks; give a file with some")
    different = _differences(results, tasks)
    if different and not force:
        task, what = next(iter(different.items()))
        raise UserError(f"{task}: {what}, so the results do not compare; evaluate again, or give --force")
    place = Path(folder)
    parts = [_runs_table(results), _scores_table(results, tasks, different)]
    parts += [*_means(results), *_paired(results, tasks), *_published(results, tasks)]
    written = []
    for fact, label in PLOTTED.items():
        for task in tasks:
            curves = _curves(results, task, fact)
            if any(len(curve) > 1 for curve in curves.values()):
                path = place / f"{task.replace(':', '-').replace('@', '-')}-by-{fact}.png"
                with output_file(path) as file:
                    plot_by_fact(curves, file, label=label, log=fact != "depth", title=task)
                written.append(path)
                parts.append(f"![{task} by {fact}]({path.name})\n")
    with output_file(place / "report.md") as file:
        file.write("\n".join(["# Evaluation\n", *parts]).encode())
    return [place / "report.md", *written]


def _names(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Return short names of files that tell them apart."""
    found = [Path(path).stem for path in paths]
    return found if len({*found}) == len(found) else [os.fspath(path) for path in paths]


def _differences(results: Mapping[str, Results], tasks: Sequence[str]) -> dict[str, str]:
    """Return by task what makes its results differ in more than the model."""
    found: dict[str, str] = {}
    for task in tasks:
        have = {name: each["suites"][task] for name, each in results.items() if task in each["suites"]}
        first, *others = have.items()
        for field in MUST_BE_EQUAL:
            for name, part in others:
                if part.get(field) != first[1].get(field):
                    found.setdefault(
                        task,
                        f"{field} is {first[1].get(field)} in {first[0]} and {part.get(field)} in {name}",
                    )
    return found


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _runs_table(results: Mapping[str, Results]) -> str:
    rows = []
    for name, each in results.items():
        made = each.get("provenance", {})
        rows.append(
            [name, str(made.get("checkpoint", "")), f"{each['step']:,}", str(made.get("devices", ""))]
        )
    return _table(("results", "checkpoint", "step", "devices"), rows)


def _scores_table(results: Mapping[str, Results], tasks: Sequence[str], different: Mapping[str, str]) -> str:
    rows = []
    for task in tasks:
        parts = [each["suites"].get(task) for each in results.values()]
        known = next(part for part in parts if part is not None)
        mark = f" (does not compare: {different[task]})" if task in different else ""
        cells = ["" if part is None else _score(part) for part in parts]
        counts = [f"{known[name]:,}" if name in known else "" for name in ("n", "tokens_read")]
        chance = "" if known.get("chance") is None else f"{known['chance']:.4f}"
        rows.append([task + mark, known["headline"], *cells, chance, *counts])
    return _table(("task", "score", *results, "chance", "items", "tokens read"), rows)


def _means(results: Mapping[str, Results]) -> list[str]:
    """Return a table of means over the tasks of the paper's tables 2 and 12, if some results have all of them."""
    found: dict[str, dict[str, float]] = {}
    for kind, tasks in MEANS.items():
        for name, each in results.items():
            values = [each["suites"][task]["value"] for task in tasks if task in each["suites"]]
            if len(values) == len(tasks):
                found.setdefault(name, {})[kind] = sum(values) / len(values)
    if not found:
        return []
    for size in ("1B", "8B", "24B"):
        for number, memory in enumerate(("BSWA", "FAM")):
            paper = {kind: sizes[size][number] for kind, sizes in MEANS_OF_THE_PAPER.items()}
            found[f"paper's {memory} {size}"] = paper
    rows = [
        [name, *(f"{means[kind]:.4f}" if kind in means else "" for kind in MEANS)]
        for name, means in found.items()
    ]
    counts = [f"{kind} ({len(tasks)} tasks)" for kind, tasks in MEANS.items()]
    title = "Means over tasks, beside those of the paper (tables 2 and 12), which are of other models:"
    return [f"{title}\n\n{_table(('results', *counts), rows)}"]


def _score(part: Results) -> str:
    interval = part.get("ci95")
    return f"{part['value']:.4f}" + ("" if interval is None else f" ({interval[0]:.4f} to {interval[1]:.4f})")


def _paired(results: Mapping[str, Results], tasks: Sequence[str]) -> list[str]:
    """Return tables of the differences of every file to the first one, on the items that both have."""
    (first, base), *others = results.items()
    tables = []
    for name, each in others:
        rows = []
        for task in tasks:
            pair = [part["suites"].get(task, {}).get("items") for part in (base, each)]
            if not pair[0] or not pair[1] or not pair[0].keys() & pair[1].keys():
                continue
            documents = each["suites"][task].get("document_of", {})
            found = paired_difference(pair[0], pair[1], documents)
            interval = f"{found.low:+.4f} to {found.high:+.4f}"
            counts = [f"{count:,}" for count in (found.higher, found.lower, found.items)]
            rows.append([task, f"{found.mean:+.4f}", interval, *counts])
        if rows:
            headings = ("task", "difference", "95 % interval", "higher", "lower", "items")
            tables.append(f"{name} less {first}, item by item:\n\n{_table(headings, rows)}")
    return tables


def _published(results: Mapping[str, Results], tasks: Sequence[str]) -> list[str]:
    """Return a table of what was published of other models, if anything was."""
    rows = []
    for task in tasks:
        part = next(each["suites"][task] for each in results.values() if task in each["suites"])
        told = part.get("published_of_other_models") or {}
        rows += [[task, part["headline"], model, f"{value:.4f}"] for model, value in told.items()]
    table = _table(("task", "score", "model", "value"), rows)
    return [f"Other models, as published, on data and prompts that may differ:\n\n{table}"] if rows else []


def _curves(results: Mapping[str, Results], task: str, fact: str) -> dict[str, dict[float, float]]:
    """Return the headline by values of a fact, for every file that has it."""
    curves = {}
    for name, each in results.items():
        part = each["suites"].get(task, {})
        if f"by_{fact}" in part:
            curves[name] = {row[fact]: row["metrics"][part["headline"]] for row in part[f"by_{fact}"]}
    return curves
