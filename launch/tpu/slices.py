"""Translate the name of a TPU slice into the names that each of Google Cloud's interfaces has for it.

    python -m launch.tpu.slices v5p:4x4x8
    python -m launch.tpu.slices v5p:4x4x8 accelerator_type

A slice is written GENERATION:TOPOLOGY, with the topology in chips, as in launch.plan. Sources, read in November 2026:
https://cloud.google.com/tpu/docs/v4, /v5p, /v5e and /v6e (shapes, hosts, what an accelerator type counts),
https://cloud.google.com/tpu/docs/runtimes (software of TPU VMs),
https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus (labels of nodes, machine types).
"""

import dataclasses
import math
from collections.abc import Sequence

from fam_jax.config import UserError
from fam_jax.config.strict_json import dump_json
from launch import cli


@dataclasses.dataclass(frozen=True)
class Generation:
    """What the slices of a TPU generation have in common."""

    # Prefix of its accelerator types, which end in a count.
    accelerator_type: str
    # Whether the count is of cores, two per chip, rather than of chips.
    counts_cores: bool
    # Number of dimensions of its topologies.
    dimensions: int
    # Software of its TPU VMs.
    runtime_version: str
    # Value of the label cloud.google.com/gke-tpu-accelerator of its nodes.
    gke_accelerator: str
    # Prefix of its machine types, which end in the number of chips of a node.
    machine_type: str


GENERATIONS = {
    "v4": Generation("v4-", True, 3, "tpu-ubuntu2204-base", "tpu-v4-podslice", "ct4p-hightpu-"),
    "v5e": Generation(
        "v5litepod-", False, 2, "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", "ct5lp-hightpu-"
    ),
    "v5p": Generation("v5p-", True, 3, "v2-alpha-tpuv5", "tpu-v5p-slice", "ct5p-hightpu-"),
    "v6e": Generation("v6e-", False, 2, "v2-alpha-tpuv6e", "tpu-v6e-slice", "ct6e-standard-"),
}

FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
# Topologies smaller than a cube of 4x4x4; larger ones consist of whole cubes.
SMALL = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
# Several topologies may have the same number of chips. An accelerator type stands for the one in the documentation's
# tables.
USUAL = (*SMALL, "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16", "16x16x24")


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice of TPU chips, with one VM and one process of a job per host."""

    generation: str
    topology: str
    chips: int
    hosts: int
    chips_per_host: int
    # Empty if no type stands for this topology.
    accelerator_type: str
    runtime_version: str
    gke_accelerator: str
    machine_type: str

    @property
    def request(self) -> list[str]:
        """Return the flags with which gcloud requests the slice."""
        if self.accelerator_type:
            return [f"--accelerator-type={self.accelerator_type}"]
        return [f"--type={self.generation}", f"--topology={self.topology}"]


def parse_slice(name: str) -> Slice:
    """Return the slice with a name such as `v5p:4x4x8`.

    Raises:
      UserError: there is no such generation, or it has no such topology.
    """
    generation, _, topology = name.partition(":")
    if generation not in GENERATIONS:
        raise UserError(
            f"slice {name!r}: expected GENERATION:TOPOLOGY, such as v5p:4x4x8; generations are {', '.join(GENERATIONS)}"
        )
    facts = GENERATIONS[generation]
    _check_shape(name, topology, facts.dimensions)
    chips = math.prod(int(size) for size in topology.split("x"))
    # A slice of up to 8 chips with a flat topology is one host. All other hosts have 4 chips.
    per_host = chips if facts.dimensions == 2 and chips <= 8 else 4
    usual = topology in (FLAT if facts.dimensions == 2 else USUAL)
    count = chips * (2 if facts.counts_cores else 1)
    return Slice(
        generation=generation,
        topology=topology,
        chips=chips,
        hosts=chips // per_host,
        chips_per_host=per_host,
        accelerator_type=f"{facts.accelerator_type}{count}" if usual else "",
        runtime_version=facts.runtime_version,
        gke_accelerator=facts.gke_accelerator,
        machine_type=f"{facts.machine_type}{per_host}t",
    )


def _check_shape(name: str, topology: str, dimensions: int) -> None:
    generation = name.partition(":")[0]
    if dimensions == 2:
        if topology not in FLAT:
            raise UserError(f"slice {name!r}: {generation} has the topologies {', '.join(FLAT)}")
        return
    sizes = [int(size) if size.isdecimal() else 0 for size in topology.split("x")]
    cubes = len(sizes) == 3 and sizes == sorted(sizes) and all(size and size % 4 == 0 for size in sizes)
    if topology not in SMALL and not cubes:
        raise UserError(
            f"slice {name!r}: {generation} has the topologies {', '.join(SMALL)}, and "
            "multiples of 4 in ascending order, such as 4x4x8"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the names of a slice, or one of them; return the exit code.

    Raises:
      UserError: there is no such slice, or no such name.
    """
    parser = cli.Parser("tpu.slices", __doc__)
    parser.add_argument("slice", type=parse_slice, metavar="SLICE", help="such as v5p:4x4x8")
    parser.add_argument(
        "field", nargs="?", metavar="FIELD", help="print this name alone, as a shell script needs it"
    )
    arguments = parser.parse_args(argv)
    if arguments.field is None:
        print(dump_json(dataclasses.asdict(arguments.slice), indent=2))
        return 0
    value = getattr(arguments.slice, arguments.field, None)
    if value is None:
        names = [field.name for field in dataclasses.fields(Slice)]
        raise UserError(f"{arguments.field}: no such name; a slice has {', '.join(names)}, request")
    print(" ".join(value) if isinstance(value, list) else value)
    return 0


if __name__ == "__main__":
    cli.run(main)
