"""A model whose PassKey results are known without running it."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from fam_jax.config import Config, EvaluateConfig
from tests.generation.tiny import CONFIG
from tests.model.tiny import params_of

VOCABULARY_SIZE = 51  # of the vocabulary that ships with the package


@pytest.fixture(scope="session")
def config() -> Config:
    return Config(
        model=dataclasses.replace(CONFIG, vocab_size=VOCABULARY_SIZE),
        evaluate=EvaluateConfig(keys=12, batch_size=8, chunk_blocks=1, filler_blocks=(1, 5), seed=3),
    )


@pytest.fixture(scope="session")
def parrot(config: Config) -> dict[str, Any]:
    """Return parameters of a model that predicts the token it has just read: layers add nothing to the embedding."""
    params = jax.tree.map(np.array, params_of(config.model))
    for name in ("output", "down"):
        params["layers"][name]["kernel"][:] = 0
    table = params["embedding"]["table"]
    params["embedding"]["table"] = table / np.linalg.norm(table, axis=1, keepdims=True)
    params["final_norm"]["scale"][:] = 1
    return params


@pytest.fixture(scope="session")
def parrot_accuracy(config: Config) -> float:
    """Return the fraction of answer tokens that equal the token before them, which the parrot gets right (1 block)."""
    from fam_jax.data.passkey import passkey_examples
    from fam_jax.data.vocabulary import load_vocabulary

    vocabulary = load_vocabulary("passkey")
    examples = passkey_examples(config.data, vocabulary, config.model.block_size, config.evaluate.keys, 3)
    right = [np.append(prompt[-1], answer[:-1]) == answer for prompt, answer in examples]
    accuracy = float(np.concatenate(right).mean())
    assert 0 < accuracy < 1
    return accuracy
