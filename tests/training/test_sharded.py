"""A step on eight devices equals the step on one."""

import jax
import numpy as np
import pytest

from fam_jax import sharding
from fam_jax.config import Config, ConfigError
from fam_jax.training.loop import make_trainer
from tests.training.tiny import assert_close, changed, run, some_batch, start

ALWAYS = changed(train__random_state_passing=1.0)
# Every option of open checkpoints that is divided over a mesh, or chosen per layer.
OPEN = changed(
    ALWAYS,
    model__layer_pattern=("local", "global"),
    model__local_window=3,
    model__qkv_bias=True,
    model__qk_norm=True,
    model__post_norms=True,
    model__norm_offset=True,
    model__logit_softcap=2.0,
    model__attention_softcap=2.0,
)


def mesh_of(data: int, fsdp: int, tensor: int, base: Config = ALWAYS) -> Config:
    return changed(base, mesh__data=data, mesh__fsdp=fsdp, mesh__tensor=tensor)


@pytest.mark.parametrize(
    ("base", "config"),
    [
        (ALWAYS, mesh_of(2, 2, 2, changed(ALWAYS, train__accumulation=2))),
        pytest.param(ALWAYS, mesh_of(2, 1, 4), marks=pytest.mark.slow),
        pytest.param(ALWAYS, mesh_of(0, 4, 1), marks=pytest.mark.slow),
        pytest.param(OPEN, mesh_of(2, 2, 2, OPEN), marks=pytest.mark.slow),
    ],
    ids=["data_fsdp_tensor_accumulation", "data_tensor", "data_fsdp", "options_of_open_checkpoints"],
)
def test_a_sharded_step_is_the_step_of_one_device(base: Config, config: Config) -> None:
    """Compare two steps, the second from the saved FAM. With tensor = 4, four devices share two key/value heads."""
    expected, metrics = run(base, 2)
    trainer = make_trainer(config)
    state = jax.device_put(start(base), jax.tree.map(lambda leaf: leaf.sharding, trainer.state_shapes))
    for leaf in jax.tree.leaves(state):
        assert len(leaf.sharding.device_set) == 8
    for step in range(2):
        batch = jax.device_put(some_batch(step), sharding.batch_sharding(trainer.mesh))
        state, found = trainer.step(state, batch)
        assert_close(jax.tree.map(float, found), metrics[step], rtol=1e-4, atol=1e-6)
    table = state.params["embedding"]["table"]
    spread = config.mesh.fsdp * config.mesh.tensor
    assert table.addressable_shards[0].data.size == table.size // spread
    for part in ("params", "optimizer", "carried", "step"):
        assert_close(getattr(state, part), getattr(expected, part), rtol=1e-4, atol=1e-5)


def test_fresh_parameters_do_not_depend_on_the_mesh() -> None:
    created = make_trainer(mesh_of(2, 2, 2)).create()
    for one, other in zip(
        jax.tree.leaves(created.params), jax.tree.leaves(start(ALWAYS).params), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (mesh_of(3, 1, 1), "config.mesh: data * fsdp * tensor = 3, but there are 8 devices"),
        (mesh_of(0, 3, 1), "config.mesh: fsdp * tensor = 3 does not divide the 8 devices"),
        (mesh_of(0, 1, 8), "config.mesh.tensor: 8 does not divide model.vocab_size 12"),
        (mesh_of(8, 1, 1, changed(ALWAYS, train__accumulation=2)), "config.train.batch_size: 4 rows cannot"),
    ],
)  # fmt: skip
def test_a_mesh_that_does_not_fit_is_refused(config: Config, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_trainer(config)
    assert str(caught.value).startswith(message)
