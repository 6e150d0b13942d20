"""Estimate memory, time and traffic of a program on a TPU slice from the compiler's output. No TPU needed.

All figures are estimates that were never checked against hardware.

- :func:`compile_on` compiles for a named topology, such as v5p:4x4x8, on any machine.
- :func:`static_profile` returns the cycles of kernels in the compiler's simulation.
- :func:`estimate` adds up time, FLOPs and bytes of a compiled program, op by op.
"""

from fam_jax.plan.chips import CHIPS, Chip, chip_of
from fam_jax.plan.compile import compile_on, topology_devices
from fam_jax.plan.cost import Estimate, OpCost, estimate
from fam_jax.plan.hlo import Module, Op, parse
from fam_jax.plan.profile import ProfileError, check_floor, static_profile

__all__ = [
    "CHIPS",
    "Chip",
    "Estimate",
    "Module",
    "Op",
    "OpCost",
    "ProfileError",
    "check_floor",
    "chip_of",
    "compile_on",
    "estimate",
    "parse",
    "static_profile",
    "topology_devices",
]
