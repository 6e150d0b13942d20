"""The mesh and the tables that place parameters, optimizer state and batches on it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from fam_jax.config import ConfigError, MeshConfig
from fam_jax.sharding import (
    batch_sharding,
    check_batch,
    make_mesh,
    param_shardings,
    replicated,
    state_shardings,
)

L, D, H, K, HD, F, V, M = 3, 128, 4, 2, 64, 512, 1024, 8


def param_shapes(num_heads: int = H, num_kv_heads: int = K, width: int = D) -> dict:
    """Return every parameter that any config has."""
    shapes = {
        "embedding": {"table": (V, width)},
        "unembedding": {"kernel": (width, V)},
        "final_norm": {"scale": (width,), "bias": (width,)},
        "memory": {"initial_fam": (M, width)},
        "layers": {
            "attention_norm": {"scale": (L, width), "bias": (L, width)},
            "ff_norm": {"scale": (L, width), "bias": (L, width)},
            "query": {"kernel": (L, width, num_heads, HD)},
            "key": {"kernel": (L, width, num_kv_heads, HD)},
            "value": {"kernel": (L, width, num_kv_heads, HD)},
            "output": {"kernel": (L, num_heads, HD, width)},
            "up": {"kernel": (L, width, F)},
            "gate": {"kernel": (L, width, F)},
            "down": {"kernel": (L, F, width)},
            "memory": {"initial_fam": (L, M, width)},
        },
    }
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


def specs(shardings: dict) -> dict:
    return jax.tree.map(lambda sharding: sharding.spec, shardings)


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (8, 1, 1)),
        (MeshConfig(fsdp=2, tensor=2), (2, 2, 2)),
        (MeshConfig(data=1, fsdp=8), (1, 8, 1)),
        (MeshConfig(data=2, fsdp=0, tensor=2), (2, 2, 2)),
    ],
)
def test_mesh_takes_all_devices(config: MeshConfig, shape: tuple[int, ...]) -> None:
    mesh = make_mesh(config)
    assert tuple(mesh.shape.items()) == tuple(zip(("data", "fsdp", "tensor"), shape, strict=True))
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert {device.id for device in mesh.devices.flat} == {device.id for device in jax.devices()}


def test_mesh_on_fewer_devices() -> None:
    mesh = make_mesh(MeshConfig(tensor=2), jax.devices()[4:])
    assert mesh.shape == {"data": 2, "fsdp": 1, "tensor": 2}
    assert {device.id for device in mesh.devices.flat} == {4, 5, 6, 7}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(data=3), r"config\.mesh: data \* fsdp \* tensor = 3, but there are 8 devices"),
        (MeshConfig(data=4, fsdp=4), r"config\.mesh: .* = 16, but there are 8 devices"),
        (MeshConfig(fsdp=3), r"config\.mesh: fsdp \* tensor = 3 does not divide the 8 devices"),
    ],
)
def test_mesh_that_does_not_fit(config: MeshConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_mesh(config)


def test_every_parameter_has_its_place() -> None:
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    placed = specs(param_shardings(param_shapes(), mesh))
    norm = {"scale": P(None, None), "bias": P(None, None)}
    projection = {"kernel": P(None, "fsdp", "tensor", None)}
    assert placed == {
        "embedding": {"table": P("tensor", "fsdp")},
        "unembedding": {"kernel": P("fsdp", "tensor")},
        "final_norm": {"scale": P(None), "bias": P(None)},
        "memory": {"initial_fam": P(None, "fsdp")},
        "layers": {
            "attention_norm": norm,
            "ff_norm": norm,
            "query": projection,
            "key": projection,
            "value": projection,
            "output": {"kernel": P(None, "tensor", None, "fsdp")},
            "up": {"kernel": P(None, "fsdp", "tensor")},
            "gate": {"kernel": P(None, "fsdp", "tensor")},
            "down": {"kernel": P(None, "tensor", "fsdp")},
            "memory": {"initial_fam": P(None, None, "fsdp")},
        },
    }


def test_multi_query_heads_are_copied() -> None:
    mesh = make_mesh(MeshConfig(tensor=4))
    layers = specs(param_shardings(param_shapes(num_kv_heads=1), mesh))["layers"]
    assert layers["key"]["kernel"] == P(None, "fsdp", None, None)
    assert layers["query"]["kernel"] == P(None, "fsdp", "tensor", None)


@pytest.mark.parametrize(
    ("shapes", "config", "message"),
    [
        (
            param_shapes(num_heads=6),
            MeshConfig(tensor=4),
            r"mesh\.tensor: 4 does not divide model\.num_heads 6",
        ),
        (param_shapes(width=132), MeshConfig(fsdp=8), r"mesh\.fsdp: 8 does not divide model\.model_dim 132"),
    ],
)
def test_indivisible_parameter_names_the_fields(shapes: dict, config: MeshConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        param_shardings(shapes, make_mesh(config))


@pytest.mark.parametrize("extra", [{"router": {"kernel": (4, 4)}}, {"final_norm": {"scale": (4, 4)}}])
def test_unknown_parameter_is_an_error(extra: dict) -> None:
    shapes = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32), extra, is_leaf=lambda x: isinstance(x, tuple)
    )
    with pytest.raises(ValueError, match=r"not in fam_jax\.sharding\.PARAMETERS"):
        param_shardings(shapes, make_mesh(MeshConfig()))


def test_batch() -> None:
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    tokens = jax.device_put(jnp.zeros((8, 5)), batch_sharding(mesh))
    assert tokens.addressable_shards[0].data.shape == (2, 5)
    assert jax.device_put(tokens, replicated(mesh)).addressable_shards[0].data.shape == (8, 5)
    check_batch(mesh, 8, "train.batch_size")
    with pytest.raises(ConfigError, match=r"config\.train\.batch_size: 6 rows .* = 4 devices"):
        check_batch(mesh, 6, "train.batch_size")


def optimizer() -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_factored_rms(min_dim_size_to_factor=128),
        optax.scale_by_adam(),
        optax.ema(0.9),
    )


def init_by_layer(params: dict) -> dict:
    """Create state as training does: by `vmap` over L for the layers, and separately for the rest."""
    rest = {name: value for name, value in params.items() if name != "layers"}
    return {"layers": jax.vmap(optimizer().init)(params["layers"]), "rest": optimizer().init(rest)}


def test_moments_are_placed_as_their_parameters() -> None:
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    params = param_shapes()
    expected = param_shardings(params, mesh)
    _, _, adam, average = state_shardings(jax.eval_shape(optimizer().init, params), params, mesh)
    assert adam.mu == adam.nu == average.ema == expected
    assert adam.count == replicated(mesh)

    state = state_shardings(jax.eval_shape(init_by_layer, params), params, mesh)
    assert state["layers"][2].mu == expected["layers"]
    assert state["rest"][2].mu == {name: value for name, value in expected.items() if name != "layers"}
    assert state_shardings(params, params, mesh) == expected


@pytest.mark.parametrize("init", [optimizer().init, init_by_layer])
def test_factored_moments_keep_the_axes_of_their_dimensions(init) -> None:
    """The remaining dimensions of a moment are placed like those of its parameter."""
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    params = param_shapes()
    state = jax.eval_shape(init, params)
    placed = {
        jax.tree_util.keystr(path): (leaf.shape, sharding.spec)
        for (path, leaf), (_, sharding) in zip(
            _leaves(state), _leaves(state_shardings(state, params, mesh)), strict=True
        )
    }

    def find(moment: str, *ends: str) -> tuple:
        return next(v for k, v in placed.items() if moment in k and "".join(f"['{e}']" for e in ends) in k)

    assert find("v_row", "up", "kernel") == ((L, D), P(None, "fsdp"))
    assert find("v_col", "up", "kernel") == ((L, F), P(None, "tensor"))
    assert find("v_row", "down", "kernel") == ((L, D), P(None, "fsdp"))
    assert find("v_col", "down", "kernel") == ((L, F), P(None, "tensor"))
    assert find("v_row", "embedding", "table") == ((D,), P("fsdp"))
    assert find("v_col", "embedding", "table") == ((V,), P("tensor"))
    # Heads of 64 are too small to be factored: optax leaves a placeholder, and keeps `v` whole.
    assert find("v_row", "query", "kernel")[1] == P()
    assert find(".v[", "query", "kernel") == ((L, D, H, HD), P(None, "fsdp", "tensor", None))


@pytest.mark.slow
def test_sharded_update_equals_update_on_one_device() -> None:
    shapes = param_shapes()
    shapes = {
        "embedding": shapes["embedding"],
        "layers": {name: shapes["layers"][name] for name in ("up", "key")},
    }
    keys = iter(jax.random.split(jax.random.key(0), 100))
    params = jax.tree.map(lambda s: jax.random.normal(next(keys), s.shape), shapes)
    grads = jax.tree.map(lambda s: jax.random.normal(next(keys), s.shape), shapes)
    transform = optax.chain(optax.scale_by_factored_rms(min_dim_size_to_factor=128), optax.ema(0.9))
    expected, _ = jax.jit(transform.update)(grads, transform.init(params), params)

    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    places = param_shardings(shapes, mesh)
    state = jax.eval_shape(transform.init, shapes)
    state_places = state_shardings(state, shapes, mesh)
    sharded_state = jax.jit(transform.init, out_shardings=state_places)(jax.device_put(params, places))
    found, new_state = jax.jit(transform.update, out_shardings=(places, state_places))(
        jax.device_put(grads, places), sharded_state, jax.device_put(params, places)
    )
    assert jax.tree.map(lambda x: x.sharding, new_state) == state_places
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_state_that_belongs_to_no_parameter_is_replicated() -> None:
    mesh = make_mesh(MeshConfig(fsdp=2))
    state = {"fam": jax.ShapeDtypeStruct((L, M, D), jnp.float32), "step": jax.ShapeDtypeStruct((), jnp.int32)}
    placed = state_shardings(state, param_shapes(), mesh)
    assert placed == {"fam": NamedSharding(mesh, P()), "step": NamedSharding(mesh, P())}


def _leaves(tree: object) -> list:
    return jax.tree_util.tree_flatten_with_path(tree)[0]
