"""Costs of compiled programs, compared with hand counts."""

import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from fam_jax.config import UserError
from fam_jax.plan import CHIPS, Chip, ProfileError, check_floor, chip_of, estimate
from fam_jax.plan.profile import read_profiles, static_profile
from tests.plan.programs import compiled, mesh, needs_compiler

CHIP = CHIPS["v5e"]


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_peak_flops_follow_from_the_matrix_units(chip: Chip) -> None:
    assert 2 * chip.cores * chip.macs_per_cycle * chip.clock == pytest.approx(chip.flops, rel=0.01)


@pytest.mark.parametrize("name", ["v5p", "v5p:2", "v5p:2x", "9:2x2", "v3:2x2"])
def test_unknown_topologies(name: str) -> None:
    with pytest.raises(UserError, match="topology"):
        chip_of(name)


@needs_compiler
def test_a_sum_of_arrays_costs_its_traffic() -> None:
    shape = (2048, 4096)
    cost = estimate(compiled(lambda a, b: a + b, shape, shape), CHIP)
    assert cost.total("hbm_bytes") == 3 * 2048 * 4096 * 4
    assert cost.seconds_low == pytest.approx(3 * 2048 * 4096 * 4 / CHIP.hbm_bandwidth)
    assert cost.seconds_high >= cost.seconds_low


@needs_compiler
def test_slicing_costs_the_slice_only() -> None:
    def function(stack: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 10, lambda i, total: total + stack[i], jnp.zeros(stack.shape[1:]))

    cost = estimate(compiled(function, (10, 2048, 2048)), CHIP)
    whole = 10 * 2048 * 2048 * 4
    assert whole <= cost.total("hbm_bytes") <= 4 * whole  # not ten times the whole stack


@needs_compiler
def test_a_large_product_costs_its_flops() -> None:
    side = 4096
    cost = estimate(compiled(lambda a, b: a @ b, (side, side), (side, side), dtype=jnp.bfloat16), CHIP)
    assert cost.total("flops") == 2 * side**3
    assert cost.seconds_low == pytest.approx(2 * side**3 / CHIP.flops / 0.95, rel=0.01)


@needs_compiler
def test_collectives_cost_the_bytes_that_a_chip_sends() -> None:
    on = mesh(data=2, fsdp=2)
    devices = list(on.devices.flat)
    size = 4096 * 512 * 4

    def gather(x: jax.Array) -> jax.Array:
        local = jax.shard_map(
            lambda x: jax.lax.all_gather(x, "fsdp", tiled=True),
            in_specs=P("fsdp"),
            out_specs=P(),
            check_vma=False,
        )
        return local(x)

    def scatter(x: jax.Array) -> jax.Array:
        local = jax.shard_map(
            lambda x: jax.lax.psum_scatter(x, "fsdp", tiled=True),
            in_specs=P(),
            out_specs=P("fsdp"),
            check_vma=False,
        )
        return local(2 * x)

    found = estimate(compiled(gather, (4096, 512), on=on, spec=P("fsdp")), CHIP, devices).collectives
    assert found["all-gather"]["bytes"] == size / 2
    assert found["all-gather"]["seconds_high"] == size / 2 / CHIP.ring_bandwidth
    found = estimate(compiled(scatter, (4096, 512), on=on), CHIP, devices).collectives
    assert found["reduce-scatter"]["bytes"] == size / 2
    assert found.keys() == {"reduce-scatter"}


def test_figures_below_the_floor_are_rejected() -> None:
    check_floor("kernel", 1001, 1000 * CHIP.macs_per_cycle, CHIP)
    with pytest.raises(ProfileError, match="999 cycles are below the 1,000"):
        check_floor("kernel", 999, 1000 * CHIP.macs_per_cycle, CHIP)


def test_profiles_are_read_by_name(tmp_path: pathlib.Path) -> None:
    for number, name in enumerate(["attend.1", "attend_backward", "fusion.12"]):
        text = f'hlo_op_name: "{name}"\nestimated_cycles: {100 + number}\n'
        (tmp_path / f"{number}_static_llo_profile.textproto").write_text(text)
    assert read_profiles(tmp_path) == {"attend": 100, "attend_backward": 101, "fusion": 102}


@needs_compiler
def test_a_program_that_fails_says_why() -> None:
    with pytest.raises(ProfileError, match="no_such_module"):
        static_profile("no_such_module", [])
