"""Models restored to read and write: weights in the dtype of their use, outputs unchanged."""

import dataclasses
import pathlib

import jax
import numpy as np

from fam_jax.checkpoint import Checkpoints
from fam_jax.config import Config
from fam_jax.generate.restore import load_model
from fam_jax.generate.streaming import Streamer
from tests.generate.tiny import CONFIG, texts
from tests.model.tiny import params_of


def test_weights_are_rounded_once_and_outputs_stay(tmp_path: pathlib.Path) -> None:
    model = dataclasses.replace(CONFIG, dtype="bfloat16", norm="layernorm")
    params = params_of(model)
    with Checkpoints(tmp_path / "run", config=dataclasses.asdict(Config(model=model)), keep=1) as checkpoints:
        checkpoints.save(1, {"params": params}, {}, wait=True)
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
