"""Loading a model rounds its weights to the dtype of their use and does not change its outputs."""

import dataclasses
import pathlib
import shutil

import jax
import numpy as np
import pytest

from fam_jax.checkpoint import Checkpoints
from fam_jax.config import Config, DataConfig, TrainConfig, UserError
from fam_jax.generation.streaming import Streamer
from fam_jax.generation.text import TextModel
from fam_jax.restore import load_model
from fam_jax.training.init_from import base_config
from launch import evaluate, generate
from tests.generation.tiny import CONFIG, texts
from tests.model.tiny import params_of


def save(folder: pathlib.Path, config: Config) -> None:
    with Checkpoints(folder, config=dataclasses.asdict(config), keep=1) as checkpoints:
        checkpoints.save(1, {"params": params_of(config.model)}, {}, wait=True)


def test_the_vocabulary_of_a_moved_checkpoint_is_found(tmp_path: pathlib.Path) -> None:
    """Find the vocabulary in the run, or in the base that it began with; a run keeps a copy of its own."""
    imported, run = tmp_path / "imported", tmp_path / "run"
    config = Config(
        model=CONFIG, data=DataConfig(vocabulary=str(imported / "huggingface" / "tokenizer.json"))
    )
    save(imported, config)
    file = imported / "huggingface" / "tokenizer.json"
    file.parent.mkdir()
    file.touch()
    save(run, dataclasses.replace(config, train=TrainConfig(init_from=str(tmp_path / "moved" / "1"))))
    assert load_model(run)[0].data.vocabulary == str(run / "vocabulary" / "tokenizer.json")
    shutil.rmtree(run / "vocabulary")
    assert load_model(imported)[0] == config
    moved = imported.rename(tmp_path / "moved")
    for folder in (moved, run):
        assert load_model(folder)[0].data.vocabulary == str(moved / "huggingface" / "tokenizer.json")
    assert base_config(str(moved)).data.vocabulary == str(moved / "huggingface" / "tokenizer.json")
    (moved / "huggingface" / "tokenizer.json").unlink()
    assert load_model(moved)[0] == config


@pytest.mark.slow
def test_rounded_weights_give_the_same_outputs(tmp_path: pathlib.Path) -> None:
    model = dataclasses.replace(CONFIG, dtype="bfloat16", norm="layernorm")
    params = params_of(model)
    save(tmp_path / "run", Config(model=model))
    _, loaded, _ = load_model(tmp_path / "run")
    dtypes = {jax.tree_util.keystr(path): str(x.dtype) for path, x in jax.tree.leaves_with_path(loaded)}
    for name, dtype in dtypes.items():
        assert dtype == ("bfloat16" if "kernel" in name or "table" in name else "float32"), name
    prompts = texts(9, 21)
    for given in (params, loaded):
        streamer = Streamer(model, given)
        logits, memory = streamer.read(prompts)
        out = streamer.generate(logits, memory, max_tokens=6)
        if given is params:
            expected = logits, out
    np.testing.assert_array_equal(logits, expected[0])
    np.testing.assert_array_equal(out.tokens, expected[1].tokens)
    np.testing.assert_array_equal(out.logprobs, expected[1].logprobs)


@pytest.mark.parametrize("reader", ["evaluate", "evaluate_tasks", "generate", "library"])
def test_a_checkpoint_imports_only_what_its_user_names(
    reader: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module of the name that a checkpoint of somebody else gives lies in the current folder."""
    ran, module = tmp_path / "ran", f"evil_{reader}"
    (tmp_path / f"{module}.py").write_text(f"import pathlib\npathlib.Path({str(ran)!r}).touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    data = DataConfig(task="seqio:x", imports=("os", module), sequence_length=32)
    save(run, Config(model=CONFIG, data=data))

    def read(*imports: str) -> None:
        flags = [f"--checkpoint={run}", *([f"--imports={','.join(imports)}"] if imports else [])]
        if reader == "evaluate":
            evaluate.main([*flags, "--task=text", "--files=x"])
        elif reader == "evaluate_tasks":
            evaluate.main([*flags, "--tasks=copy"])
        elif reader == "generate":
            generate.main([*flags, "--prompt=x"])
        else:
            TextModel.restore(run, imports=imports)

    base_config(str(run))  # a run that begins with this one has a data config of its own
    for imports in ((), ("other",)):
        with pytest.raises(UserError, match=rf"config imports {module} .*--imports=\S*{module}$") as caught:
            read(*imports)
        assert "\n" not in str(caught.value)
        assert not ran.exists()
    with pytest.raises(UserError, match="seqio has no task or mixture x"):
        read(module)
    assert ran.exists()
