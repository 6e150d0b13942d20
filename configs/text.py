"""A small byte-level language model of your own text. Its FAM carries information from beyond the window.

    python -m launch.train --config=configs/text.py --workdir=runs/text \
        --config.data.train_files=books/train --config.data.heldout_files=books/heldout

Give files, folders or patterns, with commas between them. In a folder, the .txt files are read; change this with
--config.data.file_suffixes. To make a SentencePiece model of the same text, use launch.train_vocabulary.

The argument names the memory: `configs/text.py:fam` (the default), `:bswa` (one memory segment and no FAM) or `:full`
(full attention over the row, as a base model without memory). `:smoke` is a run of a few seconds on the sources of this
repository. Both can be combined, as in `configs/text.py:bswa,smoke`.
"""

from ml_collections import ConfigDict

from fam_jax.config import default_config, memory_config, parse_argument

BLOCK, ROW = 128, 1024


def get_config(arg: str = "fam") -> ConfigDict:
    """Return a model of 4.8M parameters that reads 1,024 bytes at a time in training."""
    memory = {
        "fam": memory_config("fam", length=16, segments=1),
        "bswa": memory_config("bswa", segments=1),
        "full": memory_config("full", context=ROW),
    }
    variant, words = parse_argument("configs/text.py", arg, variants=tuple(memory))
    config = default_config()
    config.model.update(
        # 256 bytes and 3 special ids, rounded up to a multiple of 8 for a tensor axis.
        vocab_size=264,
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
        layout="by_row",
        train_files=("data/train",),
        heldout_files=("data/heldout",),
    )
    config.train.update(steps=5000, batch_size=16)
    config.evaluate.update(every=500, documents=64, batch_size=16, chunk_blocks=8)
    if "smoke" in words:
        config.model.update(num_layers=2, model_dim=16, num_heads=2, num_kv_heads=2, head_dim=8, ff_dim=32)
        config.model.block_size = 32
        if variant == "fam":
            config.model.memory.length = 4
        if variant == "full":
            config.model.memory.context = 128
        config.data.update(
            train_files=("fam_jax",), heldout_files=("launch",), file_suffixes=(".py",), sequence_length=112
        )
        config.train.update(steps=20, batch_size=4, checkpoint_every=10)
        config.evaluate.update(every=10, documents=4)
        if variant == "fam":
            config.evaluate.ablations = ("zeroed", "shuffled", "frozen")
    return config
