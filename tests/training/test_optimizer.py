"""The optimizer compared with an independent NumPy implementation, written from the papers."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fam_jax.config import OptimizerConfig
from fam_jax.model.parameters import unflatten
from fam_jax.training.optimizer import learning_rate, make_optimizer, per_layer

STEPS = 6
# With 9 layers, a stack of norms is large enough to be factored like a matrix.
LAYERS, WIDTH, WIDE = 9, 8, 16

BASE = OptimizerConfig(
    name="adafactor",
    learning_rate=0.1,
    beta1=0.9,
    beta2=0.99,
    min_factored_dim=8,
    clip_norm=0.0,
    epsilon=1e-30,
)
SHAPES = {
    "embedding/table": (11, WIDTH),  # factored
    "final_norm/scale": (WIDTH,),
    "memory/initial_fam": (3, WIDTH),  # a matrix, too small to be factored
    "layers/norm/scale": (LAYERS, WIDTH),
    "layers/up/kernel": (LAYERS, WIDTH, WIDE),  # factored
    "layers/query/kernel": (LAYERS, WIDTH, 2, WIDE),  # factored for each head
    "layers/memory/initial_fam": (LAYERS, 3, WIDTH),
}
Flat = dict[str, np.ndarray]


def some(seed: int, scale: float = 1.0) -> Flat:
    """Return random arrays of SHAPES.

    Rows, columns and layers have different magnitudes; otherwise clipping and factoring would change little.
    """
    rng = np.random.default_rng(seed)
    flat = {}
    for name, shape in SHAPES.items():
        sizes = [
            rng.uniform(0.2, 3, [n if i == axis else 1 for i in range(len(shape))])
            for axis, n in enumerate(shape)
        ]
        flat[name] = (scale * rng.normal(size=shape) * math.prod(sizes)).astype(np.float32)
    return flat


def flatten(tree: Any) -> Flat:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


@functools.cache
def compiled(config: OptimizerConfig) -> tuple[Callable[..., Any], Callable[..., Any]]:
    optimizer = make_optimizer(config, STEPS)

    @jax.jit
    def step(state: Any, values: Any, grads: Any) -> Any:
        updates, state = optimizer.update(grads, state, values)
        return state, optax.apply_updates(values, updates)

    return jax.jit(optimizer.init), step


def run(config: OptimizerConfig, params: Flat, gradients: list[Flat]) -> list[Flat]:
    """Return the parameters after each step."""
    init, step = compiled(config)
    values, found = unflatten(params), []
    state = init(values)
    for grads in gradients:
        state, values = step(state, values, unflatten(grads))
        found.append(flatten(values))
    return found


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x**2)))


class OneParameter:
    """Adafactor for one array, in float64: Shazeer and Stern (2018), algorithms 2 and 4, with momentum."""

    def __init__(self, config: OptimizerConfig, value: np.ndarray):
        self.config, self.value, self.t = config, value.astype(np.float64), 0
        two = sorted(range(value.ndim), key=lambda axis: value.shape[axis])[-2:]
        big = value.ndim > 1 and min(value.shape[axis] for axis in two) >= config.min_factored_dim
        self.factored = tuple(two) if big else None
        # Sums of squares with weights that decay over time; of rows and of columns if factored.
        self.sums: list[Any] = [0.0, 0.0]
        self.weight = 0.0
        self.momentum = 0.0 * self.value

    def second_moment(self, gradient: np.ndarray) -> np.ndarray:
        config, square = self.config, gradient**2 + self.config.epsilon
        if config.beta2_schedule == "constant":
            keep, add = config.beta2, 1 - config.beta2  # debiased below, as Adam's
        else:
            keep = 1 - self.t**-config.beta2_power
            add = 1 - keep
        self.weight = keep * self.weight + add
        axes = self.factored or ((), ())
        parts = []
        for i, axis in enumerate(axes):
            self.sums[i] = keep * self.sums[i] + add * square.mean(axis=axis, keepdims=True)
            parts.append(self.sums[i] / self.weight)
        if self.factored is None:
            return parts[0]
        return parts[0] * parts[1] / parts[0].mean(axis=axes[1], keepdims=True)

    def step(self, gradient: np.ndarray, rate: float) -> None:
        config = self.config
        self.t += 1
        update = gradient / np.sqrt(self.second_moment(gradient.astype(np.float64)))
        if config.block_rms_clip:
            update = update / max(1.0, rms(update) / config.block_rms_clip)
        update = rate * update
        if config.parameter_scaling:
            update = update * max(1e-3, rms(self.value))
        self.momentum = config.beta1 * self.momentum + (1 - config.beta1) * update
        decay = config.weight_decay if self.value.ndim > 1 else 0.0
        self.value = self.value - self.momentum - rate * decay * self.value


def rate_at(config: OptimizerConfig, t: int) -> float:
    """Return the learning rate of the update after `t` others."""
    if t < config.warmup_steps:
        return config.learning_rate * (t + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    share = (t - config.warmup_steps) / (STEPS - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def by_hand(config: OptimizerConfig, params: Flat, gradients: list[Flat]) -> list[Flat]:
    def layers(name: str, value: np.ndarray) -> list[np.ndarray]:
        return list(value) if name.startswith("layers/") else [value]

    states = {
        name: [OneParameter(config, part) for part in layers(name, value)] for name, value in params.items()
    }
    found = []
    for t, grads in enumerate(gradients):
        for name, parts in states.items():
            for part, gradient in zip(parts, layers(name, grads[name]), strict=True):
                part.step(gradient, rate_at(config, t))
        values = {name: [part.value for part in parts] for name, parts in states.items()}
        found.append(
            {name: np.stack(v) if name.startswith("layers/") else v[0] for name, v in values.items()}
        )
    return found


def assert_close(found: list[Flat], expected: list[Flat]) -> None:
    for step, (one, other) in enumerate(zip(found, expected, strict=True), 1):
        for name in SHAPES:
            np.testing.assert_allclose(
                one[name], other[name], rtol=2e-5, atol=2e-6, err_msg=f"{name} after step {step}"
            )


@pytest.fixture(scope="module")
def problem() -> tuple[Flat, list[Flat]]:
    """Return parameters, and gradients that grow and shrink from step to step."""
    return some(0), [some(seed, scale=0.1 * 3.0 ** (seed % 3)) for seed in range(1, STEPS)]


VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "power": {"beta2_schedule": "power", "beta2_power": 0.7, "beta1": 0.0, "block_rms_clip": 0.0},
    "bare": {"beta1": 0.0, "block_rms_clip": 0.0, "min_factored_dim": 128},
    "scaled": {"parameter_scaling": True, "block_rms_clip": 0.5, "warmup_steps": 3, "epsilon": 1e-2},
    "decayed": {"weight_decay": 0.5, "schedule": "cosine", "warmup_steps": 2},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_adafactor(variant: str, problem: tuple[Flat, list[Flat]]) -> None:
    config = dataclasses.replace(BASE, **VARIANTS[variant])
    assert_close(run(config, *problem), by_hand(config, *problem))


def test_what_the_reference_factors() -> None:
    factored = {
        name: OneParameter(BASE, value[0] if "layers" in name else value).factored is not None
        for name, value in some(0).items()
    }
    assert {name for name, is_so in factored.items() if is_so} == {
        "embedding/table",
        "layers/up/kernel",
        "layers/query/kernel",
    }


@pytest.mark.parametrize("variant", ["bare", "power"])
def test_the_first_updates_are_no_larger_than_later_ones(variant: str) -> None:
    """Without debiasing, beta2 = 0.99 would make the first update 10 times the learning rate."""
    config = dataclasses.replace(BASE, **VARIANTS[variant])
    params = some(0)
    constant = {name: np.sign(value) * 0.3 for name, value in params.items()}
    values = [params, *run(config, params, [constant] * 4)]
    for before, after in itertools.pairwise(values):
        for name in SHAPES:
            np.testing.assert_allclose(np.abs(after[name] - before[name]), config.learning_rate, rtol=1e-4)


def test_weight_decay_follows_the_schedule() -> None:
    """If the learning rate falls to zero, the decay must too."""
    config = dataclasses.replace(BASE, **VARIANTS["decayed"])
    params = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}
    nothing = {name: np.zeros_like(value) for name, value in params.items()}
    values = [params, *run(config, params, [nothing] * (STEPS + 1))]
    for t, (before, after) in enumerate(itertools.pairwise(values)):
        for name in SHAPES:
            vector = name in ("final_norm/scale", "layers/norm/scale")
            kept = 1.0 if vector else 1 - config.weight_decay * rate_at(config, min(t, STEPS))
            np.testing.assert_allclose(
                after[name], before[name] * kept, rtol=1e-5, err_msg=f"{name}, update {t}"
            )


def test_a_gradient_in_one_layer_moves_no_other(problem: tuple[Flat, list[Flat]]) -> None:
    params, gradients = problem
    grads = {name: np.zeros_like(value) for name, value in gradients[0].items()}
    for name in grads:
        if name.startswith("layers/"):
            grads[name][2] = gradients[0][name][2]
    after = run(BASE, params, [grads])[0]
    for name, value in after.items():
        moved = (value != params[name]).reshape(len(value), -1).any(axis=1)
        expected = np.arange(len(value)) == 2 if name.startswith("layers/") else np.zeros(len(value), bool)
        np.testing.assert_array_equal(moved, expected, err_msg=name)


@pytest.mark.parametrize("layers", [LAYERS, 130])
def test_the_norms_of_many_layers_are_no_matrix(layers: int) -> None:
    """As one matrix, (L, D) would be factored from L = 128 on."""
    stack = {"layers": {"scale": np.ones((layers, 128), np.float32)}, "other": np.ones((2, 2), np.float32)}
    config = dataclasses.replace(BASE, min_factored_dim=128)
    state = jax.eval_shape(make_optimizer(config, STEPS).init, stack)
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if leaf.ndim > 1
    }
    full = [name for name, shape in shapes.items() if shape == (layers, 128)]
    assert len(full) == 2, shapes  # second moment and momentum
    assert any("/v/" in name for name in full), shapes


def test_per_layer_counts_the_steps_of_every_layer_once() -> None:
    """A schedule inside the transformation sees the same step in the layers as outside."""
    schedule = optax.scale_by_schedule(lambda step: 1.0 + step)
    params = unflatten(some(0))
    optimizer = per_layer(schedule)
    state = optimizer.init(params)
    ones = jax.tree.map(np.ones_like, params)
    for expected in (1.0, 2.0, 3.0):
        updates, state = optimizer.update(ones, state, params)
        for name, value in flatten(updates).items():
            np.testing.assert_array_equal(value, expected, err_msg=name)


def test_adamw_is_that_of_optax(problem: tuple[Flat, list[Flat]]) -> None:
    config = dataclasses.replace(
        BASE, name="adamw", epsilon=1e-8, weight_decay=0.3, schedule="cosine", warmup_steps=2, beta2=0.95
    )
    params, gradients = problem
    matrices = {name: not name.endswith("norm/scale") for name in SHAPES}
    optimizer = optax.adamw(
        lambda t: jnp.array([rate_at(config, k) for k in range(STEPS)])[t],
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        weight_decay=0.3,
        mask=matrices,
    )
    values, expected = params, []
    state, update = optimizer.init(values), jax.jit(optimizer.update)
    for grads in gradients:
        updates, state = update(grads, state, values)
        values = optax.apply_updates(values, updates)
        expected.append({name: np.asarray(value) for name, value in values.items()})
    assert_close(run(config, params, gradients), expected)


def test_the_gradient_is_clipped_by_its_norm_over_all_parameters(problem: tuple[Flat, list[Flat]]) -> None:
    """Some norms are above the limit and some below: clipping changes the relation between steps."""
    params, gradients = problem
    norms = [
        math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in grads.values()))
        for grads in gradients
    ]
    limit = sorted(norms)[2] * 1.01
    clipped = [
        {key: g * min(1.0, limit / norm) for key, g in grads.items()}
        for grads, norm in zip(gradients, norms, strict=True)
    ]
    expected = run(BASE, params, clipped)
    assert_close(run(dataclasses.replace(BASE, clip_norm=limit), params, gradients), expected)
    unclipped = run(BASE, params, gradients)
    assert any(np.abs(unclipped[-1][key] - expected[-1][key]).max() > 1e-2 for key in SHAPES)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_learning_rate(schedule: str, warmup: int) -> None:
    config = dataclasses.replace(BASE, learning_rate=0.3, schedule=schedule, warmup_steps=warmup)
    rates = [float(learning_rate(config, STEPS)(t)) for t in range(STEPS + 2)]
    for t in range(STEPS + 1):
        assert rates[t] == pytest.approx(rate_at(config, t), abs=1e-7)
    if warmup:
        assert rates[0] == pytest.approx(0.3 / warmup)
        assert rates[warmup - 1] == pytest.approx(0.3)
    last = 0.3 if schedule == "constant" else 0.0
    assert rates[STEPS] == rates[STEPS + 1] == pytest.approx(last)
