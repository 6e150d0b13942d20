"""Checks of tile sizes, and the choice of kernels for a call."""

import dataclasses

import jax.numpy as jnp
import pytest

from fam_jax.kernels.pallas.geometry import Geometry, Span, sight
from fam_jax.kernels.pallas.tiles import VMEM_MIB, Tiles, choose_tiles

PAPER = Geometry(
    block_size=1024,
    blocks=8,
    segments=3,
    window=0,
    extra_slots=64,
    extra_keys=64,
    heads=12,
    kv_heads=12,
    head_dim=128,
    stop_gradient=False,
)


@pytest.mark.parametrize("chip", [*VMEM_MIB, "TPU of the future"])
@pytest.mark.parametrize("size", [128, 384, 1024, 4096])
def test_the_choice_is_valid_and_fits(chip: str, size: int) -> None:
    for static in (True, False):
        choice = choose_tiles(chip, dataclasses.replace(PAPER, block_size=size), jnp.bfloat16, static)
        choice.check(size)
        assert static or not (choice.resident_forward or choice.resident_backward)


@pytest.mark.parametrize("chip", ["TPU v5e", "TPU v5p", "TPU v6e"])
def test_training_at_the_papers_shape_is_resident(chip: str) -> None:
    choice = choose_tiles(chip, PAPER, jnp.bfloat16, static=True)
    assert choice.resident_forward and choice.resident_backward


def test_a_long_memory_is_streamed() -> None:
    choice = choose_tiles(
        "TPU v5p", dataclasses.replace(PAPER, segments=12, blocks=16), jnp.bfloat16, static=True
    )
    assert not choice.resident_forward and not choice.resident_backward


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 100}, "rows is 100"),
        ({"keys": 0}, "keys is 0"),
        ({"streamed": 384}, "divisor of the block size 1024"),
    ],
)
def test_wrong_sizes_are_named(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(Tiles(True, True), **change).check(1024)


def test_sight_agrees_with_pairs_of_positions() -> None:
    for window in (0, 1, 3, 6):
        for query_start in range(0, 8, 2):
            for key_start in range(-8, 8, 2):
                for size in (2, 4):
                    queries, keys = Span(query_start, 2), Span(key_start, size)
                    pairs = [
                        q - k >= 0 and (not window or q - k < window)
                        for q in range(query_start, query_start + 2)
                        for k in range(key_start, key_start + size)
                    ]
                    want = "all" if all(pairs) else "some" if any(pairs) else "none"
                    got = sight(queries, keys, window)
                    # "some" is also allowed where no pair is visible: the tile is masked.
                    assert got == want or (got == "some" and want == "none")


def test_tiles_cover_a_span() -> None:
    assert Span(-10, 7).split(3) == [Span(-10, 3), Span(-7, 3), Span(-4, 1)]
    assert Span(5, 0).split(3) == []
