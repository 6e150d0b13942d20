"""A run's checkpoints with every kind of array, for tests."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from fam_jax.checkpoint import Checkpoints

CONFIG = {"model": {"model_dim": 96, "attention": "xla"}, "train": {"steps": 10}, "mesh": {"fsdp": 2}}


def mesh_of(*shape: int) -> jax.sharding.Mesh:
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def make_state(mesh: jax.sharding.Mesh) -> dict:
    """Return a state with every kind of leaf that training has, sharded over `mesh`."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "embedding": {"table": jax.random.normal(keys[0], (64, 16))},
        "layers": {"up": {"kernel": jax.random.normal(keys[1], (3, 128, 256))}},
        "half": jax.random.normal(keys[2], (8, 4), jnp.bfloat16),
    }
    optimizer = optax.chain(optax.clip(1.0), optax.adafactor(1e-3, momentum=0.9), optax.scale_by_adam())
    state = {
        "params": params,
        "optimizer": optimizer.init(params),
        "step": jnp.int32(7),
        "rng": jax.random.key(5),
        "keys": jax.random.split(jax.random.key(6, impl="rbg"), 4),
        "fam": jnp.zeros((3, 0, 16)),  # as a model without FAM has it
        "no_fam": None,
        "seen": jnp.array([True, False]),
    }

    def place(leaf: jax.Array) -> jax.Array:
        spec = P("fsdp") if leaf.shape == (64, 16) else P()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(place, state)


def structs(state: dict) -> dict:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def bits(leaf: jax.Array | np.ndarray) -> np.ndarray:
    if not isinstance(leaf, np.ndarray) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


def assert_same(found: dict, expected: dict) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(bits(one), bits(other))


def open_run(folder: pathlib.Path, keep: int = 2, **changes: dict) -> Checkpoints:
    return Checkpoints(folder, config=CONFIG | changes, keep=keep)


def write_run(folder: pathlib.Path) -> pathlib.Path:
    """Write a run with steps 10 and 20, and return its folder."""
    state = make_state(mesh_of(2, 4))
    with open_run(folder) as checkpoints:
        checkpoints.save(10, state, {"examples": 10})
        checkpoints.save(
            20,
            state | {"step": state["step"] + 10},
            {"examples": 20, "loss": 0.5, "row": (1, 2), "by_host": {9: 1, 10: 2}},
        )
    return folder
