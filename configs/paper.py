"""What the configs of the paper's models (section 3.1, table 3) share: `fam_1b.py`, `fam_8b.py`, `fam_24b.py`.

Words of the argument, with commas between them:

    bswa      Block Sliding Window Attention alone, without FAM
    pretrain  all parameters are trained, from scratch; without it LoRA of rank 64 and the initial FAM, as in the paper,
              on the checkpoint that `--config.train.init_from=FOLDER` names
    smoke     three steps of a model small enough for a laptop, on PassKey

Data: the paper's mixture is not public, so PG-19 by TensorFlow Datasets, in rows of 8.5k tokens that end with the
repetition of a random segment. `--config.data.train_files='("gs://bucket/books/*.txt",)'` takes other text;
`--config.data.vocabulary=FILE` is the SentencePiece model, of at most 256k pieces, and has to be given.
"""

from typing import Any

from ml_collections import ConfigDict

from fam_jax.config import ConfigError, default_config, memory_config

WORDS = ("bswa", "pretrain", "smoke")


def paper_config(
    name: str, arg: str, *, model: dict[str, Any], learning_rate: float, mesh: dict[str, int]
) -> ConfigDict:
    """The config of one size.

    Args:
      name: of the config file, for messages.
      arg: words, as above.
      model: the size (table 3).
      learning_rate: constant.
      mesh: for the number of chips that the paper had.

    Raises:
      ConfigError: an unknown word.
    """
    words = [word for word in arg.split(",") if word]
    for word in words:
        if word not in WORDS:
            raise ConfigError(
                f"configs/{name}.py:{arg}: expected some of {', '.join(WORDS)}, with commas between, got {word!r}"
            )
    config = default_config()
    config.model.update(
        vocab_size=256_000,
        head_dim=128,
        dtype="bfloat16",
        block_size=1024,
        **{"remat": "dots"} | model,
    )
    if "bswa" in words:
        config.model.memory = memory_config("bswa", segments=3)
    else:
        config.model.memory = memory_config("fam", segments=3, length=64)
    config.optimizer.update(name="adafactor", learning_rate=learning_rate, beta1=0.9, beta2=0.99)
    config.data.update(
        task="text",
        vocabulary="",
        train_files=("tfds:pg19:train",),
        heldout_files=("tfds:pg19:test",),
        sequence_length=8704,
        repeat_segment=256,
        repeat_weight=0.1,
    )
    config.train.update(
        steps=50_000,
        batch_size=128,
        loss_chunk=131_072,
        random_state_passing=0.0 if "bswa" in words else 0.8,
        checkpoint_every=1000,
    )
    config.mesh.update(mesh)
    if "pretrain" not in words:
        config.lora.update(rank=64, alpha=64.0)
    if "smoke" in words:
        make_small(config)
    return config


def make_small(config: ConfigDict) -> None:
    """Three steps on any machine; the kind of model stays."""
    group = config.model.num_heads // config.model.num_kv_heads
    config.model.update(
        vocab_size=64, num_layers=2, model_dim=64, num_heads=4, num_kv_heads=4 // min(group, 4), head_dim=16,
        ff_dim=128, block_size=32, dtype="float32",
    )  # fmt: skip
    if config.model.memory.kind == "fam":
        config.model.memory.length = 8
    config.data.update(default_config().data)
    config.data.update(vocabulary="passkey", stage_blocks=(4,))
    config.train.update(steps=3, batch_size=8, loss_chunk=4096, log_every=1, checkpoint_every=3)
    config.mesh.update(data=0, fsdp=1, tensor=1)
    config.evaluate.update(filler_blocks=(4,), keys=8, batch_size=8)
    if config.lora.rank:
        config.lora.update(rank=4, alpha=4.0, random_base=True)
