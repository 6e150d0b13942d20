"""The command `fam-jax`, under the names that an installed fam_jax has."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from fam_jax.config import UserError
from launch import cli, console
from tests.launch.running import ROOT, command, environment
from tests.test_house import imports, tracked


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Return a folder for PYTHONPATH with the packages of an installed fam_jax, by links."""
    folder = tmp_path_factory.mktemp("installed")
    for name, source in {
        "fam_jax": "fam_jax",
        "fam_jax_launch": "launch",
        "fam_jax_configs": "configs",
    }.items():
        (folder / name).symlink_to(ROOT / source)
    return folder


def run(installed: pathlib.Path, folder: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from fam_jax_launch.console import run; run()", *arguments],
        cwd=folder, capture_output=True, text=True, timeout=60,
        env=environment() | {"PYTHONPATH": str(installed), "COLUMNS": "100"},
    )  # fmt: skip


def test_help_lists_all_programs(installed: pathlib.Path, tmp_path: pathlib.Path) -> None:
    done = run(installed, tmp_path, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "  train             Train a model.\n" in done.stdout
    listed = done.stdout.partition("commands:\n")[2].partition("\n\n")[0]
    assert [line.split()[0] for line in listed.splitlines()] == list(cli.PROGRAMS)


def test_every_program_but_those_of_a_clone_is_a_command() -> None:
    found = {
        ".".join(path.relative_to(ROOT / "launch").with_suffix("").parts)
        for path in (ROOT / "launch").rglob("*.py")
        if "\nif __name__ ==" in path.read_text()
    }
    assert found - set(cli.PROGRAMS.values()) == {"tpu.slices"}


def test_version(installed: pathlib.Path, tmp_path: pathlib.Path) -> None:
    done = run(installed, tmp_path, "--version")
    assert done.returncode == 0 and re.fullmatch(r"fam-jax \d+\.\d+\.\d+\n", done.stdout)


@pytest.mark.parametrize("name", ["train", "export", "jobset"])
def test_help_differs_by_the_name_of_the_program_alone(
    name: str, installed: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    here = run(installed, tmp_path, name, "--help")
    clone = subprocess.run(
        command(f"launch.{cli.PROGRAMS[name]}", "--help"), cwd=ROOT, capture_output=True, text=True, timeout=60,
        env=environment() | {"COLUMNS": "100"},
    )  # fmt: skip
    assert (here.returncode, here.stderr) == (0, "") and f"fam-jax {name}" in here.stdout
    renamed = clone.stdout.replace(f"python -m launch.{cli.PROGRAMS[name]}", f"fam-jax {name}")
    assert here.stdout.split() == renamed.split()


def test_a_config_by_name_and_errors_of_the_program(installed: pathlib.Path, tmp_path: pathlib.Path) -> None:
    done = run(installed, tmp_path, "train", "--config=passkey:fma", f"--workdir={tmp_path}/run")
    assert done.returncode == 2 and done.stderr.startswith("error: configs/passkey.py:fma: ")
    done = run(
        installed, tmp_path, "train", "--config=fam_1b:smoke", "--config.train.stepz=3", "--workdir=run"
    )
    assert done.returncode == 2 and done.stderr.startswith("error: config.train.stepz: ")
    done = run(installed, tmp_path, "train-vocabulary", "--files=none.txt", "--size=300", "--out=x.model")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_the_demo_starts_programs_of_its_own_package(installed: pathlib.Path, tmp_path: pathlib.Path) -> None:
    code = (
        "import pathlib; from fam_jax_launch.demo import Demo, commands; "
        "print([command[2] for command in commands(Demo(pathlib.Path('demo')), 'fam')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60,
        env=environment() | {"PYTHONPATH": str(installed)},
    )  # fmt: skip
    assert done.stdout == "['fam_jax_launch.train', 'fam_jax_launch.evaluate']\n", done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "missing COMMAND; --help lists the flags"),
        (["trian"], "trian: unknown command; commands are train, evaluate, "),
        (["--versoin"], "missing COMMAND"),
        (["train"], "missing --config, --workdir; --help lists the flags"),
        (["train_vocabulary"], "missing --files"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], says: str) -> None:
    with pytest.raises(UserError) as caught:
        console.main(arguments)
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


def test_programs_and_configs_import_one_another_by_relative_imports() -> None:
    """An absolute import finds nothing where they are installed under other names."""
    wrong = [
        f"{path.relative_to(ROOT)}: {line}"
        for path in tracked()
        if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in ("launch", "configs")
        for line in path.read_text().splitlines()
        if re.match(r"\s*(from|import) (launch|configs)\b", line)
    ]
    assert not wrong
    assert any(name.startswith("launch.cli") for name in imports(ROOT / "launch" / "train.py"))


@pytest.mark.slow
def test_an_installed_wheel_trains_and_evaluates_anywhere(tmp_path: pathlib.Path) -> None:
    source, target, empty = (tmp_path / name for name in ("source", "target", "empty"))
    for path in tracked():
        copy = source / path.relative_to(ROOT)
        if copy.relative_to(source).parts[0] not in ("tests", "docs", "benchmarks"):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    empty.mkdir()
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    alone = ["--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "wheel", *alone, f"--wheel-dir={tmp_path}", source], check=True)
    (wheel,) = tmp_path.glob("fam_jax-*.whl")
    subprocess.run([*pip, "install", *alone, f"--target={target}", wheel], check=True)

    def fam_jax(*arguments: str) -> str:
        done = subprocess.run(
            [target / "bin" / "fam-jax", *arguments], cwd=empty, capture_output=True, text=True, timeout=600,
            env=environment() | {"PYTHONPATH": str(target)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    assert sorted(path.name for path in target.glob("fam_jax*")) == [
        "fam_jax",
        f"{wheel.name.partition('-py3')[0]}.dist-info",
        "fam_jax_configs",
        "fam_jax_launch",
    ]
    assert fam_jax("--version") == f"fam-jax {wheel.name.split('-')[1]}\n"
    fam_jax("train", "--config=passkey:smoke", "--workdir=run")
    fam_jax("evaluate", "--checkpoint=run", "--lengths=2", "--keys=2", "--out=result.json")
    assert '"command": "fam-jax evaluate ' in (empty / "result.json").read_text()
    # A config that imports the file beside it.
    fam_jax("train", "--config=fam_1b:smoke", "--workdir=1b", "--config.train.steps=1")
    assert sorted(os.listdir(empty)) == ["1b", "result.json", "run"]
