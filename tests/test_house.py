"""Rules of the repository that readers rely on: the direction of imports, the length of files and functions."""

import ast
import dataclasses
import pathlib
import re
import subprocess
import sys

import pytest

from fam_jax.memories.registry import memory_class, memory_kinds
from fam_jax.memories.window_cache import WINDOW_AXES

ROOT = pathlib.Path(__file__).resolve().parent.parent
# A file is one subject, usually 100 to 500 lines.
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
MAX_KERNEL_ARGUMENTS = 9

# What each part of fam_jax may import from the others. The training loop may evaluate while it trains.
BASE = {"config", "data", "sharding", "checkpoint", "kernels", "layers", "memories", "model", "restore"}
MAY_IMPORT: dict[str, set[str]] = {
    "config": set(),
    "data": {"config"},
    "sharding": {"config"},
    "checkpoint": {"config"},
    "kernels": {"config"},
    "layers": {"config", "sharding", "kernels"},
    "memories": {"config", "kernels", "layers"},
    "model": {"config", "sharding", "kernels", "layers", "memories"},
    "restore": {"config", "data", "sharding", "checkpoint", "model"},
    "hf": {"config", "data", "model", "sharding", "checkpoint"},
    "generation": BASE,
    "evaluation": BASE | {"generation"},
    "training": BASE | {"generation", "evaluation"},
    "plan": BASE | {"generation", "training"},
}


# The registry names memories in strings and imports nothing of the package, so every part may import it: a config
# depends on the kind of its memory.
REGISTRY = "fam_jax.memories.registry"

# Parts that work with every memory and must not name one. A memory is named in its own file and in the registry.
KNOW_NO_MEMORY = (
    "model",
    "training",
    "generation",
    "evaluation",
    "plan",
    "checkpoint",
    "layers",
    "restore.py",
    "sharding.py",
)
OF_FAM = re.compile(r"\bfam\b(?!-jax)|fam_(?!jax\b)|_fam\b|Fam[A-Z]")


def tracked() -> list[pathlib.Path]:
    """Return the files that git tracks, or would track after `git add`."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def sources(*folders: str) -> list[pathlib.Path]:
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert files, f"no sources in {folders}"
    return files


def imports(path: pathlib.Path) -> set[str]:
    """Return the full names of the modules that a file imports, at any level of its code."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def parts_imported(path: pathlib.Path) -> set[str]:
    names = {
        name.split(".")[1]
        for name in imports(path)
        if name.startswith("fam_jax.") and not name.startswith(f"{REGISTRY}.")
    }
    assert names <= MAY_IMPORT.keys(), f"{path}: imports {names - MAY_IMPORT.keys()}, which MAY_IMPORT lacks"
    return names


def part_of(path: pathlib.Path) -> str:
    return path.relative_to(ROOT / "fam_jax").with_suffix("").parts[0]


def names_of(paths: list[pathlib.Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def test_imports_go_one_way() -> None:
    wrong = []
    for path in sources("fam_jax"):
        if path == ROOT / "fam_jax" / "__init__.py":
            continue
        allowed = MAY_IMPORT[part_of(path)] | {part_of(path)}
        wrong += [f"{path.relative_to(ROOT)} imports {name}" for name in parts_imported(path) - allowed]
    assert not wrong


def test_the_registry_imports_nothing_of_the_package() -> None:
    path = ROOT.joinpath(*REGISTRY.split(".")).with_suffix(".py")
    assert not [name for name in imports(path) if name.startswith("fam_jax")]


def test_only_a_memory_knows_its_names() -> None:
    """Code that works with every memory names neither FAM nor a field of any memory's state."""
    memories = [memory_class(kind) for kind in memory_kinds()]
    own = {
        field.name
        for memory in memories
        if memory.__module__.startswith("fam_jax.")  # other tests may have registered more
        for field in dataclasses.fields(memory.State)
        if field.name not in WINDOW_AXES
    }
    assert "fam_keys" in own
    of_states = re.compile(rf"\b({'|'.join(sorted(own))})\b(?!-jax)")
    wrong = []
    for part in KNOW_NO_MEMORY:
        place = ROOT / "fam_jax" / part
        for path in [place] if place.is_file() else sorted(place.rglob("*.py")):
            wrong += [
                f"{path.relative_to(ROOT)}:{n}: {line.strip()}"
                for n, line in enumerate(path.read_text().splitlines(), 1)
                if OF_FAM.search(line) or of_states.search(line)
            ]
    assert not wrong


def test_the_rule_itself_has_no_cycle() -> None:
    done: set[str] = set()
    while done != MAY_IMPORT.keys():
        ready = {part for part, needs in MAY_IMPORT.items() if needs <= done} - done
        assert ready, f"cycle among {MAY_IMPORT.keys() - done}"
        done |= ready


def test_the_package_does_not_import_its_users() -> None:
    users = ("launch", "configs", "fam_jax_launch", "fam_jax_configs", "benchmarks", "tests")
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources("fam_jax")
        for name in imports(path)
        if name.split(".")[0] in users
    ]
    assert not wrong


def test_no_module_is_called_utils() -> None:
    assert not [
        name for name in names_of(tracked()) if re.search(r"(^|/)(utils?|helpers?|misc)(\.py)?(/|$)", name)
    ]


def test_files_are_short() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in tracked() if path.suffix == ".py"}
    assert lengths
    assert not {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n > MAX_FILE_LINES}


def test_functions_are_short() -> None:
    long = {}
    for path in [path for path in tracked() if path.suffix == ".py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    long[f"{path.relative_to(ROOT)}:{node.name}"] = lines
    assert not long


def test_kernels_take_records() -> None:
    """Arrays and options go together, as a record each, and not as a dozen arguments."""
    counts = {
        f"{path.relative_to(ROOT)}:{node.name}": len(
            node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        )
        for path in sources("fam_jax/kernels")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    assert counts
    assert not {name: count for name, count in counts.items() if count > MAX_KERNEL_ARGUMENTS}


def test_no_path_of_somebodys_machine() -> None:
    place = re.compile(r"(?<![\w.])/(home|Users|root|work)/\w")
    wrong = []
    for path in tracked():
        text = path.read_text(errors="ignore")
        wrong += [
            f"{path.relative_to(ROOT)}:{n}"
            for n, line in enumerate(text.splitlines(), 1)
            if place.search(line)
        ]
    assert not wrong


@pytest.mark.parametrize("module", ["fam_jax.model", "fam_jax.sharding", "fam_jax.checkpoint", "fam_jax.hf"])
def test_import_does_not_load_tensorflow(module: str) -> None:
    """TensorFlow takes seconds and a gigabyte; only the data pipeline may import it."""
    code = f"import sys, {module}; print([m for m in ('tensorflow', 'seqio', 'torch') if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
