"""Folders of others: links that lead out, tensors in the wrong file, tensors that changed after their export."""

import json
import pathlib
import shutil
import struct

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from fam_jax.checkpoint.links import check_inside
from fam_jax.config import UserError
from fam_jax.hf import ConvertError, Folder, checksums, export_folder, hf_config, import_parameters
from fam_jax.hf.folder import INDEX, copy_companions
from fam_jax.hf.memory_file import MEMORY_FILE
from fam_jax.hf.tokenizer import copy_tokenizer
from tests.hf.recorded import DATA, imported, one_device
from tests.model.tiny import TINY, params_of


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """Return a copy of the recorded Llama."""
    return shutil.copytree(DATA / "llama", tmp_path / "model")


@pytest.fixture
def secret(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret").write_text('{"bos_token": "secret"}')
    return tmp_path / "elsewhere" / "secret"


NAMES = [
    "LICENSE.x",
    "tokenizer_x",
    "tokenizer.json",
    "generation_config.json",
    "config.json",
    "model.safetensors",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_link_out_of_a_folder_is_not_followed(
    name: str, folder: pathlib.Path, secret: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    with pytest.raises(UserError, match=f"{name}: leads out of its folder, to {secret}") as caught:
        Folder(folder)
    assert "\n" not in str(caught.value)
    if name == "model.safetensors":
        return
    with pytest.raises(UserError, match="leads out of its folder"):
        copy_companions(folder, tmp_path / "out")
    assert not (tmp_path / "out" / name).exists()


def test_a_link_may_lead_out_over_other_links_of_the_folder(
    folder: pathlib.Path, secret: pathlib.Path
) -> None:
    (folder / "nested").symlink_to(secret.parent)
    (folder / "LICENSE").symlink_to("nested/secret")
    with pytest.raises(UserError, match="LICENSE: leads out of its folder"):
        Folder(folder)


def test_links_of_a_cache_and_within_a_folder_are_followed(
    folder: pathlib.Path, secret: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    repository = tmp_path / "models--a--b"
    (repository / "blobs").mkdir(parents=True)
    (repository / "snapshots" / "abc").mkdir(parents=True)
    for number, file in enumerate(folder.iterdir()):
        file.rename(repository / "blobs" / f"{number}")
        (repository / "snapshots" / "abc" / file.name).symlink_to(f"../../blobs/{number}")
    snapshot = repository / "snapshots" / "abc"
    (snapshot / "LICENSE").symlink_to("config.json")
    imported(snapshot)
    copy_companions(snapshot, tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE").read_bytes() == (snapshot / "config.json").read_bytes()
    (tmp_path / "shortcut").symlink_to(snapshot)
    imported(tmp_path / "shortcut")  # the folder itself is the user's to choose
    (repository / "blobs" / "9").symlink_to(secret)
    (snapshot / "LICENSE.2").symlink_to("../../blobs/9")
    with pytest.raises(UserError, match=r"LICENSE\.2: leads out of its folder"):
        Folder(snapshot)


def test_files_beside_a_tokenizer_may_not_lead_out(
    folder: pathlib.Path, secret: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    (folder / "tokenizer.json").write_text("{}")
    (folder / "special_tokens_map.json").symlink_to(secret)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"special_tokens_map\.json: leads out of its folder"):
        copy_tokenizer(str(folder / "tokenizer.json"), tmp_path / "out")


def test_a_name_may_not_lead_out_either(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    for name in ("../outside.safetensors", str(tmp_path / "outside.safetensors")):
        (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
        with pytest.raises(UserError, match="leads out of its folder"):
            Folder(folder)
    for name in ("\ud800.safetensors", "a\0b", "n" * 300, "n/" * 3000):
        (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
        with pytest.raises(UserError, match="which no file can be called") as caught:
            Folder(folder)
        str(caught.value).encode()
    check_inside(folder / "nested" / ".." / "config.json", folder)


def in_two_files(folder: pathlib.Path) -> tuple[dict, dict, dict]:
    """Return the tensors of two files, and the index of both."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = [{name: tensors[name] for name in half} for half in (names[::2], names[1::2])]
    weight_map = {name: f"part{number}.safetensors" for number, part in enumerate(parts) for name in part}
    return parts[0], parts[1], weight_map


def write(folder: pathlib.Path, first: dict, second: dict, weight_map: dict) -> None:
    save_file(first, folder / "part0.safetensors")
    save_file(second, folder / "part1.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_the_index_says_where_a_tensor_is(folder: pathlib.Path) -> None:
    first, second, weight_map = in_two_files(folder)
    write(folder, first, second, weight_map)
    imported(folder)

    name = min(first)
    write(folder, first, second | {name: first[name] * 9}, weight_map)
    with pytest.raises(ConvertError, match=rf"{name} is in part0\.safetensors and in part1\.safetensors"):
        Folder(folder)
    write(folder, first, second, weight_map | {name: "part1.safetensors"})
    with pytest.raises(ConvertError, match=rf"{name} is in part0\.safetensors, but {INDEX} says part1"):
        Folder(folder)
    write(folder, first, second, weight_map | {"other": "part1.safetensors"})
    with pytest.raises(ConvertError, match=r"part1\.safetensors does not hold other"):
        Folder(folder)
    # What the index does not name is not part of the model.
    write(folder, first, second | {"stale": np.ones(3, "f4")}, weight_map)
    imported(folder)


def exported(folder: pathlib.Path) -> pathlib.Path:
    """Export a small model with a FAM in several files."""
    export_folder(folder, TINY, params_of(TINY), hf_config(TINY), shard_bytes=2_000)
    return folder


def data_of(file: pathlib.Path) -> tuple[bytearray, int]:
    """Return a safetensors file, and where its tensors begin."""
    content = bytearray(file.read_bytes())
    return content, 8 + struct.unpack("<Q", content[:8])[0]


def test_every_changed_bit_of_an_export_is_found(tmp_path: pathlib.Path) -> None:
    folder = exported(tmp_path / "out")
    import_parameters(Folder(folder), TINY, one_device)
    files = sorted(folder.glob("*.safetensors"))
    assert MEMORY_FILE in {file.name for file in files} and len(files) > 2
    random = np.random.default_rng(0)
    for file in files:
        original, begin = data_of(file)
        for place in random.integers(begin, len(original), 4).tolist():
            changed = bytearray(original)
            changed[place] ^= 1 << int(random.integers(8))
            file.write_bytes(changed)
            with pytest.raises(
                ConvertError, match=rf"{file.name}: tensor \S+ is not the one that was exported"
            ):
                import_parameters(Folder(folder), TINY, one_device)
        file.write_bytes(original)
    import_parameters(Folder(folder), TINY, one_device)


def test_digests_that_are_not_of_the_tensors(tmp_path: pathlib.Path) -> None:
    arrays = {"a": np.arange(3.0), "b": np.zeros((2, 0), "f4"), "c": np.array(3, "f4")}
    file = tmp_path / "x.safetensors"
    checksums.save_tensors(arrays, file, {"format": "pt"})
    checksums.check_tensors([file])
    with safe_open(file, framework="np") as opened:
        metadata = opened.metadata()
    assert metadata.keys() == {"format", checksums.ENTRY}
    written = file.read_bytes()
    for _ in range(8):
        checksums.save_tensors(arrays, file, {"format": "pt"})
        assert file.read_bytes() == written
    assert list(load_file(file)) == [*arrays]
    for wrong in ("", "[]", "{}", '{"a": "1"}', "[" * 100_000, json.dumps(dict.fromkeys("abcd", "1"))):
        save_file(arrays, file, {checksums.ENTRY: wrong})
        with pytest.raises(ConvertError, match="is damaged"):
            checksums.check_tensors([file])
    save_file(arrays, file, {checksums.ENTRY: json.dumps(dict.fromkeys("abc"))})
    with pytest.raises(ConvertError, match="tensor a is not the one"):
        checksums.check_tensors([file])
    save_file(arrays, file, {"format": "pt"})
    checksums.check_tensors([file])  # files of other programs have none
