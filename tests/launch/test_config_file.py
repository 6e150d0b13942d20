"""Config files, and what a user sees of mistakes in them."""

import pathlib

import pytest

from fam_jax.config import ConfigError
from fam_jax.config.overrides import Override
from launch.cli import load_config

GOOD = """
from fam_jax.config import default_config

def get_config(arg="7"):
    config = default_config()
    config.train.steps = int(arg)
    return config
"""


def written(folder: pathlib.Path, text: str, name: str = "mine.py") -> pathlib.Path:
    (folder / name).write_text(text)
    return folder / name


def test_a_config_with_argument_and_overrides(tmp_path: pathlib.Path) -> None:
    path = written(tmp_path, GOOD)
    assert load_config(f"{path}").train.steps == 7
    overrides = [Override("config.train.batch_size", "3"), Override("config.model.memory.kind", "bswa")]
    config = load_config(f"{path}:9", overrides)
    assert (config.train.steps, config.train.batch_size, config.model.memory.kind) == (9, 3, "bswa")


def test_file_and_argument_may_have_commas_and_colons(tmp_path: pathlib.Path) -> None:
    data = "{'task': 'text', 'train_files': (arg,), 'vocabulary': 'bytes'}"
    text = f"def get_config(arg='none'):\n    return {{'data': {data}}}\n"
    (tmp_path / "a:b,c").mkdir()
    path = written(tmp_path / "a:b,c", text, "my:config.py")
    assert load_config(f"{path}").data.train_files == ("none",)
    for argument in ("gs://x:y", "", ":,:"):
        assert load_config(f"{path}:{argument}").data.train_files == (argument,)


def test_a_plain_dict_is_a_config(tmp_path: pathlib.Path) -> None:
    path = written(tmp_path, "def get_config():\n    return {'train': {'steps': 4}}\n")
    assert load_config(f"{path}", [Override("config.train.seed", "2")]).train.steps == 4


@pytest.mark.parametrize("name", ["fam_1b", "fam_8b", "fam_24b", "instruct", "passkey", "retrofit", "text"])
def test_a_config_of_fam_jax_by_name(
    name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_path = load_config(f"configs/{name}.py:smoke")
    monkeypatch.chdir(tmp_path)
    written(tmp_path, "some text", name)  # no Python file, so it cannot be meant
    assert load_config(f"{name}:smoke") == by_path


def test_a_config_imports_the_files_beside_it(tmp_path: pathlib.Path) -> None:
    written(tmp_path, "STEPS = 5\n", "shared.py")
    path = written(
        tmp_path, "from .shared import STEPS\ndef get_config():\n    return {'train': {'steps': STEPS}}\n"
    )
    assert load_config(f"{path}").train.steps == 5
    written(tmp_path, "STEPS = 6 +\n", "shared.py")
    with pytest.raises(ConfigError) as caught:
        load_config(f"{path}")
    assert str(caught.value) == f"{tmp_path}/shared.py, line 1: invalid syntax; correct the file"


def test_no_such_config_lists_those_of_fam_jax() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("pass_key:smoke")
    names = "algorithmic, fam_1b, fam_24b, fam_8b, instruct, passkey, retrofit, text"
    assert str(caught.value) == (
        f"--config=pass_key:smoke: there is no such file; give its path, or one of the names {names}"
    )


HEAD = "from fam_jax.config import default_config, memory_config\ndef get_config():\n    config = default_config()\n"
MISTAKES = {
    "syntax": ("def get_config(:\n", "line 1: invalid syntax; correct the file"),
    "name": (f"{HEAD}    return conf\n", "line 4: NameError: name 'conf' is not defined"),
    "read": (f"{HEAD}    config.model.num_layer += 1\n", "line 4: there is no field num_layer; did you mean"),
    "far": (f"{HEAD}    print(config.model.xyzzy)\n", "line 4: there is no field xyzzy"),
    "item": (f"{HEAD}    config['modl'].x = 1\n", "line 4: there is no field modl; did you mean model?"),
    "key": (f"{HEAD}    return {{}}['x']\n", "line 4: KeyError: 'x'"),
    "type": (f"{HEAD}    config.model.num_layers = 'x'\n", "line 4: TypeError: Could not override field 'num_layers'"),
    "import": (f"import nowhere\n{HEAD}", "line 1: ModuleNotFoundError: No module named 'nowhere'"),
    "silent": (f"{HEAD}    raise RuntimeError\n", "line 4: RuntimeError; correct the file"),
    "exit": (f"{HEAD}    raise SystemExit(0)\n", "line 4: SystemExit: 0; correct the file"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_file_names_its_line(mistake: str, tmp_path: pathlib.Path) -> None:
    text, says = MISTAKES[mistake]
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(f"{path}")
    assert str(caught.value).startswith(f"{path}, {says}") and "\n" not in str(caught.value)


def test_a_mistake_in_a_file_beside_it_names_that_file(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    written(tmp_path, "\ndef base():\n    return 1 / 0\n", "shared_base.py")
    path = written(tmp_path, "from shared_base import base\ndef get_config():\n    return base()\n")
    with pytest.raises(ConfigError) as caught:
        load_config(f"{path}")
    assert str(caught.value).startswith(f"{tmp_path}/shared_base.py, line 3: ZeroDivisionError")


@pytest.mark.parametrize(
    ("text", "argument", "says"),
    [
        ("x = 1\n", "", "the file has no function get_config"),
        ("def get_config():\n    return {}\n", ":smoke", "get_config takes no argument; give --config="),
        ("def get_config(arg):\n    return {}\n", "", "get_config needs an argument; give --config="),
        (
            "def get_config():\n    pass\n",
            "",
            "get_config returns a NoneType; return an edited default_config()",
        ),
    ],
)
def test_files_that_are_no_configs(text: str, argument: str, says: str, tmp_path: pathlib.Path) -> None:
    name = f"{written(tmp_path, text)}{argument}"
    with pytest.raises(ConfigError) as caught:
        load_config(name)
    assert str(caught.value).startswith(f"--config={name}: {says}")


def test_a_file_that_is_no_text_has_no_line(tmp_path: pathlib.Path) -> None:
    (path := tmp_path / "config.py").write_bytes(b"\0\xff\xfe")
    with pytest.raises(ConfigError) as caught:
        load_config(f"{path}")
    assert str(caught.value) == f"{path}: source code string cannot contain null bytes; correct the file"


def test_errors_of_a_config_pass_through(tmp_path: pathlib.Path) -> None:
    path = written(tmp_path, f"{HEAD}    config.model.num_layer = 1\n    return config\n")
    with pytest.raises(
        ConfigError, match=r"^config\.model\.num_layer: no such field; did you mean num_layers\?"
    ):
        load_config(f"{path}")
    path = written(tmp_path, f"{HEAD}    config.model.memory = memory_config('fsm')\n")
    with pytest.raises(ConfigError, match=r"^config\.model\.memory\.kind: expected one of"):
        load_config(f"{path}")
    with pytest.raises(ConfigError, match=r"gone\.py: there is no such file"):
        load_config(f"{tmp_path}/gone.py")
    path = written(tmp_path, "raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        load_config(f"{path}")
