"""FAM's diversity and reconstruction losses: equal to NumPy, and nothing else changes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fam_jax.config import ConfigError, ModelConfig
from fam_jax.memories.fam import FamConfig
from fam_jax.memories.fam_losses import FamLossesConfig, negative_entropy, squared_error
from fam_jax.memories.inspection import WriteAttention
from fam_jax.model import auxiliary_loss, empty_state, with_auxiliary_loss
from tests.memories.cases import CASES, LAYERS, SIZE, random_parameters
from tests.model.tiny import build
from tests.oracle import naive
from tests.variants import rest_slow

pytestmark = pytest.mark.usefixtures("float64")

EXACT = {"rtol": 1e-10, "atol": 1e-11}
LENGTH, ROWS = 14, 2  # three blocks and a half
FULL = 3


def model_of(memory: Any) -> ModelConfig:
    return dataclasses.replace(CASES["bswa"].model, memory=memory)


def some_tokens(length: int = LENGTH) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 16, (ROWS, length)).astype(np.int32)


def read(model: ModelConfig, params: Any, tokens: np.ndarray, *, losses: bool = True) -> Any:
    """Return activations and state of an aligned call, and the losses (B,) if they are asked for."""

    @jax.jit
    def call(params: Any) -> Any:
        begun = empty_state(model, ROWS, past_slots=False)
        begun = with_auxiliary_loss(model, begun) if losses else begun
        hidden, after = build(model, params).hidden(jnp.asarray(tokens), begun, aligned=True)
        return hidden, after, auxiliary_loss(after) if losses else None

    return call(params)


class Recorder:
    """Keeps what enters and leaves the layers of the NumPy loop, and the weights of its updates."""

    def __init__(self, patch: pytest.MonkeyPatch):
        # By layer: inputs and outputs of tokens, FAMs, and the weights (H, keys) of each vector of each update.
        self.tokens: list[tuple[np.ndarray, np.ndarray]] = []
        self.fams: list[np.ndarray] = []
        self.weights: list[list[np.ndarray]] = []
        token_step, next_fam, attend = naive._token_step, naive._next_fam, naive.attend

        def step(layer: Any, config: Any, state: Any, x: Any, *rest: Any) -> Any:
            out = token_step(layer, config, state, x, *rest)
            self.tokens.append((x, out))
            return out

        def update(*args: Any) -> Any:
            self.weights.append([])
            fam = next_fam(*args)
            self.fams.append(fam)
            return fam

        def attending(config: Any, q: Any, keys: Any, values: Any) -> Any:
            if self.weights:
                group = len(q) // len(keys[0])
                scores = [[q[h] @ k[h // group] for k in keys] for h in range(len(q))]
                shares = np.exp(np.array(scores) / np.sqrt(q.shape[1]))
                self.weights[-1].append(shares / shares.sum(axis=1, keepdims=True))
            return attend(config, q, keys, values)

        patch.setattr(naive, "_token_step", step)
        patch.setattr(naive, "_next_fam", update)
        patch.setattr(naive, "attend", attending)


def expected_losses(
    patch: pytest.MonkeyPatch, model: Any, params: Any, tokens: np.ndarray
) -> tuple[float, float]:
    """Return the sums over layers and complete blocks of both losses of one stream, without weights."""
    recorder = Recorder(patch)
    params = jax.tree.map(np.asarray, params)
    naive.naive_forward(params, model, tokens[None])
    patch.undo()
    length, diversity, reconstruction = model.memory.length, 0.0, 0.0
    for block in range(FULL):
        for n in range(LAYERS):
            number = block * LAYERS + n
            p = np.mean(recorder.weights[number][:length], axis=(0, 1))
            diversity += float((p * np.log(p)).sum())
            layer, fam = naive.parameters_of_layer(params, n), recorder.fams[number]
            _, k, v = naive._fam_qkv(layer, model, fam, naive.fam_positions(model, block, 0.0))
            errors = []
            for t in range(block * SIZE, (block + 1) * SIZE):
                x, out = recorder.tokens[t * LAYERS + n]
                q, _, _ = naive.project_vector(layer, model, x, float(t))
                a = naive.project_output(layer, model, naive.attend(model, q, k, v)) + x
                errors.append(naive.feed_forward(layer, model, a) + a - out)
            reconstruction += float(np.square(errors).mean())
    return diversity, reconstruction


MEMORIES = {
    "last": FamLossesConfig(length=2, segments=1),
    "prefix, R=2": FamLossesConfig(length=3, segments=0, init="prefix", previous_blocks=2),
    "zero": FamLossesConfig(length=2, segments=1, positions="zero"),
}


@pytest.mark.parametrize("name", rest_slow(MEMORIES, ["last"]))
def test_losses_are_those_of_the_loop(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are summed over layers and complete blocks; activations and state are those of FAM."""
    memory, tokens = MEMORIES[name], some_tokens()
    params = random_parameters(model_of(memory))
    both = dataclasses.replace(memory, diversity=0.3, reconstruction=2.0)
    hidden, after, found = read(model_of(both), params, tokens)
    for row in range(ROWS):
        with monkeypatch.context() as patch:
            diversity, reconstruction = expected_losses(patch, model_of(memory), params, tokens[row])
        np.testing.assert_allclose(found[row], 0.3 * diversity + 2 * reconstruction, **EXACT)
    plain, state, _ = read(model_of(memory), params, tokens, losses=False)
    np.testing.assert_allclose(hidden, plain, **EXACT)
    for field in ("keys", "values", "fam", "fam_keys", "fam_values"):
        np.testing.assert_allclose(getattr(after.layers, field), getattr(state.layers, field), **EXACT)


def test_the_entropy_of_uniform_attention() -> None:
    """T6: it is the logarithm of the number of keys, and attention to one key has none."""
    uniform = WriteAttention(jnp.full((3, 2, 4, 2), 1 / 6), jnp.full((3, 2, 4, 4), 1 / 6))
    np.testing.assert_allclose(negative_entropy(uniform), -np.log(6), **EXACT)
    one = WriteAttention(jnp.zeros((1, 2, 4, 2)), jnp.zeros((1, 2, 4, 4)).at[..., 1].set(1))
    np.testing.assert_array_equal(negative_entropy(one), 0)


def test_targets_get_no_gradient() -> None:
    outputs = jnp.arange(6.0).reshape(1, 2, 3)
    slopes = jax.grad(lambda a, b: squared_error(a, b).sum(), argnums=(0, 1))(0 * outputs, outputs)
    np.testing.assert_allclose(slopes[0], -outputs / 3, **EXACT)
    np.testing.assert_array_equal(slopes[1], 0)


@pytest.mark.parametrize("name", rest_slow(["diversity", "reconstruction"], ["reconstruction"]))
def test_a_loss_trains_what_it_should(name: str) -> None:
    """A step down its gradient lowers a loss; without a weight FAM gets no such gradient."""
    tokens = some_tokens(FULL * SIZE)
    model = model_of(FamLossesConfig(length=2, segments=0, **{name: 1.0}))
    params = random_parameters(model)

    @jax.jit
    def total(params: Any) -> jax.Array:
        begun = with_auxiliary_loss(model, empty_state(model, ROWS, past_slots=False))
        _, after = build(model, params).hidden(jnp.asarray(tokens), begun, aligned=True)
        return auxiliary_loss(after).mean()

    value, slopes = jax.value_and_grad(total)(params)
    size = sum(float(jnp.square(x).sum()) for x in jax.tree.leaves(slopes))
    assert np.abs(slopes["memory"]["initial_fam"]).max() > 1e-6
    rate = 1e-3 / size
    stepped = total(jax.tree.map(lambda p, g: p - rate * g, params, slopes))
    np.testing.assert_allclose(value - stepped, 1e-3, rtol=0.2)
    assert not FamLossesConfig().has_auxiliary_loss and not FamConfig().has_auxiliary_loss


def test_losses_need_a_fam_without_noise() -> None:
    with pytest.raises(ConfigError, match=r"memory\.length: the losses of fam_losses need a FAM"):
        FamLossesConfig(length=0, diversity=0.1)
    with pytest.raises(ConfigError, match=r"memory\.noise: does not go with diversity and reconstruction"):
        FamLossesConfig(noise=0.1, diversity=0.1)
