"""Losses that a memory adds to the training loss: what is summed, over what, and that nothing else asks for it."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fam_jax.config import MemoryConfig, ModelConfig, group, setting
from fam_jax.layers.decoder_layer import DecoderLayer
from fam_jax.memories import registry
from fam_jax.memories.interface import Memory, Stream
from fam_jax.memories.window_cache import BlockWindowConfig, Position, WindowState, add_auxiliary_loss
from fam_jax.model import auxiliary_loss, empty_state, with_auxiliary_loss
from fam_jax.training.loop import make_trainer
from tests.memories import toys
from tests.memories.cases import CASES, random_parameters
from tests.model.tiny import Reader, build
from tests.training.tiny import ROWS, assert_close, changed, run, some_batch, start


def squares(state: WindowState, weight: float) -> Any:
    """Return `state` with the mean square (B,) of the block's values added to its losses."""
    return add_auxiliary_loss(state, lambda: weight * jnp.square(state.block_values).mean(axis=(1, 2, 3)))


@group("model.memory", effect="state")
class SquaresConfig(BlockWindowConfig):
    """The group of :class:`Squares`."""

    kind: str = setting(default="toy_squares", doc="The architecture.")
    weight: float = setting(default=0.5, doc="Weight of the loss.", minimum=0, effect="training")

    @property
    def has_state(self) -> bool:
        return False

    @property
    def has_auxiliary_loss(self) -> bool:
        return self.weight > 0


class Squares(Memory[WindowState]):
    """Block Sliding Window Attention that keeps values small."""

    Config: ClassVar[type[MemoryConfig]] = SquaresConfig

    def close_block(
        self, layer: DecoderLayer, state: WindowState, stream: Stream, position: Position
    ) -> tuple[WindowState, Stream]:
        return super().close_block(layer, squares(state, self.model.memory.weight), stream, position)


@group("model.memory", effect="state")
class SquaresInTurnConfig(toys.ReadWriteConfig):
    """The group of :class:`SquaresInTurn`."""

    kind: str = setting(default="toy_squares_in_turn", doc="The architecture.")

    @property
    def has_auxiliary_loss(self) -> bool:
        return True


class SquaresInTurn(toys.ReadWriteRows):
    """The same loss in a memory whose top layer feeds the bottom one."""

    Config: ClassVar[type[MemoryConfig]] = SquaresInTurnConfig

    def close_block(
        self, layer: DecoderLayer, state: Any, stream: Stream, position: Position
    ) -> tuple[Any, Stream]:
        return super().close_block(layer, squares(state, 0.5), stream, position)


@pytest.fixture(scope="module", autouse=True)
def squares_memories(own_memories: None) -> None:
    """Register the memories; `own_memories` removes them afterwards."""
    registry.register_memory("toy_squares", Squares)
    registry.register_memory("toy_squares_in_turn", SquaresInTurn)


def model_of(memory: MemoryConfig, **values: Any) -> ModelConfig:
    return dataclasses.replace(CASES["bswa"].model, memory=memory, **values)


LOCAL = {"num_layers": 3, "layer_pattern": ("local", "global"), "local_window": 3}


@pytest.mark.parametrize(
    ("memory", "values"),
    [(SquaresConfig(), {}), (SquaresConfig(), LOCAL), (SquaresInTurnConfig(), {})],
    ids=["by layer", "between local layers", "in turn"],
)
def test_losses_are_summed_over_complete_blocks_and_layers(memory: Any, values: dict[str, Any]) -> None:
    """The sums equal those of the values in the state after every block; an unfinished block adds nothing."""
    model = model_of(memory, **values)
    tokens = np.random.default_rng(0).integers(0, 16, (2, 14)).astype(np.int32)
    with jax.enable_x64(True):
        params = random_parameters(model)

        @jax.jit
        def read(tokens: jax.Array) -> Any:
            begun = with_auxiliary_loss(model, empty_state(model, 2, past_slots=False))
            hidden, after = build(model, params).hidden(tokens, begun, aligned=True)
            return hidden, auxiliary_loss(after)

        hidden, found = read(tokens)
        one, expected = Reader(model, params, 2), np.zeros(2)
        own = np.arange(model.num_layers) % 2 == 1 if values else slice(None)
        for begin in (0, 4, 8):
            one.read(tokens[:, begin : begin + 4], aligned=True)
            newest = np.asarray(one.state.layers.values)[own, :, -1]
            expected += 0.5 * np.square(newest).mean(axis=(2, 3, 4)).sum(axis=0)
        assert one.state.layers.auxiliary_loss is None
        plain, _ = build(model, params).hidden(tokens, empty_state(model, 2, past_slots=False), aligned=True)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_allclose(hidden, plain, rtol=1e-12)


def test_a_step_adds_the_mean_over_rows_and_blocks() -> None:
    """The objective and the update have the loss in them, and the metric is its share of the objective."""
    config = changed(model__memory=SquaresConfig(weight=2.0))
    model, batch = config.model, some_batch(0)
    before = start(config)
    params = jax.tree.map(np.array, before.params)
    state, (metrics,) = run(config, 1, before)
    begun = with_auxiliary_loss(model, empty_state(model, ROWS, past_slots=False))
    _, after = build(model, params).hidden(jnp.asarray(batch["inputs"]), begun, aligned=True)
    assert metrics["auxiliary_loss"] == pytest.approx(float(auxiliary_loss(after).mean()) / 3, rel=1e-5)
    assert metrics["objective"] == pytest.approx(metrics["loss"] + metrics["auxiliary_loss"], rel=1e-6)
    without = changed(model__memory=SquaresConfig(weight=0.0))
    other, (plain,) = run(without, 1, start(without))
    assert "auxiliary_loss" not in plain
    assert plain["objective"] == pytest.approx(metrics["loss"], rel=1e-6)
    assert plain["gradient_norm"] != pytest.approx(metrics["gradient_norm"], rel=1e-3)
    values, others = (np.asarray(each.params["layers"]["value"]["kernel"]) for each in (state, other))
    assert np.abs(values - others).max() > 1e-4


@pytest.mark.slow
def test_accumulation_and_meshes_change_nothing() -> None:
    config = changed(model__memory=SquaresConfig(weight=2.0))
    whole, metrics = run(config, 2)
    parts, same = run(changed(config, train__accumulation=4, model__remat="full"), 2)
    assert_close(same, metrics, rtol=1e-4, atol=1e-6)
    assert_close(parts.params, whole.params, rtol=1e-4, atol=1e-6)
    trainer = make_trainer(changed(config, mesh__data=2, mesh__fsdp=2, mesh__tensor=2))
    state = jax.device_put(start(config), jax.tree.map(lambda leaf: leaf.sharding, trainer.state_shapes))
    for step in range(2):
        state, found = trainer.step(state, some_batch(step))
        assert_close(jax.tree.map(float, found), metrics[step], rtol=1e-4, atol=1e-6)
