"""Compare update attention and rotary embedding, forward and gradients, with NumPy in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fam_jax.config import MeshConfig
from fam_jax.kernels import KV, UpdateInputs, rotary, update_attention
from fam_jax.sharding import make_mesh, replicated, traced_for
from tests.variants import rest_slow

HEADS = {"multi-head": (2, 2), "grouped queries": (4, 2), "multi-query": (3, 1)}
BATCH, ROWS, SIZE, BLOCKS, REST = 2, 16, 128, 3, 40
NAMES = ("q", "own_k", "own_v", "k", "v")


def draw(heads: int, kv_heads: int, head_dim: int = 128) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    length = BLOCKS * SIZE + REST
    shapes = ((ROWS, heads), (ROWS, kv_heads), (ROWS, kv_heads), (length, kv_heads), (length, kv_heads))
    return {
        name: rng.normal(size=(BATCH, *shape, head_dim)) for name, shape in zip(NAMES, shapes, strict=True)
    }


def attend(arrays: dict[str, Any], block: int, taps: Any, implementation: str, softcap: float = 0.0) -> Any:
    own = KV(arrays["own_k"], arrays["own_v"])
    tokens = KV(*(arrays[name].reshape(BATCH, -1, taps.k.shape[-1]) for name in ("k", "v")))
    inputs = UpdateInputs(arrays["q"], own, tokens, jnp.int32(block), taps)
    return update_attention(inputs, softcap=softcap, implementation=implementation)


def with_gradients(
    arrays: dict[str, np.ndarray], block: int, implementation: str, dtype: str, softcap: float = 0.0
) -> tuple[Any, dict[str, Any]]:
    """Return the result and the gradients of its weighted sum; those of k and v cover one block."""
    given = {name: jnp.asarray(x, dtype) for name, x in arrays.items()}
    tap = jnp.zeros((BATCH, SIZE, given["k"].shape[2] * given["k"].shape[3]), dtype)

    @jax.jit
    def call(given: Any, tap: Any) -> Any:
        def of(own: Any, taps: Any) -> Any:
            return attend(given | own, block, taps, implementation, softcap)

        own = {name: given[name] for name in NAMES[:3]}
        out, pull = jax.vjp(of, own, KV(tap, tap))
        return out, pull(weights(out.shape).astype(out.dtype))

    out, (own, taps) = call(given, tap)
    heads = given["k"].shape[2:]
    return out, own | {name: x.reshape(BATCH, SIZE, *heads) for name, x in zip("kv", taps, strict=True)}


def weights(shape: tuple[int, ...]) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=shape))


def by_hand(
    arrays: dict[str, np.ndarray], block: int, softcap: float
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return softmax attention and its gradients, computed head by head."""
    here = slice(block * SIZE, (block + 1) * SIZE)
    out = np.empty_like(arrays["q"])
    d_out = np.asarray(weights(out.shape), np.float64)
    gradients = {name: np.zeros_like(arrays[name]) for name in NAMES[:3]}
    gradients |= {name: np.zeros_like(arrays[name][:, here]) for name in ("k", "v")}
    group = arrays["q"].shape[2] // arrays["k"].shape[2]
    scale = arrays["q"].shape[-1] ** -0.5
    for b in range(BATCH):
        for h in range(out.shape[2]):
            g = h // group
            q = arrays["q"][b, :, h]
            keys = np.concatenate([arrays["own_k"][b, :, g], arrays["k"][b, here, g]])
            values = np.concatenate([arrays["own_v"][b, :, g], arrays["v"][b, here, g]])
            scores = q @ keys.T * scale
            slope = np.ones_like(scores)
            if softcap:
                capped = np.tanh(scores / softcap)
                scores, slope = softcap * capped, 1 - capped**2
            p = np.exp(scores - scores.max(1, keepdims=True))
            p /= p.sum(1, keepdims=True)
            out[b, :, h] = p @ values
            dp = d_out[b, :, h] @ values.T
            ds = p * (dp - (p * dp).sum(1, keepdims=True)) * slope * scale
            gradients["q"][b, :, h] = ds @ keys
            for name, whole in (("k", ds.T @ q), ("v", p.T @ d_out[b, :, h])):
                gradients[f"own_{name}"][b, :, g] += whole[:ROWS]
                gradients[name][b, :, g] += whole[ROWS:]
    return out, gradients


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("block", [0, BLOCKS - 1], ids=["first", "last"])
@pytest.mark.parametrize("implementation", ["xla", "pallas_interpret"])
def test_update_attention(heads: tuple[int, int], block: int, implementation: str) -> None:
    arrays = draw(*heads)
    want, slopes = by_hand(arrays, block, 0.0)
    got, gradients = with_gradients(arrays, block, implementation, "float32")
    # Averages of values, and sums over keys or queries: an error of a few roundings of the largest.
    np.testing.assert_allclose(got, want, rtol=0, atol=4e-6)
    for name, slope in slopes.items():
        np.testing.assert_allclose(
            gradients[name], slope, rtol=0, atol=4e-6 * np.abs(slope).max(), err_msg=name
        )


def test_xla_update_attention_with_a_soft_cap_in_float64() -> None:
    arrays = draw(4, 2, head_dim=8)
    with jax.enable_x64(True):
        want, slopes = by_hand(arrays, 1, 1.5)
        got, gradients = with_gradients(arrays, 1, "auto", "float64", softcap=1.5)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-13)
    for name, slope in slopes.items():
        np.testing.assert_allclose(gradients[name], slope, rtol=0, atol=1e-13, err_msg=name)


def test_update_attention_in_bfloat16() -> None:
    arrays = {name: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for name, x in draw(4, 2).items()}
    want, slopes = by_hand(arrays, 1, 0.0)
    got, gradients = with_gradients(arrays, 1, "pallas_interpret", "bfloat16")
    step = 2.0**-8  # half a unit in the last place of bfloat16, relative
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=4 * step)
    for name, slope in slopes.items():
        atol = 4 * step * np.abs(slope).max()
        np.testing.assert_allclose(
            np.asarray(gradients[name], np.float64), slope, rtol=0, atol=atol, err_msg=name
        )


@pytest.mark.parametrize("rows", [1, 2], ids=["shared angles", "angles of each row"])
@pytest.mark.parametrize("length", [48, 272], ids=["less than a tile", "a ragged last tile"])
def test_rotary_kernel(rows: int, length: int) -> None:
    rng = np.random.default_rng(2)
    x, cotangent = rng.normal(size=(2, 2, length, 3, 128))
    angles = rng.uniform(0, 6, size=(rows, length, 1, 64))
    cos, sin = np.cos(angles), np.sin(angles)

    def turned(x: np.ndarray, sin: np.ndarray) -> np.ndarray:
        first, second = np.split(x, 2, axis=-1)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    given = [jnp.asarray(a, jnp.float32) for a in (x, cos, sin)]
    for implementation in ("xla", "pallas_interpret"):

        def turn(x: jax.Array, implementation: str = implementation) -> jax.Array:
            return rotary(x, *given[1:], implementation=implementation)

        out, pull = jax.vjp(turn, given[0])
        np.testing.assert_allclose(out, turned(x, sin), rtol=0, atol=2e-6)
        np.testing.assert_allclose(
            pull(jnp.asarray(cotangent, jnp.float32))[0], turned(cotangent, -sin), atol=2e-6
        )


@pytest.mark.parametrize(
    ("begin", "length", "total"),
    [(256, 272, 600), (16, 16, 48), (64, 272, 400), (0, 0, 32)],
    ids=["whole tiles before", "a short part", "no whole tiles before", "no tokens"],
)
def test_part_of_the_tokens_is_rotated_where_it_stands(begin: int, length: int, total: int) -> None:
    """Forward and backward: as if the part were cut out first."""
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.normal(size=(2, total, 1, 128)), jnp.float32)
    angles = rng.uniform(0, 6, size=(1, length, 1, 64))
    cos, sin = jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)
    cotangent = jnp.asarray(rng.normal(size=(2, length, 1, 128)), jnp.float32)

    def part(x: jax.Array) -> jax.Array:
        return rotary(x, cos, sin, begin=begin, implementation="pallas_interpret")

    def cut(x: jax.Array) -> jax.Array:
        return rotary(x[:, begin : begin + length], cos, sin, implementation="xla")

    (got, pull), (want, pull_cut) = jax.vjp(part, x), jax.vjp(cut, x)
    assert got.shape == (2, length, 1, 128)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)
    np.testing.assert_allclose(pull(cotangent)[0], pull_cut(cotangent)[0], rtol=0, atol=2e-6)


@pytest.mark.parametrize("kv_heads", rest_slow([1, 2], [1]))
def test_devices_share_rows_and_heads(kv_heads: int) -> None:
    """On a mesh (fsdp 2, tensor 2) each device computes its part, and gradients of shared arrays are summed."""
    arrays = {name: jnp.asarray(x, jnp.float32) for name, x in draw(4, kv_heads).items()}
    tap = jnp.zeros((BATCH, SIZE, kv_heads * 128), jnp.float32)
    angles = jnp.linspace(0.0, 3.0, ROWS * 64).reshape(1, ROWS, 1, 64)
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])

    def gradients(arrays: Any, tap: Any) -> Any:
        def of(own: Any, taps: Any) -> Any:
            turned = {
                name: rotary(own[name], jnp.cos(angles), jnp.sin(angles), implementation="pallas_interpret")
                for name in ("q", "own_k")
            }
            return attend(arrays | own | turned, 1, taps, "pallas_interpret")

        out, pull = jax.vjp(of, {name: arrays[name] for name in NAMES[:3]}, KV(tap, tap))
        return out, pull(weights(out.shape).astype(out.dtype))

    got = jax.jit(traced_for(mesh, gradients), in_shardings=replicated(mesh))(arrays, tap)
    want = jax.jit(gradients)(arrays, tap)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), got, want)
