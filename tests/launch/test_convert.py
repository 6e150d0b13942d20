"""Import and export from the command line, and what a user sees of mistakes."""

import re
import shutil
import sys

import numpy as np
import pytest
import tokenizers
from etils import epath

from fam_jax.checkpoint import CheckpointError, Checkpoints, load_params, read_config
from fam_jax.config import resolve
from fam_jax.generate.streaming import Streamer
from fam_jax.hf import Folder
from fam_jax.restore import load_model
from fam_jax.train.init_from import base_config
from launch import export_hf, import_hf
from tests.hf.recorded import DATA, LENGTH, VOCABULARY, recorded_logits, recorded_tokens


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
    assert (config.model.local_window, config.model.memory.kind, config.model.memory.segments) == (
        6,
        "bswa",
        7,
    )
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
    np.testing.assert_array_equal(old["memory"]["initial_fam"], new["memory"]["initial_fam"])
    assert old["memory"]["initial_fam"].dtype == "float32"
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
    (tmp_path / "file").touch()

    def error(*arguments, entry=import_hf):
        return error_of(monkeypatch, capsys, entry, *arguments)

    assert "no such folder" in error("--source", tmp_path / "nothing", "--out", out)
    assert "is not empty" in error("--source", source, "--out", tmp_path)
    assert "config.model.block_size: must be at least 1" in error(
        "--source", source, "--out", out, "--block_size=0"
    )
    assert "config.model.memory.length" in error(
        "--source", source, "--out", out, "--block_size=8", "--fam_length=9"
    )
    assert "config.model.local_window: 6 exceeds what every token" in error(
        "--source", source, "--out", out, "--block_size=2", "--memory_segments=2"
    )
    assert "no such file" in error("--source", source, "--out", out, "--tokenizer", tmp_path / "other.json")
    assert "argument --fam_length" in error("--source", source, "--out", out, "--fam_length=many")
    assert f"{tmp_path / 'file'}: is a file; give a new folder as --out" in error(
        "--source", source, "--out", tmp_path / "file"
    )
    assert "cannot be made (Not a directory); give another --out" in error(
        "--source", source, "--out", tmp_path / "file" / "under", "--block_size=8"
    )
    (source / "tokenizer_config.json").write_text("{bad")
    assert "tokenizer_config.json: is not readable as JSON" in error(
        "--source", source, "--out", out, "--block_size=8"
    )
    (source / "tokenizer.json").unlink()
    assert "holds neither tokenizer.model nor tokenizer.json" in error("--source", source, "--out", out)
    assert not out.exists()
    assert "no such folder" in error("--checkpoint", tmp_path / "nothing", "--out", out, entry=export_hf)
    ways = {
        "is a file; give a new folder as --out": ("--out", tmp_path / "file"),
        "is not empty; give a new folder as --out": ("--out", tmp_path),
        "is where a file system is mounted": ("--out", "/"),
        "argument --shard_gb: expected a number above 0, got '0'": ("--out", out, "--shard_gb=0"),
        "argument --shard_gb: expected a number above 0, got '-1'": ("--out", out, "--shard_gb=-1"),
        "argument --shard_gb: expected a number above 0, got 'inf'": ("--out", out, "--shard_gb=inf"),
        "argument --shard_gb: expected a number above 0, got 'much'": ("--out", out, "--shard_gb=much"),
    }
    for says, arguments in ways.items():
        assert says in error("--checkpoint", tmp_path / "nothing", *arguments, entry=export_hf)


def test_a_folder_in_hugging_face_format_is_no_checkpoint(monkeypatch, capsys, source, tmp_path):
    says = (
        f"{source}: is a folder in Hugging Face format; import it first: "
        f"python -m launch.import_hf --source={source} --out=CKPT"
    )
    assert says in error_of(monkeypatch, capsys, export_hf, "--checkpoint", source, "--out", tmp_path / "out")
    for use in (load_params, load_model, base_config):
        with pytest.raises(CheckpointError, match=re.escape(says)):
            use(str(source))


def test_companions_are_files_and_one_that_cannot_be_read_leaves_nothing(
    monkeypatch, capsys, source, tmp_path
):
    out = tmp_path / "ckpt"
    (source / "tokenizer_extra").mkdir()
    how = ("--source", source, "--out", out, "--block_size=8")
    run(monkeypatch, import_hf, *how)
    assert {path.name for path in (out / "huggingface").iterdir()} == {
        "config.json", "tokenizer.json", "chat_template.jinja",
    }  # fmt: skip
    shutil.rmtree(out)
    capsys.readouterr()

    def deny(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(type(epath.Path(source)), "read_bytes", deny)
    assert "cannot be copied to" in error_of(monkeypatch, capsys, import_hf, *how)
    assert not out.exists()


@pytest.mark.parametrize("at", ["import_parameters", "Checkpoints"])
def test_an_import_that_is_interrupted_can_be_run_again(monkeypatch, capsys, source, tmp_path, at):
    out = tmp_path / "ckpt"
    how = ("--source", source, "--out", out, "--block_size=8")

    class Interrupted(Checkpoints):
        def save(self, *_, **__):
            assert (out / "config.json").exists()
            raise KeyboardInterrupt

    def interrupted(*_, **__):
        assert (out / "huggingface" / "config.json").exists()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(import_hf, at, {"import_parameters": interrupted, "Checkpoints": Interrupted}[at])
        with pytest.raises(SystemExit) as caught:
            run(monkeypatch, import_hf, *how)
    assert caught.value.code == 130
    assert not out.exists()
    run(monkeypatch, import_hf, *how)
    assert load_params(out)[2] == 0


def test_what_a_killed_import_left_is_taken_anew(monkeypatch, capsys, source, tmp_path):
    out = tmp_path / "ckpt"
    how = ("--source", source, "--out", out, "--block_size=8")
    (out / "0.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    (out / "config.json").write_text('{"model": {"num_layers": 77}}')
    assert "is not empty" in error_of(monkeypatch, capsys, import_hf, *how)  # no companions: a run's workdir
    (out / "huggingface").mkdir()
    (out / "notes.txt").touch()
    assert "is not empty" in error_of(monkeypatch, capsys, import_hf, *how)
    (out / "notes.txt").unlink()
    run(monkeypatch, import_hf, *how)
    assert {path.name for path in out.iterdir()} == {"0", "config.json", "huggingface"}
    assert load_params(out)[1]["model"]["num_layers"] == 3
    capsys.readouterr()
    assert "is not empty" in error_of(monkeypatch, capsys, import_hf, *how)  # finished


def test_the_text_part_of_a_model_with_vision(monkeypatch, capsys, source, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(DATA / "gemma3_vision" / name, source / name)
    ckpt, out = tmp_path / "ckpt", tmp_path / "out"
    run(monkeypatch, import_hf, "--source", source, "--out", ckpt, "--block_size=8")
    count = Folder(source).left_out
    said = f"the text part alone: {count} tensors of the vision tower and its projector are left out"
    assert said in capsys.readouterr().err
    run(monkeypatch, export_hf, "--checkpoint", ckpt, "--out", out)
    said = capsys.readouterr()
    assert "for Gemma3ForCausalLM" in said.out
    assert "the text part of Gemma3ForConditionalGeneration, without its vision tower" in said.err
    assert Folder(out).config["model_type"] == "gemma3_text"
    assert Folder(out).left_out == 0
    config, params, _ = load_params(ckpt)[1], *load_params(ckpt)[::2]
    logits, _ = Streamer(resolve(config).model, params).read(list(recorded_tokens()))
    np.testing.assert_allclose(logits, recorded_logits("gemma3_vision")[:, LENGTH - 1], rtol=0, atol=1e-4)
    transformers = pytest.importorskip("transformers")
    from tests.hf.hf_models import logits_of

    model = transformers.AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager")
    assert type(model).__name__ == "Gemma3ForCausalLM"
    np.testing.assert_allclose(
        logits_of(model, recorded_tokens()), recorded_logits("gemma3_vision"), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("at", ["copy_companions", "export_folder"])
def test_an_export_that_is_interrupted_leaves_nothing(monkeypatch, source, tmp_path, at):
    ckpt, out = tmp_path / "ckpt", tmp_path / "out"
    run(monkeypatch, import_hf, "--source", source, "--out", ckpt, "--block_size=8")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    before = {*tmp_path.iterdir()}
    with monkeypatch.context() as patched:
        patched.setattr(export_hf, at, interrupted)
        with pytest.raises(SystemExit) as caught:
            run(monkeypatch, export_hf, "--checkpoint", ckpt, "--out", out)
    assert caught.value.code == 130
    assert {*tmp_path.iterdir()} == before
    run(monkeypatch, export_hf, "--checkpoint", ckpt, "--out", out)
    assert (out / "tokenizer.json").exists()
