"""A loaded state equals the saved one, or an error says why it cannot be loaded."""

import dataclasses
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fam_jax.config import UserError
from fam_jax.generation.state_file import SMALL, StateFileError, fingerprint, load_state, save_state
from fam_jax.model import empty_state
from tests.generation.tiny import CONFIG, streamer, texts
from tests.model.tiny import params_of, variant

PARAMS = params_of(CONFIG)


def random_state(dtype: str, seed: int = 0) -> Any:
    """Return a config and a state whose arrays hold random bits, of all numbers that a state may have."""
    config = dataclasses.replace(CONFIG, dtype=dtype)
    random = np.random.default_rng(seed)

    def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if leaf.dtype == bool:
            return jnp.asarray(random.integers(0, 2, leaf.shape), bool)
        if leaf.dtype == np.int32:
            return jnp.asarray(random.integers(0, config.block_size, leaf.shape), leaf.dtype)
        bits = np.frombuffer(random.bytes(leaf.size * leaf.dtype.itemsize), leaf.dtype).reshape(leaf.shape)
        return jnp.asarray(np.where(np.isfinite(bits.astype(np.float64)), bits, np.ones((), leaf.dtype)))

    return config, jax.tree.map(fill, jax.eval_shape(lambda: empty_state(config, 3)))


def assert_same_bits(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("memory") / "some.memory"
    save_state(path, random_state("float32")[1], CONFIG, PARAMS)
    return path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip(tmp_path: pathlib.Path, dtype: str) -> None:
    config, state = random_state(dtype)
    path = tmp_path / "some.memory"
    for _ in range(2):  # a second time over the first
        save_state(path, state, config, PARAMS)
        assert_same_bits(load_state(path, config, PARAMS), state)
    assert [*tmp_path.iterdir()] == [path]


def test_layout_is_that_of_safetensors(saved: pathlib.Path) -> None:
    """Other programs can read the file."""
    content, (_, state) = saved.read_bytes(), random_state("float32")
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    metadata = header.pop("__metadata__")
    assert all(isinstance(value, str) for value in metadata.values()) and size % 8 == 0
    keys, filled = header["layers.keys"], header["position.filled"]
    assert (keys["dtype"], filled["dtype"]) == ("F32", "I32")
    assert tuple(keys["shape"]) == state.layers.keys.shape
    assert data[slice(*filled["data_offsets"])] == np.asarray(state.position.filled).tobytes()
    spans = sorted(entry["data_offsets"] for entry in header.values())
    assert [0, *(end for _, end in spans)] == [*(begin for begin, _ in spans), len(data)]


def test_branches_continue_as_if_never_saved(tmp_path: pathlib.Path) -> None:
    """Two continuations of one file equal those of the state that was saved."""
    model = streamer()
    _, state = model.read(texts(9, 33, 21), chunk_blocks=2)
    save_state(tmp_path / "memory", state, CONFIG, model.params)
    for seed in (3, 4):
        more = texts(2, 3, 4, seed=seed)
        found, found_state = model.read(more, load_state(tmp_path / "memory", CONFIG, model.params))
        expected, expected_state = model.read(more, state)
        np.testing.assert_array_equal(found, expected)
        assert_same_bits(found_state, expected_state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 8}, "block_size was 4, is 8"),
        ({"rope_base": 500.0}, r"rope_base was 10000.0, is 500.0"),
        ({"dtype": "bfloat16"}, 'dtype was "float32", is "bfloat16"'),
        ({"length": 1, "num_layers": 3}, "memory.length was 2, is 1; num_layers was 2, is 3"),
    ],
    ids=str,
)
def test_another_config_is_refused(saved: pathlib.Path, changes: dict, message: str) -> None:
    with pytest.raises(StateFileError, match=f"is of another model .*{message}.*load it with the model"):
        load_state(saved, variant(CONFIG, **changes), PARAMS)


def test_ways_of_execution_do_not_matter(saved: pathlib.Path) -> None:
    config = dataclasses.replace(CONFIG, attention="reference", remat="full")
    assert_same_bits(load_state(saved, config, PARAMS), random_state("float32")[1])


def test_other_weights_are_refused(saved: pathlib.Path) -> None:
    with pytest.raises(StateFileError, match="same shape with other weights"):
        load_state(saved, CONFIG, params_of(CONFIG, seed=1))


def test_another_vocabulary_is_refused(saved: pathlib.Path, tmp_path: pathlib.Path) -> None:
    state = random_state("float32")[1]
    save_state(tmp_path / "memory", state, CONFIG, PARAMS, "a" * 64)
    with pytest.raises(
        StateFileError, match="saved by this model with another vocabulary, so its tokens mean other text"
    ):
        load_state(tmp_path / "memory", CONFIG, PARAMS, "b" * 64)
    for path, vocabulary in ((tmp_path / "memory", "a" * 64), (tmp_path / "memory", ""), (saved, "b" * 64)):
        assert_same_bits(load_state(path, CONFIG, PARAMS, vocabulary), state)


def test_fingerprint() -> None:
    own = fingerprint(PARAMS)
    assert own == fingerprint(jax.tree.map(np.array, PARAMS))  # on the host or on a device
    assert own == fingerprint(dict(reversed(PARAMS.items())))
    table = np.array(PARAMS["embedding"]["table"])
    table[3, 3] = np.nextafter(table[3, 3], 9)
    assert own != fingerprint({**PARAMS, "embedding": {"table": table}})
    assert own != fingerprint({**PARAMS, "embedding": {"other": PARAMS["embedding"]["table"]}})
    assert own != fingerprint({**PARAMS, "embedding": {"table": PARAMS["embedding"]["table"].T}})

    big = {"x": np.arange(SMALL, dtype=np.float32).reshape(4, -1)}
    same, other = {"x": big["x"].copy()}, {"x": big["x"] * 1.01}
    assert fingerprint(big) == fingerprint(same) != fingerprint(other)
    assert fingerprint({"x": jnp.asarray(big["x"])}) == fingerprint(big)


@given(data=st.data())
def test_any_change_of_a_byte_is_found(saved: pathlib.Path, data: st.DataObject) -> None:
    content = bytearray(saved.read_bytes())
    where = data.draw(st.integers(0, len(content) - 1) | st.integers(0, 1500))
    content[where] ^= data.draw(st.integers(1, 255))
    damaged = saved.with_name("damaged")
    damaged.write_bytes(content)
    with pytest.raises(StateFileError, match=r"damaged|version") as caught:
        load_state(damaged, CONFIG, PARAMS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0, 5, 8, 100, 2000, -1])
def test_a_truncated_file_is_refused(saved: pathlib.Path, keep: int) -> None:
    damaged = saved.with_name("truncated")
    damaged.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(StateFileError, match="damaged"):
        load_state(damaged, CONFIG, PARAMS)


def test_bytes_at_the_end_are_refused(saved: pathlib.Path) -> None:
    damaged = saved.with_name("longer")
    damaged.write_bytes(saved.read_bytes() + b"\0")
    with pytest.raises(StateFileError, match="damaged"):
        load_state(damaged, CONFIG, PARAMS)


@pytest.mark.parametrize(
    "content", [b"[1, 2]", b'{"__metadata__": 3}', b'{"__metadata__": {"format": "other"}}', b"3"]
)
def test_other_files_are_refused(tmp_path: pathlib.Path, content: bytes) -> None:
    (tmp_path / "other").write_bytes(len(content).to_bytes(8, "little") + content)
    with pytest.raises(StateFileError, match="memory"):
        load_state(tmp_path / "other", CONFIG, PARAMS)


def test_missing_folders(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        load_state(tmp_path / "missing", CONFIG, PARAMS)
    with pytest.raises(UserError, match="cannot be written"):
        save_state(tmp_path / "missing" / "file", random_state("float32")[1], CONFIG, PARAMS)


def test_a_failed_save_leaves_the_old_file(
    saved: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "some.memory"
    path.write_bytes(saved.read_bytes())

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StateFileError, match="No space left on device"):
        save_state(path, random_state("float32", seed=1)[1], CONFIG, PARAMS)
    assert [*tmp_path.iterdir()] == [path]
    assert_same_bits(load_state(path, CONFIG, PARAMS), random_state("float32")[1])


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_mode_follows_the_umask(tmp_path: pathlib.Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        save_state(tmp_path / "some.memory", random_state("float32")[1], CONFIG, PARAMS)
    finally:
        os.umask(before)
    assert (tmp_path / "some.memory").stat().st_mode & 0o777 == mode


FORMER = pathlib.Path(__file__).resolve().parents[1] / "format1" / "data" / "heldout.memory"


@pytest.mark.parametrize("where", [9, 300, -1])
def test_a_damaged_file_of_version_1_is_refused(tmp_path: pathlib.Path, where: int) -> None:
    """An intact one is loaded by the tests of format 1; here it is refused as it belongs to another model."""
    content = bytearray(FORMER.read_bytes())
    (tmp_path / "memory").write_bytes(content)
    with pytest.raises(StateFileError, match="is of another model"):
        load_state(tmp_path / "memory", CONFIG, PARAMS)
    content[where] ^= 1
    (tmp_path / "memory").write_bytes(content)
    with pytest.raises(StateFileError, match=r"damaged|version"):
        load_state(tmp_path / "memory", CONFIG, PARAMS)
    (tmp_path / "memory").write_bytes(bytes(content[:where]))
    with pytest.raises(StateFileError, match="damaged"):
        load_state(tmp_path / "memory", CONFIG, PARAMS)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_memory_that_is_not_finite_is_refused(value: float, tmp_path: pathlib.Path) -> None:
    config, state = random_state("float32")
    broken = dataclasses.replace(state.layers, fam=state.layers.fam.at[0, 1].set(value))
    save_state(tmp_path / "memory", dataclasses.replace(state, layers=broken), config, PARAMS)
    with pytest.raises(StateFileError, match=r"layers\.fam has values that are not finite"):
        load_state(tmp_path / "memory", config, PARAMS)
