"""A small language model on your own text, by bytes; a FAM carries what is further back than its window.

    python -m launch.train --config=configs/text.py --workdir=runs/text \
        --config.data.train_files=books/train --config.data.heldout_files=books/heldout

Files, folders and patterns with commas between them; `.txt` files count in a folder, `--config.data.file_suffixes`
says otherwise. A SentencePiece model of the same text comes from `launch/train_vocabulary.py`.

The argument names the memory: `configs/text.py:fam` (the default), `:bswa` (one memory segment and no FAM), `:full`
(full attention over the row: a base model without memory). `:smoke` is a run of a few seconds on this repository's
own sources.
"""

from ml_collections import ConfigDict

from fam_jax.config import ConfigError, default_config, memory_config

BLOCK, ROW = 128, 1024


def get_config(arg: str = "fam") -> ConfigDict:
    """4.8M parameters, which read 1,024 bytes in training."""
    memory = {
        "fam": memory_config("fam", length=16, segments=1),
        "bswa": memory_config("bswa", segments=1),
        "full": memory_config("full", context=ROW),
    }
    variant = "fam" if arg in ("", "smoke") else arg
    if variant not in memory:
        raise ConfigError(f"configs/text.py:{arg}: expected one of {', '.join(memory)}, smoke")
    config = default_config()
    config.model.update(
        vocab_size=264,  # 256 bytes, 3 special ids; a multiple of 8, for a tensor axis
        num_layers=6,
        model_dim=256,
        num_heads=4,
        num_kv_heads=4,
        head_dim=64,
        ff_dim=704,
        block_size=BLOCK,
        remat="dots",
    )
    config.model.memory = memory[variant]
    config.optimizer.update(
        learning_rate=2e-3, warmup_steps=100, schedule="cosine", beta2_schedule="power", weight_decay=0.1
    )
    config.data.update(
        task="text",
        vocabulary="bytes",
        sequence_length=ROW,
        train_files=("data/train",),
        heldout_files=("data/heldout",),
    )
    config.train.update(steps=5000, batch_size=16)
    config.evaluate.update(every=500, documents=64, batch_size=16, chunk_blocks=8)
    if arg == "smoke":
        config.model.update(num_layers=2, model_dim=16, num_heads=2, num_kv_heads=2, head_dim=8, ff_dim=32)
        config.model.block_size = 32
        config.model.memory.length = 4
        config.data.update(
            train_files=("fam_jax",), heldout_files=("launch",), file_suffixes=(".py",), sequence_length=112
        )
        config.train.update(steps=20, batch_size=4, checkpoint_every=10)
        config.evaluate.update(every=10, documents=4, ablations=("zeroed", "shuffled", "frozen"))
    return config
