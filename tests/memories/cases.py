"""Every memory at a size that compiles in seconds, with the gradient reach that it must have."""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from examples.running_mean import RunningMean, RunningMeanConfig
from fam_jax.config import MemoryConfig, ModelConfig
from fam_jax.memories.armt import ArmtConfig
from fam_jax.memories.autocompressor import AutoCompressorConfig
from fam_jax.memories.block_recurrent import BlockRecurrentConfig
from fam_jax.memories.compressive import CompressiveConfig
from fam_jax.memories.fam import FamConfig
from fam_jax.memories.fam_losses import FamLossesConfig
from fam_jax.memories.feedback import FeedbackConfig
from fam_jax.memories.fm import FeedbackMemoryConfig
from fam_jax.memories.infini import InfiniConfig
from fam_jax.memories.longformer import LongformerConfig
from fam_jax.memories.prmt import PrmtConfig
from fam_jax.memories.registry import memory_class, memory_kinds
from fam_jax.memories.rmt import RmtConfig
from fam_jax.memories.sum_fam import SummaryFamConfig
from fam_jax.memories.titans import TitansGateConfig, TitansLayerConfig
from fam_jax.memories.titans_mac import TitansContextConfig
from fam_jax.memories.window import (
    BlockSlidingWindowConfig,
    FullConfig,
    SlidingWindowConfig,
    TransformerXLConfig,
)
from fam_jax.model import Transformer, to_dict
from tests.memories import toys

SIZE, LAYERS, BLOCKS = 4, 2, 4

# (block of the loss, block of the embeddings) -> whether a gradient may flow.
Reach = Callable[[int, int], bool]


class Case(NamedTuple):
    """A memory, and which blocks' losses reach which blocks' embeddings."""

    memory: MemoryConfig
    reach: Reach

    @property
    def model(self) -> ModelConfig:
        """Return a float64 model with two layers and grouped queries.

        Embeddings are not tied: the gradient of a token's embedding then comes from its input alone.
        """
        return ModelConfig(
            vocab_size=SIZE * BLOCKS + 3,
            num_layers=LAYERS,
            model_dim=8,
            num_heads=4,
            num_kv_heads=2,
            head_dim=4,
            ff_dim=12,
            tie_embeddings=False,
            dtype="float64",
            block_size=SIZE,
            memory=self.memory,
        )


def blocks_back(segments: int) -> Reach:
    """Return the reach of layers that each look `segments` blocks back."""
    return lambda loss, embedding: 0 <= loss - embedding <= LAYERS * segments


def tokens_back(window: int) -> Reach:
    """Return the reach of layers that each look window - 1 tokens back."""

    def reach(loss: int, embedding: int) -> bool:
        nearest = (loss - embedding) * SIZE - (SIZE - 1) if loss > embedding else 0
        return loss >= embedding and nearest <= LAYERS * (window - 1)

    return reach


def everything(loss: int, embedding: int) -> bool:
    """Reach the whole past."""
    return loss >= embedding


def own_block(loss: int, embedding: int) -> bool:
    """Reach the own block only: no gradient crosses a block border."""
    return loss == embedding


# Memories of the tests. `conftest.py` registers them for the tests of this folder alone.
OWN = {
    "running_mean": RunningMean,
    "toy_read_write": toys.ReadWriteRows,
    "toy_associative": toys.AssociativeRows,
}

CASES = {
    "full": Case(FullConfig(context=SIZE * BLOCKS), everything),
    "swa": Case(SlidingWindowConfig(window=3), tokens_back(3)),
    "bswa": Case(BlockSlidingWindowConfig(segments=1), blocks_back(1)),
    "bswa, own block": Case(BlockSlidingWindowConfig(segments=0), own_block),
    "bswa, window": Case(BlockSlidingWindowConfig(segments=1, window=2), tokens_back(2)),
    "bswa, stop-gradient": Case(BlockSlidingWindowConfig(segments=1, stop_gradient=True), own_block),
    "longformer": Case(LongformerConfig(windows=(2, 3), dilations=(1, 2)), lambda i, j: 0 <= i - j <= 2),
    "longformer, all layers": Case(
        LongformerConfig(windows=(3,), dilations=(2,), dilated_heads=1), blocks_back(1)
    ),
    "transformer_xl": Case(TransformerXLConfig(segments=1), own_block),
    "block_recurrent": Case(BlockRecurrentConfig(length=3, layers_above=1, form="dual"), everything),
    "block_recurrent, lstm": Case(
        BlockRecurrentConfig(length=3, layers_above=0, segments=0, gate="lstm"), everything
    ),
    "block_recurrent, single, stop-gradient": Case(
        BlockRecurrentConfig(length=2, layers_above=0, form="single", stop_gradient=True), everything
    ),
    "compressive": Case(CompressiveConfig(compressed_rows=2, compressed_blocks=2), own_block),
    "compressive, centre, gradients": Case(
        CompressiveConfig(segments=0, compressed_rows=1, positions="centre", stop_gradient=False),
        blocks_back(1),
    ),
    "compressive, mean, gradients": Case(
        CompressiveConfig(compressed_rows=2, compression="mean", window=3, stop_gradient=False), everything
    ),
    "fam": Case(FamConfig(length=2, segments=0), everything),
    "fam, prefix, R=2": Case(FamConfig(length=2, init="prefix", previous_blocks=2), everything),
    "fam, zero": Case(FamConfig(length=2, segments=1, positions="zero"), everything),
    "fam, float, stop-gradient": Case(
        FamConfig(length=3, segments=1, positions="float", stop_gradient=True), everything
    ),
    "fam_losses": Case(FamLossesConfig(length=2, segments=1, diversity=0.1, reconstruction=0.1), everything),
    "sum_fam": Case(SummaryFamConfig(length=2, segments=0), everything),
    "sum_fam, none, R=2": Case(
        SummaryFamConfig(length=2, segments=1, residual="none", previous_blocks=2), everything
    ),
    "fm": Case(FeedbackMemoryConfig(segments=1), everything),
    "fm, stop-gradient": Case(FeedbackMemoryConfig(segments=1, stop_gradient=True), own_block),
    "titans_mag": Case(TitansGateConfig(segments=0, chunk=4, depth=1, persistent=2), everything),
    "titans_mag, chunks": Case(TitansGateConfig(segments=1, chunk=2, persistent=2), everything),
    "titans_mag, heads": Case(TitansGateConfig(chunk=4, heads=2, depth=3, stop_gradient=True), everything),
    "titans_mal": Case(TitansLayerConfig(segments=1, chunk=4, depth=1, persistent=0), everything),
    "titans_mac": Case(TitansContextConfig(chunk=2, persistent=2), everything),
    "titans_mac, own": Case(TitansContextConfig(segments=1, chunk=1, retrieved="own"), everything),
    "infini": Case(InfiniConfig(), everything),
    "infini, delta": Case(InfiniConfig(update="delta"), everything),
    "infini, delta, window": Case(InfiniConfig(update="delta", segments=1, window=3), everything),
    "armt": Case(ArmtConfig(length=2, key_dim=6), everything),
    "armt, no correction, many rows": Case(
        ArmtConfig(length=SIZE + 1, key_dim=4, dpfp_nu=2, correction=False, segments=1), everything
    ),
    "prmt": Case(PrmtConfig(length=2), everything),
    "prmt, prompt, before, window": Case(
        PrmtConfig(length=2, init="prompt", query_positions="before", segments=1), everything
    ),
    "prmt, once, many rows": Case(
        PrmtConfig(length=SIZE + 1, memory_twice=False, first_residual=False), everything
    ),
    "prmt, not causal": Case(PrmtConfig(length=3, causal=False, first_residual=False), everything),
    "rmt": Case(RmtConfig(length=2), everything),
    "rmt, causal, M > C": Case(RmtConfig(length=5, mask="causal"), everything),
    "rmt, window": Case(RmtConfig(length=2, segments=1, stop_gradient=True), everything),
    "autocompressor": Case(AutoCompressorConfig(length=2, summaries=3), everything),
    "autocompressor, two kept": Case(AutoCompressorConfig(length=2, summaries=2), everything),
    "autocompressor, fixed, M > C": Case(
        AutoCompressorConfig(length=5, summaries=2, summary_positions="fixed"), everything
    ),
    "autocompressor, window": Case(AutoCompressorConfig(length=2, summaries=1, segments=1), everything),
    "feedback": Case(FeedbackConfig(segments=1), everything),
    "feedback, sees itself": Case(FeedbackConfig(segments=2, sees_itself=True), everything),
    "feedback, stop-gradient": Case(FeedbackConfig(segments=1, stop_gradient=True), own_block),
    "running_mean": Case(RunningMeanConfig(segments=1, rate=0.5), everything),
    "read_write": Case(toys.ReadWriteConfig(segments=0), everything),
    "read_write, window": Case(toys.ReadWriteConfig(segments=1, window=3), everything),
    "associative": Case(toys.AssociativeConfig(segments=0), everything),
}
# One of every kind, and what differs most; the other cases are slow tests. These run T1, T3 and T5.
ALWAYS = (
    "full", "swa", "bswa", "longformer", "transformer_xl", "block_recurrent", "compressive", "fam", "fam, prefix, R=2",
    "sum_fam", "fm", "titans_mag", "titans_mac", "infini", "armt", "prmt", "rmt",
    "autocompressor", "feedback", "running_mean", "read_write", "associative",
)  # fmt: skip
# Those that run all tests: one of each way to read and to write. Gradients take longest to compile.
IN_FULL = (
    "full", "swa", "bswa", "transformer_xl", "fam", "fam, prefix, R=2", "armt", "rmt", "running_mean",
)  # fmt: skip
# Kinds that differ little from another one, which stands for them.
ALIKE = {"fam_losses": "fam", "titans_mal": "titans_mag"}
assert {*IN_FULL} <= {*ALWAYS}
assert {CASES[name].memory.kind for name in ALWAYS} | {*ALIKE} == {
    case.memory.kind for case in CASES.values()
}
assert {case.memory.kind for case in CASES.values()} == {*memory_kinds(), *OWN}, (
    "a registered memory has no case"
)


def class_of(kind: str) -> Any:
    """Return the class of a memory, even while those of the tests are not registered."""
    return OWN[kind] if kind in OWN else memory_class(kind)


def random_parameters(model: ModelConfig, seed: int = 0) -> dict[str, Any]:
    """Return random values for every parameter: tests must also cover parameters that start at zero."""
    shapes = to_dict(nnx.state(nnx.eval_shape(lambda: Transformer(model, rngs=nnx.Rngs(0)))))

    def fill(path: Any, leaf: Any) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        values = np.random.default_rng([seed, zlib.crc32(name.encode())]).normal(size=leaf.shape)
        if name.endswith("scale"):
            return jnp.asarray(1 + 0.3 * values, model.dtype)
        fan_in = model.ff_dim if "down" in name else model.model_dim
        return jnp.asarray(values / np.sqrt(fan_in), model.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)
