"""Import and export from the command line, and the messages for mistakes."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import tokenizers
from etils import epath

from fam_jax.checkpoint import CheckpointError, Checkpoints, end_ids, load_params, read_config
from fam_jax.config import UserError, resolve
from fam_jax.generation.streaming import Streamer
from fam_jax.hf import Folder, exporting, importing
from fam_jax.memories.fam import FamConfig
from fam_jax.memories.window import BlockSlidingWindowConfig, FullConfig
from fam_jax.restore import load_model
from fam_jax.training.init_from import base_config
from launch import export_hf, import_hf
from tests.hf.recorded import DATA, LENGTH, VOCABULARY, assert_same_tensors, recorded_logits, recorded_tokens


@pytest.fixture
def source(tmp_path):
    """Return a folder with the recorded Gemma 2 and a tokenizer of its size."""
    folder = tmp_path / "source"
    shutil.copytree(DATA / "gemma2", folder)
    pieces = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(pieces, unk_token="w0")).save(
        str(folder / "tokenizer.json")
    )
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def run(entry, *arguments):
    assert entry.main([*map(str, arguments)]) == 0


def error_of(entry, *arguments):
    with pytest.raises(UserError) as caught:
        entry.main([*map(str, arguments)])
    message = str(caught.value)
    assert "\n" not in message
    return message


def model_of(checkpoint):
    return resolve(read_config(checkpoint)).model


def test_import_read_and_export(capsys, source, tmp_path):
    ckpt, out = tmp_path / "ckpt", tmp_path / "out"
    run(import_hf, "--source", source, "--out", ckpt, "--block_size=8")
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

    run(export_hf, "--checkpoint", ckpt, "--out", out)
    assert {path.name for path in out.iterdir()} == {path.name for path in source.iterdir()} - {"logits.npy"}
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert_same_tensors(out / "model.safetensors", source / "model.safetensors")
    assert "for Gemma2ForCausalLM" in capsys.readouterr().out


def test_import_with_a_fam_export_and_import_again(source, tmp_path):
    a, out, b = (tmp_path / name for name in ("a", "out", "b"))
    how = (
        "--block_size=8",
        "--memory_segments=2",
        "--fam_length=3",
        "--param_dtype=bfloat16",
        "--attention=xla",
    )
    run(import_hf, "--source", source, "--out", a, "--tokenizer=none", *how)
    run(export_hf, "--checkpoint", a, "--out", out)
    run(import_hf, "--source", out, "--out", b, "--tokenizer=none")
    (old, old_config, _), (new, new_config, _) = load_params(a), load_params(b)
    assert new_config["model"] | {"attention": "xla", "dtype": "float32"} == old_config["model"] | {
        "dtype": "float32"
    }
    np.testing.assert_array_equal(old["memory"]["initial_fam"], new["memory"]["initial_fam"])
    assert old["memory"]["initial_fam"].dtype == "float32"
    assert old["embedding"]["table"].dtype == new["embedding"]["table"].dtype == "bfloat16"
    np.testing.assert_array_equal(old["layers"]["down"]["kernel"], new["layers"]["down"]["kernel"])


def test_the_memory_is_chosen_by_config_fields_or_their_short_forms(source, tmp_path):
    short, long = tmp_path / "short", tmp_path / "long"
    how = ("--source", source, "--tokenizer=none")
    run(import_hf, *how, "--out", short, "--block_size=8", "--fam_length=3", "--fam_init=prefix")
    memory = "--config.model.memory"
    fields = (
        "--config.model.block_size=8",
        f"{memory}.kind=fam",
        f"{memory}.length=3",
        f"{memory}.init=prefix",
    )
    run(import_hf, *how, "--out", long, *fields)
    assert model_of(short) == model_of(long)
    assert model_of(short).memory == FamConfig(length=3, segments=7, init="prefix")
    run(import_hf, *how, "--out", tmp_path / "full", "--block_size=8", f"{memory}.kind=full")
    assert model_of(tmp_path / "full").memory == FullConfig(context=64)


def test_a_stored_fam_can_be_left_out(source, tmp_path):
    how = ("--tokenizer=none", "--source")
    run(import_hf, *how, source, "--out", tmp_path / "a", "--block_size=8", "--fam_length=3")
    run(export_hf, "--checkpoint", tmp_path / "a", "--out", tmp_path / "out")
    run(import_hf, *how, tmp_path / "out", "--out", tmp_path / "b", "--fam_length=0")
    assert model_of(tmp_path / "b").memory == BlockSlidingWindowConfig(segments=7)
    assert "memory" not in load_params(tmp_path / "b")[0]


def test_a_window_of_all_layers_stays(capsys, source, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(DATA / "mistral" / name, source / name)
    run(import_hf, "--source", source, "--out", tmp_path / "out", "--tokenizer=none", "--block_size=4")
    model = model_of(tmp_path / "out")
    assert model.memory == BlockSlidingWindowConfig(segments=15, window=7)
    assert "equal to the original for texts of any length" in capsys.readouterr().err
    # As far as the tokens of both see the same.
    for segments, own, original, tokens in (
        (2, 7, 7, None), (1, 5, 5, None), (1, 4, 5, 4), (3, 7, 5, 5), (3, 0, 5, 5), (3, 5, 0, 5),
        (3, 0, 0, 16), (0, 0, 0, 4),
    ):  # fmt: skip
        memory = BlockSlidingWindowConfig(segments=segments, window=own)
        changed = dataclasses.replace(model, memory=memory)
        assert importing.exact_tokens(changed, original) == tokens


def test_a_run_s_own_vocabulary_goes_with_its_export(source, tmp_path):
    own, ckpt, out, again = (tmp_path / name for name in ("own", "ckpt", "out", "again"))
    own.mkdir()
    vocabulary = own / "mine.json"
    shutil.move(source / "tokenizer.json", vocabulary)
    how = ("--source", source, "--out", ckpt, "--block_size=8")
    run(import_hf, *how, "--tokenizer", vocabulary)
    shutil.rmtree(ckpt / "huggingface")  # as if it had been trained here
    run(export_hf, "--checkpoint", ckpt, "--out", out)
    assert (out / "tokenizer.json").read_bytes() == vocabulary.read_bytes()
    run(import_hf, "--source", out, "--out", again, "--block_size=8")


def test_an_export_without_a_tokenizer_says_so(source, tmp_path, capsys):
    run(import_hf, "--source", source, "--out", tmp_path / "ckpt", "--block_size=8", "--tokenizer=none")
    (tmp_path / "ckpt" / "huggingface" / "tokenizer.json").unlink()
    run(export_hf, "--checkpoint", tmp_path / "ckpt", "--out", tmp_path / "out")
    assert "exported without a tokenizer" in capsys.readouterr().err


def test_a_moved_run_is_exported_with_its_tokenizer(source, tmp_path, capsys):
    """The run, not its base, is what is left."""
    base, work = tmp_path / "base", tmp_path / "run"
    run(import_hf, "--source", source, "--out", base, "--block_size=8")
    params, values, _ = load_params(base)
    values["train"]["init_from"] = str(base)
    with Checkpoints(work, config=values, keep=1) as checkpoints:
        checkpoints.save(3, {"params": params}, {})
    shutil.rmtree(base)
    work = work.rename(tmp_path / "moved")
    run(export_hf, "--checkpoint", work, "--out", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert (tmp_path / "out" / "chat_template.jinja").exists()
    assert "without a tokenizer" not in capsys.readouterr().err


def test_a_tokenizer_given_by_a_flag_is_carried(source, tmp_path):
    mine = shutil.move(source / "tokenizer.json", tmp_path / "mine.json")
    run(import_hf, "--source", source, "--out", tmp_path / "ckpt", "--block_size=8", "--tokenizer", mine)
    text = mine.read_text()
    mine.unlink()
    config, _, _ = load_model(tmp_path / "ckpt")
    assert config.data.vocabulary == str(tmp_path / "ckpt" / "vocabulary" / "mine.json")
    run(export_hf, "--checkpoint", tmp_path / "ckpt", "--out", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == text


def test_a_run_with_another_vocabulary_than_its_base_is_exported_with_its_own(source, tmp_path):
    (source / "LICENSE").write_text("free")
    (source / "generation_config.json").write_text('{"eos_token_id": 3}')
    (source / "tokenizer_config.json").write_text('{"eos_token": "w3"}')
    run(import_hf, "--source", source, "--out", tmp_path / "base", "--block_size=8")
    pieces = {f"v{i}": i for i in range(VOCABULARY)}
    own = tmp_path / "own" / "tokenizer.json"
    own.parent.mkdir()
    tokenizers.Tokenizer(tokenizers.models.WordLevel(pieces, unk_token="v0")).save(str(own))
    params, values, _ = load_params(tmp_path / "base")
    values["train"]["init_from"] = str(tmp_path / "base")
    values["data"]["vocabulary"] = str(own)
    with Checkpoints(tmp_path / "run", config=values, keep=1) as checkpoints:
        checkpoints.save(3, {"params": params}, {})
    run(export_hf, "--checkpoint", tmp_path / "run", "--out", tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "LICENSE"}
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == own.read_bytes()


@pytest.mark.parametrize("content", ["{", "[" * 100_000, '{"eos_token_id": "w3"}', '{"eos_token_id": [1.5]}'])
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_end_tokens_that_generation_could_not_read_are_refused_at_the_import(source, tmp_path, name, content):
    if name == "config.json" and "eos" in content:
        content = json.dumps(json.loads((source / name).read_text()) | json.loads(content))
    (source / name).write_text(content)
    message = error_of(import_hf, "--source", source, "--out", tmp_path / "ckpt", "--block_size=8")
    assert name in message and not (tmp_path / "ckpt").exists()


def test_end_tokens_behind_a_byte_order_mark(source, tmp_path):
    (source / "generation_config.json").write_bytes(b'\xef\xbb\xbf{"eos_token_id": [3, 5]}')
    run(import_hf, "--source", source, "--out", tmp_path / "ckpt", "--block_size=8")
    assert {3, 5} <= {*end_ids(resolve(read_config(tmp_path / "ckpt")), tmp_path / "ckpt")}


def test_paths_that_look_like_patterns(source, tmp_path):
    """They can be read, and an export can be written there; Orbax cannot save there."""
    odd = tmp_path / "exp [v1]"
    source = source.rename(tmp_path / "a [b]*")
    assert "for a pattern; give a folder without" in error_of(
        import_hf, "--source", source, "--out", odd / "ckpt"
    )
    assert not odd.exists()
    run(import_hf, "--source", source, "--out", tmp_path / "ckpt", "--block_size=8")
    assert (tmp_path / "ckpt" / "huggingface" / "tokenizer.json").exists()
    (tmp_path / "ckpt").rename(tmp_path / "[ckpt]")
    run(export_hf, "--checkpoint", tmp_path / "[ckpt]", "--out", odd / "out")
    assert_same_tensors(odd / "out" / "model.safetensors", source / "model.safetensors")
    assert (odd / "out" / "tokenizer.json").exists()


def test_mistakes(source, tmp_path):
    out = tmp_path / "ckpt"
    (tmp_path / "file").touch()

    def error(*arguments, entry=import_hf):
        return error_of(entry, *arguments)

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
    other_kind = error("--source", source, "--out", out, "--fam_init=prefix")
    assert "config.model.memory.init: is a field of fam" in other_kind
    assert "but the kind is bswa" in other_kind
    assert "config.model.num_layers: the model's config.json decides this field" in error(
        "--source", source, "--out", out, "--config.model.num_layers=2"
    )
    assert "config.train.steps: is not a field of the model" in error(
        "--source", source, "--out", out, "--config.train.steps=2"
    )
    assert "argument --fam_length" in error("--source", source, "--out", out, "--fam_length=many")
    assert f"{tmp_path / 'file'}: is a file; give a new folder as --out" in error(
        "--source", source, "--out", tmp_path / "file"
    )
    assert "cannot be created (Not a directory); give another --out" in error(
        "--source", source, "--out", tmp_path / "file" / "under", "--block_size=8"
    )
    (source / "tokenizer_config.json").write_text("{bad")
    assert "tokenizer_config.json: cannot be read as JSON" in error(
        "--source", source, "--out", out, "--block_size=8"
    )
    (source / "tokenizer.json").unlink()
    assert "holds neither tokenizer.model nor tokenizer.json" in error("--source", source, "--out", out)
    assert not out.exists()
    assert "no such folder" in error("--checkpoint", tmp_path / "nothing", "--out", out, entry=export_hf)
    ways = {
        "is a file; give a new folder as --out": ("--out", tmp_path / "file"),
        "is not empty; give a new folder as --out": ("--out", tmp_path),
        "is the root of a mounted file system": ("--out", "/"),
        "argument --shard_gb: expected a number above 0, got '0'": ("--out", out, "--shard_gb=0"),
        "argument --shard_gb: expected a number above 0, got '-1'": ("--out", out, "--shard_gb=-1"),
        "argument --shard_gb: expected a number above 0, got 'inf'": ("--out", out, "--shard_gb=inf"),
        "argument --shard_gb: expected a number above 0, got 'much'": ("--out", out, "--shard_gb=much"),
    }
    for says, arguments in ways.items():
        assert says in error("--checkpoint", tmp_path / "nothing", *arguments, entry=export_hf)


def test_a_folder_in_hugging_face_format_is_not_a_checkpoint(source, tmp_path):
    says = (
        f"{source}: is a folder in Hugging Face format; import it first: "
        f"python -m launch.import_hf --source={source} --out=CKPT"
    )
    assert says in error_of(export_hf, "--checkpoint", source, "--out", tmp_path / "out")
    for use in (load_params, load_model, base_config):
        with pytest.raises(CheckpointError, match=re.escape(says)):
            use(str(source))


def test_companions_are_files_and_one_that_cannot_be_read_leaves_nothing(monkeypatch, source, tmp_path):
    out = tmp_path / "ckpt"
    (source / "tokenizer_extra").mkdir()
    how = ("--source", source, "--out", out, "--block_size=8")
    run(import_hf, *how)
    assert {path.name for path in (out / "huggingface").iterdir()} == {
        "config.json", "tokenizer.json", "chat_template.jinja", "source.json",
    }  # fmt: skip
    shutil.rmtree(out)

    read_bytes = type(epath.Path(source)).read_bytes

    def deny(path):
        if path.name == "chat_template.jinja":
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    monkeypatch.setattr(type(epath.Path(source)), "read_bytes", deny)
    assert "chat_template.jinja: cannot be copied to" in error_of(import_hf, *how)
    assert not out.exists()


@pytest.mark.parametrize("at", ["import_parameters", "Checkpoints"])
def test_an_interrupted_import_can_be_run_again(monkeypatch, source, tmp_path, at):
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
        patched.setattr(importing, at, {"import_parameters": interrupted, "Checkpoints": Interrupted}[at])
        with pytest.raises(KeyboardInterrupt):
            run(import_hf, *how)
    assert not out.exists()
    run(import_hf, *how)
    assert load_params(out)[2] == 0


def test_an_import_replaces_what_a_killed_one_left(source, tmp_path):
    out = tmp_path / "ckpt"
    how = ("--source", source, "--out", out, "--block_size=8")
    (out / "0.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    (out / "config.json").write_text('{"model": {"num_layers": 77}}')
    assert "is not empty" in error_of(import_hf, *how)  # no companions: a run's workdir
    (out / "huggingface").mkdir()
    (out / "notes.txt").touch()
    assert "is not empty" in error_of(import_hf, *how)
    (out / "notes.txt").unlink()
    run(import_hf, *how)
    assert {path.name for path in out.iterdir()} == {"0", "config.json", "huggingface", "newest_step.json"}
    assert load_params(out)[1]["model"]["num_layers"] == 3
    assert "is not empty" in error_of(import_hf, *how)  # finished


@pytest.mark.slow
def test_the_text_part_of_a_model_with_vision(capsys, source, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(DATA / "gemma3_vision" / name, source / name)
    ckpt, out = tmp_path / "ckpt", tmp_path / "out"
    run(import_hf, "--source", source, "--out", ckpt, "--block_size=8")
    count = Folder(source).left_out
    said = f"imported the text part only; left out {count} tensors of the vision tower and its projector"
    assert said in capsys.readouterr().err
    run(export_hf, "--checkpoint", ckpt, "--out", out)
    said = capsys.readouterr()
    assert "for Gemma3ForCausalLM" in said.out
    assert "exported the text part of Gemma3ForConditionalGeneration, without its vision tower" in said.err
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
def test_an_interrupted_export_leaves_nothing(monkeypatch, source, tmp_path, at):
    ckpt, out = tmp_path / "ckpt", tmp_path / "out"
    run(import_hf, "--source", source, "--out", ckpt, "--block_size=8")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    before = {*tmp_path.iterdir()}
    with monkeypatch.context() as patched:
        patched.setattr(exporting, at, interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(export_hf, "--checkpoint", ckpt, "--out", out)
    assert {*tmp_path.iterdir()} == before
    run(export_hf, "--checkpoint", ckpt, "--out", out)
    assert (out / "tokenizer.json").exists()
