"""An imported model computes what transformers computes, however its tokens are divided."""

import numpy as np
import pytest

from tests.hf.recorded import DATA, LENGTH, NAMES, imported, recorded_logits, recorded_tokens
from tests.model.tiny import Reader
from tests.variants import rest_slow

CLOSE = {"rtol": 0, "atol": 1e-4}  # float32 logits of the order of 1, by two libraries


@pytest.mark.parametrize("block_size", rest_slow([4, 8, LENGTH], [4]))
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name, block_size):
    config, params = imported(DATA / name, block_size=block_size)
    logits = Reader(config, params, 2).read(recorded_tokens(), aligned=True)
    np.testing.assert_allclose(logits, recorded_logits(name), **CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_reading_in_pieces_gives_the_same_logits(name):
    config, params = imported(DATA / name)
    tokens, reader = recorded_tokens(), Reader(config, params, 2)
    parts = [reader.read(tokens[:, :8], aligned=True), reader.read(tokens[:, 8:13])]
    parts += [reader.read(tokens[:, at : at + 1]) for at in range(13, LENGTH)]
    np.testing.assert_allclose(np.concatenate(parts, axis=1), recorded_logits(name), **CLOSE)


def test_the_recorded_models_differ_where_their_options_say_so():
    """Windows, soft caps and scaled positions are within reach of the recorded tokens."""
    for name, changes in {
        "llama3": {"rope_scaling": "none"}, "llama_linear": {"rope_factor": 2.0}, "mistral": {"window": 0},
        "qwen2_windows": {"local_window": 6}, "gemma2": {"attention_softcap": 0.0}, "gemma3": {"local_rope_base": 1e6},
    }.items():  # fmt: skip
        config, params = imported(DATA / name, **changes)
        logits = Reader(config, params, 2).read(recorded_tokens(), aligned=True)
        assert np.abs(logits - recorded_logits(name)).max() > 1e-2
