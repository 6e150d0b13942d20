"""Config fields set from text, and the arguments of config files."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fam_jax.config import ConfigError, default_config, resolve
from fam_jax.config.overrides import Override, apply_overrides, parse_argument, parse_value, split_list

PAIRS = tuple[tuple[str, float], ...]


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (int, "12", 12),
        (int, "-3", -3),
        (int, "1_000", 1000),
        (int, "1e3", 1000),
        (int, "2.5e1", 25),
        (int, "9007199254740993", 9007199254740993),
        (float, "1e-3", 1e-3),
        (float, "2", 2.0),
        (bool, "true", True),
        (bool, "False", False),
        (bool, "1", True),
        (bool, "0", False),
        (str, "a b,'c'", "a b,'c'"),
        (str, "", ""),
        (tuple[str, ...], "a.txt,b.txt", ("a.txt", "b.txt")),
        (tuple[str, ...], "('a.txt', 'b.txt')", ("a.txt", "b.txt")),
        (tuple[str, ...], '["a.txt"]', ("a.txt",)),
        (tuple[str, ...], "('a.txt')", ("a.txt",)),
        (tuple[str, ...], "", ()),
        (tuple[str, ...], "()", ()),
        (tuple[int, ...], "1,2", (1, 2)),
        (tuple[int, ...], "[1, 2]", (1, 2)),
        (tuple[int, ...], "(2,)", (2,)),
        (tuple[int, ...], "4", (4,)),
        (tuple[int, ...], "1e3,", (1000,)),
        (tuple[float, ...], "1,2.5", (1.0, 2.5)),
        (tuple[str, ...], "\"a,b*.txt\", 'c''d,e'x ,it's", ("a,b*.txt", "c'd,ex", "it's")),
        (PAIRS, "flan/*.parquet=0.4,t0=2", (("flan/*.parquet", 0.4), ("t0", 2.0))),
        (PAIRS, "'a,b=c'=1e-1, \"gs://x:y\"=.5,", (("a,b=c", 0.1), ("gs://x:y", 0.5))),
        (PAIRS, "[('a', 0.4), ('b,c', 2.0)]", (("a", 0.4), ("b,c", 2.0))),
        (PAIRS, "", ()),
    ],
)
def test_a_value_is_parsed_by_its_type(kind: Any, text: str, value: Any) -> None:
    found = parse_value(kind, text, "config.x")
    assert found == value
    entries = zip(found, value, strict=True) if isinstance(value, tuple) else [(found, value)]
    assert all(type(entry) is type(wanted) for entry, wanted in entries)


@pytest.mark.parametrize("name", ["a,b.txt", "a, b", "[v1]", "(1, 2)", "['a']"])
def test_a_path_that_exists_is_one_entry(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).touch()
    for path in (name, str(tmp_path / name)):
        assert parse_value(tuple[str, ...], path, "config.x") == (path,)
        assert parse_value(tuple[str, ...], repr((path, "b")), "config.x") == (path, "b")


@pytest.mark.parametrize(
    ("kind", "text", "says"),
    [
        (int, "two", "expected int, got 'two'"),
        (int, "2.5", "expected int, got '2.5'"),
        (int, "1e-3", "expected int"),
        (int, "1e999999999", "expected int"),
        (int, "inf", "expected int"),
        (int, "nan", "expected int"),
        (int, "", "expected int, got ''"),
        (float, "1,5", "expected float, got '1,5'"),
        (bool, "2", "expected true or false, got '2'"),
        (bool, "maybe", "expected true or false, got 'maybe'"),
        (tuple[int, ...], "1,two", "expected int, got 'two'"),
        (tuple[int, ...], "[1, 'x']", "expected int, got 'x'"),
        (tuple[int, ...], "(1, 2", "expected a list of int"),
        (tuple[str, ...], "[a, b]", "expected a list of str"),
        (tuple[str, ...], "a,'b,c", "the quote in 'b,c is not closed; write ' at its end"),
        (PAIRS, "a,b=1", "expected FILES=RATE, such as flan/*.parquet=0.4, got 'a'"),
        (PAIRS, "a=1.2.3", "expected FILES=RATE"),
        (PAIRS, "=1", "expected FILES=RATE"),
        (PAIRS, "[('a', 0.4", "expected a list of pairs of str and float, such as a=0.4,b=0.6 or"),
    ],
)
def test_other_texts_are_rejected(kind: Any, text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_value(kind, text, "config.x")
    assert str(caught.value).startswith(f"config.x: {says}")


def applied(*overrides: str) -> dict[str, Any]:
    values = default_config().to_dict()
    apply_overrides(values, [Override(*override.split("=", 1)) for override in overrides])
    return values


def test_fields_are_set_and_the_last_value_wins() -> None:
    values = applied("config.train.steps=5", "config.data.train_files=a,b", "config.train.steps=6")
    assert values["train"]["steps"] == 6 and values["data"]["train_files"] == ("a", "b")


@pytest.mark.parametrize("first", [True, False])
def test_a_new_kind_of_memory_comes_first_and_keeps_what_both_kinds_have(first: bool) -> None:
    kind, others = "config.model.memory.kind=full", ["config.model.memory.context=96"]
    values = applied(*([kind, *others] if first else [*others, kind]))
    assert values["model"]["memory"] == {"kind": "full", "context": 96}

    values = default_config().to_dict()
    values["model"]["memory"] |= {"segments": 3, "stop_gradient": True, "length": 5}
    apply_overrides(values, [Override("config.model.memory.kind", "bswa")])
    memory = resolve(values).model.memory
    assert memory.kind == "bswa" and not hasattr(memory, "length")
    assert (values["model"]["memory"]["segments"], memory.stop_gradient) == (3, True)


def test_the_same_kind_changes_nothing() -> None:
    assert applied("config.model.memory.kind=fam") == default_config().to_dict()


def test_a_group_that_a_plain_dict_leaves_out_is_made() -> None:
    values: dict[str, Any] = {}
    apply_overrides(
        values, [Override("config.model.memory.kind", "bswa"), Override("config.train.steps", "3")]
    )
    assert values["train"] == {"steps": 3}
    assert resolve(values).model.memory.kind == "bswa"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("config.train.step=5", "config.train.step: no such field; did you mean steps?"),
        ("config.train=5", "config.train: is a group of fields"),
        ("config.train.steps.x=5", "config.train.steps.x: config.train.steps is not a group"),
        ("config.model.memory.kind=fsm", "config.model.memory.kind: expected one of full, "),
        (
            "config.model.memory.context=5",
            "config.model.memory.context: is a field of full, but the kind is fam",
        ),
        ("config.model.fam_length=5", "config.model.fam_length: is now config.model.memory.length"),
    ],
)
def test_unknown_fields_are_rejected(override: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        applied(override)
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arg", "variant", "words"),
    [
        ("", "fam", set()),
        ("bswa", "bswa", set()),
        ("smoke", "fam", {"smoke"}),
        ("smoke,,bswa", "bswa", {"smoke"}),
    ],
)
def test_the_argument_of_a_config_file(arg: str, variant: str, words: set[str]) -> None:
    found = parse_argument("configs/x.py", arg, variants=("fam", "bswa"))
    assert (found.variant, set(found.words)) == (variant, words)


@pytest.mark.parametrize(
    ("arg", "wrong"), [("bswa,tiny", "tiny"), ("fam,bswa", "bswa"), ("bswa,bswa", "bswa")]
)
def test_other_arguments_are_rejected(arg: str, wrong: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_argument("configs/x.py", arg, variants=("fam", "bswa"), words=("smoke", "long"))
    assert str(caught.value) == (
        f"configs/x.py:{arg}: expected one of fam, bswa and any of smoke, long, with commas between them, "
        f"got {wrong!r}"
    )


@pytest.mark.parametrize("field", ["train.seed", "evaluate.seed"])
def test_a_seed_that_jax_cannot_take_is_rejected(field: str) -> None:
    group, name = field.split(".")
    largest = 2**32 - 1
    assert getattr(getattr(resolve({group: {name: largest}}), group), name) == largest
    for seed in (2**32, 10**20, 10**400):
        with pytest.raises(ConfigError, match=rf"config\.{field}: must be between 0 and "):
            resolve({group: {name: seed}})


@given(entries=st.lists(st.text("ab,:='\" *\n", min_size=1).filter(lambda text: text.strip() == text)))
def test_quoted_entries_of_a_list_may_have_any_characters(entries: list[str]) -> None:
    for quote in ("'", '"'):
        quoted = [f"{quote}{entry.replace(quote, 2 * quote)}{quote}" for entry in entries]
        assert split_list(",".join(quoted), "x") == entries
    plain = [entry for entry in entries if "," not in entry and entry[0] not in "'\""]
    assert split_list(" , ".join(plain), "x") == plain
