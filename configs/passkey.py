"""PassKey retrieval at a size that trains on two CPU cores in minutes (section 3.2 of the paper, figure 3a).

    python -m launch.train --config=configs/passkey.py --workdir=runs/passkey

The argument names the memory: `configs/passkey.py:fam` (the default), `:bswa_m1` (Block Sliding Window Attention
with one memory segment), `:bswa_m1_sg` (the same with stop-gradient, as Transformer-XL). `:smoke` is a run of a few
seconds.
"""

from ml_collections import ConfigDict

from fam_jax.config import ConfigError, default_config, memory_config


def get_config(arg: str = "fam") -> ConfigDict:
    """FAM without memory segments against BSWA with one: the paper's comparison at 1B."""
    memory = {
        "fam": memory_config("fam", length=8, segments=0),
        "bswa_m1": memory_config("bswa", segments=1),
        "bswa_m1_sg": memory_config("bswa", segments=1, stop_gradient=True),
    }
    variant = "fam" if arg in ("", "smoke") else arg
    if variant not in memory:
        raise ConfigError(f"configs/passkey.py:{arg}: expected one of {', '.join(memory)}, smoke")
    config = default_config()
    config.model.update(
        vocab_size=64,
        num_layers=3,
        model_dim=64,
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
        ff_dim=512,  # wide: it is the feed-forward that keeps a digit from drifting, see docs/results/passkey.md
        block_size=32,
        remat="dots",  # with small micro-batches, below, faster on a CPU: it is short of memory bandwidth
    )
    config.model.memory = memory[variant]
    config.optimizer.update(
        learning_rate=2e-3,
        warmup_steps=100,
        schedule="cosine",
        beta2_schedule="power",
        weight_decay=0.1,  # keeps the loss from vanishing before every digit is held for good
    )
    config.data.update(
        vocabulary="passkey",
        stage_blocks=(2, 4, 8, 18),
        max_stage_steps=250,  # a model that does not master a length goes on to the next all the same
        longest_fraction=0.9,
        prompt_weight=0.001,  # the random digits of the prompt cannot be learned: their gradient is noise
        filler_step=32,  # whole blocks, as in evaluation: the question never straddles two blocks
    )
    config.train.update(steps=1200, batch_size=16, accumulation=4)
    if arg == "smoke":
        config.model.update(num_layers=2, model_dim=16, num_heads=2, num_kv_heads=2, head_dim=8, ff_dim=32)
        config.data.update(stage_blocks=(2, 4), max_stage_steps=10)
        config.train.update(steps=20, batch_size=4, accumulation=1, checkpoint_every=10)
        config.evaluate.update(filler_blocks=(2, 4), keys=8, batch_size=8)
    return config
