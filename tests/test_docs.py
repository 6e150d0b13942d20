"""What README and docs/ claim: links lead somewhere, commands parse, configs load, the code runs."""

import importlib
import pathlib
import re
import shlex
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import pytest
import yaml
from flax import nnx

from fam_jax.checkpoint import MAY_CHANGE
from fam_jax.config import EvaluateConfig, ModelConfig, UserError, check_field, default_config, field_type
from fam_jax.config.fields import field_types
from fam_jax.config.memory import memory_config_type
from fam_jax.config.overrides import parse_value
from fam_jax.kernels import IMPLEMENTATIONS
from fam_jax.memories.fam import FamConfig
from fam_jax.memories.registry import MEMORIES
from fam_jax.model import Transformer
from launch.config_file import load_config

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

MAX_README_LINES = 110
LINK = re.compile(r"\]\(([^()\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
PROGRAM = re.compile(r"(?:python -m )?launch\.([a-z_.]+[a-z])((?: .*)?)$")
# What a reader replaces, where a program checks it.
PLACEHOLDERS = {"--seed=S": "--seed=0", "...": "--config=FILE --workdir=DIR"}
# A path in the repository, in backticks. Names in capitals are placeholders.
CODE_PATH = re.compile(r"(?:fam_jax|launch|configs|tests|docs|benchmarks|examples)/[a-z0-9_./]*")


class Command(NamedTuple):
    """A command line of a page."""

    page: str
    # Such as train, of `python -m launch.train`.
    program: str
    words: list[str]
    # The error that the page shows below it; empty: it shows none.
    error: str
    # In a block of code, so complete; else part of a sentence.
    whole: bool


def slug(heading: str) -> str:
    """Return GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def without_code(text: str) -> str:
    return FENCE.sub("", text)


def anchors(page: pathlib.Path) -> set[str]:
    return {slug(line.lstrip("#")) for line in without_code(page.read_text()).splitlines() if line[:1] == "#"}


def code_lines(text: str) -> list[str]:
    """Return the lines of indented and fenced blocks of code, with continued lines joined."""
    # Other lines become empty, as they end a block.
    indented = [line.strip() if line.startswith("    ") else "" for line in without_code(text).splitlines()]
    fenced = [line.strip() for _, body in FENCE.findall(text) for line in body.splitlines()]
    return "\n".join([*indented, "", *fenced]).replace("\\\n", "").splitlines()


def shown_error(lines: list[str]) -> str:
    """Return the error at the start of `lines`; it may go on over several."""
    if not lines or not lines[0].startswith("error: "):
        return ""
    end = next((n for n, line in enumerate(lines) if not line or line.startswith("$ ")), len(lines))
    return " ".join(lines[:end]).removeprefix("error: ")


def split(text: str) -> list[str]:
    for shown, real in PLACEHOLDERS.items():
        text = text.replace(shown, real)
    words = shlex.split(text, comments=True)
    return words[: words.index("|")] if "|" in words else words


def commands_of(page: pathlib.Path) -> Iterator[Command]:
    text, name = page.read_text(), str(page.relative_to(ROOT))
    lines = code_lines(text)
    for number, line in enumerate(lines):
        line = line.removeprefix("$ ")
        if line.startswith("launch/tpu/queued.sh") and " -- " in line:
            yield Command(name, "train", split(line.partition(" -- ")[2]), "", True)
        elif (found := PROGRAM.match(line)) and line.startswith("python"):
            words = split(found[2])
            yield Command(name, found[1], words, shown_error(lines[number + 1 :]), True)
            if "--" in words:
                yield Command(name, "train", words[words.index("--") + 1 :], "", True)
    for span in INLINE.findall(without_code(text)):
        if (found := PROGRAM.match(span)) and " --" in found[2]:
            yield Command(name, found[1], split(found[2]), "", False)


COMMANDS = [command for page in PAGES for command in commands_of(page)]


def parse(command: Command) -> Any:
    """Parse a command line by the parser of its program; return None if it only asks for a list."""
    module = importlib.import_module(f"launch.{command.program}")
    if not hasattr(module, "parse_arguments"):
        return None
    try:
        return module.parse_arguments(command.words)
    except SystemExit:  # of --help and the like; mistakes raise UserError
        return None


def test_pages_have_commands() -> None:
    assert {"train", "evaluate", "generate", "plan", "import_hf", "export_hf", "train_vocabulary"} <= {
        command.program for command in COMMANDS
    }
    assert sum(command.error != "" for command in COMMANDS) >= 4


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_to_files_and_headings(page: pathlib.Path) -> None:
    wrong = []
    for target in LINK.findall(without_code(page.read_text())):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.exists() or (anchor and anchor not in anchors(there)):
            wrong.append(target)
    assert not wrong


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_paths_in_the_text_exist(page: pathlib.Path) -> None:
    spans = [span for span in INLINE.findall(without_code(page.read_text())) if CODE_PATH.fullmatch(span)]
    assert not [span for span in spans if not (ROOT / span).exists()]


def test_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= MAX_README_LINES


def test_citation() -> None:
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert found["cff-version"] == "1.2.0"
    assert all(found[key] for key in ("title", "message", "authors", "version"))
    paper = found["preferred-citation"]
    assert paper["type"] == "article" and paper["year"] == 2024 and "2404.09173" in paper["url"]
    assert [author["family-names"] for author in paper["authors"]] == [
        "Hwang", "Wang", "Huo", "Sim", "Moreno Mengibar",
    ]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: f"{c.page} {c.program} {' '.join(c.words)}")
def test_flags_are_those_of_the_program(
    command: Command,
    capsys: pytest.CaptureFixture[str],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # launch.generate checks that it can write its files
    if command.whole:
        parse(command)
        return
    parse(command._replace(words=["--help"]))
    known = {flag.replace("-", "_") for flag in re.findall(r"--[\w-]+", capsys.readouterr().out)}
    given = {word.partition("=")[0].replace("-", "_") for word in command.words if word.startswith("--")}
    assert {flag for flag in given if not flag.startswith("__config.")} <= known
    for flag in given:
        if flag.startswith("__config."):
            check_field(flag.removeprefix("__"))


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_flags_of_benchmarks_exist(page: pathlib.Path) -> None:
    """Their parsers are made in `main`, so the flags are looked up in the source."""
    text = page.read_text()
    lines = [*code_lines(text), *INLINE.findall(without_code(text))]
    for name, rest in re.findall(r"python -m (benchmarks\.\w+)(.*)", "\n".join(lines)):
        source = ROOT.joinpath(*name.split(".")).with_suffix(".py").read_text()
        assert not [
            flag for flag in re.findall(r"--\w+", rest.partition("#")[0]) if f'"{flag}"' not in source
        ]


def loaded(command: Command) -> bool:
    """Return whether a command names a config file of this repository, and no folder of the reader."""
    file, _, argument = next((w for w in command.words if w.startswith("--config=")), "")[9:].partition(":")
    return file.startswith("configs/") and not argument.startswith("runs/")


WITH_CONFIGS = [c for c in COMMANDS if c.program in ("train", "plan") and c.whole and loaded(c)]


@pytest.mark.parametrize("command", WITH_CONFIGS, ids=lambda c: f"{c.page} {' '.join(c.words)}")
def test_configs_of_commands_load_or_fail_as_shown(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    arguments = parse(command)
    if not command.error:
        load_config(arguments.config, arguments.overrides)
        return
    with pytest.raises(UserError) as error:
        load_config(arguments.config, arguments.overrides)
    assert str(error.value) == command.error


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_config_flags_in_the_text_are_fields(page: pathlib.Path) -> None:
    if page.name == "add_a_memory.md":
        return  # its fields are those of the memory that it adds
    for flag, _, value in (span.partition("=") for span in INLINE.findall(without_code(page.read_text()))):
        path = flag.removeprefix("--")
        if re.fullmatch(r"--config\.[a-z_0-9.]+", flag):
            check_field(path)
            if " " not in value:
                parse_value(field_type(path), value, path)


def table_of(page: str, head: str) -> list[tuple[str, ...]]:
    """Return the rows of the table of a page whose first line begins with `head`, cell by cell."""
    body = (ROOT / "docs" / page).read_text().partition(head)[2].partition("\n\n")[0]
    return [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in body.splitlines()[2:]]


def test_memories_of_the_tables_are_those_of_the_registry() -> None:
    ours = {
        kind for kind, memory in MEMORIES.items() if isinstance(memory, str) or "fam_jax" in memory.__module__
    }
    kinds = README.read_text().partition("`config.model.memory.kind` |")[2].partition("\n\n")[0]
    named = [
        kind
        for cell in re.findall(r"^\| (`[^|]+) \|", kinds, re.MULTILINE)
        for kind in re.findall(r"`(\w+)`", cell)
    ]
    assert sorted(named) == sorted(ours)
    rows = [(kind.strip("`"), fields) for kind, fields in table_of("configs.md", "| kind | fields")]
    assert {kind: {"kind", *re.findall(r"`(\w+)`", fields)} for kind, fields in rows} == {
        kind: {*field_types(memory_config_type(kind))} for kind in ours
    }


def test_fields_that_may_change_are_those_of_the_guide() -> None:
    guide = (ROOT / "docs" / "configs.md").read_text()
    resume = guide.partition("- **Resume.**")[2].partition("- **")[0]
    whole = {"mesh", "evaluate"} & {*re.findall(r"`(\w+)`", resume)}
    assert whole == {"mesh", "evaluate"}
    single = {*re.findall(r"`(\w+\.\w+)`", resume)}
    assert single == {path for path in MAY_CHANGE if path.partition(".")[0] not in whole}
    assert {path for path in MAY_CHANGE if path.startswith("evaluate.")} == {
        f"evaluate.{name}" for name in field_types(EvaluateConfig)
    }


def test_shapes_of_a_state_are_those_of_the_table() -> None:
    sizes = {"L": 2, "B": 3, "m": 4, "C": 16, "K": 2, "hd": 8, "M": 6, "D": 32, "R": 5}
    model = ModelConfig(
        num_layers=sizes["L"],
        model_dim=sizes["D"],
        num_kv_heads=sizes["K"],
        head_dim=sizes["hd"],
        block_size=sizes["C"],
        memory=FamConfig(length=sizes["M"], segments=sizes["m"], previous_blocks=sizes["R"]),
    )
    state = jax.eval_shape(lambda: Transformer(model, rngs=nnx.Rngs(0)).init_state(sizes["B"]))
    leaves = jax.tree.leaves_with_path(state)
    found = {jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape for path, leaf in leaves}
    told = {}
    for names, shape, _ in table_of("architecture.md", "| field | shape |"):
        if shape:
            group = names.strip("`").partition(".")[0]
            letters = re.findall(r"\w+", shape.partition(")")[0])
            for name in re.findall(r"`(?:\w+)?\.(\w+)`", names):
                told[f"{group}.{name}"] = tuple(sizes[letter] for letter in letters)
    assert told == found


def test_implementations_of_attention_are_those_of_the_table() -> None:
    names = [row[0].strip("`") for row in table_of("architecture.md", "| name | runs on |")]
    assert sorted(names) == sorted(["auto", *IMPLEMENTATIONS])


def test_code_of_the_guide_to_configs(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs" / "configs.md").read_text()
    memory, file, library, field = [body for language, body in FENCE.findall(text) if language == "python"]
    config = default_config()
    exec(memory, {"config": config})
    assert (config.model.memory.kind, config.model.memory.length, config.model.memory.segments) == (
        "fam",
        64,
        3,
    )
    (tmp_path / "my_config.py").write_text(file)
    mine = load_config(f"{tmp_path}/my_config.py:wide,smoke")
    assert mine.model.model_dim == 256 and mine.train.steps == 3
    names: dict[str, Any] = {}
    exec(library, names)
    assert names["longer"].train.steps == 200 and names["passkey"].train.steps == 20
    assert field in (ROOT / "fam_jax" / "config" / "training.py").read_text().replace("    ", "")
