"""Checkpoints: a restore returns exactly what was saved, on any mesh, or raises an error that says why not."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fam_jax.checkpoint import (
    CheckpointError,
    Checkpoints,
    load_params,
    read_config,
)
from fam_jax.checkpoint.manifest import checksums
from fam_jax.config import UserError
from fam_jax.config.format1 import FORMAT
from tests.checkpoint.states import CONFIG, assert_same, make_state, mesh_of, open_run, structs
from tests.variants import rest_slow


@pytest.mark.parametrize("shape", [(2, 4), (1, 2), (4, 2), (1, 1)])
def test_round_trip_on_any_mesh(saved: pathlib.Path, shape: tuple[int, int]) -> None:
    expected = make_state(mesh_of(*shape))
    with open_run(saved) as checkpoints:
        assert (checkpoints.all_steps(), checkpoints.latest_step()) == ([10, 20], 20)
        found, position = checkpoints.restore(None, structs(expected))
        older, older_position = checkpoints.restore(10, structs(expected))
    assert position == {"examples": 20, "loss": 0.5, "row": [1, 2], "by_host": {"9": 1, "10": 2}}
    assert older_position == {"examples": 10}
    assert_same(older, expected)
    assert_same(found, expected | {"step": jnp.int32(17)})
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.sharding == other.sharding


def test_restored_keys_continue_the_random_stream(saved: pathlib.Path) -> None:
    expected = make_state(mesh_of(1, 1))
    with open_run(saved) as checkpoints:
        found, _ = checkpoints.restore(20, structs(expected))
    assert jax.random.key_impl(found["keys"]) == jax.random.key_impl(expected["keys"])
    np.testing.assert_array_equal(jax.random.bits(found["keys"][2]), jax.random.bits(expected["keys"][2]))


def test_save_does_not_keep_donated_buffers(tmp_path: pathlib.Path) -> None:
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jnp.arange(100_000.0)
    expected = np.arange(100_000.0, dtype=np.float32)
    with open_run(tmp_path, keep=5) as checkpoints:
        for number in range(1, 4):
            checkpoints.save(number, {"params": {"x": x}}, {})
            x = step(x)
        for number in range(1, 4):
            found, _ = checkpoints.restore(number, {"params": {"x": jax.ShapeDtypeStruct(x.shape, x.dtype)}})
            np.testing.assert_array_equal(found["params"]["x"], expected + number - 1)


def test_written_a_few_bytes_at_a_time(tmp_path: pathlib.Path) -> None:
    state = make_state(mesh_of(2, 2))
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(state["params"]))
    with Checkpoints(tmp_path / "run", config=CONFIG, keep=1, in_flight_bytes=largest) as checkpoints:
        checkpoints.save(1, {"params": state["params"]}, {}, wait=True)
    params, _, step = load_params(tmp_path / "run")
    assert step == 1
    assert_same(params, jax.tree.map(np.asarray, state["params"]))


def test_params_alone(saved: pathlib.Path) -> None:
    expected = make_state(mesh_of(1, 1))["params"]
    params, config, step = load_params(saved)
    assert (config, step) == (CONFIG, 20)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
    assert_same(params, expected)

    everywhere = NamedSharding(mesh_of(1, 2), P())
    params, _, step = load_params(saved, step=10, shardings=everywhere)
    assert step == 10
    assert {leaf.sharding for leaf in jax.tree.leaves(params)} == {everywhere}
    assert_same(params, expected)

    first = NamedSharding(mesh_of(2, 2), P("fsdp"))

    def choose(shapes: dict) -> dict:
        assert shapes["layers"]["up"]["kernel"].shape == (3, 128, 256)
        return jax.tree.map(lambda x: first if x.shape[0] % 2 == 0 else everywhere, shapes)

    params, _, _ = load_params(saved, shardings=choose)
    assert params["embedding"]["table"].sharding == first
    assert params["layers"]["up"]["kernel"].sharding == everywhere
    assert_same(params, expected)


def test_params_alone_need_no_optimizer_state(run: pathlib.Path) -> None:
    shutil.rmtree(run / "20" / "training")
    assert load_params(run)[2] == 20


def test_relative_path(saved: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved.parent)
    assert load_params(saved.name)[2] == 20


DAMAGE = {
    "flipped": lambda data: (
        data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :]
    ),
    "truncated": lambda data: data[: len(data) // 2],
    "zeroed": lambda data: bytes(len(data)),
    "empty": lambda data: b"",
}


@pytest.mark.parametrize(
    ("file", "damage"),
    rest_slow(
        [
            *[("params/ocdbt.process_0/d/*", damage) for damage in DAMAGE],
            *[("contents/data.json", damage) for damage in DAMAGE],
            ("params/_METADATA", "truncated"),
            ("params/manifest.ocdbt", "flipped"),
        ],
        [
            ("params/ocdbt.process_0/d/*", "flipped"),
            ("contents/data.json", "truncated"),
            ("params/_METADATA", "truncated"),
            ("params/manifest.ocdbt", "flipped"),
        ],
    ),
)
def test_damage_is_found(
    run: pathlib.Path, file: str, damage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = max((run / "20").glob(file), key=lambda path: path.stat().st_size)
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"step 20 is damaged .*\(--step=10\)") as caught:
        load_params(run)
    assert "\n" not in str(caught.value)
    assert str(run / "20" / file.split("/")[0]) in str(caught.value)
    assert capfd.readouterr().err == ""  # the user sees only the message
    like = structs(make_state(mesh_of(1, 1)))
    with open_run(run) as checkpoints, pytest.raises(CheckpointError, match=r"\(--restore_step=10\)"):
        checkpoints.restore(20, like)
    assert load_params(run, step=10)[2] == 10


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of abandoned reads
@settings(max_examples=25)
@given(data=st.data())
def test_any_changed_byte_is_found_or_harmless(saved: pathlib.Path, data: st.DataObject) -> None:
    """Change any byte of any file: a restore raises an error, or returns exactly what was saved."""
    file = data.draw(st.sampled_from(sorted(path for path in (saved / "20").rglob("*") if path.is_file())))
    original = file.read_bytes()
    changed = bytearray(original)
    changed[data.draw(st.integers(0, len(original) - 1))] ^= data.draw(st.integers(1, 255))
    expected = make_state(mesh_of(1, 1)) | {"step": jnp.int32(17)}
    file.write_bytes(changed)
    try:
        with open_run(saved) as checkpoints:
            found, position = checkpoints.restore(20, structs(expected))
    except CheckpointError:
        return
    finally:
        file.write_bytes(original)
    assert position["examples"] == 20
    assert_same(found, expected)


def test_only_step_damaged(run: pathlib.Path) -> None:
    shutil.rmtree(run / "10")
    (run / "20" / "contents" / "data.json").write_text("{}")
    with pytest.raises(CheckpointError, match="there is no earlier step"):
        load_params(run)


@given(word=st.integers(0, 2**32 - 1), other=st.integers(0, 2**32 - 1), place=st.integers(0, 8 * 6 - 1))
def test_checksum_sees_any_change_of_one_word(word: int, other: int, place: int) -> None:
    words = np.full((8, 6), word, np.uint32)
    changed = words.copy()
    changed.flat[place] = other
    sums = checksums({"words": words, "changed": changed})
    assert (sums["words"][:8] == sums["changed"][:8]) == (word == other)


def test_checksum_sees_exchanged_values() -> None:
    array = np.arange(48, dtype=np.float32).reshape(8, 6)
    assert checksums({"x": array}) != checksums({"x": array[::-1].copy()})
    assert checksums({"x": array}) != checksums({"x": array[:, ::-1].copy()})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bool"])
def test_checksum_does_not_depend_on_the_mesh(dtype: str) -> None:
    array = (jax.random.normal(jax.random.key(0), (8, 12, 4)) * 5).astype(dtype)
    mesh = mesh_of(2, 4)
    placed = [
        jax.device_put(array, NamedSharding(mesh, spec))
        for spec in (P(), P("data", "fsdp"), P(("fsdp", "data")), P(None, "fsdp"))
    ]
    assert len({checksums({"x": x})["x"] for x in [array, np.asarray(array), *placed]}) == 1


def test_leftovers_of_a_killed_save_are_ignored(run: pathlib.Path) -> None:
    shutil.copytree(run / "20", run / "30.orbax-checkpoint-tmp")
    shutil.copytree(run / "20" / "params", run / "30.orbax-checkpoint-tmp" / "params.orbax-checkpoint-tmp")
    assert load_params(run)[2] == 20
    state = make_state(mesh_of(1, 1))
    with open_run(run, keep=3) as checkpoints:
        assert checkpoints.all_steps() == [10, 20]
        checkpoints.save(30, state, {"examples": 30}, wait=True)
    assert load_params(run)[2] == 30


def test_keeps_the_latest(tmp_path: pathlib.Path) -> None:
    state = {"params": {"x": jnp.ones(3)}}
    with open_run(tmp_path, keep=2) as checkpoints:
        for step in (5, 6, 7, 8):
            checkpoints.save(step, state, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["7", "8", "config.json", "newest_step.json"]


def test_saving_an_old_step_is_refused(run: pathlib.Path) -> None:
    state = make_state(mesh_of(1, 1))
    with open_run(run) as checkpoints:
        for step in (15, 20):
            with pytest.raises(CheckpointError, match=f"step {step} cannot be saved after step 20"):
                checkpoints.save(step, state, {})
    assert load_params(run)[2] == 20


def test_going_back_replaces_later_steps(run: pathlib.Path) -> None:
    with open_run(run) as checkpoints:
        state, position = checkpoints.restore(10, structs(make_state(mesh_of(1, 1))))
        assert checkpoints.all_steps() == [10, 20]  # until another step replaces it
        checkpoints.save(15, state, position)
        assert checkpoints.all_steps() == [10, 15]
        checkpoints.save(20, state, {"examples": 21})
        _, position = checkpoints.restore(None, structs(state))
    assert position == {"examples": 21}
    assert sorted(path.name for path in run.iterdir()) == ["15", "20", "config.json", "newest_step.json"]


def test_config_that_differs_is_refused(saved: pathlib.Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_run(saved, model={"model_dim": 64, "attention": "xla"}, train={"steps": 10, "seed": 3})
    message = str(caught.value)
    assert "model.model_dim was 96, is 64" in message
    assert "train.seed was 0, is 3" in message  # not in the file, so it had its default
    assert "new workdir" in message
    assert "\n" not in message
    assert read_config(saved) == CONFIG


def test_config_may_change_in_execution(run: pathlib.Path) -> None:
    changes = {
        "model": {"model_dim": 96, "attention": "reference"}, "train": {"steps": 99}, "mesh": {"data": 4}
    }  # fmt: skip
    open_run(run, **changes).close()
    assert read_config(run) == changes
    written = json.loads((run / "config.json").read_text())
    assert written.pop("sha256") and written == {"format": FORMAT, **changes}


def test_nothing_there(tmp_path: pathlib.Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        load_params(tmp_path / "missing")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_params(tmp_path)
    with open_run(tmp_path / "new") as checkpoints:
        assert checkpoints.latest_step() is None
        with pytest.raises(CheckpointError, match="no complete checkpoint"):
            checkpoints.restore(None, {"params": {}})
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        load_params(tmp_path / "new")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="another workdir"):
        open_run(tmp_path / "file")


def test_missing_step(saved: pathlib.Path) -> None:
    with pytest.raises(CheckpointError, match="has no step 12; saved are 10, 20"):
        load_params(saved, step=12)


def test_other_shapes_are_no_damage(saved: pathlib.Path) -> None:
    state = make_state(mesh_of(1, 1))
    with open_run(saved) as checkpoints:
        wider = structs(state | {"seen": jnp.zeros(3, bool)})
        with pytest.raises(CheckpointError, match=r"training/seen is bool\[2\] .* bool\[3\] here"):
            checkpoints.restore(20, wider)
        with pytest.raises(CheckpointError, match=r"training/extra is absent .* float32\[\] here"):
            checkpoints.restore(20, structs(state | {"extra": jnp.zeros(())}))


def test_a_memory_saved_in_bfloat16_is_restored_wider(tmp_path: pathlib.Path) -> None:
    """Earlier versions carried FAM in the dtype of activations. Only that array may differ, and only so."""
    mesh = mesh_of(1, 1)
    state = make_state(mesh) | {"carried": {"fam": jnp.linspace(-3, 3, 24, dtype=jnp.bfloat16)}}
    with open_run(tmp_path / "run") as checkpoints:
        checkpoints.save(1, state, {}, wait=True)
    wide = state | {"carried": {"fam": state["carried"]["fam"].astype(jnp.float32)}}
    narrow = state | {"carried": {"fam": state["carried"]["fam"].astype(jnp.float16)}}
    with open_run(tmp_path / "run") as checkpoints:
        assert_same(checkpoints.restore(1, structs(wide))[0], wide)
        assert_same(checkpoints.restore(1, structs(state))[0], state)
        with pytest.raises(CheckpointError, match="carried/fam is bfloat16"):
            checkpoints.restore(1, structs(narrow))


def test_error_is_a_user_error() -> None:
    assert issubclass(CheckpointError, UserError)
