"""TPU chips: what the vendor publishes of them, and the clock that follows from it."""

import dataclasses
import re

from fam_jax.config import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip of a generation; figures are of the whole chip unless they say otherwise.

    Peak FLOP/s, HBM and interconnect: Cloud TPU documentation, "System architecture" of each generation. The clock is
    flops / (2 * cores * macs_per_cycle).
    """

    name: str
    flops: float  # peak, bfloat16, per second
    hbm_bandwidth: float  # bytes/s
    hbm_bytes: int  # capacity
    cores: int
    macs_per_cycle: int  # of one core's matrix units
    clock: float  # Hz
    ici_bandwidth: float  # bytes/s to other chips, one way, all links together
    ici_links: int
    profiled: bool = True  # whether the compiler can simulate kernels

    @property
    def ring_bandwidth(self) -> float:
        """Bytes/s that a ring along one axis of the torus has: two links, one in each direction."""
        return self.ici_bandwidth * 2 / self.ici_links

    def matrix_seconds(self, macs: float) -> float:
        """The least time that all cores together take for so many multiplications and additions."""
        return macs / (self.cores * self.macs_per_cycle * self.clock)


# Matrix units per core: four of 128 x 128. Those of v6e are 256 x 256; the documentation counts two, and the compiler's
# simulation runs 244,000 MACs per cycle in a long product: the equivalent of four.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 1200e9, 32 * GIB, 2, 4 * 128**2, 1.05e9, 300e9, 6, profiled=False),
        Chip("v5e", 197e12, 819e9, 16 * GIB, 1, 4 * 128**2, 1.5e9, 200e9, 4),
        Chip("v5p", 459e12, 2765e9, 95 * GIB, 2, 4 * 128**2, 1.75e9, 600e9, 6),
        Chip("v6e", 918e12, 1638e9, 32 * GIB, 1, 4 * 256**2, 1.75e9, 400e9, 4),
    )
}


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as v5p:2x2x1.

    Raises:
      UserError: the name is malformed, or the generation unknown.
    """
    match = re.fullmatch(r"(\w+):\d+x\d+(x\d+)?", topology)
    if match is None:
        raise UserError(
            f"topology {topology!r}: expected a generation and its chips, as in v5p:4x4x8 or v5e:4x8"
        )
    if match[1] not in CHIPS:
        raise UserError(f"topology {topology!r}: unknown generation {match[1]}; there are {', '.join(CHIPS)}")
    return CHIPS[match[1]]
