r"""Fine-tune an open model, or a model of your own, on instructions: prompts and answers, or chats, in JSON or Parquet.

    python -m launch.import_hf --source=DIR --out=runs/gemma
    python -m launch.train --config=configs/instruct.py:runs/gemma --workdir=runs/gemma_chat \
        --config.data.train_files=chats/train --config.data.heldout_files=chats/heldout

The argument names the base, as in configs/retrofit.py: the folder of a checkpoint, or FOLDER/STEP. A base without a
memory gets one. Its tokenizer's own chat template renders chats. Words may follow, with commas between them:

    full        train all parameters; without this word, LoRA of rank 64 and the initial FAM
    bswa        block sliding window attention without FAM, as a control
    smoke       three steps with short blocks and rows on examples/instructions.jsonl; a public model becomes a tiny one
    FILES=RATE  for each source of a mixture, in place of train_files

An entry with commas in its path is quoted:

    --config='configs/instruct.py:runs/gemma,full,"data/a,b/*.parquet"=0.7,chats=0.3'

See docs/data.md for the rows that are read, and for chat templates.
"""

from ml_collections import ConfigDict

from fam_jax.config import is_rated, parse_rated, split_list

from .retrofit import read_base, retrofit_config

FILE = "configs/instruct.py"
WORDS = ("full", "bswa", "smoke")


def get_config(arg: str = "") -> ConfigDict:
    """Return a config for the base that `arg` names.

    Raises:
      ConfigError: `arg` names no base, or has an unknown word.
      CheckpointError: the folder holds no checkpoint.
    """
    given = split_list(arg, f"{FILE}:{arg}")
    mixture = parse_rated([entry for entry in given if is_rated(entry)], FILE)
    place, words = read_base(FILE, [entry for entry in given if not is_rated(entry)], WORDS)
    config = retrofit_config(place, words)
    config.data.update(
        task="instructions",
        train_files=() if mixture else ("data/train",),
        mixture=mixture,
        heldout_files=("data/heldout",),
        file_suffixes=(".txt",),
    )
    if "full" in words:
        config.lora.update(rank=0, random_base=False)
        config.optimizer.update(learning_rate=1e-5)
    if "smoke" in words:
        config.data.update(heldout_files=())
        if not mixture:
            config.data.update(train_files=("examples/instructions.jsonl",))
    return config
