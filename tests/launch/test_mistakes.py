"""Mistaken command lines of every program: one line, exit code 2, no traceback, and nothing is written or lost."""

import dataclasses
import hashlib
import importlib
import os
import pathlib

import pytest

from fam_jax.config import Config
from launch import cli
from tests.evaluation.conftest import VOCABULARY_SIZE
from tests.evaluation.runs import save_run
from tests.generation.tiny import CONFIG

HUGE, LONG = "1" + "0" * 30, "n" * 300
TRAIN = "--config=configs/passkey.py:smoke --config.train.steps=1"
# A checkpoint, or a folder to write to, cannot be here.
NO_PLACE = ("{file}", "{file}/x", "/proc/x", "{loop}", "")
NO_FOLDER = ("{file}", "{folder}", "{file}/x", "/dev/null", "{loop}", "", LONG)
TEXT = "--config=configs/text.py:smoke --workdir={new}"
MISTAKES = {
    "train": [
        *(f"{TRAIN} --workdir={place}" for place in (*NO_PLACE, "/dev/null/x", "{pipe}")),
        *(
            f"--workdir={{new}} --config={file}"
            for file in ("{file}", "{binary}", "{folder}", "{deep}", "{loop}", "", "{none}", "{file}:x", f"{LONG}")
        ),
        *(
            f"{TRAIN} --workdir={{new}} --config.{field}"
            for field in (
                "train.seed=-1", f"train.seed={HUGE}", f"train.steps={HUGE}", "train.batch_size=2000000000",
                "train.batch_size=0", "model.num_layers=1000000000", "model.block_size=1000000000",
                "model.vocab_size=1000000000", "optimizer.learning_rate=nan", "optimizer.learning_rate=1e309",
                "data.vocabulary={folder}", "data.vocabulary={binary}", "data.vocabulary={loop}",
                "data.vocabulary={file}/x", f"data.vocabulary={LONG}", "data.stage_blocks=()", "data.stage_blocks=(2",
                "mesh.data=100000000", "train.init_from={file}", "train.init_from={folder}",
                f"train.init_from={LONG}", "model.memory.kind=nothing", "evaluate.keys=0", "data.task=nothing",
                "data.imports=['nothing']",
            )
        ),
        *(
            f"{TEXT} --config.data.train_files={files}"
            for files in ("{folder}", "{binary}", "{loop}", "{file}/x", "{deep}", "/dev/zero", LONG, "[]")
        ),
        *(
            f"{TRAIN} --workdir={{new}} {flag}"
            for flag in (
                "--restore_step=-1", f"--restore_step={HUGE}", "--fork={file}", "--fork={folder}", "--fork=/proc",
                "--profile_steps=5", "--profile_steps=2,1", "--allow_change=nothing", "--cpu_devices=100000",
                "--coordinator=x", "--process_id=5", "--heartbeat_timeout=0", "--join_timeout=nan", "--what",
            )
        ),
    ],
    "evaluate": [
        *(f"--checkpoint={place}" for place in (*NO_FOLDER, "/proc")),
        *(
            f"--checkpoint={{run}} {flag}"
            for flag in (
                "--out={folder}", "--out={file}/x.json", "--out=/proc/x.json", "--out={pipe}", "--out=/dev/null/x",
                "--out=", f"--lengths={HUGE}", "--lengths=0", "--lengths=", "--lengths=1,,2", f"--keys={HUGE}",
                "--keys=0", "--batch_size=0", f"--step={HUGE}", "--step=7", "--mesh=data=0,fsdp=0", "--mesh=nothing=1",
                f"--mesh=data={HUGE}", "--task=nothing", "--tasks=nothing", "--suite=nothing",
                "--tasks=boolq --data={folder}", "--tasks=boolq --data={file}", "--limit=-1", "--limit=5", "--shots=1",
                "--seeds=0", "--probe=nothing", "--files={folder}", "--ablations=nothing", "--documents=3",
                "--lm_eval_tasks={file}", "--question=middle",
            )
        ),
    ],
    "generate": [
        *(f"--checkpoint={place} --prompt=a" for place in NO_FOLDER),
        *(
            f"--checkpoint={{run}} --max-tokens=2 {flag}"
            for flag in (
                "--prompt-file={folder}", "--prompt-file={binary}", "--prompt-file={loop}", "--prompt-file={file}/x",
                f"--prompt-file={LONG}", "--load-memory={folder} --question=a", "--load-memory={file} --question=a",
                "--load-memory={binary} --question=a", "--load-memory=/dev/null --question=a",
                f"--load-memory={LONG} --question=a", "--prompt=a --save-memory={folder}",
                "--prompt=a --save-memory={file}/x", "--prompt=a --save-memory=/proc/x",
                "--prompt=a --save-memory={pipe}", "--batch={folder} --out={new}",
                "--batch={lines} --out={folder}", "--batch={lines} --out={pipe}",
                "--batch={lines}", "--out={new} --prompt=a", "--prompt=a --temperature=nan",
                "--prompt=a --temperature=-1", "--prompt=a --temperature=1e309", f"--prompt=a --top-k={HUGE}",
                "--prompt=a --top-p=2", "--prompt=a --max-tokens=-1", f"--prompt=a --seed={HUGE}",
                "--prompt=a --chunk-blocks=0", f"--prompt=a --streams={HUGE}", "--prompt=a --mesh=data=3",
            )
        ),
    ],
    "export_hf": [
        *(f"--checkpoint={{run}} --out={place}" for place in (*NO_PLACE, "{full}", LONG)),
        *(
            f"--checkpoint={{run}} --out={{new}} {flag}"
            for flag in ("--lora=adapter", "--base=x", "--dtype=int8", "--shard_gb=nan", "--shard_gb=0", "--step=7")
        ),
    ],
    "import_hf": [
        f"--source={place} --out={{new}}" for place in (*NO_FOLDER, "/proc")
    ],
    "plan": [
        f"{TRAIN} --topology={rest}"
        for rest in (
            "nothing", "", f"v5e:2x2 --tokens={HUGE}", "v5e:2x2 --streams=2", "v5e:2x2 --out={folder}",
            "v5e:2x2 --mesh=x",
        )
    ],
    "train_vocabulary": [
        f"--files={rest}"
        for rest in (
            "{folder} --out={new} --size=400", "{binary} --out={new} --size=400", "{file} --out={folder} --size=400",
            "{file} --out={pipe} --size=400", f"{{file}} --out={{new}} --size={HUGE}",
            "{file} --out={new} --size=10",
            "{file} --out={new} --size=400 --megabytes=0", "{loop} --out={new} --size=400", " --out={new} --size=400",
        )
    ],
    "report": [
        f"{place} --out={{new}}" for place in ("{file}", "{folder}", "{binary}", "{deep}", "{loop}", "/dev/null", LONG)
    ],
    "demo": [
        *(f"--workdir={place}" for place in NO_PLACE),
        "--workdir={full} --clean",
        "--workdir={file} --clean",
    ],
    "demo_data": [
        *(f"--parts=code --out={place}" for place in NO_PLACE),
        "--parts=nothing --out={new}",
    ],
    "tpu.jobset": [
        f"--name=a --slice=v5p:2x2x1 --image=i {flag} -- --config=configs/passkey.py --workdir=gs://b/x"
        for flag in (
            "--name=A_b", "--slice=nothing", "--slice=v5p:0x0x0", "--num_slices=0", f"--restarts={HUGE}", "--env=x",
            "--cpu=-1", "--memory=x", "--image=",
        )
    ],
}  # fmt: skip
CASES = [(program, line) for program, lines in MISTAKES.items() for line in lines]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    """Return files, folders and links by the name that command lines have for them."""
    folder = tmp_path_factory.mktemp("places")
    found = {
        name: folder / name
        for name in ("file", "binary", "folder", "full", "deep", "lines", "loop", "pipe", "new", "none")
    }
    found["file"].write_text("some words of text\n" * 50)
    found["binary"].write_bytes(bytes(range(256)) * 40)
    found["folder"].mkdir()
    found["full"].mkdir()
    (found["full"] / "thesis.tex").write_text("years of work")
    found["deep"].write_text("[" * 20_000 + "]" * 20_000)
    found["lines"].write_text('{"prompt": "a"}\n')
    found["loop"].symlink_to(found["loop"])
    os.mkfifo(found["pipe"])
    model = dataclasses.replace(CONFIG, vocab_size=VOCABULARY_SIZE)
    found["run"] = save_run(folder / "run", Config(model=model))
    return found


def tree(folder: pathlib.Path) -> dict[str, str]:
    """Return a digest of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in folder.rglob("*")
        # Locks stay, empty.
        if not path.name.endswith(".lock")
    }


@pytest.mark.parametrize(
    ("program", "line"), CASES, ids=[f"{program} {line}"[:90] for program, line in CASES]
)
def test_a_mistake_is_one_line_and_changes_nothing(
    program: str,
    line: str,
    places: dict[str, pathlib.Path],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    main = importlib.import_module(f"launch.{program}").main
    arguments = [part.format(**places) for part in line.split(" ")]
    monkeypatch.setattr("sys.argv", [program, *arguments])
    before = tree(places["file"].parent)
    with pytest.raises(SystemExit) as caught:
        cli.run(main)
    assert caught.value.code == 2
    said = [each for each in capfd.readouterr().err.splitlines() if each.strip()]
    errors = [each for each in said if each.startswith("error: ")]
    assert len(errors) == 1 and said[-1] == errors[0] and "Traceback" not in "".join(said), said
    assert tree(places["file"].parent) == before
    assert places["pipe"].is_fifo()
