"""How the models of `benchmarks.retrofit` are trained: flags of `launch.train`."""

import dataclasses
from pathlib import Path
from typing import Any

CONTEXT = 512  # tokens that the base is trained on at a time
BLOCK = 128


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much is done."""

    base_steps: int
    steps: dict[str, int]  # of retrofitting, by variant
    lengths: tuple[int, ...]  # of PassKey fillers, in blocks
    keys: int
    documents: int  # of all lengths
    long_documents: int
    long_tokens: int  # that these have at least


FULL = Settings(500, {"fam": 800, "bswa": 300}, (2, 3, 4, 6, 8, 16, 32), 32, 32, 4, 16_384)
QUICK = Settings(2, {"fam": 2, "bswa": 2}, (1, 2), 2, 2, 2, 40_000)


def base_flags(place: Path, settings: Settings) -> list[str]:
    """The base: a Llama of 1.3M parameters with full attention over its rows."""
    config = {
        "data.vocabulary": place / "stdlib.model", "data.train_files": place / "text/train",
        "data.heldout_files": place / "text/heldout", "data.file_suffixes": ".py", "data.sequence_length": CONTEXT,
        "model.vocab_size": 2048, "model.num_layers": 4, "model.model_dim": 128, "model.num_heads": 4,
        "model.num_kv_heads": 4, "model.head_dim": 32, "model.ff_dim": 512, "model.block_size": BLOCK,
        "model.memory_segments": CONTEXT // BLOCK - 1, "model.remat": "none", "optimizer.learning_rate": 4e-3,
        "train.batch_size": 8, "train.accumulation": 4, "train.loss_chunk": 1024, "train.checkpoint_every": 300,
        "train.steps": settings.base_steps, "evaluate.every": 0,
    }  # fmt: skip
    return ["--config=configs/text.py:full", *_overrides(config)]


def retrofit_flags(place: Path, variant: str, settings: Settings) -> list[str]:
    """LoRA and the initial FAM on the imported base: text and PassKey in turns."""
    words = ",bswa" if variant == "bswa" else ""
    fam = {} if variant == "bswa" else {"model.fam_length": 16}
    config = {
        "model.block_size": BLOCK, "model.memory_segments": 1, "model.remat": "none", **fam,
        "lora.rank": 32, "lora.alpha": 64.0,  # half of what the config has: the base is 128 wide
        "data.task": "text+passkey", "data.train_files": place / "text/train",
        "data.heldout_files": place / "text/heldout", "data.file_suffixes": ".py",
        "data.sequence_length": 768, "data.repeat_segment": 0, "data.passkey_fraction": 0.85,
        "data.filler_step": BLOCK, "data.stage_blocks": "(2,4,8,16)", "data.advance_accuracy": 0.7,
        "data.longest_fraction": 0.8, "data.prompt_weight": 0.001,
        "optimizer.learning_rate": 4e-3, "optimizer.warmup_steps": 30, "optimizer.schedule": "cosine",
        "optimizer.beta2_schedule": "power", "optimizer.weight_decay": 0.1,
        "train.random_state_passing": 0.0, "train.batch_size": 16, "train.accumulation": 4,
        "train.loss_chunk": 1024, "train.checkpoint_every": 50, "train.steps": settings.steps[variant],
        "mesh.data": 0, "mesh.fsdp": 1,
    }  # fmt: skip
    return [f"--config=configs/retrofit.py:{place}/imported{words}", *_overrides(config)]


def _overrides(config: dict[str, Any]) -> list[str]:
    return [f"--config.{field}={value}" for field, value in config.items()]
