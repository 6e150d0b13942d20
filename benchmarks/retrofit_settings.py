"""Settings of `benchmarks.retrofit`: its sizes, and the flags of `launch.train`."""

import dataclasses
from pathlib import Path
from typing import Any

# Tokens of a row that the base is trained on.
CONTEXT = 512
BLOCK = 128
VOCABULARY = 2048


@dataclasses.dataclass(frozen=True)
class Settings:
    """The amount of training and evaluation."""

    base_steps: int
    # Steps of retrofitting by variant.
    steps: dict[str, int]
    # Lengths of PassKey fillers in blocks.
    lengths: tuple[int, ...]
    # PassKey examples per length.
    keys: int
    # Documents of any length.
    documents: int
    # Number of long documents, and the fewest tokens of one.
    long_documents: int
    long_tokens: int
    # FAM is trained again with each of these seeds.
    more_seeds: tuple[int, ...]

    def repeats(self) -> dict[str, int]:
        """Return the names of the further runs of FAM, with their seeds."""
        return {f"fam_seed{seed}": seed for seed in self.more_seeds}


FULL = Settings(
    base_steps=1500,
    steps={"fam": 600, "bswa": 600},
    lengths=(1, 2, 3, 4, 8, 16, 32, 64, 128),
    keys=32,
    documents=32,
    long_documents=4,
    long_tokens=16_384,
    more_seeds=(2, 3),
)
QUICK = Settings(
    base_steps=2,
    steps={"fam": 2, "bswa": 2},
    lengths=(1, 2),
    keys=2,
    documents=2,
    long_documents=2,
    long_tokens=40_000,
    more_seeds=(2,),
)


def base_flags(place: Path, settings: Settings) -> list[str]:
    """Return the flags that train the base: a Llama of 2.8M parameters with full attention over its rows."""
    config = {
        "data.vocabulary": place / "stdlib.model",
        "data.train_files": place / "text/train",
        "data.heldout_files": place / "text/heldout",
        "data.file_suffixes": ".py",
        "data.sequence_length": CONTEXT,
        "data.layout": "packed",
        "model.vocab_size": VOCABULARY,
        "model.num_layers": 4,
        "model.model_dim": 192,
        "model.num_heads": 6,
        "model.num_kv_heads": 6,
        "model.head_dim": 32,
        "model.ff_dim": 768,
        "model.block_size": BLOCK,
        "model.memory.context": CONTEXT,
        "model.remat": "none",
        "optimizer.learning_rate": 3e-3,
        "train.batch_size": 8,
        "train.accumulation": 4,
        "train.loss_chunk": 1024,
        "train.checkpoint_every": 300,
        "train.steps": settings.base_steps,
        "evaluate.every": 0,
    }
    return ["--config=configs/text.py:full", *_overrides(config)]


def retrofit_flags(place: Path, variant: str, settings: Settings, seed: int = 1) -> list[str]:
    """Return the flags that train LoRA and the initial FAM on the imported base, on text mixed with PassKey."""
    words = ",bswa" if variant == "bswa" else ""
    # Without FAM the model masters no stage beyond the window. This limit ends stages about as early as with FAM.
    own = {"data.max_stage_steps": 35} if variant == "bswa" else {"model.memory.length": 16}
    config = {
        "model.block_size": BLOCK,
        "model.memory.segments": 1,
        "model.remat": "none",
        **own,
        # A model this small needs larger updates than the default gives.
        "lora.alpha": 128.0,
        "data.task": "text+passkey",
        "data.train_files": place / "text/train",
        "data.heldout_files": place / "text/heldout",
        "data.file_suffixes": ".py",
        "data.sequence_length": 768,
        "data.layout": "packed",
        "data.repeat_segment": 0,
        "data.passkey_fraction": 0.85,
        "data.last_stage_passkey_fraction": 0.25,
        "data.min_filler_blocks": 0,
        "data.filler_step": BLOCK,
        "data.stage_blocks": "(1,2,3,4,6,8,12,16)",
        "data.advance_accuracy": 0.7,
        "data.longest_fraction": 0.8,
        "data.prompt_weight": 0.001,
        "optimizer.learning_rate": 3e-3,
        "optimizer.warmup_steps": 30,
        "optimizer.schedule": "cosine",
        "optimizer.beta2_schedule": "power",
        "optimizer.weight_decay": 0.1,
        "train.seed": seed,
        "train.random_state_passing": 0.0,
        "train.batch_size": 16,
        "train.accumulation": 4,
        "train.loss_chunk": 1024,
        "train.checkpoint_every": 50,
        "train.steps": settings.steps[variant],
        "mesh.data": 0,
        "mesh.fsdp": 1,
    }
    return [f"--config=configs/retrofit.py:{place}/imported{words}", *_overrides(config)]


def _overrides(config: dict[str, Any]) -> list[str]:
    return [f"--config.{field}={value}" for field, value in config.items()]
