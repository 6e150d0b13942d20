"""The common part of the configs of the paper's models (section 3.1, table 3): fam_1b.py, fam_8b.py and fam_24b.py.

Words of the argument, with commas between them:

    bswa      block sliding window attention without FAM
    pretrain  train all parameters from scratch; without this word, train LoRA of rank 64 and the initial FAM, as in the
              paper, starting from the checkpoint that --config.train.init_from=FOLDER names
    smoke     three steps of a model that is small enough for a laptop, on PassKey unless there is a mixture

and FILES=RATE for each source of a mixture of instructions, to train on that in place of PG-19: rows of Flan, P3,
Natural Instructions or chats in JSON or Parquet (docs/data.md). A source with commas in its path is quoted.

    --config='configs/fam_1b.py:gs://BUCKET/flan/*.parquet=0.6,gs://BUCKET/niv2/*.json=0.4'

The paper's data is not public. These configs use PG-19 from TensorFlow Datasets, in rows of 8.5k tokens that end with
the repetition of a random segment. Choose other text with --config.data.train_files='gs://bucket/books/*.txt'. A
vocabulary is required: --config.data.vocabulary=FILE, a SentencePiece model of up to 256k pieces.
"""

from typing import Any

from ml_collections import ConfigDict

from fam_jax.config import default_config, is_rated, memory_config, parse_argument, parse_rated, split_list


def paper_config(
    name: str, arg: str, *, model: dict[str, Any], learning_rate: float, mesh: dict[str, int]
) -> ConfigDict:
    """Return the config of one size.

    Args:
      name: name of the config file, for messages.
      arg: words, as above.
      model: fields of the model group that depend on the size (table 3).
      learning_rate: constant learning rate.
      mesh: mesh for the number of chips that the paper used.

    Raises:
      ConfigError: the argument has an unknown word.
    """
    file = f"configs/{name}.py"
    given = split_list(arg, f"{file}:{arg}")
    mixture = parse_rated([entry for entry in given if is_rated(entry)], file)
    others = ",".join(entry for entry in given if not is_rated(entry))
    memory, words = parse_argument(file, others, variants=("fam", "bswa"), words=("pretrain", "smoke"))
    config = default_config()
    config.model.update(
        vocab_size=256_000,
        head_dim=128,
        dtype="bfloat16",
        block_size=1024,
        **{"remat": "dots"} | model,
    )
    fields = {"length": 64} if memory == "fam" else {}
    config.model.memory = memory_config(memory, segments=3, **fields)
    config.optimizer.update(name="adafactor", learning_rate=learning_rate, beta1=0.9, beta2=0.99)
    config.data.update(
        task="text",
        vocabulary="",
        train_files=("tfds:pg19:train",),
        heldout_files=("tfds:pg19:test",),
        sequence_length=8704,
        # Each process tokenizes its own rows only.
        layout="by_row",
        repeat_segment=256,
        repeat_weight=0.1,
    )
    if mixture:
        config.data.update(task="instructions", mixture=mixture, train_files=(), heldout_files=())
    config.train.update(
        steps=50_000,
        batch_size=128,
        loss_chunk=131_072,
        random_state_passing=0.8 if memory == "fam" else 0.0,
        checkpoint_every=1000,
    )
    config.mesh.update(mesh)
    if "pretrain" not in words:
        config.lora.update(rank=64, alpha=64.0)
    if "smoke" in words:
        make_small(config)
    return config


def make_small(config: ConfigDict) -> None:
    """Change the config to a run of three steps on any machine, with the same kind of model."""
    group = config.model.num_heads // config.model.num_kv_heads
    config.model.update(
        vocab_size=64,
        num_layers=2,
        model_dim=64,
        num_heads=4,
        num_kv_heads=4 // min(group, 4),
        head_dim=16,
        ff_dim=128,
        block_size=32,
        dtype="float32",
    )
    if config.model.memory.kind == "fam":
        config.model.memory.length = 8
    if config.data.task == "instructions":
        config.model.vocab_size = 264
        config.data.update(vocabulary="bytes", sequence_length=112, repeat_segment=16)
    else:
        config.data.update(default_config().data)
        config.data.update(vocabulary="passkey", stage_blocks=(4,))
    config.train.update(steps=3, batch_size=8, loss_chunk=4096, log_every=1, checkpoint_every=3)
    config.mesh.update(data=0, fsdp=1, tensor=1)
    config.evaluate.update(filler_blocks=(4,), keys=8, batch_size=8)
    if config.lora.rank:
        config.lora.update(rank=4, alpha=4.0, random_base=True)
