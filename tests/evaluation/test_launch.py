"""`python -m launch.evaluate`: results on any number of devices, and mistakes in one line."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from fam_jax.config import Config, UserError, resolve
from fam_jax.evaluation import TASKS, read_evaluation
from fam_jax.evaluation.item_tasks import ITEM_TASKS
from fam_jax.evaluation.planning import DOCUMENTS
from launch import evaluate
from launch.errors import user_errors
from tests.evaluation.fixtures import GPT3, write_rows
from tests.evaluation.runs import save_run
from tests.flags import xla_flags

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, config: Config, parrot: dict) -> pathlib.Path:
    """Return the folder of a run with two steps."""
    return save_run(tmp_path_factory.mktemp("runs") / "parrot", config, parrot)


def launch(*arguments: str, devices: int) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "launch.evaluate", *arguments],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": xla_flags(devices), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_on_four_devices(run: pathlib.Path, config: Config, parrot_accuracy: float) -> None:
    done = launch(f"--checkpoint={run}", "--lengths=1", "--batch_size=4", "--mesh=data=2,fsdp=2", devices=4)
    assert done.returncode == 0, done.stderr
    assert "PassKey retrieval, step 10" in done.stdout and f"{parrot_accuracy:.1%}" in done.stdout
    path = run / "evaluations" / "10" / "passkey.json"
    assert f"written to {path}" in done.stdout
    found = read_evaluation(path)
    row = found.details["groups"]["1"]
    assert row["answer_token_accuracy"] == parrot_accuracy
    assert row["questions"] == config.evaluate.keys
    assert found.step == 10 and found.devices == "4 x cpu"
    assert found.details["seed"] == config.evaluate.seed
    assert found.command.startswith("python -m launch.evaluate --checkpoint=")
    used = resolve(found.config)
    assert used.model == config.model
    assert (used.evaluate.filler_blocks, used.evaluate.batch_size, used.mesh.fsdp) == ((1,), 4, 2)


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path: pathlib.Path) -> None:
    done = launch(f"--checkpoint={tmp_path / 'missing'}", devices=1)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "no such folder" in done.stderr


def test_the_list_of_tasks(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    """The list needs no checkpoint. With --data, it says where the data of each task is."""
    assert evaluate.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*TASKS, *DOCUMENTS, *ITEM_TASKS]
    docs = [task.doc for task in TASKS.values()] + [doc for *_, doc in DOCUMENTS.values()]
    for line, doc in zip(lines, [*docs, *(task.doc for task in ITEM_TASKS.values())], strict=True):
        assert doc in line
    write_rows(tmp_path, "copa", "validation", GPT3["copa"])
    assert evaluate.main(["--list", f"--data={tmp_path}", "--tasks=copa,wic,text"]) == 0
    copa, wic, text = capsys.readouterr().out.splitlines()
    assert copa.endswith(f"; {tmp_path}/copa/validation.jsonl")
    assert (
        "; missing: run `tfds build super_glue/wic` and use --data=tfds or put wic/validation.jsonl into"
        in wic
    )
    assert text.endswith("; needs no data of --data")


@pytest.mark.parametrize("argument", ["--list", "--help"])
def test_help_does_not_load_tensorflow(argument: str) -> None:
    code = (
        "import sys\nfrom launch import evaluate\n"
        f"try: evaluate.main(['{argument}'])\nfinally: print('tensorflow' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0 and done.stderr.strip() == "False", done.stderr
    assert "passkey" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "missing --checkpoint; --help lists the flags"),
        (["--checkpoint=RUN", "--steps=5"], "unrecognized arguments: --steps=5"),
        (["--checkpoint=RUN", "--lengths=4,x"], "expected numbers with commas between them, got '4,x'"),
        (["--checkpoint=RUN", "--lengths=0"], "config.evaluate.filler_blocks: must be at least 1, got 0"),
        (["--checkpoint=RUN", "--keys=0"], "argument --keys: must be at least 1, got 0"),
        (["--checkpoint=RUN", "--documents=3"], "config.evaluate.documents: has no meaning for the task passkey, only"),
        (["--checkpoint=RUN", "--files=x.txt"], "files: have no meaning for the task passkey, only for text; leave"),
        (["--checkpoint=RUN", "--limit=5"], "--limit: has no meaning here, only for --tasks and --suite; leave it out"),
        (["--checkpoint=RUN", "--lm_eval_chat"], "--lm_eval_chat: has no meaning here, only for --tasks and --suite"),
        (["--checkpoint=RUN", "--tasks=copa", "--keys=3"], "--keys: has no meaning here, only for the tasks pass"),
        (["--checkpoint=RUN", "--step=7"], "has no step 7; saved are 5, 10"),
        (["--checkpoint=RUN", "--mesh=1,2"], "argument --mesh: expected the devices along some of"),
        (["--checkpoint=RUN", "--mesh=3,1,1"], "config.mesh: data * fsdp * tensor = 3, but there are 8 devices"),
        (["--checkpoint=RUN", "--mesh=1,1,8"], "8 does not divide model.vocab_size 51"),
        (["--checkpoint=RUN", "--task=nothing"], "task 'nothing': is unknown; choose one of passkey, algorithmic, te"),
        (["--checkpoint=RUN", "--out=RUN"], "RUN: cannot be written (it is a folder); give another --out"),
        (["--checkpoint=RUN", "--out=RUN/config.json/x.json"], "cannot be written (Not a directory)"),
        (["--checkpoint=RUN", "--out=x.png"], "--out=x.png: .png is the ending of the plot; give FILE.json"),
    ],
    ids=str,
)  # fmt: skip
def test_mistakes(run: pathlib.Path, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        evaluate.main([part.replace("RUN", str(run)) for part in arguments])
    assert message.replace("RUN", str(run)) in str(caught.value) and "\n" not in str(caught.value)


def test_a_config_with_an_unknown_field(tmp_path: pathlib.Path, run: pathlib.Path) -> None:
    changed = tmp_path / "run"
    changed.mkdir()
    values = json.loads((run / "config.json").read_text())
    values["model"]["heads"] = 3
    del values["sha256"]  # as the message about an edited file says
    (changed / "config.json").write_text(json.dumps(values))
    (changed / "5").symlink_to(run / "5")
    with pytest.raises(UserError, match=r"^config\.model\.heads: no such field"):
        evaluate.main([f"--checkpoint={changed}"])


def test_user_errors(capsys: pytest.CaptureFixture[str]) -> None:
    for error, code, told in (
        (UserError("first\n second"), 2, "error: first second\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ):
        with pytest.raises(SystemExit) as ended, user_errors():
            raise error
        assert (ended.value.code, capsys.readouterr().err) == (code, told)
    with pytest.raises(ValueError, match="a bug"), user_errors():
        raise ValueError("a bug")
