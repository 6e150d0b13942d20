"""Configs: every mistake is one line that names the field, and what is written down can be read back."""

import dataclasses
import importlib.util
import json
import pathlib
import re
import subprocess
import sys
import types
import typing
from typing import Any

import ml_collections
import pytest

from fam_jax import config as config_module
from fam_jax.config import (
    CHOICES,
    DECAYS,
    FRACTIONS,
    MINIMA,
    Config,
    ConfigError,
    DataConfig,
    UserError,
    check_field,
    default_config,
    resolve,
    to_json,
)
from fam_jax.config.data import TASK_FIELDS

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIG_FILES = sorted(
    path for path in (ROOT / "configs").glob("*.py") if "def get_config" in path.read_text()
)


def fields() -> dict[str, Any]:
    """Type of every field by its name, such as "model.num_layers"."""
    groups = typing.get_type_hints(Config)
    return {f"{g}.{n}": kind for g, cls in groups.items() for n, kind in typing.get_type_hints(cls).items()}


def changed(**values: Any) -> dict[str, Any]:
    """The default config as nested dict, with fields such as model__num_layers set."""
    nested = dataclasses.asdict(Config())
    for field, value in values.items():
        group, name = field.split("__")
        nested[group][name] = value
    return nested


def error_of(values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(values)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 250
    return message


def with_field(field: str, value: Any) -> dict[str, Any]:
    return changed(**{field.replace(".", "__"): value})


def test_the_defaults_are_valid_and_errors_are_user_errors() -> None:
    assert resolve(default_config()) == Config() == resolve({})
    assert issubclass(ConfigError, UserError)


@pytest.mark.parametrize("field", fields())
def test_a_value_of_the_wrong_type_names_the_field(field: str) -> None:
    wrongs = {
        int: (1.5, "1", None, True),
        float: ("0.1", None, True),
        bool: (1, "true"),
        str: (1, None),
        tuple[int, ...]: (3, "2,3", (1, "2"), (1.5,), None),
        tuple[str, ...]: (3, "a,b", ("a", 1), (1.5,), None),
    }
    for wrong in wrongs[fields()[field]]:
        message = error_of(with_field(field, wrong))
        assert message.startswith(f"config.{field}: expected ")
        assert repr(wrong[-1] if isinstance(wrong, tuple) else wrong) in message


def test_whole_numbers_will_do_for_floats_and_lists_for_tuples() -> None:
    config = resolve(changed(optimizer__learning_rate=1, data__stage_blocks=[2, 3]))
    assert isinstance(config.optimizer.learning_rate, float)
    assert config.data.stage_blocks == (2, 3)


@pytest.mark.parametrize(
    ("values", "start", "says"),
    [
        ({"modle": {}}, "config.modle: ", "did you mean model?"),
        ({"model": {"num_layer": 2}}, "config.model.num_layer: ", "did you mean num_layers?"),
        ({"train": {"bach_size": 2}}, "config.train.bach_size: ", "did you mean batch_size?"),
        ({"mesh": {"zzz": 2}}, "config.mesh.zzz: ", "config.mesh has data, fsdp, tensor"),
        ({"model": 3}, "config.model: expected a group of fields", "3"),
        ([1], "config: expected a group of fields", "[1]"),
    ],
)
def test_unknown_fields_come_with_a_hint(values: Any, start: str, says: str) -> None:
    message = error_of(values)
    assert message.startswith(start)
    assert says in message


def test_check_field_knows_all_fields_and_no_others() -> None:
    for field in fields():
        check_field(f"config.{field}")
    for path, message in {
        "config.model.num_layer": "config.model.num_layer: no such field; did you mean num_layers?",
        "config.modle.num_layers": "config.modle: no such field; did you mean model?",
        "config.model": "config.model: is a group of fields; set one, such as config.model.vocab_size",
        "config.model.num_layers.x": "config.model.num_layers.x: config.model.num_layers is not a group of fields",
        "config": "config: is a group of fields; set one, such as config.model",
    }.items():
        with pytest.raises(ConfigError) as caught:
            check_field(path)
        assert str(caught.value) == message


@pytest.mark.parametrize("field", CHOICES)
def test_choices(field: str) -> None:
    message = error_of(with_field(field, "nonsense"))
    assert message.startswith(f"config.{field}: expected one of ")
    for choice in CHOICES[field]:
        assert choice in message
        group, name = field.split(".")
        # A block that every choice of attention takes.
        config = resolve(changed(model__block_size=128, **{field.replace(".", "__"): choice}))
        assert getattr(getattr(config, group), name) == choice


@pytest.mark.parametrize("field", MINIMA)
def test_minima(field: str) -> None:
    lowest = MINIMA[field]
    below = lowest - (1 if fields()[field] is int else 0.001)
    assert error_of(with_field(field, below)).startswith(f"config.{field}: must be at least {lowest}, got ")
    config_module._build(Config, with_field(field, lowest), "config")  # the type takes the lowest value


@pytest.mark.parametrize("field", FRACTIONS)
def test_fractions(field: str) -> None:
    for wrong in (-0.01, 1.01, float("nan")):
        assert error_of(with_field(field, wrong)).startswith(f"config.{field}: must be ")
    values = with_field(field, 0.5)
    if "passkey_fraction" in field:  # of one task only
        values["data"] |= {"task": "text+passkey", "vocabulary": "bytes", "train_files": ("a.txt",)}
    resolve(values)


@pytest.mark.parametrize("field", [field for field, kind in fields().items() if kind is float])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_floats_must_be_finite(field: str, value: float) -> None:
    assert error_of(with_field(field, value)).startswith(f"config.{field}: must be ")


@pytest.mark.parametrize("field", ["optimizer.beta1", "optimizer.beta2"])
def test_a_running_mean_must_forget(field: str) -> None:
    """With a decay of 1, the momentum stays zero and the debiased second moment is 0 / 0."""
    assert error_of(with_field(field, 1.0)).startswith(f"config.{field}: must be ")


def test_every_field_has_a_range() -> None:
    """Fields added later must say what they allow."""
    own_rule = {
        "model.norm_epsilon", "model.rope_base", "data.task", "data.stage_blocks", "data.vocabulary",
        "evaluate.filler_blocks", "evaluate.ablations", "lora.alpha", "model.rope_low_freq_factor",
        "model.rope_high_freq_factor", "model.layer_pattern", "model.local_rope_base",
    }  # fmt: skip
    own_rule |= {f"data.{name}" for name in (*TASK_FIELDS["text"], *TASK_FIELDS["seqio"])}  # words
    free = {field for field, kind in fields().items() if kind is bool} | {"train.init_from"}
    free |= {"lora.targets", "lora.train"}  # patterns: the model knows what there is to name
    assert fields().keys() == CHOICES.keys() | MINIMA.keys() | {*FRACTIONS, *DECAYS} | own_rule | free


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model__num_heads": 4, "model__num_kv_heads": 3}, "model.num_kv_heads: 3 does not divide num_heads 4"),
        ({"model__num_heads": 2, "model__num_kv_heads": 4}, "model.num_kv_heads: 4 does not divide num_heads 2"),
        ({"model__head_dim": 7}, "model.head_dim: must be even for RoPE, got 7"),
        ({"model__fam_length": 9, "model__block_size": 8}, "model.fam_length: 9 is longer than block_size 8"),
        ({"model__norm_epsilon": 0.0}, "model.norm_epsilon: must be positive, got 0.0"),
        ({"model__rope_base": 1.0}, "model.rope_base: must be above 1, got 1.0"),
        ({"model__window": 34, "model__block_size": 32, "model__memory_segments": 1}, "model.window: 34 is further"),
        (
            {"model__attention": "pallas", "model__block_size": 128, "model__attention_softcap": 50.0},
            "model.attention: pallas has no attention_softcap; set auto, xla or reference",
        ),
        (
            {"model__rope_scaling": "llama3", "model__rope_low_freq_factor": 4.0},
            "model.rope_low_freq_factor: must be above 0 and below rope_high_freq_factor 4.0, got 4.0",
        ),
        ({"model__layer_pattern": ()}, "model.layer_pattern: expected 1 to num_layers 3 of global and local, got ()"),
        ({"model__layer_pattern": ("full",)}, "model.layer_pattern: expected 1 to num_layers 3 of global and local"),
        ({"model__layer_pattern": ("global",) * 4}, "model.layer_pattern: expected 1 to num_layers 3 of global"),
        ({"model__layer_pattern": ("local",)}, "model.local_window: is of the local layers in layer_pattern"),
        ({"model__local_window": 3}, "model.local_window: is of the local layers in layer_pattern"),
        (
            {"model__layer_pattern": ("local",), "model__local_window": 34, "model__block_size": 32},
            "model.local_window: 34 is further back",
        ),
        ({"model__local_rope_base": 0.5}, "model.local_rope_base: must be above 1, or 0 for rope_base, got 0.5"),
        ({"model__attention": "pallas"}, "model.attention: pallas needs a block_size that is a multiple of 128"),
        (
            {"model__attention": "pallas_interpret", "model__block_size": 128, "model__remat": "dots"},
            "model.remat: the interpreter of pallas_interpret cannot run under it, got dots; set none",
        ),
        ({"train__batch_size": 6, "train__accumulation": 4}, "train.accumulation: 4 does not divide batch_size 6"),
        (
            {"train__random_state_passing": 0.5, "model__fam_length": 0},
            "train.random_state_passing: needs a FAM, but model.fam_length is 0",
        ),
        ({"data__stage_blocks": ()}, "data.stage_blocks: must name at least one length"),
        ({"data__stage_blocks": (2, 2)}, "data.stage_blocks: must rise"),
        ({"data__stage_blocks": (4, 3)}, "data.stage_blocks: must rise"),
        ({"data__stage_blocks": (2, 3), "data__min_filler_blocks": 2}, "data.stage_blocks: must rise and lie above"),
        ({"evaluate__filler_blocks": ()}, "evaluate.filler_blocks: must be positive lengths"),
        ({"evaluate__filler_blocks": (4, 0)}, "evaluate.filler_blocks: must be positive lengths"),
        ({"data__digits": 10}, "data.digits: at most 9, got 10"),
        ({"lora__alpha": 0.0}, "lora.alpha: must be positive, got 0.0"),
        ({"lora__rank": 4, "lora__targets": ()}, "lora.targets: must name at least one kernel"),
        ({"data__task": "txt"}, "data.task: expected passkey, text, text+passkey or seqio:NAME, got 'txt'"),
        ({"data__task": "seqio:"}, "data.task: expected passkey, text, text+passkey or seqio:NAME, got 'seqio:'"),
        ({"data__task": "text:x"}, "data.task: expected passkey, text, text+passkey or seqio:NAME, got 'text:x'"),
        ({"data__task": "text", "data__vocabulary": "bytes"}, "data.train_files: the task text needs files"),
        ({"data__task": "text", "data__train_files": ("a",)}, "data.vocabulary: passkey has the words of its own"),
        ({"data__train_files": ("a",)}, "data.train_files: belongs to the task text, but data.task is passkey;"),
        ({"data__repeat_segment": 2}, "data.repeat_segment: belongs to the task text or seqio, but data.task is pass"),
        ({"data__imports": ("a",)}, "data.imports: belongs to the task seqio, but data.task is passkey;"),
        ({"data__task": "seqio:a", "data__vocabulary": "bytes"}, "data.vocabulary: belongs to the task passkey or te"),
        ({"data__task": "seqio:a", "data__digits": 3}, "data.digits: belongs to the task passkey, but data.task is s"),
        ({"evaluate__ablations": ("zero",)}, "evaluate.ablations: expected some of zeroed, shuffled, frozen, got"),
        ({"evaluate__ablations": ("zeroed",), "model__fam_length": 0}, "evaluate.ablations: there is no FAM to ablate"),
    ],
)  # fmt: skip
def test_impossible_combinations(values: dict[str, Any], message: str) -> None:
    assert error_of(changed(**values)).startswith(f"config.{message}")


def test_every_field_of_the_data_belongs_to_a_task() -> None:
    belonging = [field for names in TASK_FIELDS.values() for field in names]
    assert sorted([*belonging, "task"]) == sorted(field.name for field in dataclasses.fields(DataConfig))
    text = {"data__task": "text", "data__train_files": ("a",), "data__vocabulary": "bytes"}
    resolve(changed(**text, data__repeat_segment=3))
    resolve(changed(data__task="seqio:a", data__imports=("b",), data__sequence_length=2))


def test_limits_themselves_are_allowed() -> None:
    resolve(
        changed(
            model__fam_length=32, model__block_size=32, model__window=33, model__memory_segments=1, data__digits=9,
            data__min_filler_blocks=1, data__stage_blocks=(2,), train__batch_size=6, train__accumulation=6,
        )
    )  # fmt: skip
    resolve(changed(model__fam_length=0, train__random_state_passing=0.0))


def test_config_dict_and_json_round_trips() -> None:
    config = resolve(changed(model__num_layers=5, data__stage_blocks=(3, 7), optimizer__epsilon=1e-30))
    assert resolve(json.loads(to_json(config))) == config
    assert resolve(ml_collections.ConfigDict(dataclasses.asdict(config))) == config
    assert resolve(default_config().lock()) == Config()


def load(path: pathlib.Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arguments(path: pathlib.Path) -> list[str]:
    """Those that the docstring of a config file names, such as `:smoke`."""
    return re.findall(r"`(?:configs/\w+\.py)?:(\w+)`", load(path).__doc__ or "")


@pytest.mark.parametrize(
    ("path", "argument"),
    [
        (path, argument)
        for path in CONFIG_FILES
        for argument in [*([] if path.stem == "retrofit" else [None]), *arguments(path)]  # it needs a base
    ],
    ids=lambda value: getattr(value, "stem", str(value)),
)
def test_config_files_resolve(path: pathlib.Path, argument: str | None) -> None:
    get_config = load(path).get_config
    resolve(get_config() if argument is None else get_config(argument))


def test_the_passkey_models_differ_in_their_memory_only() -> None:
    path = ROOT / "configs" / "passkey.py"
    assert {"fam", "bswa_m1", "bswa_m1_sg", "smoke"} == set(arguments(path))
    get_config = load(path).get_config
    memory = ("fam_length", "memory_segments", "stop_gradient")
    seen = {}
    for variant in ("fam", "bswa_m1", "bswa_m1_sg"):
        config = resolve(get_config(variant))
        seen[variant] = tuple(getattr(config.model, name) for name in memory)
        plain = dict.fromkeys(memory, 0) | {"stop_gradient": False}
        assert dataclasses.replace(
            config, model=dataclasses.replace(config.model, **plain)
        ) == dataclasses.replace(
            resolve(get_config()), model=dataclasses.replace(resolve(get_config()).model, **plain)
        )
    assert seen == {"fam": (8, 0, False), "bswa_m1": (0, 1, False), "bswa_m1_sg": (0, 1, True)}
    with pytest.raises(ConfigError, match="bswa_m2: expected one of fam, bswa_m1, bswa_m1_sg, smoke"):
        get_config("bswa_m2")


# Overrides on the command line, several in one process: `launch.read_config` defines its flag once per process, so
# each command line is parsed in a fork of a process that has everything imported and TensorFlow forbidden.
FORKS = """
import contextlib, io, json, os, runpy, sys, warnings
warnings.simplefilter("ignore")
import fam_jax.config, launch.errors, absl.app, ml_collections.config_flags
class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("tensorflow", "seqio"):
            raise AssertionError(f"{name} is imported before the flags are known to be right")
sys.meta_path.insert(0, Forbidden())
results = []
for argv in json.load(sys.stdin):
    reader, writer = os.pipe()
    if not os.fork():
        os.dup2(writer, 1), os.dup2(writer, 2), os.close(writer), os.close(reader)
        sys.argv = ["launch/train.py", *argv]
        code = 1
        try:
            runpy.run_module("launch.train", run_name="__main__")
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException as error:
            print(f"Traceback {type(error).__name__}: {error}", flush=True)
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code or 0)
    os.close(writer)
    with open(reader) as pipe:
        text = pipe.read()
    results.append((os.waitstatus_to_exitcode(os.wait()[1]), text))
json.dump(results, sys.stdout)
"""
FILE = "--config=configs/passkey.py"
WORKDIR = "--workdir=never-made"
MISTAKES = {
    "typo": ([FILE, "--config.model.num_layer=2", WORKDIR], "config.model.num_layer:", "did you mean num_layers?"),
    "group": ([FILE, "--config.modle.num_layers=2", WORKDIR], "config.modle", "did you mean model?"),
    "whole group": ([FILE, "--config.model=2", WORKDIR], "config.model: is a group of fields", ""),
    "type": ([FILE, "--config.model.num_layers=two", WORKDIR], "config.model.num_layers", "two"),
    "fraction": ([FILE, "--config.model.num_layers=2.5", WORKDIR], "config.model.num_layers", "2.5"),
    "value": ([FILE, "--config.model.norm=batch", WORKDIR], "config.model.norm: expected one of rmsnorm", ""),
    "combination": ([FILE, "--config.model.head_dim=7", WORKDIR], "config.model.head_dim: must be even", ""),
    "order": (["--config.model.num_layers=2", FILE, WORKDIR], "config.model.num_layers: must come after", ""),
    "no file": (["--config=configs/pass.py", WORKDIR], "configs/pass.py: there is no such file", ""),
    "no config": ([WORKDIR], "--config=FILE is missing", ""),
    "argument": ([f"{FILE}:bswa_m2", WORKDIR], "bswa_m2: expected one of fam", ""),
    "flag": ([FILE, WORKDIR, "--worker=3"], "worker", ""),
    "no workdir": ([FILE], "workdir", ""),
    "restore": ([FILE, WORKDIR, "--restore_step=last"], "restore_step", "last"),
    "two words": (["--config", "configs/passkey.py", "--config.model.head_dim", "7", WORKDIR], "head_dim", "even"),
    "left over": ([FILE, WORKDIR, "model.head_dim=8"], "model.head_dim=8", ""),
}  # fmt: skip


@pytest.fixture(scope="module")
def outcomes() -> dict[str, tuple[int, str]]:
    """Exit code and output of `python -m launch.train` with each of MISTAKES."""
    result = subprocess.run(
        [sys.executable, "-c", FORKS],
        input=json.dumps([argv for argv, *_ in MISTAKES.values()]),
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return dict(zip(MISTAKES, json.loads(result.stdout), strict=True))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_on_the_command_line_are_told_in_a_line(
    mistake: str, outcomes: dict[str, tuple[int, str]]
) -> None:
    _, names, says = MISTAKES[mistake]
    code, text = outcomes[mistake]
    assert code == 2, text
    assert text.startswith("error: ") and text.count("\n") == 1 and text.endswith("\n"), text
    assert names in text and says in text
    assert not (ROOT / "never-made").exists()
