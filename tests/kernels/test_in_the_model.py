"""The whole model computes the same logits, state and gradients with the kernels and with XLA."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fam_jax.config import MeshConfig
from fam_jax.model import empty_state
from fam_jax.sharding import make_mesh, replicated, traced_for
from tests.kernels.cases import attend, draw
from tests.kernels.test_block_attention import TRAINING, single
from tests.model.tiny import build, params_of, some_tokens, variant
from tests.variants import rest_slow

SHAPE = {"block_size": 128, "head_dim": 8, "num_heads": 2, "num_kv_heads": 1, "segments": 1}


@pytest.mark.parametrize(
    "past_slots", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["training", "prefill"]
)
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"length": 3}, marks=pytest.mark.slow),
        pytest.param({"previous_blocks": 2, "stop_gradient": True}, marks=pytest.mark.slow),
        {"length": 16, "head_dim": 128},
        {"length": 16, "head_dim": 128, "segments": 0},
    ],
    ids=["padded FAM", "two FAMs, stop-gradient", "all kernels", "all kernels, no past blocks"],
)
def test_kernels_and_xla_agree(changes: dict[str, Any], past_slots: bool) -> None:
    tokens = jnp.asarray(some_tokens(1, 304))
    params = params_of(variant(**SHAPE | changes))
    weights = np.random.default_rng(1).normal(size=(1, 304, 11)).astype(np.float32)

    def result(attention: str) -> Any:
        config = variant(**SHAPE | changes, attention=attention)

        @jax.jit
        def call(params: Any) -> Any:
            def loss(params: Any) -> Any:
                model = build(config, params)
                logits, memory = model(tokens, empty_state(config, 1, past_slots=past_slots), aligned=True)
                return (weights * logits).sum(), (logits, memory)

            return jax.value_and_grad(loss, has_aux=True)(params)

        (_, outputs), gradients = call(params)
        return outputs, gradients

    got, want = result("pallas_interpret"), result("xla")

    def close(path: Any, a: jax.Array, b: jax.Array) -> None:
        scale = max(float(np.abs(b).max(initial=0)), 1e-3)
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * scale, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(close, got, want)


@pytest.mark.parametrize("kv_heads", rest_slow([1, 2], [2]))
def test_devices_share_rows_and_heads(kv_heads: int) -> None:
    """On a mesh (fsdp 2, tensor 2) each device computes its part, and gradients of shared arrays are summed."""
    case = dataclasses.replace(TRAINING, heads=4, kv_heads=kv_heads, length=8).wider()
    case = dataclasses.replace(case, heads=4, kv_heads=kv_heads)
    call = draw(case)
    inputs = single(call.inputs)
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])

    def gradients(inputs: Any) -> Any:
        out, pull = jax.vjp(lambda x: attend(case, call, x, "pallas_interpret"), inputs)
        return out, pull(call.cotangent.astype(np.float32))

    got = jax.jit(traced_for(mesh, gradients), in_shardings=replicated(mesh))(inputs)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), got, jax.jit(gradients)(inputs)
    )


def equations(jaxpr: Any) -> Iterator[Any]:
    """Yield the equations of a jaxpr and of all jaxprs in it."""
    for equation in jaxpr.eqns:
        yield equation
        for part in jax.tree.leaves(
            equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(part, "jaxpr", part)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_cached_keys_get_gradients_only_if_somebody_asks_for_them(
    remat: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training, rows that go on start from a state without gradient; the kernel then skips that of its keys.

    This holds through the scan over layers and through rematerialization.
    """
    monkeypatch.setattr(
        "fam_jax.kernels.pallas.block_attention.target_chip", lambda: "TPU v5p"
    )  # only traced
    config = variant(**SHAPE, length=16, remat=remat, attention="pallas")
    params, tokens = params_of(config), jnp.asarray(some_tokens(1, 256))
    state = empty_state(config, 1)

    def loss(params: Any, state: Any) -> jax.Array:
        return build(config, params)(tokens, state, aligned=True)[0].sum()

    def results(argnums: Any) -> list[int]:
        traced = jax.make_jaxpr(jax.grad(loss, argnums=argnums, allow_int=True))(params, state)
        return [
            len(each.outvars)
            for each in equations(traced.jaxpr)
            if each.primitive.name == "pallas_call" and "block_attention_backward" in str(each.params)
        ]

    # Queries, keys, values, extra keys and values; and the keys and values of the past.
    assert results(0) == [5]
    assert results((0, 1)) == [7]
