"""Folders of models, tokenizers, saved memories and checkpoints, damaged and hostile."""

import hashlib
import json
import pathlib
import shutil
import struct
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from fam_jax.checkpoint import end_ids, load_params
from fam_jax.checkpoint.folder import json_digest
from fam_jax.checkpoint.origin import settings_digest
from fam_jax.config import Config, DataConfig
from fam_jax.data.text_vocabulary import train_text_vocabulary
from fam_jax.data.vocabulary import load_vocabulary
from fam_jax.generation.state_file import CHECKSUM, NO_CHECKSUM, load_state, save_state
from fam_jax.generation.streaming import Streamer
from fam_jax.hf import Folder, export_folder, hf_config, import_parameters
from fam_jax.hf.importing import imported_config
from fam_jax.hf.tokenizer import adds_bos, check_tokenizer
from tests.checkpoint.test_folder import save
from tests.fuzz.hostile import changed_json, damaged, examples, reads
from tests.generation.tiny import CONFIG
from tests.hf.recorded import DATA, one_device
from tests.model.tiny import TINY, params_of

PARAMS = params_of(CONFIG)
load_vocabulary("bytes")  # loads TensorFlow, whose memory is not that of a reader


def header_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def with_header(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("memory") / "memory"
    streamer = Streamer(CONFIG, PARAMS)
    _, state = streamer.read([np.arange(9, dtype=np.int32) % CONFIG.vocab_size])
    save_state(path, state, CONFIG, PARAMS)
    return path.read_bytes()


def sealed(content: bytes) -> bytes:
    """Return the content of a memory file with the right checksum."""
    found = CHECKSUM.search(content)
    if found is None:
        return content
    whole = content[: found.start(1)] + NO_CHECKSUM.encode() + content[found.end(1) :]
    return content[: found.start(1)] + hashlib.sha256(whole).hexdigest().encode() + content[found.end(1) :]


@pytest.mark.parametrize("part", ["header", "metadata", "config", "bytes"])
@examples(20)
@given(data=st.data())
def test_a_memory_of_anything_with_the_right_checksum(
    part: str, memory: bytes, data: st.DataObject, tmp_path: pathlib.Path
) -> None:
    header, values = header_of(memory)
    if part == "bytes":
        content = data.draw(damaged(memory))
    else:
        if part == "header":
            header = data.draw(changed_json(header))
        elif part == "metadata":
            header["__metadata__"] = data.draw(changed_json(header["__metadata__"]))
        else:
            config = json.loads(header["__metadata__"]["config"])
            header["__metadata__"]["config"] = json.dumps(data.draw(changed_json(config)))
        content = with_header(header, values)
    (tmp_path / "memory").write_bytes(sealed(content))
    found = reads(lambda: load_state(tmp_path / "memory", CONFIG, PARAMS))
    if not isinstance(found, str):
        like = jax.eval_shape(lambda: Streamer(CONFIG, PARAMS).start(found.batch_size))
        assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == jax.tree.map(
            lambda x: (x.shape, x.dtype), like
        )
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))
        assert (found.tokens_read >= 0).all()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Return an export in several files. Do not change it."""
    folder = tmp_path_factory.mktemp("exported") / "out"
    export_folder(folder, TINY, params_of(TINY), hf_config(TINY), shard_bytes=2_000)
    return folder


def import_all(folder: pathlib.Path) -> None:
    opened = Folder(folder)
    config = imported_config(opened)
    if sum(np.prod(opened.shape(name)) for name in opened.names) < 1e6 and config.model.num_layers < 9:
        import_parameters(opened, config.model, one_device)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@examples(15)
@given(data=st.data())
def test_json_of_a_model_of_anything(
    name: str, exported: pathlib.Path, data: st.DataObject, tmp_path: pathlib.Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(exported, folder, dirs_exist_ok=True)
    original = (exported / name).read_bytes()
    if data.draw(st.booleans()):
        (folder / name).write_bytes(data.draw(damaged(original)))
    else:
        (folder / name).write_text(json.dumps(data.draw(changed_json(json.loads(original)))))
    reads(lambda: import_all(folder))


@pytest.mark.parametrize("name", ["model-00001-of-00003.safetensors", "memory.safetensors"])
@examples(15)
@given(data=st.data())
def test_tensors_of_anything(
    name: str, exported: pathlib.Path, data: st.DataObject, tmp_path: pathlib.Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(exported, folder, dirs_exist_ok=True)
    original = (exported / name).read_bytes()
    header, values = header_of(original)
    if data.draw(st.booleans()):
        content = with_header(data.draw(changed_json(header)), values)
    else:
        content = data.draw(damaged(original))
    (folder / name).write_bytes(content)
    reads(lambda: import_all(folder))


TOKENIZER = {
    "tokenizer.json": json.loads(
        tokenizers.Tokenizer(
            tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2, "<s>": 3, "</s>": 4}, [("a", "b")])
        ).to_str()
    )
    | {
        "added_tokens": [
            {"id": n, "content": c, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": True}
            for n, c in ((3, "<s>"), (4, "</s>"))
        ]
    },
    "tokenizer_config.json": {
        "bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": True,
        "tokenizer_class": "LlamaTokenizer",
        "added_tokens_decoder": {"3": {"content": "<s>", "special": True}}, "chat_template": "{{ messages }}",
    },
    "special_tokens_map.json": {"eos_token": "</s>", "additional_special_tokens": ["<x>"]},
    "added_tokens.json": {"</s>": 4},
    "config.json": {"eos_token_id": [4], "model_type": "llama", "text_config": {"eos_token_id": 4}},
    "generation_config.json": {"eos_token_id": 4},
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZER)
@examples(15)
@given(data=st.data())
def test_a_tokenizer_of_anything(name: str, data: st.DataObject, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "huggingface"
    folder.mkdir(exist_ok=True)
    for file, value in TOKENIZER.items():
        (folder / file).write_text(json.dumps(value))
    content = json.dumps(TOKENIZER[name]).encode()
    if data.draw(st.booleans()):
        content = data.draw(damaged(content))
    else:
        content = json.dumps(data.draw(changed_json(TOKENIZER[name]))).encode()
    (folder / name).write_bytes(content)
    file = folder / "tokenizer.json"
    reads(lambda: load_vocabulary(str(file)).encode("ab <s>"))
    reads(lambda: check_tokenizer(file, 5))
    reads(lambda: adds_bos(file))
    reads(lambda: end_ids(Config(data=DataConfig(vocabulary=str(file))), tmp_path))
    reads(lambda: settings_digest(epath.Path(file)))


@pytest.fixture(scope="module")
def pieces() -> bytes:
    return train_text_vocabulary(["the quick brown fox jumps over the lazy dog " * 20] * 20, 300, threads=1)


@examples(15)
@given(data=st.data())
def test_a_damaged_vocabulary(pieces: bytes, data: st.DataObject, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "x.model"
    file.write_bytes(data.draw(damaged(pieces)))
    reads(lambda: load_vocabulary(str(file)).decode(load_vocabulary(str(file)).encode("the dog")))
    reads(lambda: check_tokenizer(file, 300))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    save(folder)
    return folder


@examples(12)
@given(data=st.data())
def test_a_record_of_anything_with_the_right_digest(
    run: pathlib.Path, data: st.DataObject, tmp_path: pathlib.Path
) -> None:
    folder = tmp_path / "run"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(run, folder)
    path = folder / "1" / "contents" / "data.json"
    record = data.draw(changed_json(json.loads(path.read_text())["record"]))
    path.write_text(json.dumps({"digest": json_digest(record), "record": record}))
    reads(lambda: load_params(folder))


@examples(12)
@given(data=st.data())
def test_a_damaged_file_of_a_step(run: pathlib.Path, data: st.DataObject, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "run"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(run, folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = files[data.draw(st.integers(0, len(files) - 1))]
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    found = reads(lambda: load_params(folder))
    if not isinstance(found, str):
        np.testing.assert_array_equal(found[0]["x"], np.arange(5.0))


def test_safetensors_of_other_programs_are_read() -> None:
    """The recorded models have no digests."""
    for folder in DATA.iterdir():
        if folder.is_dir():
            assert safetensors.numpy.load_file(folder / "model.safetensors")
            Folder(folder)
