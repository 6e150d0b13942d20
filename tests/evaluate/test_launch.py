"""The command: results on any number of devices, and errors in one line."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from etils import epath

from fam_jax.checkpoint import Checkpoints
from fam_jax.config import Config, UserError, resolve
from launch import evaluate
from launch.errors import user_errors

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, config: Config, parrot: dict) -> pathlib.Path:
    """A training run's folder with two steps."""
    folder = tmp_path_factory.mktemp("runs") / "parrot"
    params = jax.tree.map(jnp.asarray, parrot)
    with Checkpoints(folder, config=dataclasses.asdict(config), keep=2) as checkpoints:
        for step in (5, 10):
            checkpoints.save(step, {"params": params, "step": jnp.int32(step)}, {})
    return folder


def launch(*arguments: str, devices: int) -> subprocess.CompletedProcess:
    flags = (
        f"--xla_force_host_platform_device_count={devices} "
        "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"  # compiles faster
    )
    return subprocess.run(
        [sys.executable, "-m", "launch.evaluate", *arguments],
        cwd=ROOT, env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip


def test_on_four_devices(run: pathlib.Path, config: Config, parrot_accuracy: float) -> None:
    done = launch(f"--checkpoint={run}", "--lengths=1", "--batch_size=4", "--mesh=2,2,1", devices=4)
    assert done.returncode == 0, done.stderr
    assert "step 10" in done.stdout and f"{parrot_accuracy:.1%}" in done.stdout
    results = json.loads((run / "evaluation_10.json").read_text())
    found = results["lengths"]["1"]
    assert found["answer_token_accuracy"] == parrot_accuracy
    assert found["keys"] == config.evaluate.keys
    assert results["step"] == 10
    assert results["devices"] == "4 x cpu"
    assert results["seed"] == config.evaluate.seed
    assert results["command"].startswith("python -m launch.evaluate --checkpoint=")
    used = resolve(results["config"])
    assert used.model == config.model
    assert (used.evaluate.filler_blocks, used.evaluate.batch_size, used.mesh.fsdp) == ((1,), 4, 2)
    assert results["versions"].keys() == {"python", "fam-jax", "jax", "flax", "numpy"}


def test_error_of_the_command(tmp_path: pathlib.Path) -> None:
    done = launch(f"--checkpoint={tmp_path / 'missing'}", devices=1)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "no such folder" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --checkpoint; --help lists the arguments"),
        (["--checkpoint=RUN", "--steps=5"], "unrecognized arguments: --steps=5"),
        (["--checkpoint=RUN", "--lengths=4,x"], "expected numbers with commas between them, got '4,x'"),
        (["--checkpoint=RUN", "--lengths=0"], "config.evaluate.filler_blocks: must be positive"),
        (["--checkpoint=RUN", "--keys=0"], "config.evaluate.keys: must be at least 1"),
        (["--checkpoint=RUN", "--step=7"], "has no step 7; saved are 5, 10"),
        (["--checkpoint=RUN", "--mesh=1,2"], "argument --mesh: expected three numbers"),
        (["--checkpoint=RUN", "--mesh=3,1,1"], "config.mesh: data * fsdp * tensor = 3, but there are 8 devices"),
        (["--checkpoint=RUN", "--mesh=1,1,8"], "8 does not divide model.vocab_size 51"),
    ],
    ids=str,
)  # fmt: skip
def test_errors(
    run: pathlib.Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", *(part.replace("RUN", str(run)) for part in arguments)])
    with pytest.raises(SystemExit) as ended:
        evaluate.main()
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert message in err


def test_config_of_another_program(
    tmp_path: pathlib.Path,
    run: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changed = tmp_path / "run"
    changed.mkdir()
    values = json.loads((run / "config.json").read_text())
    values["model"]["heads"] = 3
    (changed / "config.json").write_text(json.dumps(values))
    (changed / "5").symlink_to(run / "5")
    monkeypatch.setattr(sys, "argv", ["evaluate", f"--checkpoint={changed}"])
    with pytest.raises(SystemExit, match="2"):
        evaluate.main()
    assert "error: config.model.heads: no such field" in capsys.readouterr().err


def test_results_that_cannot_be_written(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"cannot be written .*give another --out"):
        evaluate.write_json(epath.Path(tmp_path / "missing" / "out.json"), {})


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
