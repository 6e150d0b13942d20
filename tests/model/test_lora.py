"""LoRA equals the base model at the start and the merged model at any time; only its updates have gradients."""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fam_jax.config import Config, ConfigError, LoraConfig, ModelConfig
from fam_jax.memories import chain
from fam_jax.model import create_model, empty_state, from_dict, lora, to_dict
from tests.model.test_gradients import plain_scan, score
from tests.model.tiny import Reader, build, params_of, some_tokens, variant
from tests.variants import rest_slow

LORA = LoraConfig(rank=3, alpha=6.0)
TOKENS = some_tokens(2, 14)
OTHER_LAYERS = {
    "init": "prefix",
    "norm": "layernorm",
    "activation": "gelu",
    "tie_embeddings": False,
    "num_kv_heads": 1,
}


@functools.cache
def structure(model: ModelConfig, config: LoraConfig = LORA) -> tuple[Any, Any]:
    return nnx.split(nnx.eval_shape(lambda: create_model(Config(model=model, lora=config), rngs=nnx.Rngs(0))))


def adapted_params(model: ModelConfig, config: LoraConfig = LORA, *, trained: bool = True) -> dict[str, Any]:
    """Return the oracle's random parameters, with initial or random low-rank updates."""
    rng = np.random.default_rng(3)
    leaves = lora.flatten(to_dict(structure(model, config)[1]))

    def fresh(name: str, shape: tuple[int, ...]) -> np.ndarray:
        values = 0.3 * rng.normal(size=shape)
        return values if trained or name.endswith("lora_a") else np.zeros_like(values)

    adapters = {name: fresh(name, leaf.shape) for name, leaf in leaves.items() if "lora_" in name}
    kind = "float64" if model.dtype == "float64" else "float32"
    return jax.tree.map(lambda x: jnp.asarray(x, kind), lora.join(params_of(model), lora.unflatten(adapters)))


def logits(model: ModelConfig, params: dict[str, Any], *, aligned: bool) -> np.ndarray:
    @jax.jit
    def call(params: Any) -> jax.Array:
        graphdef, abstract = structure(model)
        adapted = nnx.merge(graphdef, from_dict(abstract, params))
        return adapted(jnp.asarray(TOKENS), adapted.init_state(len(TOKENS)), aligned=aligned)[0]

    return np.asarray(call(params))


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "anywhere"])
@pytest.mark.parametrize("changes", [{}, OTHER_LAYERS], ids=["default", "other layers"])
def test_merged_is_applied(changes: dict[str, Any], aligned: bool) -> None:
    model = variant(dtype="float64", **changes)
    with jax.enable_x64(True):
        params = adapted_params(model)
        applied = logits(model, params, aligned=aligned)
        merged = lora.merge(params, LORA)
        assert jax.tree.structure(merged) == jax.tree.structure(params_of(model))
        expected = Reader(model, merged, len(TOKENS)).read(TOKENS, aligned=aligned)
        base = Reader(model, params_of(model), len(TOKENS)).read(TOKENS, aligned=aligned)
    np.testing.assert_allclose(applied, expected, rtol=1e-9, atol=1e-10)
    assert np.abs(expected - base).max() > 0.1, "the updates do nothing"


@pytest.mark.parametrize("dtype", rest_slow(["float32", "bfloat16"], ["float32"]))
def test_at_the_start_it_is_the_base_bit_for_bit(dtype: str) -> None:
    model = variant(dtype=dtype)
    params = adapted_params(model, trained=False)
    expected = Reader(model, params_of(model), len(TOKENS)).read(TOKENS, aligned=True)
    np.testing.assert_array_equal(logits(model, params, aligned=True), expected)
    stored = lora.stored(params, Config(model=model, lora=LORA))  # frozen kernels in the dtype of activations
    assert stored["layers"]["query"]["kernel"].dtype == dtype
    np.testing.assert_array_equal(logits(model, stored, aligned=True), expected)
    for merged, base in zip(
        jax.tree.leaves(lora.merge(params, LORA)), jax.tree.leaves(params_of(model)), strict=True
    ):
        np.testing.assert_array_equal(merged, base)


def loss_of(model: ModelConfig, config: LoraConfig) -> Any:
    """Return the loss as a function of trained and frozen parameters."""
    graphdef, abstract = structure(model, config)

    def loss(trained: Any, frozen: Any) -> jax.Array:
        adapted = nnx.merge(graphdef, from_dict(abstract, lora.join(trained, frozen)))
        memory = empty_state(model, len(TOKENS), past_slots=False)
        return score(adapted(jnp.asarray(TOKENS), memory, aligned=True)[0])

    return loss


def gradients(model: ModelConfig) -> Any:
    return jax.jit(jax.grad(loss_of(model, LORA)))(*lora.divide(adapted_params(model), LORA))


@pytest.mark.parametrize(
    "changes",
    [{"remat": "full"}, pytest.param(OTHER_LAYERS, marks=pytest.mark.slow)],
    ids=["remat", "other layers"],
)
def test_gradients_through_the_chain(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Updates and the initial FAM get the gradients of a plain scan over blocks; nothing else gets one."""
    model = variant(dtype="float64", **changes)
    with jax.enable_x64(True):
        deferred = gradients(model)
        calls = []
        monkeypatch.setattr(chain, "scan_updates", lambda *args: calls.append(1) or plain_scan(*args))
        plain = gradients(model)
    assert calls
    names = set(lora.flatten(deferred))
    adapters = {f"layers/{name}/{part}" for name in projections(model) for part in lora.ADAPTERS}
    assert names == adapters | {f"{'layers/' if model.memory.init == 'prefix' else ''}memory/initial_fam"}
    for name, gradient in lora.flatten(deferred).items():
        assert np.abs(gradient).max() > 1e-6, name
        np.testing.assert_allclose(gradient, lora.flatten(plain)[name], rtol=1e-9, atol=1e-10, err_msg=name)


def projections(model: ModelConfig) -> list[str]:
    paths = [path.split("/") for path in lora.flatten(params_of(model))]
    return [path[1] for path in paths if path[0] == "layers" and path[-1] == "kernel"]


def products(jaxpr: Any) -> set[tuple[int, ...]]:
    """Return the shapes of the results of all matrix products, including those of inner jaxprs."""
    found = set()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.add(equation.outvars[0].aval.shape)
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                found |= products(inner) if hasattr(inner, "eqns") else set()
    return found


def test_no_gradient_of_a_frozen_kernel_is_formed() -> None:
    """No product has the shape of a kernel, neither for tokens nor in the chain of updates."""
    model = variant(head_dim=6, num_kv_heads=4, ff_dim=20)  # no number of rows is a kernel's size
    kernels = {
        shape
        for kernel in (structure(model)[1]["layers"][name]["kernel"].shape for name in projections(model))
        for split in range(2, len(kernel))
        for shape in itertools.permutations((math.prod(kernel[1:split]), math.prod(kernel[split:])))
    }

    def formed(config: LoraConfig) -> set[tuple[int, ...]]:
        loss = jax.grad(loss_of(model, config))
        shapes = lora.divide(to_dict(structure(model, config)[1]), config)
        return products(jax.make_jaxpr(loss)(*shapes).jaxpr) & kernels

    assert formed(LoraConfig()) == {(8, 24), (24, 8), (8, 20), (20, 8)}
    assert not formed(LORA)


def test_targets_choose_the_projections() -> None:
    config = LoraConfig(rank=2, targets=("layers/query/kernel", "layers/v*/kernel"))
    params = adapted_params(variant(), config)
    assert {name for name, leaves in params["layers"].items() if "lora_a" in [*leaves]} == {"query", "value"}
    model = variant()
    assert params["layers"]["query"]["lora_a"].shape == (model.num_layers, model.model_dim, 2)
    heads = (model.num_kv_heads, model.head_dim)
    assert params["layers"]["value"]["lora_b"].shape == (model.num_layers, 2, *heads)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ("layers/qery/kernel",)}, "config.lora.targets: 'layers/qery/kernel' matches none of layers/q"),
        ({"targets": ("embedding/table",)}, "config.lora.targets: 'embedding/table' matches none of layers/"),
        ({"train": ("final_norm/scael",)}, "config.lora.train: 'final_norm/scael' matches none of "),
        (
            {"train": ("layers/*",)},
            "config.lora.train: 'layers/*' matches layers/down/kernel, which config.lora.targets",
        ),
    ],
)  # fmt: skip
def test_a_pattern_that_cannot_be_meant_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        structure(variant(), dataclasses.replace(LORA, **changes))
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_what_is_trained_beside_the_updates() -> None:
    config = LoraConfig(rank=2, train=("final_norm/*", "*memory/*"))
    trained, frozen = lora.divide(adapted_params(variant(), config), config)
    beside = {name for name in lora.flatten(trained) if not name.endswith(lora.ADAPTERS)}
    assert beside == {"final_norm/scale", "memory/initial_fam"}
    assert not set(lora.flatten(frozen)) & set(lora.flatten(trained))
    assert build(variant(), lora.merge(lora.join(trained, frozen), config)) is not None
