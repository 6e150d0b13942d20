"""What `benchmarks.reproduce` trains: memories (arms), tasks, and which of them each experiment compares.

The experiments follow the figures and appendices of the TransformerFAM paper at the size of a laptop. All models of a
task see the same batches and have as many parameters as FAM has, within 5 %: `matched` chooses the width of their
feed-forward layers.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx

from fam_jax.config import Config, ModelConfig, changed
from fam_jax.config.overrides import Override
from fam_jax.model import Transformer, count_parameters
from launch.config_file import load_config

# Parameters of a model may differ from those of the reference by this share.
TOLERANCE = 0.05
REFERENCE = "fam"
WINDOW = {"segments": 1}
# Rows of a memory, for arms that leave it to the task.
ROWS = "rows of the task"
# Fields of FAM that all of its variants share, unless they say otherwise.
FAM = {"kind": "fam", "length": ROWS, "segments": 0}


class Arm(NamedTuple):
    """A model to train: its memory, and config fields beside it."""

    label: str
    # Fields of config.model.memory.
    memory: Mapping[str, Any]
    # By path, without "config.".
    fields: Mapping[str, Any] = {}


class Task(NamedTuple):
    """What models are trained and evaluated on."""

    label: str
    # --config of `launch.train`.
    config: str
    # Fields of all arms, by path, without "config.".
    fields: Mapping[str, Any]
    # Lengths to evaluate, in blocks, and the longest one in training.
    lengths: tuple[int, ...]
    trained: int
    # What lengths measure.
    length_of: str
    # Rows of a memory: a quarter of a block, or half of it where a block is eight tokens.
    rows: int = 8


class Experiment(NamedTuple):
    """A comparison."""

    title: str
    arms: tuple[str, ...]
    # What the paper reports, at its own size.
    paper: str
    tasks: tuple[str, ...] = ("passkey",)


ARMS = {
    "fam": Arm("FAM", FAM),
    "fam_bounded": Arm("FAM, bounded, with noise", {**FAM, "bound": 4.0, "noise": 0.25}),
    "fam_prefix": Arm("FAM, prefix", {**FAM, "init": "prefix"}),
    "fam_float": Arm("FAM, positions between blocks", {**FAM, "positions": "float"}),
    "fam_zero": Arm("FAM, positions zero", {**FAM, "positions": "zero"}),
    "fam_2_blocks": Arm("FAM, 2 previous blocks", {**FAM, "previous_blocks": 2}),
    "fam_4_blocks": Arm("FAM, 4 previous blocks", {**FAM, "previous_blocks": 4}),
    "fam_length_1": Arm("FAM, M = 1", {**FAM, "length": 1}),
    "fam_length_2": Arm("FAM, M = 2", {**FAM, "length": 2}),
    "fam_length_4": Arm("FAM, M = 4", {**FAM, "length": 4}),
    "fam_length_16": Arm("FAM, M = 16", {**FAM, "length": 16}),
    "fam_rsp_02": Arm("FAM, random states 0.2", FAM, {"train.random_state_passing": 0.2}),
    "fam_rsp_08": Arm("FAM, random states 0.8", FAM, {"train.random_state_passing": 0.8}),
    "fam_diversity": Arm("FAM, diversity loss", {**FAM, "kind": "fam_losses", "diversity": 0.1}),
    "fam_reconstruction": Arm(
        "FAM, reconstruction loss", {**FAM, "kind": "fam_losses", "reconstruction": 0.1}
    ),
    "sum_fam": Arm("static summary tokens", {**FAM, "kind": "sum_fam"}),
    "fm": Arm("feedback memory segment", {"kind": "fm", **WINDOW}),
    "bswa_m1": Arm("BSWA, m = 1", {"kind": "bswa", "segments": 1}),
    "bswa_m2": Arm("BSWA, m = 2", {"kind": "bswa", "segments": 2}),
    "bswa_m4": Arm("BSWA, m = 4", {"kind": "bswa", "segments": 4}),
    "bswa_m1_sg": Arm("BSWA, m = 1, stop-gradient", {"kind": "bswa", "segments": 1, "stop_gradient": True}),
    "transformer_xl": Arm("Transformer-XL, m = 1", {"kind": "transformer_xl", "segments": 1}),
    "rmt": Arm("RMT", {"kind": "rmt", "length": ROWS, "segments": 0}),
    "autocompressor": Arm("AutoCompressors", {"kind": "autocompressor", "length": ROWS, "segments": 0}),
    "prmt": Arm("PRMT", {"kind": "prmt", "length": ROWS, "segments": 0}),
    "armt": Arm("ARMT", {"kind": "armt", "length": ROWS, "key_dim": 16, "segments": 0}),
    "infini": Arm("Infini-attention, delta", {"kind": "infini", "update": "delta", "segments": 0}),
    "compressive": Arm(
        "Compressive Transformer",
        {"kind": "compressive", "compressed_rows": ROWS, "positions": "index", **WINDOW},
    ),
    "block_recurrent": Arm("Block-Recurrent", {"kind": "block_recurrent", "length": ROWS, **WINDOW}),
    "feedback": Arm("Feedback Transformer", {"kind": "feedback", **WINDOW}),
    "titans_mac": Arm("Titans, MAC", {"kind": "titans_mac", "chunk": 8, "segments": 0}),
    "titans_mag": Arm("Titans, MAG", {"kind": "titans_mag", "chunk": 8, **WINDOW}),
}

STAGED = {"data.advance_accuracy": 0.0, "data.min_filler_blocks": 0, "data.late_keys": 0.0}
# With 32 rows, every memory names one of the values that it has seen and never learns which: a row has one answer.
ALGORITHMIC = {**STAGED, "data.max_stage_steps": 1500, "train.steps": 4500, "train.batch_size": 256}


def _algorithmic(
    name: str, label: str, stages: tuple[int, ...], lengths: tuple[int, ...], length_of: str
) -> Task:
    fields = {**ALGORITHMIC, "data.stage_blocks": ",".join(map(str, stages))}
    return Task(label, f"configs/algorithmic.py:{name}", fields, lengths, stages[-1], length_of, rows=4)


TASKS = {
    "passkey": Task(
        "PassKey",
        "configs/passkey.py:fam",
        {
            **STAGED,
            "data.stage_blocks": "1,2,4,8",
            "data.max_stage_steps": 150,
            "train.steps": 900,
            "train.batch_size": 16,
            "train.accumulation": 1,
            "model.ff_dim": 512,
        },
        (1, 2, 4, 8, 16, 32, 64, 128),
        8,
        "filler",
    ),
    "remember": _algorithmic("remember", "associative remember", (1, 2, 4), (1, 2, 4, 8), "pairs"),
    "rewrite": _algorithmic("rewrite", "associative rewrite", (1, 2, 4), (1, 2, 4, 8, 16, 32, 64), "pairs"),
    "copy": _algorithmic("copy", "copy", (1, 2, 3), (1, 2, 3, 4), "list"),
    "reverse": _algorithmic("reverse", "reverse", (1, 2, 3), (1, 2, 3, 4), "list"),
}

EXPERIMENTS = {
    "3a": Experiment(
        "PassKey by length: windows and FAM (figure 3a)",
        ("fam", "fam_bounded", "bswa_m1", "bswa_m2", "bswa_m4", "bswa_m1_sg"),
        "FAM retrieves all keys at every length to 260 blocks. BSWA improves up to m = 2 and then no more; with "
        "stop-gradient it fails beyond its window.",
    ),
    "6": Experiment(
        "Random state passing (figure 6)",
        ("fam", "fam_rsp_02", "fam_rsp_08"),
        "On PG-19, a probability of 0.8 is best, and without random state passing the accuracy drops clearly.",
    ),
    "7": Experiment(
        "Other recurrent memories on PassKey (figure 7)",
        ("fam", "bswa_m1", "rmt", "autocompressor"),
        "RMT is worse than BSWA with m = 1. AutoCompressors fall sharply beyond the trained length.",
    ),
    "9": Experiment(
        "Feedback memory segments and static summary tokens (figure 9)",
        ("fam", "fm", "sum_fam", "bswa_m1"),
        "Feedback memory segments are better than BSWA, but far below FAM. Static summary tokens fail.",
    ),
    "prompt": Experiment(
        "Initial FAM: prompt or prefix (appendix B.1)",
        ("fam", "fam_prefix"),
        "A prefix for each layer is consistently worse than a prompt.",
    ),
    "positions": Experiment(
        "Positions of FAM (appendix B.2.1)",
        ("fam", "fam_float", "fam_zero"),
        "The last positions of the block are best: PG-19 47.7, between blocks 47.6, zero 47.3.",
    ),
    "length": Experiment(
        "Length of FAM (appendix B.4.1)",
        ("fam_length_1", "fam_length_2", "fam_length_4", "fam", "fam_length_16"),
        "M = 64 is best on Qasper and QuALITY; more is no better.",
    ),
    "previous": Experiment(
        "Previous blocks of FAM (appendix B.4.2)",
        ("fam", "fam_2_blocks", "fam_4_blocks"),
        "More than one gains nothing.",
    ),
    "8": Experiment(
        "Transformer-XL (table 8)",
        ("bswa_m1", "transformer_xl"),
        "No significant difference to BSWA.",
    ),
    "losses": Experiment(
        "Auxiliary losses (appendix C)",
        ("fam", "fam_diversity", "fam_reconstruction"),
        "Neither the diversity loss nor the reconstruction loss helps.",
    ),
    "architectures": Experiment(
        "Memories by tasks",
        (
            "fam", "fam_bounded", "bswa_m1", "rmt", "prmt", "armt", "autocompressor", "infini", "compressive",
            "block_recurrent", "feedback", "titans_mac", "titans_mag",
        ),
        "Not in the paper. ARMT's authors find ARMT best at remembering, RMT and PRMT worst.",
        ("passkey", "remember", "rewrite", "copy"),
    ),
}  # fmt: skip


def memory_of(arm: Arm, task: Task) -> dict[str, Any]:
    """Return the fields of config.model.memory of an arm on a task."""
    return {name: task.rows if value == ROWS else value for name, value in arm.memory.items()}


def config_fields(task: Task, arm: Arm, seed: int, *, ff_dim: int | None = None) -> dict[str, str]:
    """Return the config fields of a training, by path, without "config."."""
    steps = task.fields["train.steps"]
    fields: dict[str, Any] = {
        **task.fields,
        **{f"model.memory.{name}": value for name, value in memory_of(arm, task).items()},
        **arm.fields,
        "train.seed": seed,
        "train.checkpoint_every": steps,
        "evaluate.every": steps,
        "evaluate.filler_blocks": ",".join(map(str, task.lengths)),
        "evaluate.keys": 64,
        "evaluate.batch_size": 32,
    }
    if ff_dim is not None:
        fields["model.ff_dim"] = ff_dim
    return {path: str(value) for path, value in fields.items()}


def config_of(task: Task, fields: Mapping[str, str]) -> Config:
    """Return the config of a training."""
    overrides = [Override(f"config.{path}", text) for path, text in fields.items()]
    return load_config(task.config, overrides)


@functools.cache
def parameters_of(model: ModelConfig) -> int:
    """Return the number of parameters of a model."""
    shapes = nnx.eval_shape(lambda: Transformer(model, rngs=nnx.Rngs(0)))
    return count_parameters(nnx.state(shapes, nnx.Param))


def matched(task: Task, arm: Arm) -> int:
    """Return the width F of the feed-forward layers with which a model has the parameters of the reference.

    F is a multiple of 8. A model that is within the tolerance at the reference's width keeps it.

    Raises:
      ValueError: no width brings the parameters within the tolerance.
    """
    goal = parameters_of(config_of(task, config_fields(task, ARMS[REFERENCE], 0)).model)
    config = config_of(task, config_fields(task, arm, 0))
    width, own = config.model.ff_dim, parameters_of(config.model)
    if abs(own - goal) > TOLERANCE * goal:
        # Of F, the parameters are a linear function.
        slope = parameters_of(changed(config, model={"ff_dim": width + 8}).model) - own
        width = max(8, width + 8 * round((goal - own) / slope))
        own = parameters_of(changed(config, model={"ff_dim": width}).model)
    if abs(own - goal) > TOLERANCE * goal:
        raise ValueError(f"{arm.label}: has {own:,} parameters at the least, and FAM {goal:,}")
    return width


def state_floats(model: ModelConfig) -> int:
    """Return the numbers that a stream keeps: the memory, and the keys and values of the window."""
    state = Transformer(model, rngs=nnx.Rngs(0)).init_state(batch_size=1)
    return sum(
        leaf.size for leaf in jax.tree.leaves(state) if jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating)
    )
