"""PassKey retrieval at a size that trains in minutes on two CPU cores (section 3.2 of the paper, figure 3a).

    python -m launch.train --config=configs/passkey.py --workdir=runs/passkey

The argument names the memory: `configs/passkey.py:fam` (the default), `:bswa_m1` (block sliding window attention with
one memory segment), `:bswa_m1_sg` (the same with stop-gradient, as in Transformer-XL) or `:fam_bounded` (FAM with a
bound on its norm and noise in training, a key that may stand anywhere, and rows that go on; see
docs/results/bounded.md). `:smoke` is a run of a few seconds. Both can be combined, as in
`configs/passkey.py:bswa_m1,smoke`.
"""

from ml_collections import ConfigDict

from fam_jax.config import default_config, memory_config, parse_argument


def get_config(arg: str = "fam") -> ConfigDict:
    """Return FAM without memory segments, or BSWA with one: the paper's comparison at 1B."""
    memory = {
        "fam": memory_config("fam", length=8, segments=0),
        "bswa_m1": memory_config("bswa", segments=1),
        "bswa_m1_sg": memory_config("bswa", segments=1, stop_gradient=True),
        "fam_bounded": memory_config("fam", length=8, segments=0, bound=4.0, noise=0.25),
    }
    variant, words = parse_argument("configs/passkey.py", arg, variants=tuple(memory))
    config = default_config()
    config.model.update(
        vocab_size=64,
        num_layers=3,
        model_dim=64,
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
        # A wide feed-forward layer keeps digits from drifting; see docs/results/passkey.md.
        ff_dim=512,
        block_size=32,
        # With small micro-batches this is faster on a CPU, where memory bandwidth is the limit.
        remat="dots",
    )
    config.model.memory = memory[variant]
    config.optimizer.update(
        learning_rate=2e-3,
        warmup_steps=100,
        schedule="cosine",
        beta2_schedule="power",
        # Without decay the loss vanishes before the model keeps every digit reliably.
        weight_decay=0.1,
    )
    config.data.update(
        vocabulary="passkey",
        stage_blocks=(2, 4, 8, 18),
        # A model that does not master a length moves on to the next one after this many steps.
        max_stage_steps=250,
        longest_fraction=0.9,
        # The random digits of the prompt cannot be learned, and their gradient is noise.
        prompt_weight=0.001,
        # Whole blocks, as in evaluation: the question then never crosses a block border.
        filler_step=32,
    )
    if variant == "fam_bounded":
        # Rows go on in the next two batches, so training sees memories that are three rows old.
        config.data.update(late_keys=0.5, questions=3)
        config.train.carry = "memory"
    if variant.startswith("bswa"):
        # Fillers that the window spans: a model of windows learns nothing from longer ones.
        config.data.update(stage_blocks=(1, *config.data.stage_blocks), min_filler_blocks=0)
    config.train.update(steps=1200, batch_size=16, accumulation=4)
    if "smoke" in words:
        config.model.update(num_layers=2, model_dim=16, num_heads=2, num_kv_heads=2, head_dim=8, ff_dim=32)
        config.data.update(stage_blocks=(2, 4), max_stage_steps=10)
        config.train.update(steps=20, batch_size=4, accumulation=1, checkpoint_every=10)
        config.evaluate.update(filler_blocks=(2, 4), keys=8, batch_size=8)
    return config
