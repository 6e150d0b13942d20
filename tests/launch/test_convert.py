"""Import and export from the command line, and what a user sees of mistakes."""

import shutil
import sys

import numpy as np
import pytest
import tokenizers

from fam_jax.checkpoint import load_params, read_config
from fam_jax.config import resolve
from fam_jax.generate.streaming import Streamer
from launch import export_hf, import_hf
from tests.convert.recorded import DATA, LENGTH, VOCABULARY, recorded_logits, recorded_tokens


@pytest.fixture
def source(tmp_path):
    """The recorded Gemma 2 with a tokenizer of its size."""
    folder = tmp_path / "source"
    shutil.copytree(DATA / "gemma2", folder)
    pieces = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(pieces, unk_token="w0")).save(
        str(folder / "tokenizer.json")
    )
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def run(monkeypatch, entry, *arguments):
    monkeypatch.setattr(sys, "argv", [entry.__name__, *map(str, arguments)])
    entry.main()


def error_of(monkeypatch, capsys, entry, *arguments):
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, entry, *arguments)
    assert caught.value.code == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith("error: ")
    assert "\n" not in line
    return line


def test_import_read_and_export(monkeypatch, capsys, source, tmp_path):
    ckpt, out = tmp_path / "ckpt", tmp_path / "out"
    run(monkeypatch, import_hf, "--source", source, "--out", ckpt, "--block_size=8")
    config = resolve(read_config(ckpt))
    assert (config.model.local_window, config.model.memory_segments, config.model.fam_length) == (6, 7, 0)
    assert config.data.vocabulary == str(ckpt / "huggingface" / "tokenizer.json")
    params, _, step = load_params(ckpt)
    assert step == 0
    logits, _ = Streamer(config.model, params).read(list(recorded_tokens()))
    np.testing.assert_allclose(logits, recorded_logits("gemma2")[:, LENGTH - 1], rtol=0, atol=1e-4)

    run(monkeypatch, export_hf, "--checkpoint", ckpt, "--out", out)
    assert {path.name for path in out.iterdir()} == {path.name for path in source.iterdir()} - {"logits.npy"}
    for name in ("model.safetensors", "tokenizer.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert "for Gemma2ForCausalLM" in capsys.readouterr().out


def test_import_with_a_fam_export_and_import_again(monkeypatch, source, tmp_path):
    a, out, b = (tmp_path / name for name in ("a", "out", "b"))
    how = (
        "--block_size=8",
        "--memory_segments=2",
        "--fam_length=3",
        "--param_dtype=bfloat16",
        "--attention=xla",
    )
    run(monkeypatch, import_hf, "--source", source, "--out", a, "--tokenizer=none", *how)
    run(monkeypatch, export_hf, "--checkpoint", a, "--out", out)
    run(monkeypatch, import_hf, "--source", out, "--out", b, "--tokenizer=none")
    (old, old_config, _), (new, new_config, _) = load_params(a), load_params(b)
    assert new_config["model"] | {"attention": "xla", "dtype": "float32"} == old_config["model"] | {
        "dtype": "float32"
    }
    np.testing.assert_array_equal(old["initial_fam"], new["initial_fam"])
    assert old["initial_fam"].dtype == "float32"
    assert old["embedding"]["table"].dtype == new["embedding"]["table"].dtype == "bfloat16"
    np.testing.assert_array_equal(old["layers"]["down"]["kernel"], new["layers"]["down"]["kernel"])


def test_a_run_s_own_vocabulary_goes_with_its_export(monkeypatch, source, tmp_path):
    own, ckpt, out, again = (tmp_path / name for name in ("own", "ckpt", "out", "again"))
    own.mkdir()
    vocabulary = own / "mine.json"
    shutil.move(source / "tokenizer.json", vocabulary)
    how = ("--source", source, "--out", ckpt, "--block_size=8")
    run(monkeypatch, import_hf, *how, "--tokenizer", vocabulary)
    shutil.rmtree(ckpt / "huggingface")  # as if it had been trained here
    run(monkeypatch, export_hf, "--checkpoint", ckpt, "--out", out)
    assert (out / "tokenizer.json").read_bytes() == vocabulary.read_bytes()
    run(monkeypatch, import_hf, "--source", out, "--out", again, "--block_size=8")


def test_mistakes(monkeypatch, capsys, source, tmp_path):
    out = tmp_path / "ckpt"

    def error(*arguments, entry=import_hf):
        return error_of(monkeypatch, capsys, entry, *arguments)

    assert "no such folder" in error("--source", tmp_path / "nothing", "--out", out)
    assert "is not empty" in error("--source", source, "--out", tmp_path)
    assert "config.model.block_size: must be at least 1" in error(
        "--source", source, "--out", out, "--block_size=0"
    )
    assert "config.model.fam_length" in error(
        "--source", source, "--out", out, "--block_size=8", "--fam_length=9"
    )
    assert "config.model.local_window: 6 is further back" in error(
        "--source", source, "--out", out, "--block_size=2", "--memory_segments=2"
    )
    assert "no such file" in error("--source", source, "--out", out, "--tokenizer", tmp_path / "other.json")
    assert "argument --fam_length" in error("--source", source, "--out", out, "--fam_length=many")
    (source / "tokenizer.json").unlink()
    assert "holds neither tokenizer.model nor tokenizer.json" in error("--source", source, "--out", out)
    assert not out.exists()
    assert "no such folder" in error("--checkpoint", tmp_path / "nothing", "--out", out, entry=export_hf)
