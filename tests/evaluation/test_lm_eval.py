"""Tasks of lm-evaluation-harness beside our own, on the same rows and prompts; needs the package lm_eval."""

import dataclasses
import json
import pathlib
import types
from typing import Any

import pytest

from fam_jax.config import Config, UserError, changed
from fam_jax.data.vocabulary import load_vocabulary
from fam_jax.evaluation import HowToRun, evaluate_tasks, suite
from fam_jax.evaluation.harness import request_name
from fam_jax.evaluation.item import Item, Request
from fam_jax.evaluation.item_tasks import ITEM_TASKS
from fam_jax.evaluation.report import write_report
from fam_jax.evaluation.rows import Data
from launch import evaluate
from tests.data.chat_templates import LLAMA3, PLAIN_CHAT, unmarked, write_folder
from tests.evaluation.fixtures import GPT3, write_rows
from tests.evaluation.runs import save_run
from tests.evaluation.schema import check_results

lm_eval = pytest.importorskip("lm_eval")
pytestmark = pytest.mark.slow

CHOOSING, WRITING = ("copa", "hellaswag", "winogrande"), ("natural_questions", "lambada")
FOLDER = pathlib.Path(lm_eval.__path__[0]) / "tasks"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, config: Config) -> pathlib.Path:
    own = changed(
        config,
        model={"vocab_size": 259, "block_size": 64},
        data={"task": "text", "vocabulary": "bytes", "train_files": ("x",), "sequence_length": 64},
        evaluate={"batch_size": 4},
    )
    return save_run(tmp_path_factory.mktemp("runs") / "run", own)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("data")
    for name in (*CHOOSING, *WRITING):
        split = ITEM_TASKS[name].sources["test"][-1].rpartition("/")[2]
        write_rows(folder, name, split, GPT3[name])
    return folder


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs for one device compile faster."""
    monkeypatch.setattr(suite, "make_mesh", lambda _: None)


def items_of(name: str, data: pathlib.Path) -> list[Item]:
    task, places = ITEM_TASKS[name], Data([str(data)])
    return [*task.items(Request(rows=lambda split: places.rows(task, split)))]


def write_task(folder: pathlib.Path, name: str, rows: list[dict[str, Any]], **fields: Any) -> None:
    """Write a task of the harness with its rows; YAML contains JSON."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    settings = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{context}}",
        "target_delimiter": "",
        "metadata": {"version": 3},
        **fields,
    }
    (folder / f"{name}.yaml").write_text(json.dumps({key: v for key, v in settings.items() if v is not None}))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, data: pathlib.Path) -> pathlib.Path:
    """Return a folder of tasks of the harness that have the prompts of ours."""
    folder = tmp_path_factory.mktemp("tasks")
    for name in CHOOSING[:2]:
        rows = [
            {"context": item.context, "choices": [text.strip() for text in item.choices], "gold": item.gold}
            for item in items_of(name, data)
        ]
        how = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "gold"}
        how["target_delimiter"] = " "
        metrics = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}, {"metric": "acc_norm"}]
        write_task(folder, f"same_{name}", rows, metric_list=metrics, **how)
    rows = [
        {"contexts": item.contexts, "rest": item.choices[0], "gold": item.gold}
        for item in items_of("winogrande", data)
    ]
    how = {"output_type": "loglikelihood", "doc_to_target": "{{rest}}", "metric_list": [{"metric": "acc"}]}
    write_task(folder, "same_winogrande", rows, **{**how, "doc_to_text": "{{contexts[gold]}}"})
    for name in WRITING:
        rows = [{"context": item.context, "gold": item.references[0]} for item in items_of(name, data)]
        limits = {"until": ["\n"], "max_gen_toks": ITEM_TASKS[name].max_tokens, "do_sample": False}
        write_task(
            folder,
            f"same_{name}",
            rows,
            output_type="generate_until",
            doc_to_target="{{gold}}",
            generation_kwargs=limits,
            metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        )
    group = {"group": "same", "task": [f"same_{name}" for name in CHOOSING[:2]]}
    group["aggregate_metric_list"] = [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}]
    (folder / "same.yaml").write_text(json.dumps(group))
    texts = [{"context": "", "text": "the sea and the land " * n} for n in (1, 5, 12)]
    metrics = [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}]
    how = {"output_type": "loglikelihood_rolling", "doc_to_target": "{{text}}", "metric_list": metrics}
    write_task(folder, "whole_texts", texts, **how)
    # A task of the harness, with its own code, on rows of a file.
    rows = [{**row, "question": ("cause", "effect")[row["question"]]} if isinstance(row["question"], int) else row
            for row in GPT3["copa"]]  # fmt: skip
    rows_file = folder / "copa_rows.jsonl"
    rows_file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "copa_of_harness.yaml").write_text(
        f"include: {FOLDER / 'super_glue' / 'copa' / 'default.yaml'}\n"
        # Without this, the harness puts two blanks before a choice of COPA.
        'target_delimiter: ""\n'
        "task: copa_of_harness\ndataset_path: json\ndataset_name: null\n"
        f"dataset_kwargs: {{data_files: {{train: {rows_file}, validation: {rows_file}}}}}\n"
    )
    return folder


def lines_of(out: pathlib.Path, task: str) -> dict[str, dict[str, Any]]:
    lines = map(json.loads, out.with_suffix(".items.jsonl").read_text().splitlines()[1:])
    return {line["id"]: line for line in lines if line["task"] == task}


def test_the_same_rows_and_prompts_give_the_same(
    run: pathlib.Path, data: pathlib.Path, tasks: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Log probabilities of every choice, generated texts, tokens read, and accuracies."""
    out = tmp_path / "out.json"
    names = [*(f"lm_eval:same_{name}" for name in (*CHOOSING, *WRITING)), "lm_eval:copa_of_harness"]
    arguments = [f"--checkpoint={run}", f"--data={data}", f"--out={out}", f"--lm_eval_tasks={tasks}"]
    assert evaluate.main([*arguments, f"--tasks={','.join([*CHOOSING, *WRITING, *names])}"]) == 0
    check_results(out)
    suites = json.loads(out.read_text())["suites"]
    for name in CHOOSING[:2]:
        ours, theirs = lines_of(out, name), lines_of(out, f"lm_eval:same_{name}")
        for item in items_of(name, data):
            other = theirs[request_name("pair", item.context, *item.choices)]["likelihoods"]
            for (total, tokens, *_), (other_total, other_tokens, *_) in zip(
                ours[item.id]["likelihoods"], other, strict=True
            ):
                assert total == pytest.approx(other_total, abs=1e-4) and tokens == other_tokens
        mine, their = suites[name], suites[f"lm_eval:same_{name}"]
        assert their["metrics"]["acc"] == mine["metrics"]["acc"] and their["n"] == mine["n"]
        assert their["tokens_read"] == their["tokens_expected"] == mine["tokens_read"]
        assert their["metrics"]["acc_norm"] == pytest.approx(mine["metrics"]["acc_byte"])
    ours, theirs = lines_of(out, "winogrande"), lines_of(out, "lm_eval:same_winogrande")
    for item in items_of("winogrande", data):
        other = theirs[request_name("pair", item.contexts[item.gold], item.choices[0])]["likelihoods"][0]
        assert ours[item.id]["likelihoods"][item.gold][0] == pytest.approx(other[0], abs=1e-4)
    for name in WRITING:
        ours, theirs = lines_of(out, name), lines_of(out, f"lm_eval:same_{name}")
        texts = sorted(line["text"] for line in ours.values())
        assert texts == sorted(line["text"] for line in theirs.values()) and len({*texts}) > 1
        for count in ("tokens_read", "tokens_generated"):
            assert suites[f"lm_eval:same_{name}"][count] == suites[name][count]
    harness = suites["lm_eval:copa_of_harness"]
    assert harness["metrics"]["acc"] == suites["copa"]["metrics"]["acc"]
    assert harness["tokens_read"] == suites["copa"]["tokens_read"]
    sums = [
        sorted(each[0] for line in lines_of(out, name).values() for each in line["likelihoods"])
        for name in ("copa", "lm_eval:copa_of_harness")
    ]
    assert len(sums[0]) == 20 and sums[0] == pytest.approx(sums[1], abs=1e-4)


def test_results_are_those_of_other_tasks(
    run: pathlib.Path, tasks: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """A group and its tasks; drawn rows; resumption; a report."""
    how = HowToRun(lm_eval_tasks=(str(tasks),), limit=3)
    found = evaluate_tasks(run, ["lm_eval:same"], how=how, out=tmp_path / "a.json")
    assert {*found.suites} == {"lm_eval:same", "lm_eval:same_copa", "lm_eval:same_hellaswag"}
    part = found.suites["lm_eval:same_copa"]
    assert (part["headline"], part["n"], part["shots"], part["version"], part["limit"]) == ("acc", 3, 0, 3, 3)
    assert part["harness"] == {"name": "lm_eval", "version": lm_eval.__version__}
    assert part["ci95"][0] <= part["value"] <= part["ci95"][1] and len(part["items"]) == 3
    values = [found.suites[f"lm_eval:same_{name}"]["metrics"]["acc"] for name in CHOOSING[:2]]
    assert found.suites["lm_eval:same"]["metrics"]["acc"] == pytest.approx(sum(values) / 2)
    more = evaluate_tasks(
        run, ["lm_eval:same_copa"], how=dataclasses.replace(how, limit=5), out=tmp_path / "b.json"
    )
    assert part["items"].items() <= more.suites["lm_eval:same_copa"]["items"].items()
    # Killed behind the second answer.
    journal = (tmp_path / "a.items.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "again.items.jsonl").write_bytes(b"".join(journal[:3]))
    again = evaluate_tasks(run, ["lm_eval:same"], how=how, out=tmp_path / "again.json")
    asked = [lines_of(tmp_path / f"{name}.json", "lm_eval:same") for name in ("a", "again")]
    assert asked[0].keys() == asked[1].keys() and len(asked[0]) == len(journal) - 1 == 6
    changing = {"seconds", "padding", "longest_prompt", "programs"}
    for name, result in found.suites.items():
        for key in result.keys() - changing:
            assert again.suites[name][key] == result[key], (name, key)
    check_results(tmp_path / "again.json")
    write_report([tmp_path / "a.json", tmp_path / "again.json"], tmp_path / "report")
    assert "lm_eval:same_copa" in (tmp_path / "report" / "report.md").read_text()


def test_from_python(run: pathlib.Path, tasks: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """The harness calls the model by object or by name; its cache has the answers."""
    from lm_eval.tasks import TaskManager

    from fam_jax.evaluation.lm_eval import HarnessLM

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    how: dict[str, Any] = {"task_manager": manager, "bootstrap_iters": 0}
    names = ["same_copa", "whole_texts", "same_lambada"]
    model = HarnessLM.restore(run, batch_size=2)
    first = lm_eval.simple_evaluate(model=model, tasks=names, use_cache=str(tmp_path / "cache"), **how)
    by_name = lm_eval.simple_evaluate(
        model="fam_jax", model_args=f"checkpoint={run},batch_size=3", tasks=names, **how
    )
    for name in names:
        for metric, value in first["results"][name].items():
            other = by_name["results"][name][metric]
            assert other == (value if isinstance(value, str) else pytest.approx(value, rel=1e-5))
    assert first["results"]["whole_texts"]["bits_per_byte,none"] > 1
    # With the cache, nothing is left to ask.
    monkeypatched = HarnessLM.restore(run)
    monkeypatched.loglikelihood = monkeypatched.generate_until = None  # type: ignore[method-assign, assignment]
    cached = lm_eval.simple_evaluate(
        model=monkeypatched, tasks=["same_copa", "same_lambada"], use_cache=str(tmp_path / "cache"), **how
    )
    assert cached["results"]["same_copa"] == first["results"]["same_copa"]
    for argument in ("step=1,batch_size=2", f"checkpoint={run},pretrained=x", f"checkpoint={run},step=x"):
        with pytest.raises(UserError, match=r"^model_args: "):
            lm_eval.simple_evaluate(model="fam_jax", model_args=argument, tasks=names, **how)


def test_chats(tmp_path: pathlib.Path, config: Config) -> None:
    """Prompts by the tokenizer's template begin with the start token once, and keep their last blanks."""
    from lm_eval.tasks import TaskManager

    from fam_jax.evaluation.lm_eval import HarnessLM

    vocabulary = write_folder(tmp_path / "tokenizer", "llama3", unmarked(LLAMA3))
    size = load_vocabulary(vocabulary).vocab_size
    own = changed(
        config,
        model={"vocab_size": size, "block_size": 16},
        data={"task": "text", "vocabulary": vocabulary, "train_files": ("x",), "add_bos": True},
    )
    model = HarnessLM.restore(save_run(tmp_path / "run", own), batch_size=2)
    (tmp_path / "tasks").mkdir()
    rows = [{"context": f"where is {name}?", "gold": "there"} for name in ("it", "he")]
    limits = {"until": ["\n\n"], "max_gen_toks": 4}
    fields = {"output_type": "generate_until", "doc_to_target": "{{gold}}", "generation_kwargs": limits}
    write_task(tmp_path / "tasks", "asked", rows, metric_list=[{"metric": "exact_match"}], **fields)
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=["asked"],
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        bootstrap_iters=0,
        apply_chat_template=True,
    )
    shown = [sample["arguments"][0][0] for sample in found["samples"]["asked"]]
    header = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n"
    assert shown[0] == f"{header}where is it?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    encode = load_vocabulary(vocabulary).encode
    assert [each.tokens_read for each in model.read_for("asked")] == [len(encode(text)) for text in shown]
    assert model.chat_template(True) == unmarked(LLAMA3) and model.chat_template() is None
    other = changed(own, data={"vocabulary": write_folder(tmp_path / "plain", "llama3", None)})
    plain = HarnessLM.restore(save_run(tmp_path / "other", other))
    assert plain.tokenizer_name != model.tokenizer_name and plain.chat_template(True) is None
    with pytest.raises(
        UserError, match=r"has no chat template beside it; put one there as chat_template\.jinja"
    ):
        plain.apply_chat_template([{"role": "user", "content": "x"}])


def test_chats_of_a_vocabulary_that_takes_control_tokens_for_text(
    tmp_path: pathlib.Path, config: Config
) -> None:
    from fam_jax.evaluation.lm_eval import HarnessLM

    (tmp_path / "chat.jinja").write_text(PLAIN_CHAT)
    template = str(tmp_path / "chat.jinja")
    own = changed(
        config,
        model={"vocab_size": 259, "block_size": 16},
        data={
            "task": "instructions",
            "vocabulary": "bytes",
            "train_files": ("x",),
            "chat_template": template,
        },
    )
    model = HarnessLM.restore(save_run(tmp_path / "run", own), batch_size=2)
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    context = model.apply_chat_template(chat[:3])
    assert context == "user: a\nassistant: b</s>\nuser: a\nassistant: "
    request = types.SimpleNamespace(args=(context, {"until": ["\n"], "max_gen_toks": 2}), task_name="asked")
    model.generate_until([request])
    assert [each.tokens_read for each in model.read_for("asked")] == [len(context) - len("</s>") + 1]


def test_tasks_that_cannot_run(
    run: pathlib.Path, tasks: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unknown names are mistakes; missing data and rows of another format skip a task, before a model is loaded."""
    how = HowToRun(lm_eval_tasks=(str(tasks),))
    monkeypatch.setattr(suite, "load_model", None)
    with pytest.raises(
        UserError, match=r"^task lm_eval:same_cop: the harness has no such task; did you mean same_copa"
    ):
        evaluate_tasks(run, ["lm_eval:same_cop"], how=how)
    with pytest.raises(UserError, match=r"^--shots=gpt3: tasks of the harness take numbers"):
        evaluate_tasks(run, ["lm_eval:same_copa"], how=dataclasses.replace(how, shots=("gpt3",)))
    text = (tasks / "copa_of_harness.yaml").read_text()
    (tasks / "gone.yaml").write_text(text.replace("copa_of_harness", "gone").replace("copa_rows", "nowhere"))
    with pytest.raises(
        UserError, match=r"^task lm_eval:gone: the harness cannot load it \(FileNotFound.*local data"
    ):
        evaluate_tasks(run, ["lm_eval:gone"], how=how)
