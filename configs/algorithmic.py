"""Small tasks that need a memory, at a size that trains in minutes on a CPU core.

    python -m launch.train --config=configs/algorithmic.py:remember --workdir=runs/remember

The argument names the task, a memory, or both: `configs/algorithmic.py:remember` (pairs of keys and values, and a
question for one of them), `:rewrite` (the last value of a key that is written again), `:copy` or `:reverse` (a list),
and `fam` (the default), `fam_bounded`, `bswa`, `armt` or `rmt`, as in `configs/algorithmic.py:rewrite,armt`. `smoke` is
a run of a few seconds. docs/data.md describes the tasks.
"""

from ml_collections import ConfigDict

from fam_jax.config import default_config, memory_config, parse_argument
from fam_jax.config.data import ALGORITHMS


def get_config(arg: str = "remember") -> ConfigDict:
    """Return the config of a task and a memory."""
    memories = {
        "fam": memory_config("fam", length=4, segments=0),
        "fam_bounded": memory_config("fam", length=4, segments=0, bound=4.0),
        "bswa": memory_config("bswa", segments=1),
        "armt": memory_config("armt", length=4, key_dim=16, segments=0),
        "rmt": memory_config("rmt", length=8, segments=0),
    }
    task, words = parse_argument(
        "configs/algorithmic.py", arg, variants=ALGORITHMS, words=("smoke", *memories)
    )
    chosen = [word for word in words if word in memories] or ["fam"]
    config = default_config()
    config.model.update(
        vocab_size=259,
        num_layers=3,
        model_dim=64,
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
        ff_dim=256,
        block_size=8,
        remat="none",
    )
    config.model.memory = memories[chosen[-1]]
    config.optimizer.update(
        learning_rate=2e-3, warmup_steps=100, schedule="cosine", beta2_schedule="power", weight_decay=0.1
    )
    config.data.update(
        task=f"algorithmic:{task}",
        vocabulary="bytes",
        min_filler_blocks=0,
        stage_blocks=(1, 2, 4, 8) if task in ("remember", "rewrite") else (1, 2, 3),
        max_stage_steps=400,
        longest_fraction=0.8,
        # Letters cannot be predicted, and their gradient is noise.
        prompt_weight=0.0,
    )
    # A row has one answer: with 32 rows, models learn to name one of the values, and not which.
    config.train.update(steps=2000, batch_size=256)
    config.evaluate.update(filler_blocks=(1, 2, 4, 8))
    if "smoke" in words:
        config.model.update(num_layers=2, model_dim=16, num_heads=2, num_kv_heads=2, head_dim=8, ff_dim=32)
        config.data.update(stage_blocks=(1, 2), max_stage_steps=10)
        config.train.update(steps=20, batch_size=4, checkpoint_every=10)
        config.evaluate.update(filler_blocks=(1, 2), keys=8, batch_size=8)
    return config
