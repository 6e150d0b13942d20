"""PassKey with ablated memory: does the memory carry the key?"""

from pathlib import Path

import numpy as np

from fam_jax.config import ABLATIONS
from fam_jax.data.build import task_vocabulary
from fam_jax.data.passkey import passkey_examples
from fam_jax.evaluate.text import ablated
from fam_jax.generate.streaming import Streamer
from fam_jax.restore import load_model


def ablate_passkey(checkpoint: Path, blocks: int, keys: int) -> dict[str, float]:
    """Return the fraction of keys whose every token is the likeliest after the true ones before it, by ablation.

    Args:
      checkpoint: of a model with FAM.
      blocks: of filler.
      keys: examples, the same ones that `launch.evaluate` takes.
    """
    config, params, _ = load_model(str(checkpoint))
    streamer, size = Streamer(config.model, params), config.model.block_size
    examples = passkey_examples(
        config.data, task_vocabulary(config.data), blocks * size, keys, config.evaluate.seed
    )
    rows = np.stack([np.concatenate(example) for example in examples])
    inputs, targets = (
        np.pad(part, ((0, 0), (0, -part.shape[1] % size))) for part in (rows[:, :-1], rows[:, 1:])
    )
    answer = slice(len(examples[0][0]) - 1, rows.shape[1] - 1)
    found = {}
    for name in ("none", *ABLATIONS):
        state = start = streamer.start(keys)
        likeliest = []
        for begin in range(0, inputs.shape[1], size):
            block = slice(begin, begin + size)
            tokens, _, state = streamer.measure(inputs[:, block], targets[:, block], state)
            likeliest.append(tokens)
            if name in ABLATIONS:
                state = ablated(config.model, state, start, name)
        right = np.concatenate(likeliest, axis=1)[:, answer] == targets[:, answer]
        found[name] = float(right.all(axis=1).mean())
    return found
