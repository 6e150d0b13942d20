"""Several tasks on a checkpoint: results, skipped tasks, and resumption after a kill at any place."""

import dataclasses
import json
import pathlib
from typing import Any

import jsonschema
import pytest
from etils import epath

from fam_jax.checkpoint.lock import WriterLock
from fam_jax.config import Config, UserError, changed
from fam_jax.evaluation import HowToRun, evaluate_tasks, suite
from fam_jax.evaluation.item import Answered, Item, Likelihood
from fam_jax.evaluation.item_tasks import ITEM_TASKS
from fam_jax.evaluation.journal import Journal
from fam_jax.evaluation.planning import DOCUMENTS, availability, find_tasks
from fam_jax.evaluation.rows import Data, MissingDataError
from fam_jax.evaluation.summary import fingerprint, limited
from fam_jax.evaluation.tasks import TASKS
from launch import evaluate
from tests.evaluation.fixtures import GPT3, write_rows
from tests.evaluation.runs import save_run
from tests.evaluation.schema import check_results, schema

TASKS_OF_RUN = ("copa", "web_questions")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder, "copa", "validation", GPT3["copa"][:3])
    write_rows(folder, "copa", "train", GPT3["copa"][3:])
    write_rows(folder, "web_questions", "test", GPT3["web_questions"][:3])
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, config: Config) -> pathlib.Path:
    """Return the folder of a run with a vocabulary of bytes."""
    folder = tmp_path_factory.mktemp("runs")
    own = changed(
        config,
        model={"vocab_size": 259, "block_size": 64},
        data={"task": "text", "vocabulary": "bytes", "train_files": ("x",), "sequence_length": 64},
        evaluate={"batch_size": 4},
    )
    return save_run(folder / "run", own)


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Run on one device, for which programs compile faster; slow tests use all."""
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr(suite, "make_mesh", lambda _: None)


def without_times(path: str | pathlib.Path) -> dict[str, Any]:
    found = json.loads(pathlib.Path(path).read_text())
    for result in found["suites"].values():
        for name in ("seconds", "tokens_per_second", "padding", "longest_prompt", "programs"):
            del result[name]
    del found["provenance"]
    return found


def test_tasks_from_rows_to_a_file_of_results(
    run: pathlib.Path, data: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    arguments = [f"--checkpoint={run}", f"--data={data}", f"--out={out}", "--shots=0,99"]
    assert evaluate.main([*arguments, "--tasks=copa,web_questions,wic"]) == 0
    printed = capsys.readouterr().out
    assert "acc_token" in printed and f"written to {out}" in printed
    assert "skipped wic: task wic: its data is not on disk; " in printed
    found = json.loads(out.read_text())
    check_results(found)
    assert list(found["suites"]) == ["copa", "web_questions"]
    assert found["suites"]["copa"]["programs"] > 0 and found["suites"]["copa"]["peak_device_bytes"] is None
    assert set(found["skipped"]) == {"wic", "wic@99", "web_questions@99", "copa@99"}
    assert found["skipped"]["copa@99"].endswith("has only 7 examples to show; ask for fewer")
    copa = found["suites"]["copa"]
    assert (copa["headline"], copa["n"], copa["chance"], copa["shots"]) == ("acc_token", 3, 0.5, 0)
    assert copa["value"] == copa["metrics"]["acc_token"] in (0, 1 / 3, 2 / 3, 1)
    assert copa["ci95"][0] <= copa["value"] <= copa["ci95"][1]
    assert copa["tokens_read"] == copa["tokens_expected"] > 0
    assert copa["source"] == {"test": f"{data}/copa/validation.jsonl"}
    assert found["suites"]["web_questions"]["tokens_generated"] > 0
    assert found["provenance"]["how"]["shots"] == ["0", "99"]
    assert found["provenance"]["command"].startswith("python -m launch.evaluate --checkpoint=")
    lines = [json.loads(line) for line in out.with_suffix(".items.jsonl").read_text().splitlines()]
    assert set(lines[0]) == {"head"} and len(lines) == 1 + 3 + 3
    # The whole text can be had from one line: the sums of all choices, so that any rule can be computed again.
    assert len(lines[1]["likelihoods"]) == 2 and lines[1]["tokens_read"] > 0


def test_a_killed_evaluation_goes_on(
    run: pathlib.Path, data: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after any number of lines, with the last one torn: the results are those of one run."""
    how = HowToRun(data=(str(data),))

    def evaluated(out: pathlib.Path, **fields: Any) -> dict[str, Any]:
        evaluate_tasks(run, TASKS_OF_RUN, how=how, out=out, **fields)
        return without_times(out)

    expected = evaluated(tmp_path / "whole.json")
    content = (tmp_path / "whole.items.jsonl").read_bytes()
    lines = content.splitlines(keepends=True)
    out = tmp_path / "out.json"
    journal = tmp_path / "out.items.jsonl"
    asked: list[str] = []
    run_items = suite.Answering.run
    monkeypatch.setattr(
        suite.Answering,
        "run",
        lambda self, items: asked.extend(i.id for i in items) or run_items(self, items),
    )
    for whole in (1, 5):
        journal.write_bytes(b"".join(lines[:whole]) + (lines[whole][:9] if whole < 7 else b""))
        asked.clear()
        assert evaluated(out) == expected
        assert len(asked) == 7 - whole
        assert sorted(journal.read_bytes().splitlines()) == sorted(content.splitlines())
    asked.clear()
    assert evaluated(out, fresh=True) == expected and len(asked) == 6


@pytest.mark.slow
def test_eight_devices_and_one_choose_and_say_the_same(
    run: pathlib.Path, data: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so does a run that is killed on one number of devices after every line, and goes on with the other."""
    how = HowToRun(data=(str(data),), shots=("0", "1"), limit=3)

    def evaluated(out: pathlib.Path) -> dict[str, Any]:
        evaluate_tasks(run, TASKS_OF_RUN, how=how, out=out, batch_size=8)
        return without_times(out)

    def metrics(found: dict[str, Any]) -> dict[str, Any]:
        return {name: (part["metrics"], part["tokens_read"]) for name, part in found["suites"].items()}

    def texts(name: str) -> list[str]:
        lines = (tmp_path / f"{name}.items.jsonl").read_text().splitlines()
        return sorted(json.loads(line)["text"] for line in lines if '"text"' in line)

    many = evaluated(tmp_path / "many.json")
    with monkeypatch.context() as patched:
        patched.setattr(suite, "make_mesh", lambda _: None)
        one = evaluated(tmp_path / "one.json")
    suites = one["suites"]
    assert list(suites) == ["copa", "copa@1", "web_questions"]
    assert suites["copa@1"]["tokens_read"] > suites["copa"]["tokens_read"]
    assert metrics(many) == metrics(one) and texts("many") == texts("one")
    lines = (tmp_path / "one.items.jsonl").read_bytes().splitlines(keepends=True)
    for whole in range(len(lines) + 1):
        (tmp_path / "again.items.jsonl").write_bytes(b"".join(lines[:whole]))
        assert metrics(evaluated(tmp_path / "again.json")) == metrics(one)


def test_another_head_is_refused_by_name(
    run: pathlib.Path, data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    out = tmp_path / "out.json"
    how = HowToRun(data=(str(data),), limit=1)
    evaluate_tasks(run, ["copa"], how=how, out=out)
    with pytest.raises(UserError, match=r"holds answers of another evaluation \(step was 10, is 5.*--fresh$"):
        evaluate_tasks(run, ["copa"], how=how, out=out, step=5)
    with pytest.raises(UserError, match=r"limit was 1, is 2; tasks.copa.fingerprint was"):
        evaluate_tasks(run, ["copa"], how=dataclasses.replace(how, limit=2), out=out)
    evaluate_tasks(run, ["copa"], how=dataclasses.replace(how, limit=2), out=out, fresh=True)


def test_documents_of_a_folder_are_measured_as_text(
    run: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once: the results of a task that is measured as a whole are in the journal too."""
    (tmp_path / "data" / "pg19").mkdir(parents=True)
    (tmp_path / "data" / "pg19" / "1.txt").write_text("a book " * 30)
    (tmp_path / "data" / "pg19" / "notes.md").write_text("not a book")
    how, out = HowToRun(data=(str(tmp_path / "data"),)), tmp_path / "out.json"
    found = evaluate_tasks(run, ["pg19", "isabelle"], how=how, out=out)
    assert "put .thy files into the folder isabelle of a folder of --data" in found.skipped["isabelle"]
    book = found.suites["pg19"]
    assert book["published_of_other_models"]["paper's FAM 24B"] == 0.572
    assert (book["headline"], book["details"]["documents"]) == ("next_token_accuracy", 1)
    assert book["value"] == book["metrics"]["next_token_accuracy"]
    assert book["details"]["tokens_read"] == 30 * 7 + 1 and book["metrics"]["loss_by_position/16"] > 0
    monkeypatch.setattr(suite, "prepare", None)
    assert evaluate_tasks(run, ["pg19"], how=how, out=out).suites == found.suites
    (tmp_path / "data" / "pg19" / "2.txt").write_text("another book")
    with pytest.raises(UserError, match=r"another evaluation \(measured.sources.pg19 was"):
        evaluate_tasks(run, ["pg19"], how=how, out=out)
    monkeypatch.undo()
    monkeypatch.setattr(suite, "make_mesh", lambda _: None)
    check_results(out)
    # The first book has 211 tokens with its end.
    for limit, documents in ((211, 2), (210, 1)):
        limited_how = dataclasses.replace(how, limit_tokens=limit)
        book = evaluate_tasks(run, ["pg19"], how=limited_how, out=out, fresh=True).suites["pg19"]
        assert (book["details"]["documents"], book["documents_over_limit"]) == (documents, 2 - documents)
        check_results(out)
    with pytest.raises(UserError, match=r"another evaluation \(limit_tokens was 210, is 5"):
        evaluate_tasks(run, ["pg19"], how=dataclasses.replace(how, limit_tokens=5), out=out)
    short = dataclasses.replace(how, limit_tokens=5)
    assert (
        "more tokens than --limit_tokens"
        in evaluate_tasks(run, ["pg19"], how=short, out=out, fresh=True).skipped["pg19"]
    )


def test_the_file_of_results_by_default(run: pathlib.Path, data: pathlib.Path) -> None:
    found = evaluate_tasks(run, ["copa"], how=HowToRun(data=(str(data),), limit=1))
    assert found.path == str(run / "evaluations" / "10" / "suite-copa.json")
    assert pathlib.Path(found.path).exists() and found.suites["copa"]["n"] == 1
    assert found.table("a run").row_count == 1


def test_the_schema_is_exact(run: pathlib.Path, data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """It names every setting, and rejects results that lack something or have something else."""
    fields = {field.name for field in dataclasses.fields(HowToRun)}
    how = schema()["$defs"]["how"]
    assert fields == how["properties"].keys() == {*how["required"]}
    made = evaluate_tasks(run, ["copa"], how=HowToRun(data=(str(data),), limit=2), out=tmp_path / "out.json")
    found = json.loads(pathlib.Path(made.path).read_text())
    check_results(found)
    for change in ({"value": "high"}, {"more": 1}, {"n": 0}, {"ci95": [0.5]}, {"padding": 0.5}):
        with pytest.raises(jsonschema.ValidationError):
            check_results({**found, "suites": {"copa": {**found["suites"]["copa"], **change}}})
    for name in found["suites"]["copa"].keys() - {"items"}:
        part = {key: value for key, value in found["suites"]["copa"].items() if key != name}
        with pytest.raises(jsonschema.ValidationError):
            check_results({**found, "suites": {"copa": part}})


def item(name: str, group: str = "") -> Item:
    return Item(name, "choose", "q", choices=("a", "b"), references=("0",), group=group)


def test_a_limit_draws_groups_by_seed() -> None:
    items = [item(f"{n}.{part}", f"g{n}") for n in range(50) for part in range(3)]
    few, more = limited(items, 5, 1), limited(items, 9, 1)
    assert len(few) == 15 and len(more) == 27 and {i.id for i in few} < {i.id for i in more}
    assert few != items[:15] and limited(items, 5, 2) != few and limited(items, 0, 1) == items
    assert few == sorted(few, key=items.index)
    assert limited(items[::-1], 5, 1) == few[::-1]


def test_a_fingerprint_changes_with_any_text() -> None:
    changes = (
        {"context": "r"},
        {"choices": ("a", "c")},
        {"references": ("1",)},
        {"unconditional": ""},
        {"id": "y"},
    )
    found = {fingerprint([dataclasses.replace(item("x"), **change)]) for change in ({}, *changes)}
    assert len(found) == len(changes) + 1


def test_a_journal_keeps_what_was_answered(tmp_path: pathlib.Path) -> None:
    answered = Answered(
        item("x"),
        (Likelihood(float("-inf"), 1, 1), Likelihood(-0.1, 2, 3, -4.5)),
        tokens_read=4,
        tokens_expected=4,
    )
    written = Answered(dataclasses.replace(item("y"), kind="generate"), (), "téxt\n", "end", 3, 3, 2)
    journal = Journal(tmp_path / "new" / "j.jsonl", {"seed": 1})
    journal.add("task", [answered, written])
    again = Journal(tmp_path / "new" / "j.jsonl", {"seed": 1})
    for each in (answered, written):
        assert journal.find("task", each.item) == again.find("task", each.item) == each
    assert again.find("other", answered.item) is None
    for content in ('{"no": 1}\n', "text\n", '{"head": 3}\n', '{"head": {"seed": 1}}\n{"task": 1}\n'):
        (tmp_path / "wrong.jsonl").write_text(content)
        with pytest.raises(UserError, match="is not a journal of answers"):
            Journal(tmp_path / "wrong.jsonl", {"seed": 1})


def test_names_of_tasks_and_suites() -> None:
    assert {"pg19", "isabelle", "quality"} <= {*find_tasks(["long_context"])} and not {*DOCUMENTS} & {*TASKS}
    assert find_tasks(["gpt3"]) == [name for name, task in ITEM_TASKS.items() if task.suite == "gpt3"]
    assert find_tasks(["perplexity", "copa", "passkey", "copa"]) == ["text", "copa", "passkey"]
    assert not {*ITEM_TASKS} & {*TASKS}
    with pytest.raises(UserError, match="task 'hellaswagg': is unknown; did you mean hellaswag"):
        find_tasks(["hellaswagg"])
    for name, task in ITEM_TASKS.items():
        assert task.name == name and task.doc and "\n" not in task.doc and task.version >= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--tasks=copa", "--data=missing"],
            "--data=missing: no such folder; name folders with data, or tfds",
        ),
        (["--tasks=copa", "--data=DATA", "--shots=x"], "--shots=x: expected numbers, or gpt3"),
        (["--tasks=copa", "--data=DATA", "--task=text"], "--task: has no meaning beside --tasks or --suite"),
        (
            ["--tasks=wic", "--data=DATA"],
            "task wic: its data is not on disk; run `tfds build super_glue/wic` and use",
        ),
        (["--suite=gpt4", "--data=DATA"], "task 'gpt4': is unknown"),
        (["--task=wic", "--data=DATA"], "put wic/validation.jsonl into a folder of --data"),
    ],
)
def test_mistakes(run: pathlib.Path, data: pathlib.Path, arguments: list[str], message: str) -> None:
    """They are found before a model is loaded."""
    with pytest.raises(UserError) as caught:
        evaluate.main([f"--checkpoint={run}", *(part.replace("DATA", str(data)) for part in arguments)])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_rows_of_every_format(tmp_path: pathlib.Path) -> None:
    import gzip

    import pyarrow
    import pyarrow.parquet

    rows, task = GPT3["multirc"], ITEM_TASKS["multirc"]
    text = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    for ending, content in {
        "jsonl": text,
        "jsonl.gz": gzip.compress(text),
        "json": json.dumps(rows).encode(),
        "json.gz": gzip.compress(json.dumps({"version": "1", "data": rows}).encode()),
    }.items():
        folder = tmp_path / ending
        (folder / "multirc").mkdir(parents=True)
        (folder / "multirc" / f"validation.{ending}").write_bytes(content)
    (tmp_path / "parquet" / "multirc").mkdir(parents=True)
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "parquet" / "multirc" / "validation.parquet")
    for folder in sorted(tmp_path.iterdir()):
        found = Data([str(folder)]).rows(task, "test")
        assert [row.values for row in found] == rows and [row.id for row in found][:2] == ["0", "1"]
    # The first place that has the data counts.
    both = Data([str(tmp_path / "json"), str(tmp_path / "jsonl")])
    assert both.source(task, "test").startswith(str(tmp_path / "json" / "multirc"))
    with pytest.raises(MissingDataError):
        both.source(task, "train")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "validation.jsonl",
            b'{"a": 1}\n{"b"',
            "validation.jsonl: line 2: is not valid JSON; correct or remove it",
        ),
        (
            "validation.jsonl",
            rb'{"a": ["\ud83d"]}',
            r"line 1: has half a surrogate pair, \\ud83d, which is no",
        ),
        ("validation.jsonl", b"[1]\n", "line 1: expected an object with fields, got list"),
        ("validation.json", b"[{}, 3]", "validation.json: entry 2: expected an object with fields, got int"),
        ("validation.jsonl.gz", b"no gzip", "cannot be read"),
        ("validation.parquet", b"no parquet", "is damaged or not a Parquet file"),
        ("validation.jsonl", b"\n", "holds no rows"),
        ("validation.jsonl", "é".encode("latin-1"), "not UTF-8 at byte 0"),
    ],
)
def test_files_that_are_damaged(tmp_path: pathlib.Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / "copa").mkdir()
    (tmp_path / "copa" / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        Data([str(tmp_path)]).rows(ITEM_TASKS["copa"], "test")


def test_books_of_a_prepared_tfds_dataset(run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """PG-19 has four texts for each book; the book itself is measured."""
    import tensorflow_datasets as tfds

    names = ("book_id", "book_link", "book_text", "book_title", "publication_date")
    books = [{key: f"{key} {n} " * (3 if key == "book_text" else 1) for key in names} for n in range(2)]
    with pytest.raises(
        UserError, match=r"task pg19: .* run `tfds build pg19` and use --data=tfds, or put \.txt files"
    ):
        evaluate_tasks(run, ["pg19"], how=HowToRun(data=("tfds",)), out=tmp_path / "none.json")
    try:
        tfds.dataset_builders.store_as_tfds_dataset(
            "pg19",
            version="0.1.1",
            features=tfds.features.FeaturesDict({key: tfds.features.Text() for key in names}),
            split_datasets={"validation": [*enumerate(books)]},
            data_dir=str(tmp_path),
            disable_shuffling=True,
        )
        tfds.core.utils.file_utils.add_data_dir(str(tmp_path))
        ((*_, place),) = availability(["pg19"], Data(["tfds"]))
        assert place == "tfds:pg19:validation"
        found = evaluate_tasks(run, ["pg19"], how=HowToRun(data=("tfds",)), out=tmp_path / "out.json")
    finally:
        tfds.core.utils.file_utils.clear_registered_data_dirs()
    assert found.suites["pg19"]["source"] == "tfds:pg19:validation"
    read = sum(len(book["book_text"]) + 1 for book in books)
    assert found.suites["pg19"]["details"]["tokens_read"] == read
    check_results(tmp_path / "out.json")


def test_rows_of_a_prepared_tfds_dataset(tmp_path: pathlib.Path) -> None:
    """Nested features come as JSON has them; what is not prepared is missing, and nothing is downloaded."""
    import numpy as np
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict(
        {
            "text": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=["no", "yes"]),
            "idx": {"paragraph": np.int32, "question": np.int32},
            "words": tfds.features.Sequence(tfds.features.Text()),
            "options": tfds.features.Sequence(tfds.features.Sequence(tfds.features.Text())),
            "answers": tfds.features.Sequence({"text": tfds.features.Text(), "start": np.int32}),
        }
    )
    rows = [
        {
            "text": f"é{n}",
            "label": n % 2,
            "idx": {"paragraph": n, "question": 1},
            "words": ["a"] * n,
            "options": [["a", "b"], ["c"]][: n % 3],
            "answers": {"text": ["x"] * (n % 2), "start": [3] * (n % 2)},
        }
        for n in range(4)
    ]
    file_utils = tfds.core.utils.file_utils
    try:
        builder = tfds.dataset_builders.store_as_tfds_dataset
        builder(
            "fam_rows",
            version="1.0.0",
            features=features,
            split_datasets={"validation": [*enumerate(rows)]},
            data_dir=str(tmp_path),
            disable_shuffling=True,
        )
        file_utils.add_data_dir(str(tmp_path))
        task = dataclasses.replace(
            ITEM_TASKS["copa"],
            sources={"test": ("tfds:fam_rows:validation",), "train": ("tfds:fam_rows:train",)},
        )
        data = Data(["tfds"])
        assert [row.values for row in data.rows(task, "test")] == rows
        assert data.rows(task, "test")[2].where == "tfds:fam_rows:validation: row 3"
        for missing in (task, ITEM_TASKS["copa"]):
            with pytest.raises(MissingDataError, match="run `tfds build"):
                data.source(missing, "train")
    finally:
        file_utils.clear_registered_data_dirs()


def test_a_folder_of_data_with_commas(
    run: pathlib.Path, data: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a, b").symlink_to(data)
    folders = repr((f"{tmp_path}/a, b",))
    assert evaluate.main([f"--checkpoint={run}", f"--data={folders}", "--tasks=copa", "--list"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "copa" in line)
    assert line.endswith(f"{tmp_path}/a, b/copa/validation.jsonl")
    found = evaluate_tasks(run, ["copa"], how=HowToRun(data=(f"{tmp_path}/a, b",)), out=tmp_path / "out.json")
    assert found.suites["copa"]["items"].keys() == set("012") and not found.skipped


def test_two_evaluations_do_not_write_to_one_file(
    run: pathlib.Path, data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    how, out = HowToRun(data=(str(data),)), tmp_path / "out.json"
    with WriterLock(epath.Path(tmp_path), out.name), pytest.raises(UserError) as caught:
        evaluate_tasks(run, ["copa"], how=how, out=out)
    assert str(out) in str(caught.value) and "another process" in str(caught.value)
    assert not out.exists() and not out.with_suffix(".items.jsonl").exists()
    assert evaluate_tasks(run, ["copa"], how=how, out=out).suites["copa"]["items"].keys() == set("012")
