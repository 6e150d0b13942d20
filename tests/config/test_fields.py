"""Every mistake in a config field gives a one-line error that names the field, wherever the group is built."""

import dataclasses
import typing
from typing import Any

import pytest

from fam_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    EvaluateConfig,
    LoraConfig,
    ModelConfig,
    TrainConfig,
    UserError,
    changed,
    check_field,
    default_config,
    fields_with_effect,
    resolve,
)
from fam_jax.config.fields import Constraint, check_range, constraint_of, effect_of, field_types
from fam_jax.config.memory import memory_config_type
from fam_jax.memories.fam import FamConfig
from fam_jax.memories.registry import memory_kinds
from fam_jax.memories.window import BlockSlidingWindowConfig, FullConfig, SlidingWindowConfig

GROUPS: list[Any] = [*typing.get_type_hints(Config).values(), *map(memory_config_type, memory_kinds())]


class Field(typing.NamedTuple):
    """A field of a group."""

    group: Any
    name: str
    kind: Any
    limits: Constraint

    @property
    def path(self) -> str:
        return f"config.{self.group.config_path}.{self.name}"

    def build(self, value: Any) -> Any:
        return self.group(**{self.name: value})

    def error(self, value: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            self.build(value)
        return one_line(str(caught.value))


def one_line(message: str) -> str:
    assert "\n" not in message
    assert len(message) < 250
    return message


FIELDS = [
    Field(group, field.name, field_types(group)[field.name], constraint_of(field))
    for group in GROUPS
    for field in dataclasses.fields(group)
    if not dataclasses.is_dataclass(field_types(group)[field.name])
]


TASKS = (
    "data.task: expected passkey, text, instructions, text+passkey, seqio:NAME or algorithmic:NAME with NAME remember, "
    "rewrite, copy, reverse, got "
)
INSTRUCTIONS: dict[str, Any] = {"task": "instructions", "vocabulary": "bytes"}


def those(condition: Any) -> Any:
    """Parametrize a test over the fields that satisfy a condition."""
    chosen = [field for field in FIELDS if condition(field)]
    assert chosen
    return pytest.mark.parametrize("field", chosen, ids=lambda field: f"{field.group.__name__}.{field.name}")


def test_the_defaults_are_valid_and_errors_are_user_errors() -> None:
    assert resolve(default_config()) == Config() == resolve({})
    assert issubclass(ConfigError, UserError)


@those(lambda field: True)
def test_a_value_of_the_wrong_type_names_the_field(field: Field) -> None:
    wrongs = {
        int: (1.5, "1", None, True),
        float: ("0.1", None, True),
        bool: (1, "true"),
        str: (1, None),
        tuple[int, ...]: (3, "2,3", (1, "2"), (1.5,), None),
        tuple[str, ...]: (3, "a,b", ("a", 1), (1.5,), None),
        tuple[tuple[str, float], ...]: (3, "a=1", (("a", 1.0), "b"), (("a", 1.0), ("b",)), None),
    }
    for wrong in wrongs[field.kind]:
        message = field.error(wrong)
        assert message.startswith(f"{field.path}: expected ")
        assert repr(wrong[-1] if isinstance(wrong, tuple) else wrong) in message


@those(lambda field: field.limits.choices)
def test_choices(field: Field) -> None:
    words = field.kind is not str
    message = field.error(("nonsense",) if words else "nonsense")
    assert message.startswith(f"{field.path}: expected one of {', '.join(field.limits.choices)}, got ")
    for choice in field.limits.choices:
        with_block = {"block_size": 128} if field.name == "attention" else {}
        built = field.group(**{field.name: (choice,) if words else choice}, **with_block)
        assert getattr(built, field.name) == ((choice,) if words else choice)


@those(lambda field: field.limits.minimum is not None)
def test_the_lowest_value(field: Field) -> None:
    lowest = field.limits.minimum
    is_whole, is_list = field.kind in (int, tuple[int, ...]), typing.get_origin(field.kind) is tuple
    below = lowest - (1 if is_whole else 0.001)
    lowest = int(lowest) if is_whole else lowest
    wrap = (lambda value: (value,)) if is_list else (lambda value: value)
    message = field.error(wrap(below))
    assert message.startswith(f"{field.path}: must be ") and str(below) in message
    check_range(field.limits, wrap(lowest), field.path)  # building the group might contradict other fields


@those(lambda field: field.limits.maximum is not None)
def test_fractions_and_other_highest_values(field: Field) -> None:
    highest = field.limits.maximum
    step = 1 if field.kind is int else 0.01
    assert field.error(highest + step).startswith(f"{field.path}: must be ")
    field.build(field.kind(highest))


@those(lambda field: field.kind is float)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_floats_must_be_finite(field: Field, value: float) -> None:
    assert field.error(value).startswith(f"{field.path}: must be ")


@pytest.mark.parametrize("name", ["beta1", "beta2"])
def test_a_running_mean_must_forget(name: str) -> None:
    """With a decay of 1, the momentum stays zero and the debiased second moment is 0 / 0."""
    with pytest.raises(
        ConfigError, match=rf"config.optimizer.{name}: must be at least 0 and below 1, got 1.0"
    ):
        changed(Config(), optimizer={name: 1.0})


def test_every_field_has_a_meaning_and_every_number_a_range() -> None:
    free = {"rope_low_freq_factor", "rope_high_freq_factor", "local_rope_base"}  # checked together
    for field in FIELDS:
        assert len(field.limits.doc) > 1, field.path
        assert field.limits.doc in field.group.__doc__.replace("\n    ", " "), f"help() lacks {field.path}"
        if field.kind in (int, float) and field.name not in free:
            limits = field.limits
            assert not (limits.minimum is None and limits.above is None), f"{field.path} has no lower limit"


def test_whole_numbers_will_do_for_floats_and_lists_for_tuples() -> None:
    config = resolve({"optimizer": {"learning_rate": 1}, "data": {"stage_blocks": [2, 3]}})
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
        ({"model": {"fam_length": 2}}, "config.model.fam_length: ", "is now config.model.memory.length"),
        ({"model": {"memory": {"kind": "lstm"}}}, "config.model.memory.kind: expected one of ", "got 'lstm'"),
        (
            {"model": {"memory": {"kind": "bswa", "length": 2}}},
            "config.model.memory.length: ",
            "is a field of fam",
        ),
        (
            {"model": {"memory": {"kind": "bswa", "lenght": 2}}},
            "config.model.memory.lenght: ",
            "bswa has kind",
        ),
        (
            {"model": {"memory": {"kind": "bswa", "segments": -1}}},
            "config.model.memory.segments: ",
            "at least 0",
        ),
    ],
)
def test_unknown_fields_come_with_a_hint(values: Any, start: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(values)
    message = one_line(str(caught.value))
    assert message.startswith(start)
    assert says in message


def test_check_field_knows_all_fields_and_no_others() -> None:
    for field in FIELDS:
        check_field(field.path)
    for path, message in {
        "config.model.num_layer": "config.model.num_layer: no such field; did you mean num_layers?",
        "config.modle.num_layers": "config.modle: no such field; did you mean model?",
        "config.model": "config.model: is a group of fields; set one of them, such as config.model.vocab_size",
        "config.model.num_layers.x": "config.model.num_layers.x: config.model.num_layers is not a group of fields",
        "config": "config: is a group of fields; set one of them, such as config.model",
    }.items():
        with pytest.raises(ConfigError) as caught:
            check_field(path)
        assert str(caught.value) == message


def bswa(**fields: Any) -> dict[str, Any]:
    return {"memory": BlockSlidingWindowConfig(**fields)}


@pytest.mark.parametrize(
    ("group", "values", "message"),
    [
        (ModelConfig, {"num_heads": 4, "num_kv_heads": 3}, "model.num_kv_heads: 3 does not divide num_heads 4"),
        (ModelConfig, {"num_heads": 2, "num_kv_heads": 4}, "model.num_kv_heads: 4 does not divide num_heads 2"),
        (ModelConfig, {"head_dim": 7}, "model.head_dim: must be even for RoPE, got 7"),
        (ModelConfig, {"memory": FamConfig(length=9), "block_size": 8}, "model.memory.length: 9 is longer than block"),
        (ModelConfig, {"norm_epsilon": 0.0}, "model.norm_epsilon: must be above 0, got 0.0"),
        (ModelConfig, {"rope_base": 1.0}, "model.rope_base: must be above 1, got 1.0"),
        (ModelConfig, bswa(window=34) | {"block_size": 32}, "model.memory.window: 34 exceeds what every token can see"),
        (
            ModelConfig,
            {"attention": "pallas", "block_size": 128, "attention_softcap": 50.0},
            "model.attention: pallas does not support attention_softcap; set auto, xla or reference",
        ),
        (
            ModelConfig,
            {"rope_scaling": "llama3", "rope_low_freq_factor": 4.0},
            "model.rope_low_freq_factor: must be above 0 and below rope_high_freq_factor 4.0, got 4.0",
        ),
        (ModelConfig, {"layer_pattern": ()}, "model.layer_pattern: expected 1 to num_layers 3 entries, each global"),
        (ModelConfig, {"layer_pattern": ("full",)}, "model.layer_pattern: expected 1 to num_layers 3 entries"),
        (ModelConfig, {"layer_pattern": ("global",) * 4}, "model.layer_pattern: expected 1 to num_layers 3 entries"),
        (ModelConfig, {"layer_pattern": ("local",)}, "model.local_window: set it if and only if layer_pattern has"),
        (ModelConfig, {"local_window": 3}, "model.local_window: set it if and only if layer_pattern has local"),
        (
            ModelConfig,
            {"layer_pattern": ("local",), "local_window": 34, "block_size": 32},
            "model.local_window: 34 exceeds what every token can see",
        ),
        (ModelConfig, {"local_rope_base": 0.5}, "model.local_rope_base: must be above 1, or 0 for rope_base, got 0.5"),
        (ModelConfig, {"attention": "pallas"}, "model.attention: pallas needs a block_size that is a multiple of 128"),
        (
            ModelConfig,
            {"attention": "pallas_interpret", "block_size": 128, "remat": "dots"},
            "model.remat: pallas_interpret cannot run under rematerialization, got dots; set none",
        ),
        (TrainConfig, {"batch_size": 6, "accumulation": 4}, "train.accumulation: 4 does not divide batch_size 6"),
        (DataConfig, {"stage_blocks": ()}, "data.stage_blocks: must name at least one length"),
        (DataConfig, {"stage_blocks": (2, 2)}, "data.stage_blocks: must increase"),
        (DataConfig, {"stage_blocks": (4, 3)}, "data.stage_blocks: must increase"),
        (DataConfig, {"stage_blocks": (2, 3), "min_filler_blocks": 2}, "data.stage_blocks: must increase and lie"),
        (EvaluateConfig, {"filler_blocks": ()}, "evaluate.filler_blocks: must be positive lengths"),
        (EvaluateConfig, {"filler_blocks": (4, 0)}, "evaluate.filler_blocks: must be at least 1, got 0"),
        (EvaluateConfig, {"ablations": ("zero",)}, "evaluate.ablations: expected one of zeroed, shuffled, frozen, got"),
        (DataConfig, {"mixture": (("a", "b"),)}, "data.mixture: expected float, got 'b'"),
        (DataConfig, {"mixture": ((1, 1.0),)}, "data.mixture: expected str, got 1"),
        (DataConfig, {"mixture": (("a", 0.0),)}, "data.mixture: expected files and a rate above 0, got 'a' with 0.0"),
        (DataConfig, {"mixture": ((" ", 1.0),)}, "data.mixture: expected files and a rate above 0, got ' ' with 1.0"),
        (DataConfig, {"mixture": (("a", float("inf")),)}, "data.mixture: expected files and a rate above 0, got 'a'"),
        (DataConfig, {"format": "csv"}, "data.format: expected one of auto, natural_instructions,"),
        (DataConfig, {"digits": 10}, "data.digits: must be between 1 and 9, got 10"),
        (LoraConfig, {"alpha": 0.0}, "lora.alpha: must be above 0, got 0.0"),
        (LoraConfig, {"rank": 4, "targets": ()}, "lora.targets: must name at least one kernel"),
    ],
)  # fmt: skip
def test_impossible_combinations_in_a_group(group: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        group(**values)
    assert one_line(str(caught.value)).startswith(f"config.{message}")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"train": {"random_state_passing": 0.5}, "model": bswa()},
            "train.random_state_passing: bswa has no state beyond its window to pass on",
        ),
        (
            {"train": {"random_state_passing": 0.5}, "model": {"memory": FamConfig(length=0)}},
            "train.random_state_passing: fam has no state beyond its window to pass on",
        ),
        (
            {"evaluate": {"ablations": ("zeroed",)}, "model": bswa()},
            "evaluate.ablations: bswa has no state beyond its window to ablate",
        ),
        ({"data": {"filler_step": 3}}, "data.filler_step: 3 does not divide model.block_size 32"),
        ({"data": {"task": "txt"}}, f"{TASKS}'txt'"),
        ({"data": {"task": "seqio:"}}, f"{TASKS}'seqio:'"),
        ({"data": {"task": "text:x"}}, f"{TASKS}'text:x'"),
        ({"data": {"task": "text", "vocabulary": "bytes"}}, "data.train_files: the task text needs files"),
        ({"data": {"task": "text", "train_files": ("a",)}}, "data.vocabulary: passkey has the words of its own"),
        ({"data": {"train_files": ("a",)}}, "data.train_files: belongs to the task text or instructions, but data."),
        ({"data": {"repeat_segment": 2}}, "data.repeat_segment: belongs to the task text or seqio or instr"),
        ({"data": INSTRUCTIONS}, "data.train_files: the task instructions needs files to train on; set it or"),
        ({"data": INSTRUCTIONS | {"train_files": ("a",), "mixture": (("b", 1.0),)}}, "data.train_files: the task "),
        ({"data": {"task": "instructions", "train_files": ("a",)}}, "data.vocabulary: passkey has the words of its"),
        ({"data": {"mixture": (("a", 1.0),)}}, "data.mixture: belongs to the task instructions, but data.task is pass"),
        ({"data": {"imports": ("a",)}}, "data.imports: belongs to the task seqio or instructions, but data.task"),
        ({"data": {"task": "seqio:a", "vocabulary": "bytes"}}, "data.vocabulary: belongs to the task passkey or text"),
        ({"data": {"task": "seqio:a", "digits": 3}}, "data.digits: belongs to the task passkey, but data.task is seq"),
    ],
)  # fmt: skip
def test_impossible_combinations_of_groups(values: dict[str, dict[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        changed(Config(), **values)
    assert one_line(str(caught.value)).startswith(f"config.{message}")


def test_every_field_of_the_data_belongs_to_a_task() -> None:
    for field in dataclasses.fields(DataConfig):
        assert constraint_of(field).tasks or field.name == "task"
    text: dict[str, Any] = {"task": "text", "train_files": ("a",), "vocabulary": "bytes"}
    changed(Config(), data=text | {"repeat_segment": 3})
    changed(Config(), data=INSTRUCTIONS | {"train_files": ("a",), "repeat_segment": 3, "format": "p3"})
    changed(Config(), data=INSTRUCTIONS | {"mixture": (("a", 1.0), ("b", 2.0)), "as_chat": True})
    changed(Config(), data={"task": "seqio:a", "imports": ("b",), "sequence_length": 2})


@pytest.mark.parametrize("value", [2**31, 10**30, -(2**31)])
def test_whole_numbers_fit_into_32_bits(value: int) -> None:
    for values in ({"train": {"steps": value}}, {"data": {"stage_blocks": (2, value)}}):
        with pytest.raises(ConfigError, match=r"must be at (most|least) \d+, got -?\d+"):
            changed(Config(), **values)
    with pytest.raises(ConfigError, match=r"config\.train\.seed: must be between 0 and 4294967295, got"):
        changed(Config(), train={"seed": 2**32 if value > 0 else value})
    if value > 0:
        assert changed(Config(), model={"rope_base": value}).model.rope_base == value


def test_limits_themselves_are_allowed() -> None:
    model = {"memory": FamConfig(length=32, window=33, segments=1), "block_size": 32}
    changed(
        Config(),
        model=model,
        data={"digits": 9, "min_filler_blocks": 1, "stage_blocks": (2,)},
        train={"batch_size": 6, "accumulation": 6},
    )
    changed(Config(), model=bswa(), train={"random_state_passing": 0.0})


def test_windows_keep_the_blocks_that_they_reach_into() -> None:
    for tokens, blocks in ((1, 0), (2, 1), (9, 1), (10, 2), (17, 2), (18, 3)):
        assert SlidingWindowConfig(window=tokens).cached_blocks(8) == blocks
    for tokens, blocks in ((1, 0), (8, 0), (9, 1), (16, 1), (17, 2)):
        assert FullConfig(context=tokens).cached_blocks(8) == blocks
    model = ModelConfig(block_size=8, memory=SlidingWindowConfig(window=10))
    assert model.memory_segments == 2


def test_what_a_change_affects_is_said_on_the_field() -> None:
    execution = fields_with_effect(Config, "execution")
    assert execution == {
        "train.steps",
        "train.accumulation",
        "train.loss_chunk",
        "train.log_every",
        "train.checkpoint_every",
        "train.keep_checkpoints",
        "train.skip_batches",
        "data.train_files",
        "data.heldout_files",
        "data.mixture",
        "data.chat_template",
        "model.attention",
        "model.remat",
        *(f"evaluate.{field.name}" for field in dataclasses.fields(EvaluateConfig)),
        "mesh.data",
        "mesh.fsdp",
        "mesh.tensor",
    }
    state = fields_with_effect(FamConfig, "parameters", "state")
    assert state == {"kind", "segments", "window", "length", "init", "positions", "previous_blocks", "bound"}
    assert fields_with_effect(ModelConfig, "state", "execution") == {
        "dtype",
        "block_size",
        "attention",
        "remat",
        "memory.kind",
    }
    for group in GROUPS:
        for field in dataclasses.fields(group):
            assert effect_of(group, field) in ("parameters", "state", "training", "execution")
