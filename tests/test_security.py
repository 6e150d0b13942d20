"""Promises of SECURITY.md: files of others run no code."""

import ast
import pathlib
import re

import pytest

from fam_jax.config import UserError
from fam_jax.data.chat import ChatTemplate

ROOT = pathlib.Path(__file__).resolve().parent.parent
MODULES = sorted(path for folder in ("fam_jax", "launch") for path in (ROOT / folder).rglob("*.py"))
# Calls that can run what a file says.
FORBIDDEN = re.compile(
    r"eval|exec|compile|__import__|(c?pickle|dill|marshal|shelve|joblib|cloudpickle)\..*|os\.(system|popen)|"
    r"(np|numpy)\.load|torch\.load|yaml\.(load|unsafe_load|full_load|load_all)|runpy\..*"
)


def calls(path: pathlib.Path) -> list[tuple[str, ast.Call]]:
    return [
        (ast.unparse(node.func), node)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
    ]


def test_no_module_runs_what_a_file_says() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{call.lineno}: {name}"
        for path in MODULES
        for name, call in calls(path)
        if FORBIDDEN.fullmatch(name)
        or any(
            keyword.arg in ("shell", "allow_pickle", "trust_remote_code")
            and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
            for keyword in call.keywords
        )
    ]
    assert len(MODULES) > 200
    assert not found


@pytest.mark.parametrize(
    "code", ["eval('1')", "pickle.loads(x)", "f(shell=True)", "np.load(x, allow_pickle=y)"]
)
def test_what_would_be_found(code: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.py").write_text(code)
    monkeypatch.setattr(f"{__name__}.MODULES", [*MODULES, tmp_path / "x.py"])
    monkeypatch.setattr(f"{__name__}.ROOT", pathlib.Path("/"))
    with pytest.raises(AssertionError):
        test_no_module_runs_what_a_file_says()


def test_modules_are_imported_by_name_in_known_places_alone() -> None:
    """A name from a file would otherwise choose code to run."""
    found = {
        path.relative_to(ROOT).as_posix()
        for path in MODULES
        for name, call in calls(path)
        if name == "importlib.import_module" and not isinstance(call.args[0], ast.Constant)
    }
    assert found == {
        "fam_jax/__init__.py",  # its own modules
        "fam_jax/memories/registry.py",  # memories of this package, or that the process registered
        "fam_jax/data/seqio_source.py",  # data.imports, after `check_imports`
        *(path for path in found if path.startswith("launch/")),  # modules of this package
    }


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ self.__init__.__globals__.__builtins__ }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_a_chat_template_cannot_leave_its_sandbox(template: str) -> None:
    def render() -> None:
        made = ChatTemplate(template, "x", named={}, control_tokens=[])
        made.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], where="row 1")

    with pytest.raises(UserError) as caught:
        render()
    assert "\n" not in str(caught.value)
