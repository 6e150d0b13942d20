"""Rotary embedding at large positions: angles compared with extended precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fam_jax.layers.rope import Rope, Rotation, rotate
from tests.model.tiny import variant
from tests.oracle.naive import _rope as naive_rope

POSITIONS = np.array([0, 1, 255, 256, 65_535, 10**6 + 7, 10**9 + 1, 2**31 - 1])


def angles(positions, rope):
    """Return angles in extended precision, reduced to one turn."""
    products = positions.astype(np.longdouble)[:, None] * rope.frequencies().astype(np.longdouble)
    return np.remainder(products, 2 * np.longdouble("3.14159265358979323846264338327950288"))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("unit", [1, 1024])
def test_any_int32_position_is_exact_in_float32(unit, sign):
    rope = Rope(8, 10_000.0, "float32")
    positions = sign * (POSITIONS // unit)
    rotation = jax.jit(lambda p: rope.at(p, unit=unit))(jnp.asarray(positions, jnp.int32))
    want = angles(positions * unit, rope)
    # Three products of float32 rotations, with one or two roundings each.
    np.testing.assert_allclose(rotation.cos[:, 0], np.cos(want).astype(float), rtol=0, atol=1e-6)
    np.testing.assert_allclose(rotation.sin[:, 0], np.sin(want).astype(float), rtol=0, atol=1e-6)


def test_static_and_dynamic_positions_agree():
    with jax.enable_x64(True):
        rope = Rope(8, 500.0, "float64")
        positions = np.arange(-300, 300)
        got, want = jax.jit(rope.at)(jnp.asarray(positions, jnp.int32)), rope.static(positions)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert a.shape == (600, 1, 4)
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


def test_rotation_pairs_the_halves_as_the_oracle_does():
    config = variant(head_dim=8, rope_base=100.0)
    x = np.random.default_rng(0).normal(size=(3, 8))
    with jax.enable_x64(True):
        rotation = Rope(8, 100.0, "float64").static(np.asarray(5.25))
        np.testing.assert_allclose(rotate(jnp.asarray(x), rotation), naive_rope(config, x, 5.25), rtol=1e-13)


def test_rotations_are_a_group():
    with jax.enable_x64(True):
        rope = Rope(4, 10.0, "float64")
        two, three = rope.static(np.asarray(2.0)), rope.static(np.asarray(3.0))
        for got, want in ((two.after(three), 5.0), (three.after(two.inverse()), 1.0)):
            expected = rope.static(np.asarray(want))
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
                np.testing.assert_allclose(a, b, atol=1e-14)
        assert isinstance(two[0], Rotation)
