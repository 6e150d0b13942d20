"""TPU slices by the names that each of Google Cloud's interfaces has for them.

    python -m launch.tpu.slices v5p:4x4x8

A slice is written GENERATION:TOPOLOGY, the topology in chips, as the planner takes it. Sources, read in November 2026:
https://cloud.google.com/tpu/docs/v4, /v5p, /v5e and /v6e (shapes, hosts, what an accelerator type counts),
https://cloud.google.com/tpu/docs/runtimes (software of TPU VMs),
https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus (labels of nodes, machine types).
"""

import dataclasses
import json
import math
import sys

from fam_jax.config import UserError
from launch.errors import user_errors


@dataclasses.dataclass(frozen=True)
class Generation:
    """What the slices of a TPU generation have in common."""

    accelerator_type: str  # followed by a count
    counts_cores: bool  # two per chip; otherwise the count is of chips
    dimensions: int  # of the topology
    runtime_version: str  # of TPU VMs
    gke_accelerator: str  # value of a node's label cloud.google.com/gke-tpu-accelerator
    machine_type: str  # of a node, followed by its chips


GENERATIONS = {
    "v4": Generation("v4-", True, 3, "tpu-ubuntu2204-base", "tpu-v4-podslice", "ct4p-hightpu-"),
    "v5e": Generation(
        "v5litepod-", False, 2, "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", "ct5lp-hightpu-"
    ),
    "v5p": Generation("v5p-", True, 3, "v2-alpha-tpuv5", "tpu-v5p-slice", "ct5p-hightpu-"),
    "v6e": Generation("v6e-", False, 2, "v2-alpha-tpuv6e", "tpu-v6e-slice", "ct6e-standard-"),
}

FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
# Smaller than a cube of 4x4x4; larger ones are made of whole cubes.
SMALL = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
# Of the shapes with as many chips, that which an accelerator type stands for: the documentation's tables.
USUAL = (*SMALL, "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16", "16x16x24")


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice of TPU chips; one VM, and one process of a job, per host."""

    generation: str
    topology: str
    chips: int
    hosts: int
    chips_per_host: int
    accelerator_type: str  # empty if none stands for this shape
    runtime_version: str
    gke_accelerator: str
    machine_type: str

    @property
    def request(self) -> list[str]:
        """The flags by which gcloud asks for it."""
        if self.accelerator_type:
            return [f"--accelerator-type={self.accelerator_type}"]
        return [f"--type={self.generation}", f"--topology={self.topology}"]


def parse_slice(name: str) -> Slice:
    """The slice that is called, say, `v5p:4x4x8`.

    Raises:
      UserError: there is no such generation, or no such shape of it.
    """
    generation, _, topology = name.partition(":")
    if generation not in GENERATIONS:
        raise UserError(
            f"slice {name!r}: expected GENERATION:TOPOLOGY such as v5p:4x4x8, of {', '.join(GENERATIONS)}"
        )
    facts = GENERATIONS[generation]
    _check_shape(name, topology, facts.dimensions)
    chips = math.prod(int(size) for size in topology.split("x"))
    # Slices of one host may have 1 or 8 chips in it; all others have 4.
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
    if dimensions == 2:
        if topology not in FLAT:
            raise UserError(f"slice {name!r}: the topologies of this generation are {', '.join(FLAT)}")
        return
    sizes = [int(size) if size.isdecimal() else 0 for size in topology.split("x")]
    cubes = len(sizes) == 3 and sizes == sorted(sizes) and all(size and size % 4 == 0 for size in sizes)
    if topology not in SMALL and not cubes:
        raise UserError(
            f"slice {name!r}: the topologies of this generation are {', '.join(SMALL)}, and rising multiples of 4 "
            "such as 4x4x8"
        )


def main(arguments: list[str]) -> None:
    """Prints the names of a slice as JSON, or the words of the field that a second argument names."""
    if len(arguments) not in (1, 2):
        raise UserError("expected a slice such as v5p:4x4x8")
    found = parse_slice(arguments[0])
    if len(arguments) == 1:
        print(json.dumps(dataclasses.asdict(found), indent=2))
        return
    value = getattr(found, arguments[1], None)
    if value is None:
        raise UserError(f"{arguments[1]}: a slice has no such field")
    print(" ".join(value) if isinstance(value, list) else value)


if __name__ == "__main__":
    with user_errors():
        main(sys.argv[1:])
