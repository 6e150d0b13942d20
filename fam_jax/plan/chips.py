"""Published figures of TPU chips, and the clock rates derived from them."""

import dataclasses
import re

from fam_jax.config import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip of a generation. Figures are for the whole chip unless stated otherwise.

    Peak FLOP/s, HBM and interconnect: Cloud TPU documentation, "System architecture" of each generation. The clock is
    flops / (2 * cores * macs_per_cycle).
    """

    name: str
    # Peak FLOP/s in bfloat16.
    flops: float
    # Bytes/s.
    hbm_bandwidth: float
    # Capacity.
    hbm_bytes: int
    cores: int
    # Multiply-adds per cycle of one core's matrix units.
    macs_per_cycle: int
    # Hz.
    clock: float
    # Bytes/s to other chips in one direction, over all links.
    ici_bandwidth: float
    ici_links: int
    # Whether the compiler can simulate kernels for this chip.
    profiled: bool = True

    @property
    def ring_bandwidth(self) -> float:
        """Bytes/s of a ring along one axis of the torus: two links, one in each direction."""
        return self.ici_bandwidth * 2 / self.ici_links

    def matrix_seconds(self, macs: float) -> float:
        """Return the time in which all cores at their peak do `macs` multiply-adds."""
        return macs / (self.cores * self.macs_per_cycle * self.clock)


# Each core has four matrix units of 128 x 128. Those of v6e are 256 x 256: the documentation counts two of them, but in
# the compiler's simulation a long product reaches 244,000 MACs per cycle, which takes four.
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
    """Return the chip of a topology such as v5p:2x2x1.

    Raises:
      UserError: the name is malformed or the generation is unknown.
    """
    match = re.fullmatch(r"(\w+):\d+x\d+(x\d+)?", topology)
    if match is None:
        raise UserError(
            f"topology {topology!r}: malformed; write a generation and its grid of chips, such as v5p:4x4x8 or v5e:4x8"
        )
    if match[1] not in CHIPS:
        raise UserError(
            f"topology {topology!r}: unknown generation {match[1]}; use one of {', '.join(CHIPS)}"
        )
    return CHIPS[match[1]]
